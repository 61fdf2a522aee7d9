"""The command line of vmtest, and its place on disk."""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import tempfile

from . import bench, compare, initramfs, kernel, power, vhost
from .common import Failure, fail_on_signals, run, say

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# What is called, and the Debian package that has it.
PACKAGES = {
    "busybox": "busybox-static",
    "cc": "gcc libc6-dev",
    "cpio": "cpio",
    "crun": "crun",
    "e2fsck": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "nbd-client": "nbd-client",
    "nbdkit": "nbdkit nbdkit-plugin-python",
    "pgbench": "postgresql-15",
    "qemu-system-x86_64": "qemu-system-x86",
    "sqlite3": "sqlite3",
    "fio": "fio",
    "strip": "binutils",
}
FSX_VERSION = "0.3.2"
# Seconds for what a guest does from its beginning to its end, emulated on a busy host.
LONG, LONGER = 1200, 1800


def arguments():
    parser = argparse.ArgumentParser(
        prog="vmtest",
        description="Boots a small virtual machine with a Vellum store on a disk that loses what "
        "was not flushed, cuts its power at random moments, and checks that nothing is lost that "
        "was acknowledged. Then exercises the guest kernel's NBD client against `vellum nbd`."
        " With --vhost: Debian on a disk of `vellum vhost`, whose server is killed."
        " With --compare: tools/compare with drivers that the host's kernel may lack.",
        epilog="Needs no root, once these Debian packages are installed: "
        + " ".join(PACKAGES.values()) + ". The kernel comes from Debian's archive, once, and is kept in the "
        "target directory. docs/durability.md says what is checked.",
    )
    parser.add_argument("--cuts", type=int, default=10, metavar="N", help="power cuts [10]")
    parser.add_argument(
        "--work", type=float, default=4.0, metavar="SECONDS",
        help="the longest time between the first commits and a cut [4]",
    )
    parser.add_argument(
        "--kernel", default="bookworm", metavar="WHICH",
        help="a Debian release (bookworm: 6.1, trixie: 6.12) or a kernel package [bookworm]",
    )
    parser.add_argument(
        "--fs", choices=("ext4", "xfs"), default="ext4", help="the store's file system [ext4]"
    )
    parser.add_argument(
        "--no-control", action="store_true",
        help="leave out the last cut, of a disk that ignores flushes, which has to be found out",
    )
    parser.add_argument(
        "--kills", type=int, default=3, metavar="N",
        help="how often the NBD server is killed under load [3]",
    )
    parser.add_argument("--no-nbd", action="store_true", help="leave out the NBD client")
    parser.add_argument(
        "--grow", type=pathlib.Path, metavar="PATH",
        help="only run this test program's test of file systems that grow in use (tests/vm/grow.rs)",
    )
    parser.add_argument(
        "--vhost", type=pathlib.Path, metavar="TAR",
        help="only run a machine with a disk of `vellum vhost`, and Debian from this archive on it",
    )
    parser.add_argument(
        "--ublk", action="store_true",
        help="only run containers on ublk devices (`--kernel trixie` or newer), whose servers are killed",
    )
    parser.add_argument(
        "--bench", action="store_true",
        help="only measure ublk against FUSE and loop, and against a file (`--kernel trixie` or newer)",
    )
    parser.add_argument(
        "--compare", type=pathlib.Path, metavar="PROGRAM",
        help="only run this build of tools/compare: raw, vellum, overlayfs and thin volumes of "
        "device-mapper, in Debian 13 (`--kernel trixie` or newer)",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("."), metavar="DIR",
        help="with --compare: where its reports go [.]",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="with --compare: hardly any work of two drivers, to see that all works"
    )
    parser.add_argument(
        "--zfs", action="store_true",
        help="with --compare: ZFS, too, whose module is built of Debian's sources (ten minutes, once)",
    )
    parser.add_argument(
        "--workloads", default="", metavar="LIST",
        help="with --compare: these instead, by commas, as tools/compare has them",
    )
    parser.add_argument(
        "--drivers", default="", metavar="LIST",
        help="with --compare: these instead, by commas, of those that tools/compare has built in",
    )
    parser.add_argument(
        "--limit", type=int, default=3600, metavar="SECONDS",
        help="with --compare: how long it may take [3600]",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N",
        help="with --bench and --compare: rounds of each work [5]",
    )
    parser.add_argument(
        "--seconds", type=int, default=3, metavar="N", help="with --bench: for each work [3]"
    )
    parser.add_argument(
        "--attaches", type=int, default=10, metavar="N",
        help="with --ublk: how often a container is mounted and unmounted [10]",
    )
    parser.add_argument(
        "--transport", default="classic", metavar="HOW",
        help="how requests come to the containers' servers: classic, ublk [classic]",
    )
    parser.add_argument("--seed", type=int, help="draws the moments and what survives [random]")
    parser.add_argument(
        "--vellum", type=pathlib.Path, metavar="PATH", help="this program [built: release]"
    )
    parser.add_argument("--cpus", type=int, default=2, help="virtual processors [2]")
    parser.add_argument("--kvm", action="store_true", help="hardware virtualisation, if there is")
    parser.add_argument("--keep", action="store_true", help="keep the disk and the logs")
    parser.add_argument("-v", "--verbose", action="store_true", help="print what the guest says")
    options = parser.parse_args()
    if options.cuts < 0 or options.work <= 0:
        parser.error("--cuts and --work count upwards from zero")
    return options


