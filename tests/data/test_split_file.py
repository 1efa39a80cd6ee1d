"""A file of records in parts: nothing lost, paths that still lead to the pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nanomolmo2.data.record import address_key
from nanomolmo2.data.sources import open_source
from nanomolmo2.data.split_file import split_file
from tests.data.sources import picture, write_records

ADDRESS = "https://example.org/1.png"


def read(folder: Path, *parts: str) -> list[dict[str, Any]]:
    return [json.loads(x) for p in parts for x in (folder / f"{p}.jsonl").read_text().splitlines()]


def own(name: Any, i: int = 0) -> dict[str, Any]:
    return {"image": name, "question": f"Number {i}?", "answer": str(i % 3)}


def test_nothing_is_lost_and_every_path_leads_on(tmp_path: Path) -> None:
    """Two records of each of 20 pictures, one of them by the name of a copy."""
    (tmp_path / "images").mkdir()
    lines = []
    for i in range(20):
        picture(i).save(tmp_path / "images" / f"{i}.png")
        picture(i).save(tmp_path / f"copy {i}.png")
        lines += [own(f"images/{i}.png", i), own(f"copy {i}.png", i)]
    data = write_records(tmp_path / "my.jsonl", *lines)
    out = tmp_path / "deep" / "parts"
    about = split_file(data, out, (0.2, 0.1), seed=3)
    assert sorted(os.listdir(out)) == ["split.json", "test.jsonl", "train.jsonl", "val.jsonl"]
    assert about == json.loads((out / "split.json").read_text())
    assert about["parts"] == {
        "train": {"records": 28, "pictures": 14},
        "val": {"records": 8, "pictures": 4},
        "test": {"records": 4, "pictures": 2},
    }
    back = [
        {**r, "image": os.path.relpath(out / r["image"], tmp_path)}
        for r in read(out, "train", "val", "test")
    ]
    assert sorted(back, key=str) == sorted(lines, key=str)
    numbers = [
        {record["question"] for record in read(out, part)} for part in ("train", "val", "test")
    ]
    assert sum(map(len, numbers)) == len(set.union(*numbers)) == 20
    for part in ("train", "val", "test"):
        source = open_source(out / f"{part}.jsonl")
        assert all(source[i].images[0].size == (40, 30) for i in range(len(source)))
    before = (out / "val.jsonl").read_bytes()
    split_file(data, out, (0.2, 0.1), seed=3)  # replaces what an earlier split wrote
    assert (out / "val.jsonl").read_bytes() == before


def test_every_kind_of_path(tmp_path: Path) -> None:
    """Those of other layouts, of frames, of addresses whose pictures were saved, and absolute ones,
    with a folder of pictures."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", "b.png", f"{address_key(ADDRESS)}.png"):
        picture(len(name)).save(pictures / name)
    absolute = str(pictures / "a.png")
    lines = [
        own("a.png"),
        own(None) | {"images": ["a.png", {"path": "b.png"}]},
        {"image_url": ADDRESS, "caption": "A dot."},
        {"video": {"frames": ["a.png", "b.png"], "times": 1}, "question": "?", "answer": "!"},
        {
            "image": absolute,
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}],
        },
        {"question": "Ü \ud800?", "answer": "4"},
        own("gone.png"),
        {"image_url": "https://example.org/gone.png", "caption": "?"},
    ]
    data = write_records(tmp_path / "my.jsonl", *lines)
    out = tmp_path / "parts"
    split_file(data, out, [0.4], images=pictures)
    found = {json.dumps(record) for record in read(out, "train", "val")}
    moved = [
        own("../pictures/a.png"),
        own(None) | {"images": ["../pictures/a.png", {"path": "../pictures/b.png"}]},
        {**lines[2], "image": f"../pictures/{address_key(ADDRESS)}.png"},
        {**lines[3], "video": {"frames": ["../pictures/a.png", "../pictures/b.png"], "times": 1}},
        *lines[4:6],
        own("../pictures/gone.png"),
        lines[7],
    ]
    assert found == {json.dumps(record) for record in moved}


def test_a_list_of_records(tmp_path: Path) -> None:
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "my.json").write_text(json.dumps([own(f"{i}.png", i) for i in range(4)]))
    split_file(tmp_path / "my.json", tmp_path / "parts", [0.5])
    assert len(read(tmp_path / "parts", "train")) == len(read(tmp_path / "parts", "val")) == 2


def test_what_cannot_be_split(tmp_path: Path) -> None:
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    data = write_records(tmp_path / "my.jsonl", *(own(f"{i}.png", i) for i in range(4)))
    out = tmp_path / "parts"
    with pytest.raises(ValueError, match=r"a share of 0.1 of 4 records in 4 groups .* empty split"):
        split_file(data, out, [0.1])
    with pytest.raises(ValueError, match="found 3 shares, expected one"):
        split_file(data, out, [0.1, 0.1, 0.1])
    with pytest.raises(ValueError, match="holds other things, such as"):
        split_file(data, tmp_path, [0.5])
    (tmp_path / "my.tar").touch()
    with pytest.raises(ValueError, match=r"is no .jsonl or .json file of records"):
        split_file(tmp_path / "my.tar", out, [0.5])
    with data.open("a") as stream:
        stream.write("{broken\n")
    with pytest.raises(ValueError, match=r"my.jsonl, line 5 is not valid JSON .* correct it"):
        split_file(data, out, [0.5])
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
