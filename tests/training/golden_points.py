"""The golden examples of MolmoPoint's training code as batches of ours.

Made by AI2's training repository with the small random checkpoint beside them; see
tests/data/README.md. There targets are shifted, and the end of an answer is a target alone: here it
is a token too, behind which nothing comes, so that no other number changes.

B rows of T tokens, P PATCH tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanomolmo2 import NanoMolmo2
from nanomolmo2.batch import IGNORED_LABEL, Batch
from nanomolmo2.models.point_config import PointConfig

FOLDER = Path(__file__).parents[1] / "data" / "molmo_point"
EXAMPLES = ("single", "single_own_low_row", "tree", "pack", "multi")
EOS = 2
Z_LOSS = 1e-4
RELEASED: dict[str, Any] = {}  # of the rule, as the training repository has it
TRAINED = {"overview_embedding": "shared"}


@functools.cache
def goldens() -> dict[str, dict[str, Any]]:
    """Losses, gradient norms and numbers of every example."""
    found: dict[str, dict[str, Any]] = json.loads((FOLDER / "training.json").read_text())
    return found


@functools.cache
def golden_tensors() -> dict[str, Tensor]:
    return load_file(FOLDER / "training.safetensors")


def golden_model(**rule: Any) -> NanoMolmo2:
    """The golden checkpoint, its rule changed; in training mode, all of it learns."""
    model = NanoMolmo2.from_pretrained(FOLDER / "checkpoint").float().train()
    return with_rule(model, **rule).requires_grad_(True)


def with_rule(model: NanoMolmo2, **rule: Any) -> NanoMolmo2:
    """The same weights under another rule."""
    points = model.config.point_config
    assert points is not None
    config = dataclasses.replace(model.config, point_config=dataclasses.replace(points, **rule))
    changed = NanoMolmo2(config)
    changed.load_state_dict(model.state_dict())
    return changed.train(model.training)


def consistent(model: NanoMolmo2) -> NanoMolmo2:
    """Under the rule of our own training."""
    points = model.config.point_config
    assert points is not None
    names = {f.name for f in dataclasses.fields(PointConfig)}
    rule = PointConfig.consistent(**{n: getattr(points, n) for n in names if n.endswith("_id")})
    fields = {n: getattr(rule, n) for n in names if not n.endswith(("_id", "_dim", "_theta"))}
    return with_rule(model, **fields)


def golden_batch(name: str) -> Batch:
    """An example as a batch of one row."""
    tensors = golden_tensors()
    name = {"single_own_low_row": "single"}.get(name, name)
    given = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{name}.")}
    ids, targets = given["input_tokens"].tolist(), given["target_tokens"].tolist()
    masks, positions = given["loss_masks"].tolist(), given["position_ids"].tolist()
    segments = given.get("subsegment_ids", torch.zeros(len(ids))).long().tolist()
    rows: list[tuple[int, int, int, int, float]] = []  # id, position, subsegment, label, weight
    label, weight = IGNORED_LABEL, 0.0
    for t, token in enumerate(ids):
        rows.append((token, positions[t], segments[t], label, weight))
        label, weight = targets[t], masks[t]
        follows = t + 1 < len(ids) and ids[t + 1] == label and weight
        if weight and not follows:
            assert label == EOS
            rows.append((EOS, positions[t] + 1, segments[t], EOS, weight))
        if not follows:
            label, weight = IGNORED_LABEL, 0.0
    columns = list(zip(*rows, strict=True))
    pixels = given["pixel_values_u8"].float()
    return Batch(
        torch.tensor([columns[0]]),
        position_ids=torch.tensor([columns[1]]),
        subsegment_ids=torch.tensor([columns[2]]) if "subsegment_ids" in given else None,
        labels=torch.tensor([columns[3]]),
        loss_weights=torch.tensor([columns[4]]),
        pixel_values=(pixels / 255 - 0.5) / 0.5,
        image_token_pooling=given["token_pooling"].long(),
        point_targets=given["point_target_ids"].long(),
    )


# Names in the goldens' gradients -> ours; a part of a weight is a range of its rows.
NAMES = {
    "transformer.wte.new_embedding": ("llm.embed_tokens.weight", slice(256, None)),
    "transformer.ff_out.new_weight": ("llm.lm_head.weight", slice(256, None)),
    "connector.image_projector.w2.weight": (
        "connector.layers.image_projector.down_proj.weight",
        slice(None),
    ),
    "vit.patch_embedding.weight": ("vision_encoder.patch_embedding.weight", slice(None)),
    **{
        f"{name}": (f"point_predictor.{name}", slice(None))
        for name in (
            *("build_vit_embedding.weight", "x_norm.weight", "patch_q.weight", "patch_k.weight"),
            *("subpatch_q.weight", "subpatch_k.weight", "add_no_point_class_embed.vector"),
            "subpatch_loc_k.weight",
        )
    },
}


def gradient_norms(model: NanoMolmo2) -> dict[str, float]:
    """Of the weights in `NAMES`, by the goldens' names."""
    found = dict(model.named_parameters())
    norms = {}
    for theirs, (ours, rows) in NAMES.items():
        gradient = found[ours].grad
        assert gradient is not None, ours
        norms[theirs] = float(np.linalg.norm(gradient[rows].double().numpy()))
    return norms