def target_directory():
    shown = run(
        "cargo", "metadata", "--format-version=1", "--no-deps",
        "--manifest-path", REPOSITORY / "Cargo.toml",
    )
    return pathlib.Path(json.loads(shown)["target_directory"])


def need_programs(target):
    """Fails where a package is missing; builds fsx where it is not there."""
    missing = [package for name, package in PACKAGES.items() if shutil.which(name) is None]
    if not missing and subprocess.run(
        ["nbdkit", "--dump-plugin", "python"], capture_output=True, check=False
    ).returncode:
        missing = ["nbdkit-plugin-python"]
    if missing:
        raise Failure(f"missing: apt-get install --no-install-recommends {' '.join(missing)}")
    if shutil.which("fsx") is None:
        say("building fsx")
        run(
            "cargo", "install", "--quiet", "--locked", "--root", target / "tools", "fsx",
            "--version", FSX_VERSION,
        )


def program(options, target):
    """The vellum to test."""
    if options.vellum is not None:
        if not options.vellum.is_file():
            raise Failure(f"no program: {options.vellum}")
        return options.vellum
    say("building vellum (release)")
    built = subprocess.run(
        ["cargo", "build", "--locked", "--quiet", "--release", "--bin", "vellum"],
        cwd=REPOSITORY, check=False,
    )
    if built.returncode != 0:
        raise Failure("cargo build failed")
    return target / "release/vellum"


def main():
    options = arguments()
    fail_on_signals()
    seed = options.seed if options.seed is not None else random.SystemRandom().getrandbits(32)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="vmtest."))
    keep = True
    try:
        # Where there is no login shell: cargo, mke2fs and the like.
        os.environ["PATH"] += f":{pathlib.Path.home()}/.cargo/bin:{initramfs.PATH}"
        target = target_directory()
        os.environ["PATH"] += f":{target}/tools/bin"
        need_programs(target)
        vellum = program(options, target)
        guest_kernel = kernel.get(options.kernel, target / "vmtest")
        say(f"kernel {guest_kernel.version}, seed {seed}, files in {directory}")
        scripts = pathlib.Path(__file__).with_name("guest")
        if options.vhost or options.compare:
            if options.compare:
                modules = compare.modules(options, guest_kernel, target / "vmtest")
            else:
                modules = guest_kernel.load_order("ext4", kernel.DISK_MODULES)
            archive = initramfs.build_small(directory, modules, scripts)
            if options.compare:
                compare.exercise(options, vellum, guest_kernel, archive, target / "vmtest", directory)
            else:
                vhost.exercise(
                    options, vellum, guest_kernel, archive, target / "vmtest", directory, seed
                )
            say("passed")
            keep = options.keep
            return 0
        archive = initramfs.build(
            directory, vellum, guest_kernel.load_order(options.fs),
            scripts, options.grow, options.bench, options.bench or options.ublk,
        )
        guest = power.Guest(options, guest_kernel, archive, directory)
        if options.grow:
            guest.run("grow", LONG, seed)
            say("grow: done")
        elif options.ublk:
            guest.run("ublk", LONGER + 10 * (options.kills + options.attaches), seed)
        elif options.bench:
            bench.exercise(guest, options)
        else:
            if options.cuts or not options.no_control:
                power.exercise(guest, seed)
            if not options.no_nbd:
                guest.run("nbd", LONG, seed)
        say("passed")
        keep = options.keep
        return 0
    except Failure as failure:
        say(f"FAILED: {failure}")
        say(f"seed {seed}; the disk and the logs are in {directory}")
        return 1
    except KeyboardInterrupt:
        keep = options.keep
        return 130
    except SystemExit:
        keep = options.keep
        raise
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
