"""Containers on ublk devices, in a machine whose kernel has them: guest/ublk."""

from .common import say

SECONDS = 1800


def exercise(guest, seed):
    """Runs guest/ublk on an empty disk."""
    guest.format()
    with guest.boot("ublk", seed) as boot:
        boot.machine.wait_for("off", SECONDS, seen=tell)
        boot.machine.wait_off(SECONDS)
        boot.machine.check_console()
        guest.forget_log(boot)


def tell(message):
    """Passes on what the guest has got through."""
    if message.startswith("ublk: "):
        say(message)
