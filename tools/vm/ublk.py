"""Containers on ublk devices, in a machine whose kernel has them: guest/ublk."""

from .common import say

# And ten for each kill and each mount.
SECONDS = 1800


def exercise(guest, seed):
    """Runs guest/ublk on an empty disk."""
    guest.format()
    with guest.boot("ublk", seed) as boot:
        options = guest.options
        seconds = SECONDS + 10 * (options.kills + options.attaches)
        boot.machine.wait_for("off", seconds, seen=tell)
        boot.machine.wait_off(SECONDS)
        boot.machine.check_console()
        guest.forget_log(boot)


def tell(message):
    """Passes on what the guest has got through."""
    if message.startswith("ublk: "):
        say(message)
