"""Scenes of things as files that any program can learn from: pictures, questions and the truth.

    DIR/train.jsonl     one record a line, read by `data/layouts.py` like any other of our own
    DIR/images/         its pictures, PNG
    DIR/info.json       how it was made

Record i depends on the seed, the settings and i alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nanomolmo2.data.example import Branch, Message
from nanomolmo2.emoji.write import encode_mask
from nanomolmo2.files import atomic_path
from nanomolmo2.things.questions import FindMix, make_branches
from nanomolmo2.things.scenes import Scene, ThingScene, test_config
from nanomolmo2.things.source import Things, ThingsConfig, test_scenes


def write_things(
    out: str | Path,
    count: int,
    *,
    seed: int = 0,
    scene: ThingScene | None = None,
    pairs: float = 0.15,
    test_set: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``count`` examples into the new or empty folder ``out``, all or nothing.

    Args:
        scene: what scenes look like.
        pairs: share of the examples whose examples lie in another picture; of a test set all or
            none, by whether it is above one half.
        test_set: name of a test set in place of training's scenes, see `scenes.TEST_SETS`.
        on_progress: called with (examples written, all examples).
    Returns: the file of records, ``out/train.jsonl`` or ``out/test.jsonl``.
    Raises: ValueError for an ``out`` that holds something, for a scene with held-out things that is
        not of a test set, and for other impossible settings.
    """
    out = Path(out).absolute()
    if count < 1:
        raise ValueError(f"count is {count}, expected 1 or more")
    if seed < 0:
        raise ValueError(f"seed is {seed}, expected 0 or more")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a new or empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} holds files already: name a new or empty folder")
    config = scene or (test_config(test_set) if test_set else ThingScene())
    source = None if test_set else Things(ThingsConfig(scene=config, pairs=pairs), seed)
    name = "test" if test_set else "train"
    with atomic_path(out) as temporary:
        (temporary / "images").mkdir(parents=True)
        with (temporary / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
            for i in range(count):
                if source is not None:
                    scenes, rng = source.scenes(i)
                    branches = make_branches(scenes, rng, FindMix())
                else:
                    scenes, branches = test_scenes(
                        i, test_set, seed, pair=pairs > 0.5, config=config
                    )
                paths = [f"images/{i:06d}{'ab'[k]}.png" for k in range(len(scenes))]
                for path, drawn in zip(paths, scenes, strict=True):
                    Image.fromarray(drawn.image).save(temporary / path)
                record = to_record(scenes, branches, paths)
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                if on_progress is not None:
                    on_progress(i + 1, count)
        info = {"test_set": test_set, "seed": seed, "count": count, "pairs": pairs}
        text = json.dumps({**info, "scene": config.to_dict()}, indent=2)
        (temporary / "info.json").write_text(text + "\n", encoding="utf-8")
    return out / f"{name}.jsonl"


def to_record(
    scenes: Sequence[Scene], branches: Sequence[Branch], paths: Sequence[str]
) -> dict[str, Any]:
    """Plain JSON types. Answers hold their exact points, in pixels."""
    return {
        "images": list(paths),
        "scenes": [_truth_of(scene) for scene in scenes],
        "branches": [
            {
                "messages": [*branch.messages[:-1], _exact(branch)],
                "task": branch.task,
                "truth": branch.truth,
            }
            for branch in branches
        ],
    }


def _exact(branch: Branch) -> Message | dict[str, Any]:
    """The last message, its points in pixels where it has some."""
    truth = branch.truth
    if not truth.get("points"):
        return branch.messages[-1]
    points = [{"x": x, "y": y, "image": truth["image"]} for x, y in truth["points"]]
    mode = "point_count" if branch.task.startswith("count") else "point"
    content = {"points": points, "label": truth["noun"], "mode": mode}
    return {"role": "assistant", "content": content}


def _truth_of(scene: Scene) -> dict[str, Any]:
    height, width = scene.instance_map.shape
    return {
        "width": width,
        "height": height,
        "ground": scene.ground,
        "kinds": [
            {"id": kind.id, "px": list(kind.px), "alike": kind.alike, "of": kind.of}
            for kind in scene.kinds
        ],
        "things": [
            {
                "kind": thing.kind,
                "box": list(thing.box),
                "center": list(thing.center),
                "visible": thing.visible,
                "px": thing.px,
                "mask": encode_mask(np.asarray(scene.instance_map == i)),
            }
            for i, thing in enumerate(scene.things)
        ],
    }
