"""Golden values of MolmoPoint (tests/data/molmo_point), and the checkpoint they were made with."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nanomolmo2.batch import IGNORED_LABEL, NO_MORE_POINTS, Batch
from nanomolmo2.models import NanoMolmo2

FOLDER = Path(__file__).parent / "data" / "molmo_point"
CHECKPOINT = FOLDER / "checkpoint"
V = 384  # ids behind it are classes
PATCH, SUBPATCH, LOCATION = 267, 268, 269
CASES = ("one", "two", "video")
TRAINING = ("single", "single_own_low_row", "tree", "pack", "multi")


@cache
def table(name: str) -> dict[str, Any]:
    """A JSON file of the folder."""
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """A safetensors file of the folder."""
    return load_file(FOLDER / f"{name}.safetensors")


def golden_model(**rule: Any) -> NanoMolmo2:
    """The checkpoint, by the released rule or with some of its fields changed."""
    model = NanoMolmo2.from_pretrained(str(CHECKPOINT)).eval()
    point_config = replace(model.config.point_config, **rule)
    model.config = replace(model.config, point_config=point_config)
    model.point_predictor.config = point_config
    return model


def normalised(pixels: Tensor) -> Tensor:
    """uint8 crops as the model takes them."""
    return (pixels.float() / 255 - 0.5) / 0.5


def images_of(case: str) -> dict[str, Tensor]:
    """``pixel_values`` and ``image_token_pooling`` (over all crops) of a case."""
    found = tensors("cases")
    name = "pixel_values_videos_u8" if case == "video" else "pixel_values_u8"
    return {
        "pixel_values": normalised(found[f"{case}.{name}"]),
        "image_token_pooling": found[f"{case}.token_pooling"].long(),
    }


def markers_of(ids: list[int], bounds: dict[str, int]) -> tuple[list[int], list[list[int]]]:
    """Ids in released numbering -> ids with markers, and a line (row, slot, cell) a PATCH."""
    marked, lines = [], []
    for id in ids:
        if id < V:
            marked.append(id)
        elif id < bounds["no_more_points"]:
            marked.append(PATCH)
            lines.append([id - V, -1, -1])
        elif id == bounds["no_more_points"]:
            marked.append(PATCH)
            lines.append([NO_MORE_POINTS, -1, -1])
        elif id < bounds["location_start"]:
            marked.append(SUBPATCH)
            lines[-1][1] = id - bounds["subpatch_start"]
        else:
            marked.append(LOCATION)
            lines[-1][2] = id - bounds["location_start"]
    return marked, lines


def training_batch(name: str) -> Batch:
    """An example of training.safetensors as our batch.

    There a target stands at the position before it, and the last one of a branch is no input. Here
    labels stand at their own position, so every branch gets its last target as one more token.
    """
    name = name.removesuffix("_own_low_row")
    found = {
        key.removeprefix(f"{name}."): value
        for key, value in tensors("training").items()
        if key.startswith(f"{name}.")
    }
    ids, targets, weights, positions = (
        found[key].tolist()
        for key in ("input_tokens", "target_tokens", "loss_masks", "position_ids")
    )
    subsegments = found["subsegment_ids"].tolist() if "subsegment_ids" in found else [0] * len(ids)
    rows: list[tuple[int, int, float, int, int]] = []
    pending: tuple[int, float] | None = None  # target and weight of the token that comes
    for t, id in enumerate(ids):
        target, weight = pending or (IGNORED_LABEL, 0.0)
        rows.append((id, target, weight, positions[t], subsegments[t]))
        pending = (targets[t], weights[t]) if weights[t] > 0 else None
        if pending and (t + 1 == len(ids) or ids[t + 1] != pending[0]):
            rows.append((pending[0], *pending, positions[t] + 1, subsegments[t]))
            pending = None
    columns = [torch.tensor(column)[None] for column in zip(*rows, strict=True)]
    return Batch(
        columns[0],
        labels=columns[1],
        loss_weights=columns[2],
        position_ids=columns[3],
        subsegment_ids=columns[4] if "subsegment_ids" in found else None,
        pixel_values=normalised(found["pixel_values_u8"]),
        image_token_pooling=found["token_pooling"].long(),
        point_targets=found["point_target_ids"].long(),
    )
