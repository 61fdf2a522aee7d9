"""The kernel's NBD client against `vellum nbd`, both in the guest."""

from .common import say

SECONDS = 1200


def exercise(guest, seed):
    """Runs guest/nbd on an empty disk."""
    guest.format()
    with guest.boot("nbd", seed) as boot:
        boot.machine.wait_for("off", SECONDS, show)
        boot.machine.wait_off(SECONDS)
        boot.machine.check_console()
        guest.forget_log(boot)


def show(message):
    if message.startswith("nbd: "):
        say(message)
