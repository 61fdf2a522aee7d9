"""One virtual machine from power-on to power-off, and the disk that it runs on."""

import json
import os
import pathlib
import queue
import re
import signal
import subprocess
import threading
import time

from .common import Failure, end_with_parent, say

# In the kernel's log none of these may appear.
BAD = re.compile(
    r"Kernel panic|BUG:|Oops|general protection|EXT4-fs error|EXT4-fs \(.*\): .*corrupt"
    r"|JBD2: .*error|Aborting journal|I/O error|XFS \(.*\): (Corruption|Metadata|log I/O)"
)
# The guest writes this to its kernel's log before it provokes errors.
EXPECTED = "vmtest: errors are expected from here on"


class Disk:
    """The nbdkit process that plays a disk with a volatile cache for one boot."""

    def __init__(self, directory, image, seed, survive="random", lie=False):
        self.socket = directory / "disk.sock"
        self.report_file = directory / "cut.json"
        self.log = open(directory / "disk.log", "ab")
        for path in (self.socket, self.report_file):
            path.unlink(missing_ok=True)
        plugin = pathlib.Path(__file__).with_name("volatile_disk.py")
        self.process = subprocess.Popen(
            [
                "nbdkit", "--foreground", "--exit-with-parent", "--unix", self.socket,
                "python", plugin, f"file={image}", f"report={self.report_file}",
                f"seed={seed}", f"survive={survive}", f"flush={'lie' if lie else 'honest'}",
            ],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )
        deadline = time.monotonic() + 60
        while not self.socket.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise Failure(f"nbdkit does not serve: see {directory / 'disk.log'}")
            time.sleep(0.02)

    def drive(self):
        """How the machine has it."""
        return [
            # No cache of qemu's: the guest's flushes reach the disk, and so do its writes.
            "-blockdev", "driver=nbd,node-name=store,server.type=unix,"
            f"server.path={self.socket},cache.direct=on,cache.no-flush=off",
            "-device", "virtio-blk-pci,drive=store,write-cache=on",
        ]

    def cut(self):
        """What became of the cache. The machine is gone by now."""
        deadline = time.monotonic() + 60
        while not (self.report_file.exists() and self.report_file.stat().st_size):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failure(f"nbdkit made no report: see {self.log.name}")
            time.sleep(0.02)
        self.process.terminate()
        self.process.wait(timeout=60)
        return json.loads(self.report_file.read_text(encoding="utf-8"))

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()


def memory(options):
    """MiB that the guest has: its programs are in memory too, and what is measured."""
    if options.bench:
        return "3584"
    if options.compare:
        return "2048"
    return "1024" if options.ublk else "768"


class Machine:
    """A running guest. The kernel's log goes to a file, the guest's messages to `messages`."""

    def __init__(self, options, kernel, initramfs, drive, console, command_line):
        self.console = console
        self.options = options
        self.messages = queue.Queue()
        self.up = None
        command = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none", "-machine", "q35,hpet=off",
            "-accel", "kvm" if options.kvm else "tcg,thread=multi",
            # Emulated by qemu 7.2, cmpxchg16b may leave wrong flags, and Linux 6.12 crashes; page
            # tables of five levels cost time.
            "-cpu", "host" if options.kvm else "max,cx16=off,la57=off",
            "-smp", str(options.cpus), "-m", memory(options),
            "-kernel", kernel.image, "-initrd", initramfs,
            "-append", "console=ttyS0 loglevel=5 panic=-1 nokaslr mitigations=off "
            "random.trust_cpu=on no_timer_check rdinit=/init " + command_line,
            "-chardev", f"file,id=console,path={console}", "-serial", "chardev:console",
            "-chardev", "stdio,id=messages,signal=off", "-serial", "chardev:messages",
            *drive,
        ]
        errors = open(console.with_suffix(".qemu"), "wb")
        with errors:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                preexec_fn=end_with_parent,
            )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        """Passes on whole lines: one that the cut tore was not said."""
        with self.process.stdout as out:
            line = b""
            while True:
                data = os.read(out.fileno(), 65536)
                if not data:
                    break
                *lines, line = (line + data).split(b"\n")
                for one in lines:
                    text = one.decode(errors="replace").strip()
                    if text:
                        self.messages.put(text)
        self.messages.put(None)

    def comes_up(self, seconds):
        """Waits for the guest's first message. False when there is none: its kernel gave up."""
        try:
            message = self.messages.get(timeout=seconds)
        except queue.Empty:
            return False
        self.up = time.monotonic()
        return message == "booted"

    def next(self, deadline):
        """The guest's next message; nothing when the time is over. Its failures are ours."""
        try:
            message = self.messages.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return None
        if message is None:
            # For a second call.
            self.messages.put(None)
            raise Failure(f"the machine ended by itself: see {self.console}")
        if message.startswith("FAIL"):
            raise Failure(f"the guest says: {message}; see {self.console}")
        if self.options.verbose:
            say(f"    {message}")
        return message

    def wait_for(self, wanted, seconds, seen=None):
        """Reads messages up to one, each of which `seen` is told; fails when time is over."""
        deadline = time.monotonic() + seconds
        while True:
            message = self.next(deadline)
            if message is None:
                raise Failure(f"no {wanted!r} from the guest in {seconds} s: see {self.console}")
            if seen:
                seen(message)
            if message == wanted:
                return

    def cut_power(self):
        """Kills the machine. Returns what it had said that was not read yet."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join()
        rest = []
        while (message := self.messages.get()) is not None:
            rest.append(message)
        return rest

    def wait_off(self, seconds):
        """Waits until the guest has turned itself off."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"the guest does not turn off: see {self.console}") from None

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def check_console(self):
        """Fails when the kernel complained before the guest said that it will."""
        text = self.console.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            if EXPECTED in line:
                break
            if BAD.search(line):
                raise Failure(f"the guest's kernel says: {line.strip()}; see {self.console}")


def first_up(start, attempts, seconds):
    """The first machine of `start(attempt)` that comes up."""
    for attempt in range(1, attempts + 1):
        machine = start(attempt)
        if machine.comes_up(seconds):
            return machine
        machine.kill()
        say(f"the machine does not come up (attempt {attempt}): see {machine.console}")
    raise Failure(f"the machine does not come up: see {machine.console}")
