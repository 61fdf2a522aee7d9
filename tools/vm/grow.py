"""File systems that grow in use, by a root that may do that: a test program run in the guest."""

from .common import say

SECONDS = 1200


def exercise(guest, seed):
    """Runs guest/grow on an empty disk."""
    guest.format()
    with guest.boot("grow", seed) as boot:
        boot.machine.wait_for("off", SECONDS)
        boot.machine.wait_off(SECONDS)
        boot.machine.check_console()
        guest.forget_log(boot)
    say("grow: done")
