"""Files that are either complete or not there, and inputs that are files and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from functools import lru_cache
from io import BufferedReader
from pathlib import Path

_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@lru_cache(maxsize=1)
def _kernel_devices() -> set[int]:
    return {os.stat(path).st_dev for path in ("/proc", "/sys") if os.path.ismount(path)}


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling to write a file or a folder to; rename it to ``path`` at the end.

    On any error the temporary is removed and what was at ``path`` before stays as it was. A folder
    replaces an existing folder only after the new one is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as PIL choose the format by it.
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp-{path.name}")
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            old = path.with_name(f".{uuid.uuid4().hex[:8]}.old-{path.name}")
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file for reading in binary, if it is a regular file.

    What was opened is asked, not the path, so nothing can be exchanged in between. A named pipe
    without a writer does not block. Files of the kernel (/proc, /sys) call themselves regular, and
    some of them never end: they are none.

    Raises: OSError as `open`; ValueError for a folder, a device, a pipe or a socket.
    """
    try:
        number = os.open(path, _READ)
    except ValueError as error:  # a zero byte in the name
        raise ValueError(f"{os.fspath(path)!r} is no name of a file ({error})") from None
    opened = os.fstat(number)
    if opened.st_dev in _kernel_devices() or not stat.S_ISREG(opened.st_mode):
        os.close(number)
        kind = "a folder" if stat.S_ISDIR(opened.st_mode) else "a device or a pipe"
        raise ValueError(f"{os.fspath(path)} is {kind}, expected a regular file")
    return open(number, "rb")


def read_regular(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """All bytes of a regular file.

    Raises: OSError as `open`; ValueError if it is no regular file or longer than ``max_bytes``.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise ValueError(
                f"{os.fspath(path)} has {size:,} bytes, expected at most {max_bytes:,}"
            )
        return stream.read(size)
