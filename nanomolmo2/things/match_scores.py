"""How well things are matched before there are answers: points from visual tokens alone.

Shown one thing, which others of its kind are found by the tokens that claim a thing and whose
embedding is near enough to the example's? On drawings held out from training.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanomolmo2.emoji.heads import strongest
from nanomolmo2.things.match_heads import MatchHead
from nanomolmo2.things.match_labels import CellLabels, match_batch
from nanomolmo2.things.match_model import CROPS, MatchModel
from nanomolmo2.things.scenes import Scene, set_rng, test_scene

SETS = ("few", "alike")
NUM_SCENES = 100  # of each
SCORE_STREAM = 8  # random numbers for the examples
AT_ONCE = 10  # scenes

Shown = tuple[Scene, int, tuple[float, float]]  # with the thing that is the example, a place on it


@functools.cache
def scored_scene(name: str, index: int) -> Shown:
    """A scene of a test set with its example."""
    scene = test_scene(index, name, seed=1)
    rng = set_rng(name, index, 1, SCORE_STREAM)
    number = int(rng.choice(scene.of_kind(0)))
    return scene, number, scene.point_on(rng, number)


class Said(NamedTuple):
    """What of a scene is said to be like the example, which is left out itself.

    Attributes:
        likeness: (n,) of every cell that claims a thing.
        right: (n,) whether the thing is like the example, and not said twice.
        wanted: how many there should be.
    """

    likeness: np.ndarray
    right: np.ndarray
    wanted: int


@torch.no_grad()
def match_scores(model: MatchModel, number: int = NUM_SCENES) -> dict[str, float]:
    """Scores on the first scenes of each set, of visual tokens and of patches; the threshold is the
    best one for the set.

    ``found``: share of the things like the example that some cell claims; ``recall``,
    ``precision``, ``f1``: of those that are said to be like it. A token can claim one thing only.
    """
    scores: dict[str, float] = {}
    for name in SETS:
        said: dict[str, list[Said]] = {"": [], "patch_": []}
        for first in range(0, number, AT_ONCE):
            rows = range(first, min(first + AT_ONCE, number))
            scenes = [scored_scene(name, i) for i in rows]
            batch = match_batch([scene for scene, _, _ in scenes], CROPS, margin=0.0)
            features = model.features(batch.pixel_values)
            tokens = model.connector(features, batch.tokens.index)
            patches = features.flatten(0, 1)[batch.patches.index[:, 0]]
            said[""] += said_of(scenes, model.match_tokens, tokens, batch.tokens)
            said["patch_"] += said_of(scenes, model.match_patches, patches, batch.patches)
        for cells, parts in said.items():
            likeness, right = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
            best = best_threshold(likeness, right, sum(part.wanted for part in parts))
            scores |= {f"{name}_{cells}{key}": value for key, value in best.items()}
    return scores


@torch.no_grad()
def said_of(
    shown: Sequence[Shown], head: MatchHead, cells: Tensor, labels: CellLabels
) -> list[Said]:
    """What the cells (n, D) of some scenes say, scene by scene."""
    claims, embedded = head.claim(cells), head.look(cells)
    centred = strongest(claims[None], labels.owner[None])[0]
    found, before = [], 0
    for i, (scene, number, (x, y)) in enumerate(shown):
        height, width = scene.image.shape[:2]
        at = labels.picture == i
        rows, cols = CROPS.patch_grid(width, height)
        side = round((rows * cols / int(at.sum())) ** 0.5)  # patches of a cell
        example = int(y * rows / side / height) * (cols // side) + int(x * cols / side / width)
        near = embedded[at] @ embedded[at][example]
        owner = labels.owner[at] - before
        others = torch.tensor([n for n in scene.of_kind(0) if n != number], dtype=torch.int64)
        claimed = (claims[at] > 0) & (owner != number)
        claimed[example] = False
        right = centred[at] & torch.isin(owner, others)
        found.append(Said(near[claimed].numpy(), right[claimed].numpy(), len(others)))
        before += len(scene.things)
    return found


def best_threshold(likeness: np.ndarray, right: np.ndarray, wanted: int) -> dict[str, float]:
    """The threshold of likeness with the best F1, and what is reached there.

    Args:
        likeness, right: (n,) of everything that could be said. wanted: how many there should be.
    """
    order = np.argsort(-likeness, kind="stable")
    hits = np.cumsum(right[order])
    said = np.arange(1, len(order) + 1)
    f1 = 2 * hits / (said + wanted)
    if not len(order):
        return {"found": 0.0, "recall": 0.0, "precision": 0.0, "f1": 0.0, "threshold": 1.0}
    best = int(f1.argmax())
    return {
        "found": float(hits[-1] / wanted),
        "recall": float(hits[best] / wanted),
        "precision": float(hits[best] / said[best]),
        "f1": float(f1[best]),
        "threshold": float(likeness[order][best]),
    }
