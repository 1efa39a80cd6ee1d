"""Tensors in files: safetensors (one or sharded) and the converted ``.pt`` cache.

Reading goes tensor by tensor and, where the dtype changes, piece by piece, so that a load never
holds much more than the weights it returns.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from nanomolmo2.checks import sha256_of
from nanomolmo2.config import read_json_object
from nanomolmo2.convert.file_checks import (
    DTYPES,
    QUANTIZED,
    check_archive,
    is_plain,
    read_header,
)
from nanomolmo2.convert.leftovers import lock, remove_leftovers
from nanomolmo2.files import atomic_path, open_regular
from nanomolmo2.terminal import visible

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SAVE_ID = "save_id"  # in the metadata of the index and of its files: those of one save

CACHE_FORMAT = "nanomolmo2"
CACHE_VERSION = 1
COMPONENTS = ("vision_encoder", "llm")

_PIECE = 1 << 20  # elements converted at a time
_MAPPED_LIMIT = 1 << 23  # bytes of a mapped file that may stay in memory during a conversion


class Readable(Protocol):
    """A tensor that is still in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; nothing is read before :meth:`read`."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    version: tuple[int, ...]  # of the file whose header was read, see `_version`

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def read(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Read, in ``dtype`` (as stored by default), onto ``device``.

        Raises: ValueError if the file ends early.
        """
        target = torch.empty(self.shape, dtype=dtype or self.dtype)
        self.read_into(target.view(-1))
        return target if device is None else target.to(device)

    def read_into(self, flat: Tensor) -> None:
        """Fill a flat tensor of as many elements, in its dtype. Raises: as :meth:`read`."""
        if flat.dtype == self.dtype:
            for _ in self._pieces(flat):
                pass
        else:
            for start, piece in self._pieces(_buffer(self.numel, self.dtype)):
                flat[start : start + len(piece)] = piece

    def rows(self, start: int, stop: int) -> StoredTensor:
        """The rows ``start`` to ``stop``, as a tensor of its own that is not read either."""
        if (start, stop) == (0, self.shape[0]):
            return self
        row = math.prod(self.shape[1:])
        offset = self.offset + start * row * self.dtype.itemsize
        return replace(self, offset=offset, shape=(stop - start, *self.shape[1:]))

    def equals(self, other: StoredTensor) -> bool:
        """Whether both hold the same bits."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        mine, others = (_buffer(self.numel, self.dtype) for _ in range(2))
        pairs = zip(self._pieces(mine), other._pieces(others), strict=True)
        return all(torch.equal(_bytes(a), _bytes(b)) for (_, a), (_, b) in pairs)

    def _pieces(self, buffer: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Fill ``buffer`` again and again; yields (first element, the filled part)."""
        with open_regular(self.path) as buffered:
            stream = cast(FileIO, buffered.raw)  # straight into the tensor
            if _version(buffered) != self.version:  # weights of two saves are no model
                raise ValueError(f"{self.path} was replaced while it was read: load it again")
            stream.seek(self.offset)
            start = 0
            while start < self.numel:
                piece = buffer[: self.numel - start]
                view, done = _bytes(piece).numpy().data, 0
                while done < len(view):
                    count = stream.readinto(view[done:])
                    if not count:
                        raise ValueError(
                            f"{self.path} ended early while it was read: did it change?"
                        )
                    done += count
                yield start, piece
                start += len(piece)


@dataclass(frozen=True)
class StackedTensor:
    """Several tensors in files as one, row upon row; each is read straight to its place."""

    parts: tuple[StoredTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the parts'."""
        return functools.reduce(torch.promote_types, (p.dtype for p in self.parts))

    def read(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """As :meth:`StoredTensor.read`."""
        target = torch.empty(self.shape, dtype=dtype or self.dtype)
        sizes = [part.numel for part in self.parts]
        for part, flat in zip(self.parts, target.view(-1).split(sizes), strict=True):
            part.read_into(flat)
        return target if device is None else target.to(device)


@dataclass(frozen=True)
class PatchTensor:
    """Weights over patches as vectors (D, P * P * C), read as those of a convolution.

    The vector runs row, column, channel; ``shape`` is (D, C, P, P).
    """

    stored: StoredTensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def read(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """As :meth:`StoredTensor.read`."""
        D, C, P, _ = self.shape
        vectors = self.stored.read(dtype=dtype, device=device)
        return vectors.view(D, P, P, C).permute(0, 3, 1, 2).contiguous()


class TensorFile(NamedTuple):
    """A safetensors file whose header was read."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, Any]


def open_safetensors(directory: str | Path, *, quantized: bool = False) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint folder: ``model.safetensors``, or an index and its shards.

    Args:
        quantized: int8 tensors are expected too.
    Raises: ValueError for a folder without weights, an index that names a missing file, one outside
        the folder or a tensor that is not in it, damaged files, tensors of other dtypes, files of
        two saves.
    """
    directory = Path(directory)
    if (directory / WEIGHTS_NAME).exists():
        return open_tensor_file(directory / WEIGHTS_NAME, quantized=quantized).tensors
    if not (directory / INDEX_NAME).exists():
        others = sorted(p.name for p in directory.glob("*.bin"))
        remedy = (
            f"{others[0]} is a pickle: convert it to safetensors first"
            if others
            else "copy the weights again"
        )
        raise ValueError(
            f"{directory} holds no weights: expected {WEIGHTS_NAME} or {INDEX_NAME}; {remedy}"
        )
    return _open_shards(directory, quantized)


def _open_shards(directory: Path, quantized: bool) -> dict[str, StoredTensor]:
    index = directory / INDEX_NAME
    values = read_json_object(index)
    weight_map, about = values.get("weight_map"), values.get("metadata")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: expected weight_map to map tensor names to file names")
    files = sorted(set(weight_map.values()))
    # Names only, so that an index can not reach outside. The hub cache's links stay readable.
    outside = [f for f in files if f != Path(f).name or "\\" in f or f in ("", ".", "..")]
    if outside:
        raise ValueError(
            f"{index} points outside its folder: {', '.join(outside)[:200]}; do not trust this "
            f"checkpoint"
        )
    missing = [f for f in files if not _is_there(directory / f)]
    if missing:
        raise ValueError(
            f"{directory}: {len(missing)} of {len(files)} weight files are missing: "
            f"{', '.join(map(_shown, missing[:4]))}; download or copy them again"
        )
    save = about.get(SAVE_ID) if isinstance(about, dict) else None  # older and others' have none
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        opened = open_tensor_file(directory / file, quantized=quantized)
        if opened.metadata.get(SAVE_ID) != save:
            raise ValueError(
                f"{directory / file} is not of the same save as {INDEX_NAME}: the shards are of "
                f"different checkpoints; copy or save the folder again"
            )
        for name, tensor in opened.tensors.items():
            if weight_map.get(name) != file:
                raise ValueError(
                    f"{directory / file} holds {name[:200]}, which {INDEX_NAME} places in "
                    f"{weight_map.get(name, 'no file')}: the shards are of different checkpoints"
                )
            tensors[name] = tensor
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise ValueError(
            f"{directory}: {len(absent)} tensors of {INDEX_NAME} are in none of its files, such as "
            f"{absent[0][:200]}: the shards are of different checkpoints"
        )
    return tensors


def _shown(name: str) -> str:
    """The name of a file from an index, short and in one line."""
    return visible(name.replace("\n", "\\n"))[:80]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name of 300 letters
        return False


def open_tensor_file(path: str | Path, *, quantized: bool = False) -> TensorFile:
    """Read the header of a safetensors file, and check it against the file.

    Args:
        quantized: int8 tensors are expected too.
    Raises: OSError; ValueError naming the file for anything that is not a whole safetensors file,
        and for tensors of other dtypes.
    """
    path = Path(path)
    dtypes = DTYPES | QUANTIZED if quantized else DTYPES
    with open_regular(path) as stream:
        version, size = _version(stream), os.fstat(stream.fileno()).st_size
        try:
            start, entries, metadata = read_header(stream, size)
        except (ValueError, RecursionError) as error:
            stream.seek(0)
            is_pointer = stream.read(24).startswith(b"version https://git-lfs")
            remedy = "run git lfs pull" if is_pointer else "download or copy it again"
            raise ValueError(
                f"{path} is not a whole safetensors file ({size:,} bytes; {error}): {remedy}"
            ) from None
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] not in dtypes:
            raise ValueError(
                f"{path}: {name[:200]} is stored as {entry['dtype'][:20]}, expected one of "
                f"{', '.join(dtypes)}: use the release that is not quantised"
            )
        offset = start + entry["data_offsets"][0]
        dtype, shape = dtypes[entry["dtype"]], tuple(entry["shape"])
        tensors[name] = StoredTensor(path, offset, dtype, shape, version)
    return TensorFile(tensors, metadata)


def _version(stream: BufferedReader) -> tuple[int, ...]:
    """What tells an opened file from one that took its place."""
    found = os.fstat(stream.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class CacheFile:
    """A converted checkpoint: one component under our names, memory-mapped.

    Args:
        path: what :func:`write_cache` made.
    Raises: ValueError for anything else; code in the file is not run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._opened: tuple[int, ...] = ()
        self._check_size()
        payload = self._load()
        found = [payload.get("format"), payload.get("format_version")]
        if not is_plain(found) or found != [CACHE_FORMAT, CACHE_VERSION]:
            raise self._wrong("format {}, version {}".format(*map(reprlib.repr, found)))
        kinds = {"component": str, "config": dict, "source": dict, "state_dict": dict}
        for name, kind in kinds.items():
            if not isinstance(payload.get(name), kind):
                raise self._wrong(f"{name} of type {type(payload.get(name)).__name__}")
        if payload["component"] not in COMPONENTS:
            raise self._wrong(f"component {payload['component']!r:.80}")
        state_dict = payload.pop("state_dict")
        self._check_tensors(state_dict)
        if not all(is_plain(payload[name]) for name in ("config", "source")):
            raise self._wrong("a config or source that is not made of a few numbers and names")
        self.component: str = payload["component"]
        self.config: dict[str, Any] = payload["config"]
        self.source: dict[str, Any] = payload["source"]
        self._mapped: Mapping[str, Tensor] = state_dict
        self._touched = 0

    @property
    def tensors(self) -> dict[str, CachedTensor]:
        """The tensors by our name, not read yet."""
        return {n: CachedTensor(self, n, tuple(t.shape), t.dtype) for n, t in self._mapped.items()}

    def mapped(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file."""
        return self._mapped[name]

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of the flattened tensor, as a view of the mapped file.

        Pages that were read count as our memory for as long as the file is mapped, so the file is
        mapped anew every now and then.
        """
        if self._touched > max(_MAPPED_LIMIT, self.path.stat().st_size // 32):
            self._mapped = self._load()["state_dict"]
            self._touched = 0
        piece = self._mapped[name].reshape(-1)[start:stop]
        self._touched += piece.nbytes
        return piece

    def _check_size(self) -> None:
        record = record_path(self.path)
        if not record.exists():
            return
        expected, found = read_json_object(record).get("size"), self.path.stat().st_size
        if expected != found:
            raise ValueError(
                f"{self.path} has {found:,} bytes, but {record.name} recorded {expected!r:.40}: it "
                f"was cut or replaced; make it again with `nanomolmo2 download --force`"
            )

    def _load(self) -> dict[str, Any]:
        with open_regular(self.path) as stream:
            opened = self._opened = self._opened or _version(stream)
            if _version(stream) != opened:
                raise ValueError(f"{self.path} was replaced while it was read: load it again")
            try:
                check_archive(stream)
                payload = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:  # a damaged pickle may raise anything
                reason = str(error).split("\n")[0][:120]
                raise self._wrong(f"something that torch can not load safely ({reason})") from None
        if not isinstance(payload, dict):
            raise self._wrong(type(payload).__name__)
        return payload

    def _check_tensors(self, tensors: Mapping[Any, Any]) -> None:
        """A tensor may say that it is more than it is: rows that are all the same one in the file,
        or the rows of another one. So what they say counts, all together.
        """
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise self._wrong("entries that are not floating point tensors")
            if not isinstance(name, str) or tensor.layout != torch.strided:
                raise self._wrong("entries that are no plain tensors with a name")
        if not all(tensor.is_contiguous() for tensor in tensors.values()):
            raise self._wrong("tensors whose rows do not lie one behind the other")
        said, size = sum(t.nbytes for t in tensors.values()), self.path.stat().st_size
        if said > size:
            raise self._wrong(f"tensors of {said:,} bytes in a file of {size:,}")

    def _wrong(self, found: str) -> ValueError:
        return ValueError(
            f"{self.path} is not a weight cache: found {found}, expected format {CACHE_FORMAT!r}, "
            f"version {CACHE_VERSION}; delete it and run `nanomolmo2 download`, or pass "
            f"cache_dir=None"
        )


@dataclass(frozen=True)
class CachedTensor:
    """A tensor of a :class:`CacheFile`."""

    file: CacheFile
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(
        self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """In ``dtype`` on ``device``; as stored on the CPU it is a view of the mapped file."""
        if dtype is None or dtype == self.dtype:
            target = self.file.mapped(self.name)
        else:
            target = torch.empty(self.shape, dtype=dtype)
            flat = target.view(-1)
            for start in range(0, len(flat), _PIECE):
                stop = min(start + _PIECE, len(flat))
                flat[start:stop] = self.file.piece(self.name, start, stop)
        return target if device is None else target.to(device)


def write_cache(
    path: str | Path,
    *,
    component: str,
    config: dict[str, Any],
    source: dict[str, Any],
    state_dict: Mapping[str, Tensor],
) -> None:
    """Write a converted checkpoint and, beside it, a record of its size and sha256.

    Raises: OSError if the disk is full; nothing half-written stays.
    """
    path = Path(path)
    remove_leftovers(path)
    payload = {
        "format": CACHE_FORMAT,
        "format_version": CACHE_VERSION,
        "component": component,
        "config": config,
        "source": source,
        "state_dict": dict(state_dict),
    }
    with atomic_path(path) as temporary:
        try:
            # By a stream: given a path, torch writes its random temporary name into the file.
            with open(temporary, "wb") as stream:
                lock(stream.fileno())
                torch.save(payload, stream)
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            raise OSError(f"could not write {path} ({reason}): is the disk full?") from None
        record = {
            "file": path.name,
            "size": temporary.stat().st_size,
            "sha256": sha256_of(temporary),
            "component": component,
            "source": source,
        }
    with atomic_path(record_path(path)) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def cache_is_intact(path: str | Path) -> bool:
    """Whether a cache file is there with the recorded size and sha256."""
    path = Path(path)
    if not path.exists() or not record_path(path).exists():
        return False
    try:
        record = read_json_object(record_path(path))
    except ValueError:
        return False
    return record.get("size") == path.stat().st_size and record.get("sha256") == sha256_of(path)


def record_path(path: str | Path) -> Path:
    """``checkpoints/x.pt`` -> ``checkpoints/x.json``."""
    return Path(path).with_suffix(".json")


def _buffer(numel: int, dtype: torch.dtype) -> Tensor:
    """Room for a piece of a tensor, outside malloc: there it would leave holes between weights."""
    size = min(numel, _PIECE) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size].view(dtype)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)
