"""Checks of files: what they hold, and that no output is written over an input."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from nanomolmo2.files import open_regular


def refuse_overwriting(
    out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]]
) -> None:
    """Raises: ValueError if writing ``out`` would replace one of the inputs, whatever the names
    (``./a.png``, links), or a folder that holds one.
    """
    for given in inputs:
        if not os.path.exists(given) or not os.path.exists(out):
            continue
        if os.path.samefile(out, given):
            raise ValueError(
                f"{os.fspath(out)} would be written over {os.fspath(given)}, which is read: name "
                f"another place"
            )
        if os.path.isdir(out) and Path(given).resolve().is_relative_to(Path(out).resolve()):
            raise ValueError(
                f"{os.fspath(out)} would be replaced, and {os.fspath(given)}, which is read, lies "
                f"in it: name another place"
            )


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file, read in blocks.

    Raises: OSError as `open`; ValueError if it is no regular file.
    """
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
