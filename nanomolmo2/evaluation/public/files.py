"""The published files of a benchmark: found in a folder, read record by record.

Two kinds: parquet files as the Hugging Face hub has them, and JSON files beside folders of
pictures. Nothing is downloaded, and no record may name a file outside of the folder.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from nanomolmo2.data.example import BadExample, brief
from nanomolmo2.data.records import Joined, Parquet, Row, Rows, load_json

WORDS = {"train": ("train",), "val": ("val", "validation"), "dev": ("dev",), "test": ("test",)}


class Folder:
    """A folder that someone unpacked a benchmark into, and the data files in it."""

    def __init__(self, path: Path) -> None:
        """Raises: FileNotFoundError; ValueError for a file."""
        if not path.exists():
            raise FileNotFoundError(
                f"there is no folder {path}: name the folder that holds the benchmark's files"
            )
        if not path.is_dir():
            raise ValueError(f"{path} is a file, expected the folder that holds it")
        self.path = path
        self.files = sorted(_data_files(path))

    def find(self, pattern: str) -> list[Path]:
        """Files whose path ends like a pattern, such as ``annotations/*.json``."""
        return [file for file in self.files if PurePosixPath(file.as_posix()).match(pattern)]

    def listing(self) -> str:
        """Some of the files, for messages."""
        names = [brief(file.relative_to(self.path).as_posix()) for file in self.files]
        if not names:
            return "no .parquet or .json files"
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return ", ".join(names[:4]) + more


def _data_files(path: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(path):
        for name in names:
            if name.endswith((".parquet", ".json")):
                yield Path(folder, name)


class Layout(Protocol):
    """One way in which a benchmark is published."""

    def open(self, folder: Folder, split: str) -> Rows | None:
        """Its records; None if the folder holds none of this layout.

        Raises: ValueError for files that are there and not as they should be.
        """
        ...

    def describe(self, split: str) -> str:
        """What files it has, for messages."""
        ...


# ---- parquet files ----


@dataclass(frozen=True)
class ParquetFiles:
    """``val-00000-of-00002.parquet``, in any subfolder.

    Attributes:
        columns: that must be there; several names where copies of the data set differ.
        more: columns that are read where they are there.
        inside: pattern of the path to the files, where several data sets lie in one folder.
        any_name: all files belong to the only split there is, whatever they are called.
    """

    columns: tuple[tuple[str, ...], ...]
    more: tuple[str, ...] = ()
    inside: str = ""
    any_name: bool = False

    def open(self, folder: Folder, split: str) -> Rows | None:
        files = [file for file in folder.files if file.suffix == ".parquet"]
        if self.inside and len({file.parent for file in files}) > 1:
            places = {file: file.parent.relative_to(folder.path).as_posix() for file in files}
            files = [f for f in files if re.fullmatch(self.inside, places[f], re.IGNORECASE)]
        named = [file for file in files if _is_of(file, split)]
        if not named and self.any_name:
            named = files
        if not named:
            return None
        wanted = {name for names in self.columns for name in names} | set(self.more)
        parts = [Parquet(file, wanted) for file in named]
        for part in parts:
            self._check(part)
        return Joined(parts) if parts[1:] else parts[0]

    def _check(self, part: Parquet) -> None:
        found = part.columns
        missing = [names for names in self.columns if not set(names) & set(found)]
        if missing:
            raise ValueError(
                f"{part.path} has the columns {brief(', '.join(found))}, expected also "
                f"{_either(missing)}: is it another data set?"
            )

    def describe(self, split: str) -> str:
        name = "*.parquet" if self.any_name else f"{WORDS[split][-1]}-*.parquet"
        return f"{name} with the columns {_either(self.columns)}"


def _is_of(file: Path, split: str) -> bool:
    words = "|".join(WORDS[split])
    return bool(re.match(rf"(?:{words})(?![a-z])", file.name)) or file.parent.name in WORDS[split]


def _either(columns: Sequence[tuple[str, ...]]) -> str:
    return ", ".join(" or ".join(names) for names in columns)


# ---- JSON files beside pictures ----


@dataclass(frozen=True)
class JsonFiles:
    """A list of objects in each file, and pictures in folders beside it.

    In patterns and places ``{split}`` is the split; in places ``{name}`` is a field, and
    ``{image_name}`` the last part of the path in the field ``image``.

    Attributes:
        files: patterns; of each group the first that finds something, and all it finds.
        pictures: fields that are added to a record, and where the file of each may lie, relative to
            the JSON file or the folder.
        fields: that a record must have.
        key: of the list, where the file holds an object.
        annotations: pattern of a second file, whose records of the same ``question_id`` belong to
            those of the first.
        only_with: records without this field are left out.
    """

    files: tuple[tuple[str, ...], ...]
    pictures: Mapping[str, tuple[str, ...]]
    fields: tuple[str, ...]
    key: str = ""
    annotations: str = ""
    only_with: str = ""

    def open(self, folder: Folder, split: str) -> Rows | None:
        found = [self._group(folder, group, split) for group in self.files]
        if not any(found):
            return None
        for group, files in zip(self.files, found, strict=True):
            if not files:
                raise ValueError(
                    f"{folder.path} lacks {group[0].format(split=split)} beside "
                    f"{next(filter(None, found))[0].name}: unpack that too"
                )
        parts = [self._read(file, folder, split) for files in found for file in files]
        return Joined(parts) if parts[1:] else parts[0]

    @staticmethod
    def _group(folder: Folder, group: tuple[str, ...], split: str) -> list[Path]:
        for pattern in group:
            if files := folder.find(pattern.format(split=split)):
                return files
        return []

    def _read(self, file: Path, folder: Folder, split: str) -> Rows:
        items = read_items(file, self.key)
        if self.only_with:
            items = [item for item in items if not _lacks(item, self.only_with)]
        if self.annotations:
            pattern = self.annotations.format(split=split)
            others = folder.find(pattern)
            if not others:
                raise ValueError(f"{file} has no answers: {pattern} should lie beside it")
            known = {
                item["question_id"]: item.get("answers")
                for item in read_items(others[0], "annotations")
                if isinstance(item, dict) and isinstance(item.get("question_id"), (int, str))
            }
            items = [
                {**item, "answers": known.get(item.get("question_id"))}
                for item in items
                if isinstance(item, dict)
            ]
        return JsonItems(file, items, self, folder.path, split)

    def describe(self, split: str) -> str:
        names = [group[0].format(split=split) for group in self.files]
        if self.annotations:
            names.append(self.annotations.format(split=split))
        places = [where[0] for where in self.pictures.values()]
        return f"{' and '.join(names)} with {' and '.join(places).format_map(_Shown(split=split))}"


class _Shown(dict[str, str]):
    """Fields are shown by their names: ``{image_id:012d}`` as ``<image_id>``."""

    def __missing__(self, name: str) -> _FieldName:
        return _FieldName(name)


class _FieldName(str):
    def __format__(self, spec: str) -> str:
        return "<" + self + ">"


def _lacks(item: Any, name: str) -> bool:
    return isinstance(item, dict) and item.get(name) is None


def read_items(file: Path, key: str = "") -> list[Any]:
    """The list in a JSON file, which may be the value of ``key``.

    Raises: ValueError for anything else.
    """
    content = load_json(file)
    items = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(items, list):
        what = f"an object with the list {key!r}" if key else "a list of objects"
        found = f"the keys {brief(', '.join(content))}" if isinstance(content, dict) else "no list"
        raise ValueError(f"{file} holds {found}, expected {what}: is it another file?")
    return items


@dataclass(frozen=True)
class JsonItems:
    """Records of one JSON file, with the places of their pictures.

    A record gets the field ``annotation_file``: the name of the file without its ending.
    """

    file: Path
    items: list[Any] = field(repr=False)
    layout: JsonFiles
    folder: Path
    split: str

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Row:
        where = f"{self.file}, record {i}"
        item = self.items[i]
        if not isinstance(item, dict):
            raise BadExample("bad record", f"{where}: found {brief(item)}, expected an object")
        missing = [name for name in self.layout.fields if item.get(name) is None]
        if missing:
            raise BadExample(
                "bad record",
                f"{where}: found the fields {brief(', '.join(item))}, expected also "
                f"{', '.join(missing)}",
            )
        values = {**item, "annotation_file": self.file.stem}
        for name, places in self.layout.pictures.items():
            values[name] = self._place(places, item, where)
        return Row(values, where, self.folder, confined=True)

    def _place(self, places: Sequence[str], item: Mapping[str, Any], where: str) -> str:
        """Path of a picture, relative to the folder; the first place where it is nowhere."""
        name = PurePosixPath(str(item.get("image"))).name
        values = {**item, "split": self.split, "image_name": name}
        try:
            names = [place.format_map(values) for place in places]
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise BadExample(
                "missing picture", f"{where} does not say which picture it is about ({error})"
            ) from None
        beside = self.file.parent.relative_to(self.folder)
        # Accents are written in two ways, and archives change the one into the other.
        tried = [
            Path(base, unicodedata.normalize(form, name)).as_posix()
            for name in names
            for base in (beside, Path())
            for form in ("NFC", "NFD")
        ]
        there = (name for name in tried if os.path.isfile(self.folder / name))
        return next(there, tried[0])
