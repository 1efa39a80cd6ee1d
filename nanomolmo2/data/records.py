"""Files of records, none of them read whole: any record by its number, as a dict.

    *.jsonl     one object a line; the places of the lines are found in one pass
    *.json      a list of objects, the only kind that is loaded whole; or one object a line
    *.parquet   row groups, the last few kept; needs the extra ``data``
    *.tar       WebDataset: members of one key are one record; the headers are read in one pass
    hub:NAME    streamed from the Hugging Face hub in stored order; needs the extra ``hub-data``

All can be pickled and used after a fork: files are opened where they are read. Only regular files
are, and nothing larger is read at once than one record may be.
"""

from __future__ import annotations

import base64
import bisect
import json
import os
import re
import tarfile
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from nanomolmo2.data.example import BadExample, brief
from nanomolmo2.data.fields import READ
from nanomolmo2.files import open_regular

BLOCK = 2**18  # bytes of lines that are looked through at once
_BLANK = np.isin(np.arange(256), list(b" \t\n\r\x0b\f"))
KEPT_GROUPS = 4  # row groups of a parquet file that stay in memory
MAX_TEXT = 32 * 2**20  # bytes of a line, or of a text in a tar: as objects 20 times as much
MAX_LIST = 2**30  # bytes that a list of many small values may take in memory
MAX_MEMBER = 256 * 2**20  # bytes of a picture in a tar
MAX_GROUP, MAX_TEXTS = 2**30, 2**28  # bytes of what is read of a row group, and of its texts
# What is read of a tar; other members (pickles, masks such as 7.seg.png) never are.
MEMBER = re.compile(r"json|txt|(?:(\d+)\.)?(?:jpg|jpeg|png|webp|gif|bmp|tif|tiff)")


class Row(NamedTuple):
    """A record: its values, where it stands (for messages), what its paths are relative to.

    ``confined``: it comes from an archive or the hub, and so may name no file of this machine.
    ``unread``: what it has beside the values that was never loaded, with what is known of it.
    """

    values: dict[str, Any]
    where: str
    folder: Path
    confined: bool = False
    unread: Mapping[str, Any] = {}


