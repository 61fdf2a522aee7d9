"""Debian in a machine whose disk is a container that `vellum vhost` serves on the host."""

import json
import os
import random
import re
import signal
import subprocess
import time

from . import debian, initramfs
from .common import Failure, end_with_parent, run, say
from .machine import Machine, first_up

BOOT, WORK = 60, 240
BOOT_ATTEMPTS = 4
# What Debian's smallest root lacks.
PROGRAMS = {"fio": "usr/bin", "sqlite3": "usr/bin", "fstrim": "usr/sbin", "resize2fs": "usr/sbin"}
# What the disk has first, what it grows to while no machine is connected, and then while one is.
DISK_SIZE, GROWN_UNSEEN, GROWN = "1280M", 3 << 29, 2 << 30
# Commits of the guest's database between two kills.
COMMITS = 3
# Where a development build dies by itself, at the visit of that number, and how long that may take.
PLACES = ("vhost: taken", "vhost: flush", "vhost: done", "vhost: answers", "vhost: answered")
VISIT, DEATH = 9, 60


def disk_image(tar, cache):
    """Debian on an ext4 that fills a disk, made once."""
    image = cache / "debian.img"
    if image.exists():
        return image
    say("making Debian's disk")
    tree, unfinished = cache / "debian.tree", cache / "debian.img.new"
    debian.unpack(tar, tree)
    for name, place in PROGRAMS.items():
        initramfs.add_program(tree, initramfs.find(name), place, name)
    debian.disk(tree, unfinished, DISK_SIZE)
    unfinished.rename(image)
    return image


class Server:
    """`vellum vhost`, which can be killed and started again."""

    def __init__(self, vellum, name, socket, log):
        self.command = [vellum, "-v", "vhost", name, "--socket", socket, "--queues", "4"]
        self.socket = socket
        self.log = log
        self.process = None
        self.start()

    def start(self, crash=None):
        environment = dict(os.environ, VELLUM_CRASH_AT=f"{crash}:{VISIT}") if crash else None
        self.socket.unlink(missing_ok=True)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [str(word) for word in self.command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=end_with_parent, env=environment,
            )
        deadline = time.monotonic() + 60
        while not self.socket.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise Failure(f"vellum vhost does not serve: see {self.log}")
            time.sleep(0.01)

    def dies(self):
        """Whether it comes to the place where it is to die."""
        try:
            return self.process.wait(DEATH) == -signal.SIGKILL
        except subprocess.TimeoutExpired:
            return False

    def done_again(self):
        """How often a server found requests that the one before had not answered."""
        return self.log.read_text(encoding="utf-8").count("does again what the server before")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        status = self.process.wait(timeout=120)
        if status != 0:
            raise Failure(f"vellum vhost ended with {status} at SIGTERM: see {self.log}")


class Rig:
    """A store, and machines on its containers."""

    def __init__(self, options, vellum, kernel, archive, directory):
        self.options, self.kernel, self.archive = options, kernel, archive
        self.vellum_program = vellum
        self.directory = directory
        os.environ["VELLUM_ROOT"] = str(directory / "store")
        self.boots = 0

    def vellum(self, *arguments):
        return run(self.vellum_program, *arguments)

    def serve(self, name):
        return Server(self.vellum_program, name, self.directory / f"{name}.sock", self.directory / f"{name}.log")

    def boot(self, server, what):
        def start(_attempt):
            self.boots += 1
            console = self.directory / f"console-{self.boots}-{what}.log"
            drive = [
                "-object", "memory-backend-memfd,id=mem,size=768M,share=on",
                "-machine", "memory-backend=mem",
                "-chardev", f"socket,id=disk,path={server.socket},reconnect=1",
                "-device", "vhost-user-blk-pci,chardev=disk,num-queues=2",
            ]
            return Machine(self.options, self.kernel, self.archive, drive, console, f"script=vhost vm={what}")

        return first_up(start, BOOT_ATTEMPTS, BOOT)


