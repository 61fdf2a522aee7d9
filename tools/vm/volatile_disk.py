"""A disk with a volatile write cache, as an nbdkit plugin (nbdkit-python-plugin(3)).

What is written stays in memory until the client flushes; the file behind holds what is durable.
When the client goes away, however it does, the power is cut: each sector that was written since
the last flush keeps its durable content, or gets any one of the values it was given. So writes are
lost, torn within a request, and reordered, which killing a virtual machine alone never does: what
it wrote is in the host's page cache, and survives.

Parameters: file=PATH, report=PATH (JSON about the cut), seed=N, survive=WHAT:
  random    one of the next four, drawn from the seed
  nothing   every sector keeps its durable content
  all       every write survives
  requests  each write request survives or not, as a whole
  sectors   each sector on its own
flush=lie acknowledges flushes without making anything durable: a disk that must be found out.
"""

import json
import os
import random

import nbdkit

API_VERSION = 2
SECTOR = 512
MODES = ("nothing", "all", "requests", "sectors")

parameters = {"seed": "0", "survive": "random", "flush": "honest"}
disk = None


class Disk:
    """The durable file, and the versions of each sector written since the last flush."""

    def __init__(self, path):
        self.file = os.open(path, os.O_RDWR)
        self.size = os.fstat(self.file).st_size // SECTOR * SECTOR
        # Sector number to [(number of the request, bytes)], oldest first.
        self.cached = {}
        self.requests = 0
        self.flushes = 0
        self.written = 0

    def read(self, buf, offset):
        data = os.pread(self.file, len(buf), offset)
        buf[: len(data)] = data
        buf[len(data) :] = bytes(len(buf) - len(data))
        if not self.cached:
            return
        first = offset // SECTOR
        for index in range(len(buf) // SECTOR):
            versions = self.cached.get(first + index)
            if versions:
                buf[index * SECTOR : (index + 1) * SECTOR] = versions[-1][1]

    def write(self, buf, offset):
        self.requests += 1
        self.written += len(buf)
        data = bytes(buf)
        first = offset // SECTOR
        for index in range(len(data) // SECTOR):
            version = (self.requests, data[index * SECTOR : (index + 1) * SECTOR])
            self.cached.setdefault(first + index, []).append(version)

    def flush(self):
        self.flushes += 1
        self.persist({sector: versions[-1][1] for sector, versions in self.cached.items()})
        self.cached.clear()

    def persist(self, sectors):
        """Writes sectors to the file, neighbours in one go."""
        run, start = [], None
        for sector in sorted(sectors):
            if start is not None and sector != start + len(run):
                os.pwrite(self.file, b"".join(run), start * SECTOR)
                run, start = [], None
            if start is None:
                start = sector
            run.append(sectors[sector])
        if start is not None:
            os.pwrite(self.file, b"".join(run), start * SECTOR)

    def cut(self, survive, rng):
        """Cuts the power: decides what of the cache survives. Returns what was done."""
        mode = rng.choice(MODES) if survive == "random" else survive
        chance = rng.choice((0.1, 0.5, 0.9))
        kept = {}
        requests = {}
        for sector, versions in self.cached.items():
            if mode == "all":
                kept[sector] = versions[-1][1]
            elif mode == "requests":
                for request, data in versions:
                    if requests.setdefault(request, rng.random() < chance):
                        kept[sector] = data
            elif mode == "sectors":
                if rng.random() < chance:
                    kept[sector] = rng.choice(versions)[1]
        self.persist(kept)
        report = {
            "mode": mode,
            "unflushed": len(self.cached),
            "survived": len(kept),
            "flushes": self.flushes,
            "written": self.written,
        }
        self.cached.clear()
        return report


def config(key, value):
    if key not in ("file", "report", "seed", "survive", "flush"):
        raise RuntimeError(f"unknown parameter {key}")
    parameters[key] = value


def config_complete():
    for key in ("file", "report"):
        if key not in parameters:
            raise RuntimeError(f"the parameter {key}= is missing")
    if parameters["survive"] not in MODES + ("random",):
        raise RuntimeError(f"survive={parameters['survive']} is none of {MODES}, random")


def open(readonly):
    global disk
    disk = Disk(parameters["file"])
    return disk


def get_size(handle):
    return handle.size


def block_size(handle):
    return (SECTOR, 4096, 0xFFFFFFFF)


def can_flush(handle):
    return True


def pread(handle, buf, offset, flags):
    handle.read(buf, offset)


def pwrite(handle, buf, offset, flags):
    handle.write(buf, offset)


def flush(handle, flags):
    if parameters["flush"] == "lie":
        handle.flushes += 1
    else:
        handle.flush()


def close(handle):
    report = handle.cut(parameters["survive"], random.Random(int(parameters["seed"])))
    os.close(handle.file)
    # `open` is the plugin's own function here.
    with os.fdopen(os.open(parameters["report"], os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:
        json.dump(report, out)
