"""Power cuts: works, cuts, boots again, and compares with what the guest had said."""

import dataclasses
import random
import time

from .common import Failure, Lost, run, say
from .machine import Disk, Machine

# Generous: emulated, on a machine that has other things to do.
BOOT, VERIFY, SETUP = 300, 900, 900
BOOT_ATTEMPTS = 3
DISK_SIZE = 8 << 30
DATABASES = ("wal", "del")


class Guest:
    """What all boots have in common, and the disk between them."""

    def __init__(self, options, kernel, initramfs, directory):
        self.options = options
        self.kernel = kernel
        self.initramfs = initramfs
        self.directory = directory
        self.image = directory / "disk.img"
        self.boots = 0

    def format(self):
        """An empty disk. What making it writes is durable."""
        self.image.unlink(missing_ok=True)
        with open(self.image, "wb") as file:
            file.truncate(DISK_SIZE)
        if self.options.fs == "xfs":
            run("mkfs.xfs", "-q", self.image)
        else:
            run("mke2fs", "-q", "-t", "ext4", "-F", "-E", "lazy_itable_init=0", self.image)

    def boot(self, what, seed=0, survive="random", lie=False):
        """Turns the machine on, to do what guest/WHAT says."""
        for attempt in range(1, BOOT_ATTEMPTS + 1):
            self.boots += 1
            console = self.directory / f"console-{self.boots}-{what}.log"
            disk = Disk(self.directory, self.image, seed, survive, lie)
            boot = None
            try:
                machine = Machine(
                    self.options, self.kernel, self.initramfs, disk.drive(), console,
                    f"vm={what} fs={self.options.fs} boot={self.boots} "
                    f"kills={self.options.kills} attaches={self.options.attaches} "
                    f"transport={self.options.transport} rounds={self.options.rounds} "
                    f"seconds={self.options.seconds}",
                )
                boot = Boot(machine, disk)
                if machine.comes_up(BOOT):
                    return boot
            except BaseException:
                disk.kill()
                if boot:
                    machine.kill()
                raise
            # Emulated timers are late on a busy host, and early code of the kernel may give up.
            # Nothing has touched the disk yet.
            boot.close()
            say(f"the machine does not come up (attempt {attempt}): see {console}")
        raise Failure(f"the machine does not come up: see {console}")

    def run(self, what, seconds, seed=0, seen=None):
        """Does what guest/WHAT says from its beginning to its end, on an empty disk. What the guest says of
        how far it is goes to `seen`, or is passed on."""
        def tell(message):
            if message.startswith(f"{what}: "):
                say(message)

        self.format()
        with self.boot(what, seed) as boot:
            boot.machine.wait_for("off", seconds, seen or tell)
            boot.machine.wait_off(seconds)
            boot.machine.check_console()
            self.forget_log(boot)

    def forget_log(self, boot):
        """A long run needs no log of boots that went well."""
        if not self.options.keep:
            boot.machine.console.unlink(missing_ok=True)
            boot.machine.console.with_suffix(".qemu").unlink(missing_ok=True)


@dataclasses.dataclass
class Boot:
    """The machine that runs and its disk; both are gone at the end of a `with`."""

    machine: Machine
    disk: Disk

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.machine.kill()
        self.disk.kill()


class Ledger:
    """What the guest has said, and so must be true after any power cut."""

    def __init__(self):
        self.commits = dict.fromkeys(DATABASES, 0)
        # Images and containers: (kind, name) to `made`, `removed`, or `either`.
        self.objects = {}
        self.listed = set()
        self.verified = 0
        self.leftovers = 0
        self.logged = 0

    def booted(self):
        self.listed = set()

    def see(self, message):
        """Takes note of one message; a promise that is broken is a failure."""
        word, *rest = message.split()
        if word == "commit":
            name, number = rest
            self.commits[name] = max(self.commits[name], int(number))
            self.logged += 1
        elif word == "database":
            self.database(rest[0], rest[1:])
        elif word in ("made", "removing", "removed"):
            state = "either" if word == "removing" else word
            self.objects[tuple(rest)] = state
        elif word in ("image", "container"):
            self.listed.add((word, rest[0]))
        elif word == "leftovers":
            self.leftovers += int(rest[0])
        elif message == "listed":
            self.compare()
        elif message == "cleaning":
            # From here on a cut may leave any of them.
            self.objects = dict.fromkeys(self.objects, "either")
        elif message == "verified":
            self.objects = {}
            self.verified += 1

    def database(self, name, words):
        if words[:1] != ["ok"]:
            raise Lost(f"the database {name} is damaged: {' '.join(words)}")
        logged, found = self.commits[name], int(words[1])
        if found < logged:
            raise Lost(
                f"the database {name} has lost transactions: {logged} was committed, "
                f"{found} is the last one there"
            )

    def compare(self):
        for thing, state in self.objects.items():
            if state == "made" and thing not in self.listed:
                raise Lost(f"{' '.join(thing)} had been made, and is not there")
            if state == "removed" and thing in self.listed:
                raise Lost(f"{' '.join(thing)} had been removed, and is there again")
        for name in DATABASES:
            if ("container", name) not in self.listed:
                raise Failure(f"the container {name} is not there")
        if ("image", "box") not in self.listed and ("image", "box:latest") not in self.listed:
            raise Failure("the image box is not there")


