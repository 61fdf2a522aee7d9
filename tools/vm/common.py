"""What the parts of vmtest share."""

import ctypes
import signal
import subprocess
import sys
import time

START = time.monotonic()


class Failure(Exception):
    """Something is not as it should be: what, why, and what to do."""


class Lost(Failure):
    """Something that was acknowledged is not there after a power cut."""


def say(text):
    print(f"[{time.monotonic() - START:6.1f}s] {text}", flush=True)


def run(*command, cwd=None):
    """Runs a program to its end and returns what it printed."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise Failure(f"{words[0]} is not installed") from None
    if done.returncode != 0:
        raise Failure(f"{' '.join(words)} failed ({done.returncode}):\n{done.stderr.strip()}")
    return done.stdout


def end_with_parent():
    """For the child between fork and exec: it never outlives us, whatever ends us."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def fail_on_signals():
    """SIGTERM and SIGHUP end the program through its `finally` blocks."""

    def stop(number, _frame):
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
