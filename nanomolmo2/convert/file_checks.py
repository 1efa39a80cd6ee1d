"""What a file of weights says of itself, checked against its size before memory is asked for."""

from __future__ import annotations

import json
import math
import zipfile
from io import BufferedReader
from typing import Any, TypeGuard

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
QUANTIZED = {"I8": torch.int8}  # only where the config says so
_HEADER_LIMIT = 8_000_000  # bytes; 4,000 tensors take a half of one
_PICKLE_LIMIT = 4_000_000  # bytes of what describes the tensors of a ``.pt`` file


def read_header(
    stream: BufferedReader, size: int
) -> tuple[int, dict[str, dict[str, Any]], dict[str, Any]]:
    """Where the tensors start, what the header says of each, and of them all.

    Raises: ValueError unless the tensors have the sizes of their shapes and, one behind the other,
        fill the file: so they are never more than the file.
    """
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError("it ends within its header")
    if length > _HEADER_LIMIT:
        raise ValueError(f"its header has {length:,} bytes, expected at most {_HEADER_LIMIT:,}")
    header = json.loads(stream.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise ValueError(f"{name[:200]!r} in its header is no tensor")
        shape, span = entry.get("shape"), entry.get("data_offsets")
        if not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
            raise ValueError(f"{name[:200]!r} in its header has no shape or no place")
        dtype = (DTYPES | QUANTIZED).get(entry["dtype"])
        if dtype is not None and span[1] - span[0] != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name[:200]!r} has not the size of its shape")
        spans.append(span)
    place = 0
    for first, last in sorted(spans):
        if first != place or last < first:
            raise ValueError("its tensors overlap or leave gaps")
        place = last
    if place != size - 8 - length:
        raise ValueError("its tensors do not end where the file ends")
    return 8 + length, header, metadata if isinstance(metadata, dict) else {}


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    """Whether this is a short list of whole numbers that a shape or a place may have."""
    return (
        isinstance(values, list)
        and len(values) <= 8
        and all(type(n) is int and 0 <= n < 2**60 for n in values)
    )


def check_archive(stream: BufferedReader) -> None:
    """Raises: ValueError for an archive that would become more in memory than it is as a file."""
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed, which PyTorch does not do")
            if entry.filename.endswith(".pkl") and entry.file_size > _PICKLE_LIMIT:
                raise ValueError(
                    f"{entry.file_size:,} bytes describe its tensors, expected at most "
                    f"{_PICKLE_LIMIT:,}"
                )


def is_plain(value: Any, most: int = 10_000) -> bool:
    """Whether a value is at most ``most`` JSON values: a list may hold itself, or another often."""
    todo = [value]
    for done, found in enumerate(todo):  # which grows
        if done > most:
            return False
        if isinstance(found, dict):
            todo += (part for pair in list(found.items())[:most] for part in pair)
        elif isinstance(found, (list, tuple)):
            todo += found[:most]
        elif not isinstance(found, (str, int, float, bool, type(None))):
            return False
    return True
