"""What the ways to a container's block device cost, in a machine whose kernel has ublk: guest/bench."""

import statistics

from .common import Failure, say

WORKS = ("fsync", "read1", "read16", "write16", "large", "many", "pgbench")
WAYS = ("ublk", "classic", "raw")


def exercise(guest, options):
    """Runs guest/bench and prints its ratios."""
    seen = {}

    def tell(message):
        word, *rest = message.split()
        if word == "bench":
            work, way, turn, rate, cpu = rest
            seen.setdefault((work, way), {})[int(turn)] = (float(rate), float(cpu))
            if options.verbose:
                say(message)

    seconds = 600 + (options.rounds + 1) * len(WORKS) * len(WAYS) * (options.seconds + 20)
    guest.run("bench", seconds, seen=tell)
    report(seen)


def report(seen):
    """A line for each work: requests (of pgbench: transactions) a second and processor time for each, ublk against the others."""
    print("in an emulated machine, on a tmpfs; medians of the rounds (lowest-highest)")
    print(f"{'':10}{'ublk ÷ FUSE + loop':>24}{'ublk ÷ raw file':>24}{'CPU, ÷ FUSE + loop':>24}")
    for work in WORKS:
        ublk = seen.get((work, "ublk"))
        if not ublk:
            raise Failure(f"nothing was measured of {work}")
        cells = [ratio(ublk, seen[work, way], 0) for way in ("classic", "raw")]
        cells.append(ratio(ublk, seen[work, "classic"], 1))
        print(f"{work:10}" + "".join(f"{cell:>24}" for cell in cells))


def ratio(one, other, field):
    both = [one[turn][field] / other[turn][field] for turn in one if other[turn][field]]
    if not both:
        return "-"
    return f"{statistics.median(both):.2f} ({min(both):.2f}-{max(both):.2f})"
