"""Debian roots as archives, and as disks that a guest goes over to (guest/debian-init)."""

import pathlib
import shutil

from .common import Failure, run, say

# What no guest reads.
LEFT_OUT = ("./dev/*", "./usr/share/doc", "./usr/share/locale", "./usr/share/man")


def archive(release, packages, cache, components="main"):
    """A root of that release with those packages, made once for each list of them."""
    cache.mkdir(parents=True, exist_ok=True)
    tar, recipe = cache / f"debian-{release}.tar", cache / f"debian-{release}.recipe"
    wanted = " ".join(packages)
    if tar.exists() and recipe.exists() and recipe.read_text(encoding="utf-8") == wanted:
        return tar
    if shutil.which("mmdebstrap") is None:
        raise Failure("missing: apt-get install --no-install-recommends mmdebstrap debian-archive-keyring")
    say(f"making a root of Debian {release} (once; kept in {cache})")
    unfinished = tar.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    run(
        "mmdebstrap", "--quiet", "--variant=essential", "--format=tar", f"--components={components}",
        "--dpkgopt=force-unsafe-io", '--aptopt=APT::Install-Recommends "false"',
        '--aptopt=Acquire::Retries "3"', '--aptopt=Acquire::Check-Valid-Until "false"',
        f"--include={','.join(packages)}", release, unfinished,
    )
    unfinished.rename(tar)
    # Last: an archive with a recipe is whole.
    recipe.write_text(wanted, encoding="utf-8")
    return tar


def unpack(tar, tree):
    """The root in an archive as a directory, which is made anew."""
    shutil.rmtree(tree, ignore_errors=True)
    pathlib.Path(tree).mkdir(parents=True)
    left_out = [f"--exclude={name}" for name in LEFT_OUT]
    run("tar", "-xpf", tar, "-C", tree, "--numeric-owner", *left_out)


def disk(tree, image, size):
    """Makes an ext4 of that size, like `4G`, which holds a directory; the directory is gone then."""
    image.unlink(missing_ok=True)
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, image, size)
    shutil.rmtree(tree)
