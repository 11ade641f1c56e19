"""`sharp kernels`: the compiled kernels on disk, filled and emptied.

Knows: how to say it. The work is kernels_numba's: cubins.py keeps the files, prebuild.py makes them.
"""

from __future__ import annotations

import sys

from sharp.cli.errors import CommandError, bad_input, say
from sharp.info import show_bytes


def kernels_command(build: bool, clear: bool, arch: str | None) -> None:
    """Empty the cache, fill it, say what it holds. CommandError where kernels could not be made or kept."""
    from kernels_numba import cubins

    place = cubins.cache_directory()
    if clear:
        count, size = cubins.clear()
        say(f"sharp: deleted {count} kernels ({show_bytes(size)}) of {place}")
    if build:
        _build(arch)
    count, size = cubins.contents()
    print(f"{place}: {count} kernels, {show_bytes(size)}")


def _build(arch: str | None) -> None:
    from kernels_numba.prebuild import prebuild

    with bad_input():
        built = prebuild(arch=arch, progress=sys.stderr.isatty())
    for name, error in built.failures.items():
        say(f"sharp: {name}: {error.strip().splitlines()[0]}")
    if built.failures or built.not_kept:
        raise CommandError(str(built), 1)
    say(f"sharp: {built}")