class Commits:
    """What the guest's database said that it committed, and what else the guest said."""

    def __init__(self, machine):
        self.machine = machine
        self.last = 0
        self.said = []

    def hear(self, message):
        words = message.split()
        if words[:2] == ["commit", "wal"]:
            self.last = int(words[2])
        else:
            self.said.append(message)

    def wait(self, more):
        """Until there are so many more from now on."""
        # What is there already may be of a server that was killed since.
        while not self.machine.messages.empty():
            self.hear(self.machine.next(time.monotonic()))
        wanted, deadline = self.last + more, time.monotonic() + WORK
        while self.last < wanted:
            message = self.machine.next(deadline)
            if message is None:
                raise Failure(f"no commit {wanted} from the guest: see {self.machine.console}")
            self.hear(message)

    def wait_for(self, wanted):
        """Until the guest says this."""
        if wanted not in self.said:
            self.machine.wait_for(wanted, WORK, self.hear)

    def found(self):
        """The last transaction that the guest found when it verified."""
        for message in self.said:
            match = re.fullmatch(r"database wal ok (\d+)", message)
            if match:
                return int(match.group(1))
        raise Failure(f"the database is damaged: {self.said}")


def finish(machine, commits):
    machine.wait_for("off", WORK, commits.hear)
    machine.wait_off(WORK)
    machine.check_console()


def kept(commits, least, what):
    found = commits.found()
    if found < least:
        raise Failure(f"{what}: commit {least} was acknowledged, {found} is the last one there")
    return found


def die_at_places(rig, server, commits):
    """Lets servers die in the middle of requests. Those of release builds do not."""
    if not rig.options.vellum:
        return
    for place in PLACES:
        server.kill()
        server.start(place)
        if not server.dies():
            raise Failure(f"the server does not come by {place!r}: is {rig.vellum_program} a release build?")
        server.start()
        commits.wait(COMMITS)
    # All of them but the last, which had given its answer.
    if server.done_again() < len(PLACES) - 1:
        raise Failure(f"servers died over requests, and the next ones did nothing again: see {server.log}")
    say(f"vhost: died at {len(PLACES)} places, {server.done_again()} times requests were done again")


def work(rig, server, seed):
    """Boots, kills, takes snapshots and forks, grows. Returns what was committed before the fork."""
    machine = rig.boot(server, "load")
    commits = Commits(machine)
    try:
        commits.wait(1)
        system = next((text for text in commits.said if text.startswith("system ")), "no system")
        say(f"vhost: {system.removeprefix('system ')} has its disk from a container")
        die_at_places(rig, server, commits)
        moments = random.Random(seed)
        for _ in range(rig.options.kills):
            # Not always just after a commit.
            time.sleep(moments.uniform(0, 0.3))
            server.kill()
            server.start()
            commits.wait(COMMITS)
        say(f"vhost: killed {rig.options.kills} times under load, {commits.last} commits")
        rig.vellum("snapshot", "debian", "before")
        before_fork = commits.last
        rig.vellum("fork", "debian", "fork")
        commits.wait(COMMITS)
        server.kill()
        server.start()
        # QEMU connects again only each second: it is not there yet, and sees the new size all the same.
        rig.vellum("resize", "debian", str(GROWN_UNSEEN))
        commits.wait_for(f"grown {GROWN_UNSEEN // 512}")
        commits.wait(COMMITS)
        rig.vellum("fork", "debian", "later", "--from", "before")
        if "served over vhost-user" not in rig.vellum("ps"):
            raise Failure("vellum ps does not say who serves debian")
        stats = json.loads(rig.vellum("stats", "debian", "--json"))
        if "vhost" not in json.dumps(stats):
            raise Failure(f"vellum stats does not say who serves debian: {stats}")
        rig.vellum("resize", "debian", str(GROWN))
        finish(machine, commits)
    finally:
        machine.kill()
    if f"grown {GROWN // 512}" not in commits.said:
        raise Failure(f"the guest did not see that its disk grew: {commits.said}")
    found = kept(commits, commits.last, "the container")
    say(f"vhost: grown, {found} commits kept, {next(text for text in commits.said if text.startswith('fio '))} rounds")
    return before_fork


def exercise(options, vellum, kernel, archive, cache, directory, seed):
    """All of it, in a store of its own."""
    rig = Rig(options, vellum, kernel, archive, directory)
    rig.vellum("import", "image", disk_image(options.vhost, cache))
    rig.vellum("create", "image", "--name", "debian")
    server = rig.serve("debian")
    try:
        before_fork = work(rig, server, seed)
        server.stop()
    finally:
        server.kill()
    server = rig.serve("fork")
    try:
        machine = rig.boot(server, "verify")
        commits = Commits(machine)
        try:
            finish(machine, commits)
        finally:
            machine.kill()
        server.stop()
    finally:
        server.kill()
    say(f"vhost: the fork boots, {kept(commits, before_fork, 'the fork')} commits kept")
    rig.vellum("check", "--scrub")
    say("vhost: done")