def exercise(guest, seed):
    """Sets a store up, cuts the power as often as asked for, verifies, and tries a lying disk."""
    rng = random.Random(seed)
    guest.format()
    ledger = Ledger()
    with guest.boot("setup") as boot:
        boot.machine.wait_for("off", SETUP)
        boot.machine.wait_off(BOOT)
        boot.machine.check_console()
        guest.forget_log(boot)
    say("set up: a store, an image, two containers")
    # How long the guest takes until it works: early cuts are drawn from that time.
    until_ready = 20.0
    for number in range(1, guest.options.cuts + 1):
        until_ready = cut(guest, ledger, rng, number, until_ready)
    if not guest.options.no_control:
        control(guest, ledger, rng.getrandbits(32))
    elif guest.options.cuts:
        with guest.boot("last") as boot:
            ledger.booted()
            boot.machine.wait_for("off", VERIFY, ledger.see)
            boot.machine.wait_off(BOOT)
            boot.machine.check_console()
            guest.forget_log(boot)
        summary(guest, ledger)


def summary(guest, ledger):
    say(
        f"{guest.options.cuts} power cuts, {ledger.logged} commits logged, none missing; "
        f"{ledger.leftovers} leftovers, all collected; file systems clean"
    )


def cut(guest, ledger, rng, number, until_ready):
    """One boot that ends with a power cut: in the work mostly, else in recovery or verification."""
    early = number > 1 and rng.random() < 0.25
    delay = rng.uniform(0.0, until_ready) if early else rng.uniform(0.05, guest.options.work)
    with guest.boot("power", seed=rng.getrandbits(32)) as boot:
        machine = boot.machine
        ledger.booted()
        stage = "off"

        def see(message):
            nonlocal stage
            ledger.see(message)
            if not message.startswith(("commit", "image ", "container ", "made", "remov")):
                stage = message

        if early:
            deadline = machine.up + delay
        else:
            machine.wait_for("ready", VERIFY, see)
            wait_for_commits(machine, see)
            until_ready = time.monotonic() - machine.up
            deadline = time.monotonic() + delay
        while (message := machine.next(deadline)) is not None:
            see(message)
        for message in machine.cut_power():
            if message.startswith("FAIL"):
                raise Failure(f"the guest says: {message}; see {machine.console}")
            see(message)
        done = boot.disk.cut()
        machine.check_console()
        guest.forget_log(boot)
    when = "the kernel was up" if early else "the first commits"
    say(
        f"cut {number}: {delay:.1f} s after {when} (last: {stage}), commits "
        + ", ".join(f"{name} {last}" for name, last in ledger.commits.items())
        + f"; {done['unflushed']} sectors not flushed, {done['survived']} of them survive "
        f"({done['mode']})"
    )
    return until_ready


def wait_for_commits(machine, see):
    """Reads until each database has committed something."""
    missing = set(DATABASES)
    deadline = time.monotonic() + VERIFY
    while missing:
        message = machine.next(deadline)
        if message is None:
            raise Failure(f"no commits in {missing} in {VERIFY} s: see {machine.console}")
        see(message)
        if message.startswith("commit "):
            missing.discard(message.split()[1])


def control(guest, ledger, seed):
    """Verifies the last cut, then tests the test: a disk that ignores flushes loses commits, and
    that is noticed."""
    with guest.boot("control", seed, survive="nothing", lie=True) as boot:
        machine = boot.machine
        ledger.booted()
        machine.wait_for("ready", VERIFY, ledger.see)
        machine.check_console()
        summary(guest, ledger)
        wait_for_commits(machine, ledger.see)
        for message in machine.cut_power():
            ledger.see(message)
        boot.disk.cut()
    try:
        with guest.boot("power", seed) as boot:
            ledger.booted()
            boot.machine.wait_for("ready", VERIFY, ledger.see)
    except Lost as loss:
        say(f"control: a disk that ignores flushes is found out: {loss}")
        return
    raise Failure("a disk that ignored all flushes was not noticed: this test is worth nothing")
