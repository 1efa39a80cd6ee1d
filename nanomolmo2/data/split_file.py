"""A file of records -> one file for each part, none of whose pictures is in another part.

DIR/train.jsonl  DIR/val.jsonl  DIR/test.jsonl?  DIR/split.json    how it was split
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanomolmo2.checks import check_replaceable, refuse_overwriting, sha256_of
from nanomolmo2.data.example import BadExample
from nanomolmo2.data.record import Record
from nanomolmo2.data.sources import RecordSource, SourceConfig, open_source
from nanomolmo2.data.split import OnProgress, group_by_picture, split_groups
from nanomolmo2.files import atomic_path

PARTS = ("train", "val", "test")
ABOUT = "split.json"
_PICTURES = ("image", "images", "video")


def split_file(
    data: str | Path,
    out: str | Path,
    shares: Sequence[float],
    *,
    seed: int = 0,
    images: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Write the records of ``data`` into the folder ``out``, each into exactly one part.

    Paths of pictures are rewritten so that they lead from ``out`` to where they led before.

    Args:
        data: a .jsonl or .json file of any layout.
        out: a new or empty folder, or one of an earlier split.
        shares: of the records: of val, or of val and test.
        images: folder of the pictures; None: paths go out from ``data``.
        on_progress: called with (records looked at, all records).
    Returns: what ``out/split.json`` says: ``records`` and ``pictures`` (groups of records that
        share a picture) of each part, shares, seed, the checksum of ``data``, and
        ``missing_pictures``, as the records name them: they are known by their names alone.
    Raises: OSError; ValueError for a file of another kind, a record that is no JSON object, shares
        that are none, and an empty part; then nothing is written.
    """
    data, out = Path(data).expanduser(), Path(out).expanduser()
    if len(shares) > len(PARTS) - 1:
        raise ValueError(f"found {len(shares)} shares, expected one (val) or two (val and test)")
    if data.suffix not in (".jsonl", ".json"):
        raise ValueError(
            f"{data} is no .jsonl or .json file of records: of others make a part of the training "
            f"by --val-share"
        )
    check_replaceable(out, (*(f"{part}.jsonl" for part in PARTS), ABOUT))
    refuse_overwriting(out, [data])
    if images is not None and not Path(images).expanduser().is_dir():
        raise ValueError(f"there is no folder {images}: --images names that of the pictures")
    source = open_source(SourceConfig(str(data), image_folder=str(images or "")))
    assert isinstance(source, RecordSource)
    groups = group_by_picture(source, on_progress=on_progress)
    parts = split_groups(groups, shares, seed)
    about = {
        "data": str(data),
        "sha256": sha256_of(data),
        "shares": list(shares),
        "seed": seed,
        "parts": {
            name: {
                "records": len(part),
                "pictures": sum(group.records[0] in members for group in groups),
            }
            for name, part, members in zip(PARTS, parts, map(set, parts), strict=False)
        },
    }
    missing: list[str] = []
    with atomic_path(out) as temporary:
        temporary.mkdir()
        for name, part in zip(PARTS, parts, strict=False):
            with (temporary / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
                for i in part:
                    stream.write(_moved(source, i, os.path.realpath(out), missing))
        about["missing_pictures"] = sorted(set(missing))
        (temporary / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return about


def _moved(source: RecordSource, i: int, folder: str, missing: list[str]) -> str:
    """Record ``i`` as a line, with paths of pictures that go out from ``folder``; those without a
    file are added to ``missing``.
    """
    try:
        row = source.rows[i]
    except BadExample as bad:
        raise ValueError(f"{bad.detail}: correct it, or remove it") from None
    record = source.record(row, i)
    values = dict(row.values)
    for name in _PICTURES:
        if values.get(name) is not None:
            values[name] = _moved_picture(values[name], record, folder, missing)
    address = values.get("image_url")
    if isinstance(address, str) and values.get("image") is None:
        moved = _moved_picture(address, record, folder, [])
        if moved != address:  # its picture was saved beside the records
            values["image"] = moved
    line = json.dumps(values, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half of a pair, which only an escape can write
        line = json.dumps(values)
    return line + "\n"


def _moved_picture(value: Any, record: Record, folder: str, missing: list[str]) -> object:
    if isinstance(value, list):
        return [_moved_picture(item, record, folder, missing) for item in value]
    if isinstance(value, Mapping):
        keys = {"path", "frames"} & value.keys()
        return {
            **value,
            **{key: _moved_picture(value[key], record, folder, missing) for key in keys},
        }
    if not isinstance(value, str) or not value.strip() or value.startswith(("data:", "file:")):
        return value
    if os.path.isabs(value):
        return value
    try:
        found = record.find(value)
    except BadExample:  # an address whose picture is not here
        return value
    if not isinstance(found, Path):
        return value
    if not found.exists():
        missing.append(value)
    try:
        return Path(os.path.relpath(os.path.abspath(found), folder)).as_posix()
    except ValueError:  # on another drive
        return found.absolute().as_posix()
