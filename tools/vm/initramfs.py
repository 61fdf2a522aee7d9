"""The guest's root file system: vellum, the programs it uses, and the scripts in guest/."""

import pathlib
import re
import shutil
import subprocess

from .common import Failure, run

# Program, and where it goes.
PROGRAMS = {
    "busybox": "bin",
    "mke2fs": "sbin",
    "debugfs": "sbin",
    "resize2fs": "sbin",
    "e2fsck": "sbin",
    "crun": "usr/bin",
    "sqlite3": "usr/bin",
    "nbd-client": "usr/sbin",
    "fsx": "usr/bin",
}
# What is large, and needed for measuring alone.
BENCH_PROGRAMS = {"fio": "usr/bin", "losetup": "sbin"}
# Debian's PostgreSQL, which finds its files from where its programs are.
POSTGRES = pathlib.Path("/usr/lib/postgresql/15")
POSTGRES_PROGRAMS = ("postgres", "initdb", "pg_ctl", "pgbench", "psql")
POSTGRES_LIBRARIES = ("plpgsql.so", "dict_snowball.so")
POSTGRES_FILES = pathlib.Path("/usr/share/postgresql/15")
# Where programs are that no login shell has put on the PATH.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find(program):
    path = shutil.which(program)
    if path is None:
        raise Failure(f"{program} is not installed")
    return pathlib.Path(path).resolve()


def libraries(program):
    """The shared libraries of a program, as the loader finds them; none of a static one."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return [pathlib.Path(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)]


def add_program(root, path, directory, name=None):
    """A program with its libraries."""
    target = root / directory / (name or path.name)
    # What is there may be a link to something else.
    target.unlink(missing_ok=True)
    shutil.copy(path, target)
    target.chmod(0o755)
    for library in libraries(path):
        place = root / str(library).lstrip("/")
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, place)


class Tree:
    """A directory that becomes the archive."""

    def __init__(self, root):
        self.root = root
        for name in (
            "bin sbin usr/bin usr/sbin usr/lib dev proc sys run tmp etc root mnt modules "
            "var/lib/vellum var/log"
        ).split():
            (root / name).mkdir(parents=True)
        (root / "etc/passwd").write_text(
            "root:x:0:0:root:/root:/bin/sh\npostgres:x:100:100::/tmp:/bin/sh\n", encoding="utf-8"
        )
        (root / "etc/group").write_text("root:x:0:\npostgres:x:100:\n", encoding="utf-8")
        (root / "etc/hosts").write_text("127.0.0.1 localhost\n", encoding="utf-8")
        # mke2fs warns without one.
        (root / "etc/mtab").symlink_to("/proc/mounts")

    def program(self, path, directory, name=None):
        """A program with its libraries."""
        add_program(self.root, path, directory, name)

    def postgres(self):
        """PostgreSQL, at its place."""
        for part in ("bin", "lib"):
            (self.root / str(POSTGRES / part).lstrip("/")).mkdir(parents=True, exist_ok=True)
        for name in POSTGRES_PROGRAMS:
            program = POSTGRES / "bin" / name
            if not program.exists():
                raise Failure(f"{program} is missing: apt-get install --no-install-recommends postgresql-15")
            self.program(program, str(POSTGRES / "bin").lstrip("/"))
        for name in POSTGRES_LIBRARIES:
            self.program(POSTGRES / "lib" / name, str(POSTGRES / "lib").lstrip("/"))
        shutil.copytree(
            POSTGRES_FILES, self.root / str(POSTGRES_FILES).lstrip("/"), ignore_dangling_symlinks=True,
            ignore=shutil.ignore_patterns("man"),
        )

    def archive(self, directory, modules, scripts, init):
        """Adds the modules, in the order of loading, and the scripts, one of which is the first process; packs
        all, and returns where."""
        for number, (name, data) in enumerate(modules):
            (self.root / "modules" / f"{number:02}-{name}.ko").write_bytes(data)
        shutil.copytree(scripts, self.root / "vm")
        for script in (self.root / "vm").iterdir():
            script.chmod(0o755)
        (self.root / "init").symlink_to(f"/vm/{init}")
        archive = directory / "initramfs.cpio"
        # Not compressed: emulated, the guest would take longer to unpack it than to read it.
        with open(archive, "wb") as out:
            names = subprocess.run(
                ["find", ".", "-print0"], cwd=self.root, capture_output=True, check=True
            ).stdout
            subprocess.run(
                ["cpio", "--null", "--create", "--format=newc", "--owner=0:0", "--quiet"],
                cwd=self.root, input=names, stdout=out, check=True,
            )
        shutil.rmtree(self.root)
        return archive


def build(directory, vellum, modules, scripts, test=None, bench=False, postgres=False):
    """Makes the archive in a directory and returns its path. `modules` are in the order of loading;
    `test` is a program to be tested with."""
    tree = Tree(directory / "root")
    for name, place in {**PROGRAMS, **(BENCH_PROGRAMS if bench else {})}.items():
        tree.program(find(name), place, name)
    if postgres:
        tree.postgres()
    stripped = directory / "vellum"
    # Debug information is most of a development build.
    run("strip", "-o", stripped, vellum)
    tree.program(stripped, "usr/bin")
    if test:
        smaller = directory / "test"
        run("strip", "-o", smaller, test)
        tree.program(smaller, "usr/bin", "vellum-test")
    for name, source in (("nbd-attach", "nbd_attach.c"), ("fs-shutdown", "fs_shutdown.c")):
        tool = directory / name
        run("cc", "-O1", "-static", "-o", tool, pathlib.Path(__file__).with_name(source))
        tree.program(tool, "usr/sbin")
    return tree.archive(directory, modules, scripts, "init")


def build_small(directory, modules, scripts):
    """An archive that only goes over to Debian on a disk."""
    tree = Tree(directory / "root")
    tree.program(find("busybox"), "bin", "busybox")
    return tree.archive(directory, modules, scripts, "debian-init")
