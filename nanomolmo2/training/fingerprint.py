"""Fingerprints of data: whether the files of records are those that a checkpoint was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from nanomolmo2.data.records import KINDS
from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.files import open_regular

READ_WHOLE = 256 * 2**20  # bytes of a source that are read; of larger ones samples are
SAMPLES, SAMPLE_BYTES = 64, 2**16  # of each file then


def fingerprints(configs: Iterable[SourceConfig]) -> dict[str, str]:
    """A digest of every source of files, by its path; registered ones and the hub have none.

    It covers the names and sizes of the files of records and their content: all of it up to
    `READ_WHOLE` bytes a source, else `SAMPLES` blocks of each file, evenly spread. The pictures
    that records name are not covered.
    """
    found = {}
    for config in configs:
        if config.registered is None and not config.path.startswith("hub:"):
            root = Path(config.path).expanduser()
            found[config.path] = _digest(root, files_of(root))
    return found


def changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Paths of the sources that are no longer what they were."""
    return [path for path, digest in now.items() if before.get(path, digest) != digest]


def files_of(path: Path) -> list[Path]:
    """The files of records of a path: a file, a folder or a pattern."""
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.suffix in KINDS]
    else:
        found = [path] if path.exists() else sorted(path.parent.glob(path.name))
    return [file for file in found if file.is_file()]


def _digest(root: Path, files: Sequence[Path]) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    sizes = [file.stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        name = file.relative_to(root) if root.is_dir() else file.name  # a moved folder is the same
        hashed.update(f"{str(name)!r} {size};".encode())
        with open_regular(file) as stream:
            if sum(sizes) <= READ_WHOLE:
                hashed.update(hashlib.file_digest(stream, "blake2b").digest())
            else:
                _sample(stream, size, hashed)
    return hashed.hexdigest()


def _sample(stream: IO[bytes], size: int, hashed: hashlib.blake2b) -> None:
    for i in range(SAMPLES):
        stream.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
        hashed.update(stream.read(SAMPLE_BYTES))
