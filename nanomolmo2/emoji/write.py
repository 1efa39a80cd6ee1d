"""Emoji scenes as files that any program can learn from: pictures, questions and the exact truth.

    DIR/train.jsonl     one record a line     DIR/train.parquet    one record a row
    DIR/images/         its pictures, PNG                          pictures inside
    DIR/info.json       how it was made       DIR/info.json

A record is read by `data/layouts.py` like any other of our own layout; what only it has is told in
docs/emoji-data.md. Record i depends on the seed, the settings and i alone.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from nanomolmo2.data.example import Branch
from nanomolmo2.data.records import optional_module
from nanomolmo2.emoji.questions import make_branches
from nanomolmo2.emoji.questions import test_questions as ask_test_questions
from nanomolmo2.emoji.scenes import (
    SETTINGS,
    TEST_GROUPS,
    Scene,
    SceneConfig,
    group_rng,
    render_scene,
    setting,
    train_rng,
)
from nanomolmo2.emoji.scenes import test_scene as render_test_scene
from nanomolmo2.emoji.sprites import STYLE_GROUPS, Sprites
from nanomolmo2.files import atomic_path

FileFormat = Literal["jsonl", "parquet"]
Split = Literal["train", "test"]

QUESTION_STREAM = 3  # first word of the seeds of test questions; scenes use 1 and 2
ROW_GROUP = 64  # rows of a parquet file that are read together


def write_scenes(
    out: str | Path,
    count: int,
    *,
    seed: int = 0,
    format: FileFormat = "jsonl",
    scene: str | SceneConfig = "easy",
    split: Split = "train",
    group: str = "seen",
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``count`` scenes into the new or empty folder ``out``, all or nothing.

    Args:
        scene: name of a setting, or what scenes look like; its styles are replaced by the group's.
        split: ``test`` has scenes, and wordings of questions, that training never has.
        group: art group; ``mild`` and ``openmoji`` are for tests only.
        on_progress: called with (scenes written, all scenes).
    Returns: the file of records, ``out/SPLIT.FORMAT``.
    Raises: ValueError for an ``out`` that holds something, and for unknown or impossible settings;
        ImportError where parquet files cannot be written for want of the extra ``data``.
    """
    out = Path(out).absolute()
    for what, value, choices in (
        ("format", format, get_args(FileFormat)),
        ("split", split, get_args(Split)),
        ("group", group, TEST_GROUPS),
    ):
        if value not in choices:
            raise ValueError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")
    if split == "train" and group != "seen":
        raise ValueError(
            f"the art of {group!r} is for tests only: write the split 'test' of it, or train on "
            f"'seen'"
        )
    if count < 1:
        raise ValueError(f"count is {count}, expected 1 or more")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a new or empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} holds files already: name a new or empty folder")
    config = setting(scene) if isinstance(scene, str) else scene
    name = next((name for name, known in SETTINGS.items() if known == config), "")
    config = replace(config, styles=STYLE_GROUPS[group])
    write = {"jsonl": _write_jsonl, "parquet": _write_parquet}[format]
    if format == "parquet":  # known to be missing before anything is drawn
        optional_module("pyarrow.parquet", "data", "to write parquet files")

    def examples() -> Iterator[tuple[Scene, list[Branch]]]:
        for i in range(count):
            yield draw_example(i, config, seed=seed, split=split, group=group)
            if on_progress is not None:
                on_progress(i + 1, count)

    with atomic_path(out) as temporary:
        temporary.mkdir()
        write(temporary, f"{split}.{format}", examples())
        about = {"setting": name, "split": split, "group": group}
        info = {**about, "seed": seed, "count": count, "scene": config.to_dict()}
        (temporary / "info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return out / f"{split}.{format}"


def draw_example(
    index: int,
    config: SceneConfig,
    *,
    seed: int = 0,
    split: Split = "train",
    group: str = "seen",
    sprites: Sprites | None = None,
) -> tuple[Scene, list[Branch]]:
    """Scene number ``index`` and its questions.

    Those of ``train`` are the examples of the source ``emoji``, those of ``test`` what
    ``nanomolmo2 eval emoji`` asks.
    """
    sprites = sprites or Sprites.load()
    if split == "train":
        rng = train_rng(seed, index)
        scene = render_scene(rng, sprites, config)
        return scene, make_branches(scene, rng)
    scene = render_test_scene(index, group, seed, sprites, config)
    rng = group_rng(seed, group, index, QUESTION_STREAM)
    return scene, ask_test_questions(scene, rng)


# ---- records ----


def to_record(scene: Scene, branches: list[Branch], image: Any) -> dict[str, Any]:
    """Plain JSON types; ``image`` is a path, or what else the format holds in its place."""
    height, width = scene.instance_map.shape
    counts = Counter(o.category for o in scene.objects)
    return {
        "image": image,
        "width": width,
        "height": height,
        "objects": [
            {
                "category": o.category,
                "style": o.style,
                "box": list(o.box),
                "center": list(o.center),
                "mask": encode_mask(scene.instance_map == i),
            }
            for i, o in enumerate(scene.objects)
        ],
        "counts": [{"noun": noun, "count": counts[noun]} for noun in sorted(counts)],
        "branches": [{"messages": b.messages, "task": b.task, "truth": b.truth} for b in branches],
    }


def encode_mask(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask (H, W) as COCO's uncompressed run lengths: ``{"size": [H, W], "counts": [...]}``.

    Counts are lengths of runs down the columns, from the left, in turn outside and inside; the
    first one is outside and may be 0.
    """
    flat = np.asarray(mask, bool).ravel(order="F")
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *borders, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat.size and flat[0] else counts}


def decode_mask(encoded: Mapping[str, Any]) -> np.ndarray:
    """What `encode_mask` made, as bool (H, W). Raises: ValueError for counts of another size."""
    (height, width), counts = encoded["size"], encoded["counts"]
    if sum(counts) != height * width or any(count < 0 for count in counts):
        raise ValueError(
            f"the counts of a mask sum up to {sum(counts)}, expected {height} x {width}, and none "
            f"below 0"
        )
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(height, width, order="F")


# ---- files ----


def _write_jsonl(folder: Path, name: str, examples: Iterator[tuple[Scene, list[Branch]]]) -> None:
    (folder / "images").mkdir()
    with (folder / name).open("w", encoding="utf-8", newline="\n") as stream:
        for i, (scene, branches) in enumerate(examples):
            path = f"images/{i:06d}.png"
            (folder / path).write_bytes(_png(scene))
            stream.write(json.dumps(to_record(scene, branches, path), ensure_ascii=False) + "\n")


def _write_parquet(folder: Path, name: str, examples: Iterator[tuple[Scene, list[Branch]]]) -> None:
    """What is known about answers differs from task to task: a column of JSON texts."""
    pyarrow = optional_module("pyarrow", "data", "to write parquet files")
    parquet = optional_module("pyarrow.parquet", "data", "to write parquet files")
    text, number, numbers = pyarrow.string(), pyarrow.int32(), pyarrow.list_(pyarrow.int32())
    floats = pyarrow.list_(pyarrow.float64())

    def objects_of(**fields: Any) -> object:
        return pyarrow.list_(pyarrow.struct(list(fields.items())))

    mask = pyarrow.struct([("size", numbers), ("counts", numbers)])
    messages = objects_of(role=text, content=text)
    schema = pyarrow.schema(
        {
            "image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)]),
            "width": number,
            "height": number,
            "objects": objects_of(category=text, style=text, box=floats, center=floats, mask=mask),
            "counts": objects_of(noun=text, count=number),
            "branches": objects_of(messages=messages, task=text),
            "truths": pyarrow.list_(text),
        }
    )
    with parquet.ParquetWriter(folder / name, schema) as writer:
        rows: list[dict[str, Any]] = []

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            rows.clear()

        for i, (scene, branches) in enumerate(examples):
            image = {"bytes": _png(scene), "path": f"{i:06d}.png"}
            row = to_record(scene, branches, image)
            row["truths"] = [json.dumps(branch.pop("truth")) for branch in row["branches"]]
            rows.append(row)
            if len(rows) == ROW_GROUP:
                flush()
        if rows:
            flush()


def _png(scene: Scene) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(scene.image).save(stream, "PNG", compress_level=6)
    return stream.getvalue()