class Rows(Protocol):
    """Records by number. Reading one that is not as it should be raises `BadExample`."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Row: ...


class JsonLines:
    """One JSON object a line; blank lines do not count."""

    is_cheap = True  # a record costs no more than its line

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, self._numbers = array("q"), array("q")
        position, number, begin, filled = 0, 1, 0, False  # of the block, of the line in work
        with open_regular(path) as stream:
            while block := stream.read(BLOCK):  # a line may be longer than the memory
                values = np.frombuffer(block, np.uint8)
                ends = np.flatnonzero(values == ord("\n"))
                written = np.concatenate(([0], np.cumsum(~_BLANK[values], dtype=np.int32)))
                starts = np.concatenate(([0], ends + 1))
                counts = np.diff(written[np.append(starts, len(values))])
                counts[0] += filled
                starts += position
                starts[0] = begin
                lines = np.flatnonzero(counts[:-1])
                self._add(starts[lines], number + lines)
                position, number = position + len(values), number + len(ends)
                begin, filled = int(starts[-1]), bool(counts[-1])
        if filled:
            self._add(np.array([begin]), np.array([number]))

    def _add(self, starts: NDArray[np.int64], numbers: NDArray[np.int64]) -> None:
        self._starts.frombytes(starts.astype(np.int64).tobytes())
        self._numbers.frombytes(numbers.astype(np.int64).tobytes())

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, i: int) -> int:
        """The line of the file, from 1, that a record stands in."""
        return self._numbers[i]

    def __getitem__(self, i: int) -> Row:
        where = f"{self.path}, line {self._numbers[i]}"
        with open_regular(self.path) as stream:
            stream.seek(self._starts[i])
            line = stream.readline(MAX_TEXT + 1)
        if len(line) > MAX_TEXT:
            raise BadExample(
                "bad record",
                f"{where} is longer than {MAX_TEXT:,} bytes: keep pictures in files of their own",
            )
        return Row(_object(line, where), where, self.path.parent)


class JsonList:
    """One JSON list of objects; loaded whole, and again in every worker process."""

    is_cheap = True

    def __init__(self, path: Path) -> None:
        self.path = path
        if not isinstance(self._items, list):
            raise ValueError(
                f"{path}: expected a list of records or one object a line, found "
                f"{type(self._items).__name__}: put the records into a list, [...]"
            )

    @cached_property
    def _items(self) -> list[Any]:
        return cast(list[Any], load_json(self.path))  # looked at by __init__

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> Row:
        where = f"{self.path}, record {i}"
        return Row(_checked(self._items[i], where), where, self.path.parent)


def load_json(path: Path) -> object:
    """All that a JSON file holds.

    Raises: OSError; ValueError for what is no JSON, or would take too much memory.
    """
    with open_regular(path) as stream:
        content = stream.read()
    # What says little may take much: an empty object of 3 bytes takes 72.
    values = sum(content.count(sign) for sign in (b",", b"{", b"["))
    if len(content) < 16 * values and 2 * len(content) + 64 * values > MAX_LIST:
        raise ValueError(
            f"{path} has about {values:,} values in {len(content):,} bytes, which would take too "
            f"much memory: write one object a line, into a .jsonl file"
        )
    try:
        text = content.decode(json.detect_encoding(content))
        del content  # or there would be one copy more
        loaded: object = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is neither one JSON list nor one object a line ({error}): copy it again"
        ) from None
    return loaded


def open_json(path: Path) -> Rows:
    """A ``.json`` file: a list, or what people call so though it has one object a line."""
    with open_regular(path) as stream:
        first = b""
        while not first.strip() and (line := stream.readline(MAX_TEXT)):
            first = line
        is_object = first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{")
        more = stream.readline(2).strip() if is_object else b""
    try:
        known = is_object and READ & json.loads(first).keys()
    except (ValueError, RecursionError):
        known = False
    return JsonLines(path) if known or more.startswith(b"{") else JsonList(path)


class Parquet:
    """Rows of a parquet file. A row costs the reading of its row group, unless that is kept.

    Args:
        fields: columns that are loaded, all by default; one of no use may be larger than all others
            together.
    """

    def __init__(self, path: Path, fields: Collection[str] | None = None) -> None:
        self.path = path
        self._columns, self._unread = [], dict[str, Any]()
        metadata, schema = self._file.metadata, self._file.schema_arrow
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        for field in schema:
            if fields is None or field.name in fields:
                self._columns.append(field.name)
            else:
                self._unread[field.name] = _hint_of(str(field.type))

    @cached_property
    def _file(self) -> Any:
        parquet = optional_module("pyarrow.parquet", "data", f"to read {self.path}")
        open_regular(self.path).close()
        try:
            leaves = parquet.ParquetFile(self.path, memory_map=True).schema
            # A value that many rows share is held once: a few bytes of a file may be gigabytes.
            shared = [
                leaves.column(i).path
                for i in range(len(leaves))
                if leaves.column(i).physical_type == "BYTE_ARRAY"
            ]
            return parquet.ParquetFile(self.path, memory_map=True, read_dictionary=shared)
        except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid
            raise ValueError(
                f"{self.path} is not a parquet file ({brief(error)}): copy it again"
            ) from None

    @cached_property
    def _group(self) -> Callable[[int], Any]:
        # Without threads: those that pyarrow has begun would be lost in a fork.
        return lru_cache(KEPT_GROUPS)(
            lambda group: self._file.read_row_group(group, columns=self._columns, use_threads=False)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("path", "_starts", "_columns", "_unread")}

    @property
    def columns(self) -> list[str]:
        """Names of all columns, also of those that are not loaded."""
        return [*self._columns, *self._unread]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> Row:
        where = f"{self.path}, row {i}"
        group = bisect.bisect_right(self._starts, i) - 1
        try:
            self._check_size(group, where)
            found = self._group(group).slice(i - self._starts[group], 1).to_pylist()
        except (ValueError, OSError) as error:
            raise BadExample("bad record", f"{where} cannot be read ({brief(error)})") from None
        # Without a column of use there is no row either.
        return Row(found[0] if found else {}, where, self.path.parent, unread=self._unread)

    def _check_size(self, group: int, where: str) -> None:
        """Refuse what is too large before it is read."""
        metadata = self._file.metadata.row_group(group)
        total = texts = 0
        for i in range(metadata.num_columns):
            column = metadata.column(i)
            if column.path_in_schema.partition(".")[0] in self._columns:
                total += column.total_uncompressed_size
                kind = self._file.schema.column(i).logical_type.type
                texts += column.total_uncompressed_size if kind == "STRING" else 0
        rows = metadata.num_rows
        if total > min(MAX_GROUP, (MAX_MEMBER + MAX_TEXT) * rows) or texts > MAX_TEXTS:
            raise BadExample(
                "bad record",
                f"{where}: its row group has {total:,} bytes in {rows} rows, {texts:,} of text: "
                f"write the file with smaller row groups, of 100 rows for instance",
            )


class _Member(NamedTuple):
    """A part of a record in a tar; ``fault``: why it is not read."""

    extension: str
    offset: int
    size: int
    fault: str = ""


class Tar:
    """WebDataset: ``a/7.json, a/7.jpg`` or ``a/7.txt, a/7.0.png, a/7.1.png`` are one record.

    The record is what its json holds, or ``{"caption": what its txt holds}``, with the images of
    the tar (bytes, by their numbers) as ``images``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        members: dict[str, list[_Member]] = {}
        try:
            with (
                open_regular(path) as stream,
                tarfile.open(fileobj=stream, mode="r:") as tar,
            ):
                end = os.fstat(stream.fileno()).st_size
                for member in tar:
                    folder, _, file = member.name.rpartition("/")
                    key, _, extension = file.partition(".")
                    if member.isdir() or not key:  # hidden files begin with the dot
                        continue
                    found = members.setdefault(f"{folder}/{key}", [])
                    found.append(_member(member, extension.lower(), end))
        except (tarfile.TarError, OverflowError, EOFError, MemoryError) as error:
            reason = brief(error) or "too large a header"
            reason = reason.replace("unexpected end of data", "it breaks off")
            raise ValueError(
                f"{path} cannot be read as a tar ({reason}): copy it again, and unpack it first if "
                f"it is compressed (gunzip), since members are read where they lie"
            ) from None
        self._keys = [key.lstrip("/") for key in members]
        self._members = [sorted(found, key=_image_number) for found in members.values()]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> Row:
        where = f"{self.path}, key {brief(self._keys[i])}"
        values: dict[str, Any] = {}
        unread: dict[str, Any] = {}
        images: list[bytes] = []
        with open_regular(self.path) as stream:
            for extension, offset, size, fault in self._members[i]:
                if not MEMBER.fullmatch(extension):
                    unread[f".{extension}"] = f"a.{extension}"
                    continue
                if fault:
                    raise BadExample("bad record", f"{where}: its .{extension} {fault}")
                stream.seek(offset)
                content = stream.read(size)
                if extension == "json":
                    values = {**values, **_object(content, where)}
                elif extension == "txt":
                    values.setdefault("caption", content.decode(errors="replace").strip())
                else:
                    images.append(content)
        if images:
            values = {key: value for key, value in values.items() if key != "image"}
            values["images"] = images
        return Row(values, where, self.path.parent, confined=True, unread=unread)


