"""A small model that points, and data with points: what tests of its training share."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from PIL import Image

from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.processor import Processor
from nanomolmo2.recipes import recipe
from nanomolmo2.recipes.molmo2 import adamw
from nanomolmo2.training.build import build
from nanomolmo2.training.recipe import Recipe
from tests.training.recipes import toy

SIDE = 96  # of pictures, pixels
PARTS = ("vision", "connector", "llm", "embeddings", "points")
RATE = adamw(3e-3, 0)


def save_start(folder: Path, **changes: object) -> Path:
    """A model of one layer with random weights, and its processor."""
    model, processor = build(toy(recipe("gui"), seed=3, dtype="float32", **changes))
    config = dataclasses.replace(processor.config, trained_on=())  # there is nothing to forget
    model.save_pretrained(folder, processor=Processor(config, processor.tokenizer))
    return folder


def write_data(folder: Path, count: int = 8) -> Path:
    """Pictures with one or two squares, and records that point at their centres, in pixels; every
    fourth record is a question about a picture, and every fifth has no picture.
    """
    folder.mkdir(exist_ok=True)
    lines = []
    for k in range(count):
        places = [(12 + (37 * k + 29 * j) % 72, 10 + (23 * k + 41 * j) % 76) for j in range(2)]
        places = places[: 1 + k % 2]
        image = Image.new("RGB", (SIDE, SIDE), (225, 225, 225))
        for x, y in places:
            image.paste((200, 30, 30), (x - 6, y - 6, x + 6, y + 6))
        image.save(folder / f"{k}.png")
        line: dict[str, object] = {"image": f"{k}.png", "task": "find"}
        if k % 4 == 3:
            line |= {"question": "How many are red?", "answer": f"{len(places)}.", "task": "count"}
        else:
            points = [{"x": x, "y": y} for x, y in places]
            line |= {"question": "Point to the red ones.", "points": points, "label": "red"}
        if k % 5 == 4:
            line = {"question": "What is red?", "answer": "A colour.", "task": "talk"}
        lines.append(line)
    path = folder / "my.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe_of(start: Path, data: Path, **changes: object) -> Recipe:
    """Twelve short steps on them."""
    train = changes.get("train", PARTS)
    assert isinstance(train, tuple)
    settings: dict[str, object] = {
        "name": "points",
        "model": str(start),
        "architecture": None,
        "data": (SourceConfig(str(data)),),
        "train": train,
        "optimisers": dict.fromkeys(train, RATE),
        "dtype": "float32",
        "gradient_checkpointing": False,
        "residual_dropout": 0.0,
        "loss_weighting": "token",
        "z_loss": 0.0,
        "crop_weight": 1.0,
    }
    return toy(recipe("gui"), **(settings | changes))
