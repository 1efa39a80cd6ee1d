"""Written scenes: the same bytes each time, exact truth, nothing half-written, and our loader
reads them."""

from __future__ import annotations

import json
import sys
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanomolmo2 import cli
from nanomolmo2.cli.data import Emoji
from nanomolmo2.data.sources import open_source
from nanomolmo2.emoji import write
from nanomolmo2.emoji.scenes import SETTINGS, TEST_GROUPS, setting
from nanomolmo2.emoji.source import EmojiConfig, EmojiScenes
from nanomolmo2.emoji.sprites import STYLE_GROUPS
from nanomolmo2.emoji.write import decode_mask, draw_example, encode_mask, write_scenes


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_the_same_settings_give_the_same_bytes(tmp_path, format) -> None:
    for name in ("a", "b"):
        write_scenes(tmp_path / name, 3, seed=4, format=format, scene="occluded")
    write_scenes(tmp_path / "c", 3, seed=5, format=format, scene="occluded")
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a[f"train.{format}"] != c[f"train.{format}"]
    assert list(tmp_path.glob(".*")) == []


def test_a_smaller_count_is_the_beginning(tmp_path) -> None:
    few = write_scenes(tmp_path / "few", 2, seed=1)
    many = write_scenes(tmp_path / "many", 4, seed=1)
    assert many.read_bytes().startswith(few.read_bytes())
    pictures = contents(tmp_path / "few" / "images")
    assert len(pictures) == 2
    assert pictures.items() <= contents(tmp_path / "many" / "images").items()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_truth_is_what_the_scene_holds(tmp_path, name) -> None:
    file = write_scenes(tmp_path / "out", 2, seed=3, scene=name)
    config = setting(name)
    for i, record in enumerate(records(file)):
        scene, branches = draw_example(i, config, seed=3)
        picture = np.asarray(Image.open(file.parent / record["image"]))
        np.testing.assert_array_equal(picture, scene.image)
        assert (record["width"], record["height"]) == (config.size, config.size)
        found = np.full_like(scene.instance_map, -1)
        for number, (thing, o) in enumerate(zip(record["objects"], scene.objects, strict=True)):
            assert (thing["category"], thing["style"]) == (o.category, o.style)
            assert (thing["box"], thing["center"]) == ([*o.box], [*o.center])
            found[decode_mask(thing["mask"])] = number
        np.testing.assert_array_equal(found, scene.instance_map)
        for noun in record["counts"]:
            assert noun["count"] == sum(o.category == noun["noun"] for o in scene.objects) > 0
        assert sum(noun["count"] for noun in record["counts"]) == len(scene.objects)
        assert [branch["truth"] for branch in record["branches"]] == [b.truth for b in branches]


def test_our_loader_reads_the_examples_of_the_emoji_source(tmp_path) -> None:
    """Of both formats, and from the folder alone; parquet keeps what is known as JSON texts."""
    drawn = EmojiScenes(EmojiConfig(scene=setting("easy")), seed=2)
    for format in ("jsonl", "parquet"):
        write_scenes(tmp_path / format, 66, seed=2, format=format)
        source = open_source(tmp_path / format)
        assert len(source) == 66
        for i in (0, 65):  # the last one is in a second row group
            example, expected = source[i], drawn[i]
            np.testing.assert_array_equal(np.asarray(example.images[0]), expected.images[0])
            for branch, wanted in zip(example.branches, expected.branches, strict=True):
                assert (branch.messages, branch.task) == (wanted.messages, wanted.task)
                assert branch.truth == (wanted.truth if format == "jsonl" else {})


def test_both_formats_hold_the_same(tmp_path) -> None:
    from pyarrow import parquet

    lines = records(write_scenes(tmp_path / "jsonl", 3))
    rows = parquet.read_table(write_scenes(tmp_path / "parquet", 3, format="parquet")).to_pylist()
    for line, row in zip(lines, rows, strict=True):
        truths = [json.loads(text) for text in row.pop("truths")]
        assert truths == [branch.pop("truth") for branch in line["branches"]]
        path, image = line.pop("image"), row.pop("image")
        assert image["bytes"] == (tmp_path / "jsonl" / path).read_bytes()
        assert row == line


def test_info_says_how_it_was_made(tmp_path) -> None:
    write_scenes(tmp_path / "a", 1, scene="crowded", split="test", group="mild", seed=9)
    info = json.loads((tmp_path / "a" / "info.json").read_text())
    assert info["scene"]["styles"] == list(STYLE_GROUPS["mild"])
    about = {key: info[key] for key in ("setting", "split", "group", "seed", "count")}
    assert about == {
        "setting": "crowded",
        "split": "test",
        "group": "mild",
        "seed": 9,
        "count": 1,
    }
    write_scenes(tmp_path / "b", 1, scene=replace(setting("crowded"), clutter=3))
    assert json.loads((tmp_path / "b" / "info.json").read_text())["setting"] == ""


@pytest.mark.parametrize("group", TEST_GROUPS)
def test_the_test_split_has_its_group_alone(tmp_path, group) -> None:
    file = write_scenes(tmp_path / "out", 8, split="test", group=group)
    assert file.name == "test.jsonl"
    styles = {thing["style"] for record in records(file) for thing in record["objects"]}
    assert styles <= set(STYLE_GROUPS[group])


