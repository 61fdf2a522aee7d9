"""Debian's cloud kernel, taken out of its package without installing it, and its modules."""

import fcntl
import lzma
import pathlib
import re
import shutil

from .common import Failure, run

# What the guest loads, in this order, each after what it depends on.
DISK_MODULES = ("virtio_pci", "virtio_blk")
MODULES = (*DISK_MODULES, "loop", "fuse", "nbd", "ublk_drv")
META_PACKAGE = "linux-image-cloud-amd64"
ARCHIVE = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


class Kernel:
    """An unpacked kernel package."""

    def __init__(self, root):
        self.root = root
        beside = sorted((root / "usr/lib/modules").glob("*/vmlinuz"))
        images = sorted((root / "boot").glob("vmlinuz-*")) + beside
        if len(images) != 1:
            raise Failure(f"{root}: {len(images)} kernels in the package, one is wanted")
        self.image = images[0]
        # Since 2026 Debian has it beside the modules.
        name = self.image.parent.name if beside else self.image.name
        self.version = name.removeprefix("vmlinuz-")
        # Debian 13 has its modules below usr/lib.
        candidates = [root / "lib/modules", root / "usr/lib/modules"]
        self.modules = next(
            (path / self.version for path in candidates if (path / self.version).is_dir()), None
        )
        if self.modules is None:
            raise Failure(f"{root}: no modules of {self.version} in the package")

    def load_order(self, file_system, names=MODULES):
        """The modules' contents as (name, bytes), each after those that it depends on."""
        files = {}
        for path in self.modules.rglob("*.ko*"):
            files[path.name.split(".ko")[0].replace("-", "_")] = path
        order, seen = [], set()

        def add(name):
            if name in seen:
                return
            seen.add(name)
            # What has no file is built in.
            if name not in files:
                return
            data = read_module(files[name])
            found = re.search(rb"\0depends=([^\0]*)\0", data)
            for dependency in (found.group(1).decode() if found else "").split(","):
                if dependency:
                    add(dependency.replace("-", "_"))
            order.append((name, data))

        for name in (*names, file_system):
            add(name)
        return order


def read_module(path):
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".ko":
        return data
    raise Failure(f"{path}: a module packed in a way that is not known here")


def get(which, cache):
    """The kernel of a Debian release (bookworm, trixie, trixie-backports, ...), or of a package file."""
    cache.mkdir(parents=True, exist_ok=True)
    if which.endswith(".deb"):
        package = pathlib.Path(which).resolve()
        if not package.is_file():
            raise Failure(f"no such package: {which}")
        name = package.stem
    elif re.fullmatch("[a-z]+(-backports)?", which):
        package, name = None, which
    else:
        raise Failure(f"--kernel {which}: neither a Debian release nor a .deb")
    target = cache / f"kernel-{name}"
    # Two runs at once fetch it once.
    with open(cache / "kernel.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "complete").exists():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for fetched in [package] if package else download(which, target):
                run("dpkg-deb", "-x", fetched, target)
                if package is None:
                    fetched.unlink()
            (target / "complete").touch()
    return Kernel(target)


def download(release, directory):
    """Fetches the packages from Debian's archive, with apt state of its own: any release will do,
    and nothing of the host's changes."""
    state = directory / "apt"
    for path in ("lists/partial", "cache/archives/partial"):
        (state / path).mkdir(parents=True)
    lines = [f"deb [signed-by={KEYRING}] {ARCHIVE} {release} main"]
    sources = state / "sources.list"
    sources.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (state / "status").touch()
    options = [
        f"Dir::State={state}",
        f"Dir::State::lists={state}/lists",
        f"Dir::State::status={state}/status",
        f"Dir::Cache={state}/cache",
        f"Dir::Etc::sourcelist={sources}",
        "Dir::Etc::sourceparts=-",
        "Dir::Etc::preferencesparts=-",
        "APT::Architecture=amd64",
        "APT::Sandbox::User=",
        "Acquire::Languages=none",
        "Acquire::Retries=3",
    ]
    flags = [part for option in options for part in ("-o", option)]
    run("apt-get", *flags, "-qq", "update")
    # The meta package depends on the kernel of the day, and that, since 2026, on the packages that have it.
    shown = run("apt-cache", *flags, "depends", META_PACKAGE)
    names = re.findall(r"Depends: (linux-image-\S+)", shown)
    if not names:
        raise Failure(f"{META_PACKAGE} of {release} names no kernel:\n{shown}")
    parts = run("apt-cache", *flags, "depends", names[0])
    wanted = {names[0], *re.findall(r"Depends: (linux-(?:binary|modules)-\S+)", parts)}
    run("apt-get", *flags, "-qq", "download", *sorted(wanted), cwd=directory)
    packages = sorted(directory.glob("*.deb"))
    if len(packages) != len(wanted):
        raise Failure(f"apt-get download {' '.join(sorted(wanted))} left {len(packages)} packages")
    shutil.rmtree(state)
    return packages
