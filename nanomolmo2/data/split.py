"""Parts of a data source that have no picture in common: what is learned from and what is held out.

    group_by_picture   source -> groups of records that share a picture, or a copy of one
    split_groups       groups -> the rest and the held-out parts: seeded, labels spread over them

A picture is known by the bytes of its file, wherever they lie: beside the records, in a parquet
file, in a tar. So copies under other names are one picture, and nothing is decoded.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanomolmo2.checks import sha256_of
from nanomolmo2.data.audit import digest
from nanomolmo2.data.example import BadExample
from nanomolmo2.data.sources import RecordSource, Source
from nanomolmo2.processor import load_image

OnProgress = Callable[[int, int], None]  # called with the numbers of records done and of all
LONGEST_CLASS = 40  # characters; a longer answer is a text of its own, no class


class Group(NamedTuple):
    """Records (their numbers, rising) that share pictures, and the labels that they have."""

    records: list[int]
    labels: frozenset[str] = frozenset()


def group_by_picture(*sources: Source, on_progress: OnProgress | None = None) -> list[Group]:
    """Sort the records of sources by the pictures (and videos) that they show.

    Two records are in one group if a picture of the one is a picture of the other, byte by byte,
    or if others link them so. A record without pictures is with its exact copies. One whose
    pictures cannot be read is with those that name the same ones.

    Args:
        sources: of records (files, the hub), none of which is decoded; others give their examples,
            whose pictures are compared by their pixels.
    Returns: groups in the order of their first records; every record is in exactly one. Those of a
        second source are counted on from the first one's.
    """
    reader = PictureReader()
    records = [(source, i) for source in sources for i in range(len(source))]
    parents = list(range(len(records)))
    labels: list[frozenset[str]] = []
    first: dict[bytes, int] = {}  # picture -> record that showed it first

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    for i, (source, number) in enumerate(records):
        pictures, found = reader.look(source, number)
        labels.append(found)
        for picture in pictures:
            a, b = root(first.setdefault(picture, i)), root(i)
            parents[max(a, b)] = min(a, b)
        if on_progress is not None:
            on_progress(i + 1, len(records))
    groups: dict[int, list[int]] = {}
    for i in range(len(records)):
        groups.setdefault(root(i), []).append(i)
    return [
        Group(members, frozenset().union(*(labels[i] for i in members)))
        for members in groups.values()
    ]


def split_groups(
    groups: Sequence[Group], shares: float | Sequence[float], seed: int = 0
) -> list[list[int]]:
    """Deal groups out to the rest and to one part for each share, as whole groups.

    The same groups, shares and seed give the same parts. Groups are dealt label by label (that of
    their labels which the fewest groups have), in an order drawn from the seed, each to the part
    that lacks most: so every part has nearly its share of the records, and of every label.

    Args:
        shares: of the records, each above 0, together below 1, such as 0.1 or (0.1, 0.1).
    Returns: the numbers of the records, rising: first of the rest, then of each share's part.
    Raises: ValueError for other shares, and if a part would be empty.
    """
    shares = [float(shares)] if isinstance(shares, (int, float)) else list(shares)
    if not shares or not all(share > 0 for share in shares) or not sum(shares) < 1:
        raise ValueError(
            f"found the shares {', '.join(f'{share:g}' for share in shares) or 'none'}, expected "
            f"each above 0 and their sum below 1, such as 0.1"
        )
    targets = [1 - sum(shares), *shares]
    parts: list[list[int]] = [[] for _ in targets]
    dealt = 0
    for group in _by_label(groups, np.random.default_rng(seed)):
        dealt += len(group.records)
        lacks = [target * dealt - len(part) for target, part in zip(targets, parts, strict=True)]
        parts[lacks.index(max(lacks))] += group.records
    for share, part in zip(targets, parts, strict=True):
        if not part:
            raise ValueError(
                f"a share of {share:g} of {dealt} records in {len(groups)} groups of the same "
                f"pictures is an empty split: give a larger share, or more pictures"
            )
    return [sorted(part) for part in parts]


def _by_label(groups: Sequence[Group], rng: np.random.Generator) -> Iterator[Group]:
    """All groups in a drawn order, those of one label one after the other."""
    counts = Counter(label for group in groups for label in group.labels)
    strata: dict[str, list[Group]] = {}
    for i in rng.permutation(len(groups)):
        group = groups[i]
        rarest = min(group.labels, key=lambda label: (counts[label], label), default="")
        strata.setdefault(rarest, []).append(group)
    for stratum in strata.values():  # in the order in which the permutation met them
        yield from stratum


class PictureReader:
    """Digests of the pictures that records show; a file is read once, however often it is named."""

    def __init__(self) -> None:
        self._files: dict[Path, bytes] = {}

    def look(self, source: Source, i: int) -> tuple[list[bytes], frozenset[str]]:
        """(a digest of each picture of record ``i``, its labels).

        Of no picture: one of the record itself. Of one that cannot be read: of its name.
        """
        try:
            if not isinstance(source, RecordSource):
                images = source[i].images
                pixels = [digest(load_image(image)) for image in images]
                return pixels or [_digest(f"{source.name} {i}")], frozenset()
            row = source.rows[i]
            record = source.record(row, i)
        except (BadExample, ValueError, OSError):
            return [_digest(f"unreadable {source.name} {i}")], frozenset()
        pictures = []
        for value in pictures_of(row.values):
            try:
                pictures.append(self._digest_of(record.find(value)))
            except (BadExample, ValueError, OSError):
                pictures.append(_digest(repr(value)))
        if not pictures:
            pictures = [_digest(repr(sorted(row.values.items(), key=lambda item: str(item[0]))))]
        return pictures, labels_of(row.values)

    def _digest_of(self, found: Any) -> bytes:
        if isinstance(found, Path):
            if found not in self._files:
                self._files[found] = bytes.fromhex(sha256_of(found))
            return self._files[found]
        if isinstance(found, bytes):
            return hashlib.sha256(found).digest()
        return _digest(found) if isinstance(found, str) else digest(load_image(found))


def pictures_of(values: Mapping[str, Any]) -> Iterator[Any]:
    """What a record of any layout names as its pictures, the frames of its video, or its video."""
    for name in ("image", "images", "image_url", "video"):
        value = values.get(name)
        if name == "image_url" and values.get("image") is not None:
            continue
        if name == "video" and isinstance(value, Mapping):
            value = value.get("frames")
        yield from value if isinstance(value, list) else [value] if value is not None else ()


def labels_of(values: Mapping[str, Any]) -> frozenset[str]:
    """What a record of our layout has labels of: things with points, and short answers."""
    labels = set()
    branches = values.get("branches")
    for branch in branches if isinstance(branches, list) else [values]:
        if not isinstance(branch, Mapping):
            continue
        answer = branch.get("answer")
        pointing = answer if isinstance(answer, Mapping) else branch
        if pointing.get("points") and isinstance(pointing.get("label"), str):
            labels.add(pointing["label"])
        if isinstance(answer, str) and len(answer) <= LONGEST_CLASS:
            labels.add(answer)
    return frozenset(labels)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
