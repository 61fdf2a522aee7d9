"""ZFS's modules for the guest's kernel, built of Debian's sources: Debian has no others."""

import shutil

from .common import Failure, run, say

# Where Debian has it: what it stands on is not in main.
COMPONENTS = "main,contrib"
# What the guest calls.
PACKAGES = ("zfsutils-linux",)
MODULES = ("zfs",)


def build(guest_kernel, release, cache):
    """Puts the modules beside those of the kernel, once for each kernel."""
    ready = guest_kernel.modules / "updates"
    if ready.exists():
        return
    if shutil.which("mmdebstrap") is None:
        raise Failure("missing: apt-get install --no-install-recommends mmdebstrap debian-archive-keyring")
    say(f"building ZFS for {guest_kernel.version} (once; two processors take some ten minutes)")
    root = cache / "zfs-root"
    shutil.rmtree(root, ignore_errors=True)
    try:
        packages = ("zfs-dkms", f"linux-headers-{guest_kernel.version}")
        run(
            "mmdebstrap", "--quiet", "--mode=root", "--variant=essential", f"--components={COMPONENTS}",
            "--dpkgopt=force-unsafe-io", '--aptopt=APT::Install-Recommends "false"',
            '--aptopt=Acquire::Retries "3"', f"--include={','.join(packages)}",
            # The package may have done so by itself, for the newest kernel that it saw.
            f'--customize-hook=chroot "$1" dkms autoinstall -k {guest_kernel.version}',
            release, root,
        )
        built = sorted(root.glob(f"var/lib/dkms/zfs/*/{guest_kernel.version}/*/module/*.ko*"))
        if not built:
            raise Failure(f"dkms built no modules of ZFS for {guest_kernel.version}")
        unfinished = ready.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        for module in built:
            shutil.copy(module, unfinished)
        unfinished.rename(ready)
    finally:
        shutil.rmtree(root, ignore_errors=True)