def _member(member: tarfile.TarInfo, extension: str, end: int) -> _Member:
    """``end``: bytes of the whole tar."""
    fault = ""
    limit = MAX_TEXT if extension in ("json", "txt") else MAX_MEMBER
    if not member.isreg():
        fault = "is a link or a device, expected a file: pack the file itself"
    elif member.issparse():
        fault = "is stored with holes, expected a plain file: pack it without --sparse"
    elif member.size > limit:
        fault = f"has {member.size:,} bytes, expected at most {limit:,}"
    elif member.offset_data + member.size > end:
        fault = "breaks off: copy the tar again"
    return _Member(extension, member.offset_data, member.size, fault)


class HubRows:
    """Rows of a data set on the Hugging Face hub, downloaded as far as they were asked for.

    The stream can only go forward, so what has come is kept in a file that is deleted at the end;
    every process has its own. A resumed run streams again what came before.
    """

    in_order = True  # for the mixture: any other order would wait for the whole data set

    def __init__(self, name: str, subset: str = "", split: str = "train") -> None:
        self.name, self.subset, self.split = name, subset, split
        builder = self._datasets.load_dataset_builder(name, subset or None)
        splits = builder.info.splits or {}
        if split not in splits or not splits[split].num_examples:
            raise ValueError(
                f"hub:{name} does not say how many examples its split {split!r} has (it lists "
                f"{', '.join(splits) or 'none'}): name another split, or download its files and "
                f"give their folder"
            )
        self._size = int(splits[split].num_examples)
        self._reset()

    def _reset(self) -> None:
        self._process: int = os.getpid()
        self._stream: Iterator[dict[str, Any]] | None = None
        self._file: Any = None
        self._ends = array("q", [0])

    @property
    def _datasets(self) -> ModuleType:
        return optional_module("datasets", "hub-data", f"to stream {self.name} from the hub")

    def __getstate__(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("name", "subset", "split", "_size")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int) -> Row:
        where = f"hub:{self.name}, row {i}"
        if self._process != os.getpid():  # after a fork, two would pull at one stream
            self._reset()
        if self._stream is None:
            data = self._datasets.load_dataset(
                self.name, self.subset or None, split=self.split, streaming=True
            )
            # Images as bytes: a broken one must not end the stream.
            self._stream = iter(data.decode(False))
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the stream
        while len(self._ends) <= i + 1:
            values = next(self._stream, None)
            if values is None:
                raise BadExample("bad record", f"{where}: the stream ends before it")
            self._file.seek(self._ends[-1])
            self._file.write(json.dumps(values, default=_bytes_to_json).encode())
            self._ends.append(self._file.tell())
        self._file.seek(self._ends[i])
        text = self._file.read(self._ends[i + 1] - self._ends[i])
        values = json.loads(text, object_hook=_bytes_from_json)
        return Row(values, where, Path(), confined=True)