def test_your_own_photos_lie_behind(tmp_path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (300, 220), (10, 200, 30)).save(photos / "green.png")
    config = replace(setting("easy"), background="photo", photos=str(photos))
    scene, _ = draw_example(0, config)
    free = scene.image[scene.instance_map < 0]
    assert (free == (10, 200, 30)).all(axis=1).mean() > 0.95  # all but soft edges


# ---- masks ----


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**81 - 1))
def test_masks_come_back(height: int, width: int, bits: int) -> None:
    mask = np.array([bits >> i & 1 for i in range(height * width)], bool).reshape(height, width)
    encoded = encode_mask(mask)
    assert sum(encoded["counts"]) == height * width
    assert all(count > 0 for count in encoded["counts"][1:])
    np.testing.assert_array_equal(decode_mask(json.loads(json.dumps(encoded))), mask)


def test_runs_go_down_the_columns_and_begin_outside() -> None:
    mask = np.array([[1, 0, 0], [1, 1, 0]], bool)
    assert encode_mask(mask) == {"size": [2, 3], "counts": [0, 2, 1, 1, 2]}


@pytest.mark.parametrize("counts", [[3], [7], [-1, 7]])
def test_a_mask_of_another_size_is_refused(counts) -> None:
    with pytest.raises(ValueError, match="2 x 3"):
        decode_mask({"size": [2, 3], "counts": counts})


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "csv"}, "format 'csv'.*jsonl, parquet"),
        ({"scene": "hard"}, "setting 'hard'.*easy, crowded"),
        ({"split": "val"}, "split 'val'.*train, test"),
        ({"group": "far", "split": "test"}, "group 'far'.*seen, mild, openmoji"),
        ({"group": "mild"}, "'mild' is for tests only"),
        ({"count": 0}, "count is 0"),
        ({"count": -5}, "count is -5"),
        ({"seed": -1}, "seed is -1"),
        ({"scene": replace(SETTINGS["photos"], photos="/nowhere/at/all")}, "no folder /nowhere"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path / "out", **{"count": 2, **options})
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays(tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (("full", "holds files already"), ("file", "is a file")):
        with pytest.raises(ValueError, match=message):
            write_scenes(tmp_path / name, 1)
    assert contents(tmp_path) == {"full/mine.txt": b"mine", "file": b"mine"}


def test_an_error_in_between_leaves_nothing(tmp_path, monkeypatch) -> None:
    def fail(scene: object) -> bytes:
        if len(list(tmp_path.rglob("*.png"))) == 1:
            raise OSError(28, "No space left on device")
        return png(scene)

    png: Any = write._png
    monkeypatch.setattr(write, "_png", fail)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space"):
        write_scenes(tmp_path / "out", 3)
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_parquet_names_its_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"nanomolmo2\[data\]"):
        write_scenes(tmp_path / "out", 1, format="parquet")
    assert list(tmp_path.iterdir()) == []


# ---- the command ----


def run(*arguments: Any) -> int:
    return cli.main(["data", "emoji", *map(str, arguments)])


def test_the_command_writes_what_the_function_does(tmp_path, capsys) -> None:
    options = ["--count", 2, "--seed", 3, "--setting", "clutter", "--size", 384]
    assert run("--out", tmp_path / "a", *options) == 0
    assert "wrote 2 pictures" in capsys.readouterr().out
    write_scenes(tmp_path / "b", 2, seed=3, scene=setting("clutter", 384))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    test = ["--split", "test", "--group", "openmoji", "--format", "parquet"]
    assert run("--out", tmp_path / "c", "--count", 1, *test) == 0
    assert len(open_source(tmp_path / "c")) == 1


def test_the_command_takes_a_folder_of_backgrounds(tmp_path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (100, 90), "white").save(photos / "a.jpg")
    out = tmp_path / "out"
    assert run("--out", out, "--count", 1, "--backgrounds", photos, "--setting", "crowded") == 0
    assert json.loads((out / "info.json").read_text())["scene"]["photos"] == str(photos)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--format", "csv"], 2, "csv"),
        (["--setting", "hard"], 2, "hard"),
        (["--count", -1], 2, "--count must be 1 or more"),
        (["--seed", -1], 2, "--seed must be 0 or more"),
        (["--group", "mild"], 2, "--split test"),
        (["--size", 200], 2, "200"),
        (["--setting", "wide768", "--size", 192], 1, "do not fit"),
        (["--backgrounds", "/nowhere/at/all"], 1, "no folder"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, options, code, message) -> None:
    assert run("--out", tmp_path / "out", *options) == code
    said = capsys.readouterr().err.strip()
    assert said.startswith("nanomolmo2: ") and "\n" not in said
    assert message in said
    assert list(tmp_path.iterdir()) == []


def test_the_command_lists_all_settings() -> None:
    hints = typing.get_type_hints(Emoji)
    assert typing.get_args(hints["setting"]) == tuple(SETTINGS)
    assert typing.get_args(hints["group"]) == TEST_GROUPS
    assert typing.get_args(hints["format"]) == typing.get_args(write.FileFormat)
    assert typing.get_args(hints["split"]) == typing.get_args(write.Split)
