"""tools/compare in a machine whose kernel has what hosts lack, such as thin volumes: guest/compare."""

import json
import os
import pathlib
import shutil

from . import debian, zfs
from .common import Failure, run, say
from .kernel import DISK_MODULES
from .machine import Machine, first_up

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
DRIVERS = REPOSITORY / "tools/compare/drivers"
RELEASE = "trixie"
# What compare and the drivers call.
PACKAGES = ("dmsetup", "e2fsprogs", "fio", "fuse3", "kmod", "mount", "sqlite3", "util-linux")
WORKLOAD_PACKAGES = {"mariadb": ("mariadb-server", "sysbench"), "pgbench": ("postgresql",)}
MODULES = (*DISK_MODULES, "loop", "fuse", "overlay", "dm_thin_pool", "ublk_drv")
# Sparse.
DISK_SIZE = "12G"
BOOT, BOOT_ATTEMPTS = 120, 4
REPORTS = ("report.json", "report.html", "said")


def modules(options, guest_kernel, cache):
    """The modules that the guest loads, with their contents; builds what Debian does not have built."""
    names = MODULES
    if options.zfs:
        zfs.build(guest_kernel, RELEASE, cache)
        names = (*MODULES, *zfs.MODULES)
    return guest_kernel.load_order("ext4", names)


def add(tree, program, name):
    """A program of ours, without what is for debugging."""
    target = tree / "usr/bin" / name
    run("strip", "-o", target, program)
    target.chmod(0o755)


def make_disk(options, vellum, cache, directory):
    """Debian with compare, vellum and the drivers on a disk."""
    tree, image = directory / "tree", directory / "debian.img"
    packages, components = PACKAGES, "main"
    if options.zfs:
        packages, components = (*PACKAGES, *zfs.PACKAGES), zfs.COMPONENTS
    for workload in options.workloads.split(","):
        packages = (*packages, *WORKLOAD_PACKAGES.get(workload, ()))
    debian.unpack(debian.archive(RELEASE, packages, cache, components), tree)
    add(tree, options.compare, "compare")
    add(tree, vellum, "vellum")
    drivers = tree / "drivers"
    drivers.mkdir()
    for driver in DRIVERS.iterdir():
        target = drivers / driver.name
        target.write_bytes(driver.read_bytes())
        target.chmod(0o755)
    debian.disk(tree, image, DISK_SIZE)
    return image


def caching(options, image):
    """How qemu has the disk that is measured: what the guest flushes has to cost what it costs on the host."""
    if options.smoke:
        return "unsafe"
    # Those that cannot do direct I/O, as a tmpfs before Linux 6.6.
    try:
        os.close(os.open(image, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return "writeback"
    return "none"


def boot(options, guest_kernel, archive, image, directory):
    """Turns the machine on."""
    drive = [
        "-drive", f"file={image},format=raw,if=none,id=disk,cache={caching(options, image)}",
        "-device", "virtio-blk-pci,drive=disk",
    ]

    def start(attempt):
        console = directory / f"console-{attempt}-compare.log"
        return Machine(
            options, guest_kernel, archive, drive, console,
            f"script=compare rounds={options.rounds} {'smoke=1' if options.smoke else ''} "
            f"{'zfs=1' if options.zfs else ''} transport={options.transport} "
            f"workloads={options.workloads} drivers={options.drivers}",
        )

    return first_up(start, BOOT_ATTEMPTS, BOOT)


def exercise(options, vellum, guest_kernel, archive, cache, directory):
    """Runs guest/compare, and puts its reports into --out."""
    image = make_disk(options, vellum, cache, directory)
    machine = boot(options, guest_kernel, archive, image, directory)
    try:
        machine.wait_for("off", options.limit, lambda said: said == "off" or say(said))
        machine.wait_off(options.limit)
        machine.check_console()
    finally:
        machine.kill()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in REPORTS:
        # debugfs takes no path with a space.
        run("debugfs", "-R", f"dump /out/{name} {directory / name}", image)
        # What is not there, `show` tells.
        if (directory / name).exists():
            shutil.copyfile(directory / name, options.out / name)
    show(options.out)


def show(out):
    """A line for each driver; fails where nothing was measured."""
    said = (out / "said").read_text(encoding="utf-8", errors="replace")
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Failure(f"no report from the guest: {said}") from None
    for driver in report["drivers"]:
        flush = driver["flush"]
        checked = f"flush check {'passed' if flush['passed'] else 'FAILED'}" if flush else "not checked"
        say(f"compare: {driver['id']} ({driver['version']}): {driver['absent'] or checked}")
    if not report["samples"] or report["failures"]:
        raise Failure(f"not all was measured: {report['failures']}: {said}")
    say(f"compare: {len(report['samples'])} figures, {out / 'report.html'}")