class Joined:
    """Several files of records, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(len(part) for part in parts)]
        self.is_cheap = all(getattr(part, "is_cheap", False) for part in parts)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> Row:
        part = bisect.bisect_right(self._starts, i) - 1
        return self._parts[part][i - self._starts[part]]


KINDS: dict[str, Callable[[Path], Rows]] = {
    ".parquet": Parquet,
    ".tar": Tar,
    ".jsonl": JsonLines,
    ".json": open_json,
}


def open_rows(
    path: str, subset: str = "", split: str = "train", fields: Collection[str] | None = None
) -> Rows:
    """Records of a file, of a folder's files, of files by a pattern (``train-*.parquet``), a hub.

    Args:
        fields: columns of parquet files that are loaded; None = all.
    Raises: FileNotFoundError; ValueError for files of unknown or several kinds or splits; and
        ImportError naming the extra that is not installed.
    """
    if path.startswith("hub:"):
        return HubRows(path.removeprefix("hub:"), subset, split)
    parts = [
        Parquet(file, fields) if file.suffix == ".parquet" else KINDS[file.suffix](file)
        for file in _find_files(Path(os.path.expanduser(path)))
    ]
    return Joined(parts) if parts[1:] else parts[0]


def _find_files(path: Path) -> list[Path]:
    kinds = ", ".join(KINDS)
    if path.is_dir():
        # Small .json files of other kinds lie beside data; they count where nothing else does.
        files = [file for file in sorted(path.rglob("*")) if file.suffix in KINDS]
        large = [file for file in files if file.suffix != ".json"]
        files = large or [file for file in files if file.parent == path]
    elif re.search(r"[*?\[]", path.name):
        files = sorted(path.parent.glob(path.name))
    elif path.exists():
        files = [path]
    else:
        raise FileNotFoundError(f"there is no {path}: expected a file of records ({kinds})")
    found = {file.suffix for file in files}
    if len(found) != 1 or not found <= set(KINDS):
        raise ValueError(
            f"{path}: found {', '.join(sorted(found)) or 'no files of records'}, expected files of "
            f"one of the kinds {kinds}: name one file, or several by a pattern ('train-*.tar')"
        )
    begins = (re.match(r"(train|validation|val|dev|test)\b", file.name) for file in files)
    splits = {begin[1] for begin in begins if begin}
    if len(splits) > 1:
        raise ValueError(
            f"{path} holds the splits {', '.join(sorted(splits))}: choose one by a pattern such as "
            f"'{path if path.is_dir() else path.parent}/train-*{files[0].suffix}'"
        )
    return files


def _image_number(member: _Member) -> int:
    found = MEMBER.fullmatch(member.extension)
    return int(found[1]) if found and found[1] else -1


def optional_module(module: str, extra: str, purpose: str) -> ModuleType:
    """Import what an extra installs. Raises: ImportError naming the extra."""
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ImportError(
            f"{purpose}, {package} is needed and not installed: pip install 'nanomolmo2[{extra}]'"
        ) from None


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadExample("bad record", f"{where} is not valid JSON ({error})") from None
    return _checked(values, where)


def _hint_of(kind: str) -> str | dict[str, bytes]:
    """Something like the values of a column that is not loaded, by its type in the schema."""
    if "bytes: binary" in kind:  # how pictures are stored, also in lists
        return {"bytes": b"GIF8"}
    return kind  # says that there is something


def _checked(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise BadExample(
            "bad record", f"{where}: found {type(values).__name__}, expected an object"
        )
    return values


def _bytes_to_json(value: Any) -> dict[str, str] | str:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return str(value)  # dates and the like, which no layout asks for


def _bytes_from_json(values: dict[str, Any]) -> bytes | dict[str, Any]:
    return base64.b64decode(values["base64"]) if values.keys() == {"base64"} else values
