"""Files of records, none of them read whole: any record by its number, as a dict.

    *.jsonl     one object a line; the places of the lines are found in one pass
    *.json      a list of objects; the only kind that is loaded whole
    *.parquet   row groups, the last few kept; needs the extra ``data``
    *.tar       WebDataset: members of one key are one record; the headers are read in one pass
    hub:NAME    streamed from the Hugging Face hub in stored order; needs the extra ``hub-data``

All can be pickled and used after a fork: files are opened where they are read.
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
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from nanomolmo2.data.example import BadExample

KEPT_GROUPS = 4  # row groups of a parquet file that stay in memory
# What is read of a tar; other members (pickles, masks such as 7.seg.png) never are.
MEMBER = re.compile(r"json|txt|(?:(\d+)\.)?(?:jpg|jpeg|png|webp|gif|bmp|tif|tiff)")


class Row(NamedTuple):
    """A record: its values, where it stands (for messages), what its paths are relative to."""

    values: dict[str, Any]
    where: str
    folder: Path


class Rows(Protocol):
    """Records by number. Reading one that is not as it should be raises `BadExample`."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Row: ...


class JsonLines:
    """One JSON object a line; blank lines do not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, self._numbers = array("q"), array("q")
        position = 0
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    self._starts.append(position)
                    self._numbers.append(number)
                position += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Row:
        where = f"{self.path}, line {self._numbers[i]}"
        with self.path.open("rb") as stream:
            stream.seek(self._starts[i])
            return Row(_object(stream.readline(), where), where, self.path.parent)


class JsonList:
    """One JSON list of objects; loaded whole, and again in every worker process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not isinstance(self._items, list):
            raise ValueError(
                f"{path}: expected a list of records, found {type(self._items).__name__}; one "
                f"object a line is a .jsonl file"
            )

    @cached_property
    def _items(self) -> list[Any]:
        try:
            items: list[Any] = json.loads(self.path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path} is not valid JSON ({error}): copy it again") from None
        return items

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> Row:
        where = f"{self.path}, record {i}"
        return Row(_checked(self._items[i], where), where, self.path.parent)


class Parquet:
    """Rows of a parquet file. A row costs the reading of its row group, unless that is kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]

    @cached_property
    def _file(self) -> Any:
        parquet = optional_module("pyarrow.parquet", "data", f"to read {self.path}")
        try:
            return parquet.ParquetFile(self.path, memory_map=True)
        except ValueError as error:  # pyarrow's ArrowInvalid
            raise ValueError(
                f"{self.path} is not a parquet file ({error}): copy it again"
            ) from None

    @cached_property
    def _group(self) -> Callable[[int], Any]:
        # Without threads: those that pyarrow has begun would be lost in a fork.
        return lru_cache(KEPT_GROUPS)(
            lambda group: self._file.read_row_group(group, use_threads=False)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_starts": self._starts}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> Row:
        where = f"{self.path}, row {i}"
        group = bisect.bisect_right(self._starts, i) - 1
        try:
            values = self._group(group).slice(i - self._starts[group], 1).to_pylist()[0]
        except (ValueError, OSError) as error:
            raise BadExample("bad record", f"{where} cannot be read ({error})") from None
        return Row(values, where, self.path.parent)


class Tar:
    """WebDataset: ``a/7.json, a/7.jpg`` or ``a/7.txt, a/7.0.png, a/7.1.png`` are one record.

    The record is what its json holds, or ``{"caption": what its txt holds}``, with the images of
    the tar (bytes, by their numbers) as ``images``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        members: dict[str, list[tuple[str, int, int]]] = {}  # key -> (extension, offset, size)
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, file = member.name.rpartition("/")
                    key, _, extension = file.partition(".")
                    if not member.isreg() or not key:  # hidden files begin with the dot
                        continue
                    found = members.setdefault(f"{folder}/{key}", [])
                    extension = extension.lower()
                    if MEMBER.fullmatch(extension):
                        found.append((extension, member.offset_data, member.size))
        except tarfile.TarError as error:
            raise ValueError(
                f"{path} cannot be read as a tar ({error}): copy it again, and unpack it first if "
                f"it is compressed (gunzip), since members are read where they lie"
            ) from None
        self._keys = [key.lstrip("/") for key in members]
        self._members = [sorted(found, key=_image_number) for found in members.values()]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> Row:
        where = f"{self.path}, key {self._keys[i]}"
        values: dict[str, Any] = {}
        images: list[bytes] = []
        with self.path.open("rb") as stream:
            for extension, offset, size in self._members[i]:
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
        return Row(values, where, self.path.parent)


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
        return Row(json.loads(text, object_hook=_bytes_from_json), where, Path())


class Joined:
    """Several files of records, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> Row:
        part = bisect.bisect_right(self._starts, i) - 1
        return self._parts[part][i - self._starts[part]]


KINDS: dict[str, Callable[[Path], Rows]] = {
    ".parquet": Parquet,
    ".tar": Tar,
    ".jsonl": JsonLines,
    ".json": JsonList,
}


def open_rows(path: str, subset: str = "", split: str = "train") -> Rows:
    """Records of a file, of a folder's files, of files by a pattern (``train-*.parquet``), a hub.

    Raises: FileNotFoundError; ValueError for files of unknown or several kinds or splits; and
        ImportError naming the extra that is not installed.
    """
    if path.startswith("hub:"):
        return HubRows(path.removeprefix("hub:"), subset, split)
    files = _find_files(Path(os.path.expanduser(path)))
    return (
        Joined([KINDS[file.suffix](file) for file in files])
        if files[1:]
        else (KINDS[files[0].suffix](files[0]))
    )


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


def _image_number(member: tuple[str, int, int]) -> int:
    found = MEMBER.fullmatch(member[0])
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
