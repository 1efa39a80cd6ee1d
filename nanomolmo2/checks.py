"""Checks of files: what they hold, and that no output is written over an input."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanomolmo2.files import atomic_path, open_regular, read_regular

if TYPE_CHECKING:
    from PIL.Image import Image

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MOST_JSON = 32 * 2**20  # bytes of a JSON file; as Python objects they are twenty times as much


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


def check_replaceable(folder: str | os.PathLike[str], known: Iterable[str]) -> None:
    """Raises: ValueError if writing a folder would remove anything but what was written before.

    A folder that is new or empty may be written, and one of files whose names are like ``known``
    (``*.json``).
    """
    patterns = list(known)
    if os.path.isfile(folder):
        raise ValueError(f"{os.fspath(folder)} is a file: name a folder to write")
    for path in Path(folder).iterdir() if os.path.isdir(folder) else ():
        if path.is_dir() or not any(fnmatch(path.name, pattern) for pattern in patterns):
            raise ValueError(
                f"{os.fspath(folder)} would be replaced, and it holds other things, such as "
                f"{path.name[:80]}: name a new or empty folder"
            )


@contextlib.contextmanager
def named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let what goes wrong while an output is written name the output.

    A full disk names no file, an encoder not even the reason, and some name the temporary file.

    Raises: OSError in place of such an error.
    """
    try:
        yield
    except OSError as error:
        at = os.fspath(error.filename) if error.filename is not None else None
        is_output = isinstance(at, str) and (
            f".tmp-{Path(path).name}" in at or (at == str(path) and error.errno in FULL_DISK)
        )
        says_nothing = at is None and (error.errno is not None or type(error) is OSError)
        if not (is_output or says_nothing):
            raise
        reason = error.strerror or " ".join(str(error).split())
        raise OSError(
            f"{os.fspath(path)} could not be written ({reason}): is the disk full? Nothing there "
            f"was changed"
        ) from error


@contextlib.contextmanager
def written(path: str | Path) -> Iterator[Path]:
    """`atomic_path`, with errors that name ``path``."""
    with named_errors(path), atomic_path(path) as temporary:
        yield temporary


def save_image(image: Image, path: str | Path, format: str | None = None, **options: Any) -> None:
    """Write a PIL image, complete or not at all.

    It is encoded in memory: PIL's own writers of JPEG and GIF do not notice that a disk is full.

    Args:
        format: such as ``GIF``; by default that of the suffix.
        options: of PIL's ``save``.
    Raises: OSError that names the file.
    """
    from PIL.Image import registered_extensions

    stream = io.BytesIO()
    image.save(stream, format or registered_extensions()[Path(path).suffix.lower()], **options)
    with written(path) as temporary:
        temporary.write_bytes(stream.getbuffer())


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file, read in blocks.

    Raises: OSError as `open`; ValueError if it is no regular file.
    """
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def with_digest(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a ``digest`` of all its keys and values, for `read_with_digest`."""
    return {**values, "digest": _digest_of(values)}


def read_with_digest(path: str | Path, since: str | None = None) -> dict[str, Any]:
    """Such an object from a file, without its digest; files of before the digest have none.

    A key that is none any more is for the caller to notice: a changed ``digest`` is another key.

    Args:
        since: a key that only files with a digest have.
    Raises: OSError; ValueError if a value or a key is not as it was written.
    """
    try:
        content = json.loads(read_regular(path, MOST_JSON).decode())
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    digest = content.pop("digest", None)
    if digest is None and since in content:
        raise ValueError("its digest is missing")
    if digest is not None and digest != _digest_of(content):
        raise ValueError("its values are not as they were written")
    return content


def _digest_of(values: Mapping[str, Any]) -> str:
    # Tuples and numbers as keys become what they are when the file is read.
    plain = json.loads(json.dumps(values))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
