"""What a killed process left half-written, told from what a live one is writing by a lock.

The system drops a lock with the process that holds it, whatever ended it. Where there are no such
locks (Windows, some network drives) nothing is removed.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path


def lock(descriptor: int) -> bool:
    """Mark an opened file or folder as being written until it is closed; False: someone else has.

    Also False where there are no locks.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make a folder and hold its lock."""
    path.mkdir(parents=True)
    with _opened(path) as descriptor:
        if descriptor is not None:
            lock(descriptor)
        yield


def remove_leftovers(path: Path, keep: str = "") -> None:
    """Remove the temporary siblings of ``path`` that no process writes any more.

    keep: the name of one that stays.
    """
    for left in path.parent.glob(f".*.tmp-{glob.escape(path.name)}"):
        if left.name == keep or not re.match(r"\.[0-9a-f]{8}\.tmp-", left.name):
            continue
        with _opened(left) as descriptor:
            if descriptor is None or not lock(descriptor):
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    left.unlink()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # folders can not be opened on Windows
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
