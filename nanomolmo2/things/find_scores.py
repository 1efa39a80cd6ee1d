"""How well the model finds by example while it learns: small fixed sets, without words."""

from __future__ import annotations

import functools

import numpy as np
import torch

from nanomolmo2.data.example import Branch
from nanomolmo2.evaluation.scorers import point_f1
from nanomolmo2.generation.finding import LIKELY, Found, look_for, see
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.processor import Point
from nanomolmo2.processor.crops import MultiCrop
from nanomolmo2.things.scenes import Scene
from nanomolmo2.things.source import test_scenes

# Name of the scores -> test set, whether the example lies in another picture.
SETS = {
    "few": ("few", False),
    "alike": ("alike", False),
    "made": ("made", False),
    "crowded": ("crowded", False),
    "pair": ("few", True),
}
THRESHOLDS = (0.2, 0.3, 0.4, LIKELY, 0.6, 0.7)
SEED = 1  # of the test sets; 0 is the published one


Shown = tuple[list[Scene], Branch]  # one or two pictures, and a question by example about them


@functools.cache
def _shown(index: int, name: str, pair: bool) -> Shown:
    """Its first question, which is one by example."""
    scenes, branches = test_scenes(index, name, SEED, pair=pair)
    return scenes, next(branch for branch in branches if branch.task == "like")


@torch.no_grad()
def find_scores(model: NanoMolmo2, crops: MultiCrop, number: int) -> dict[str, float]:
    """Mean point F1 and share of exact counts of the first questions of each set.

    ``best``: F1 at the best of `THRESHOLDS`, ``at``: which one.
    """
    model.eval()
    scores: dict[str, float] = {}
    for key, (name, pair) in SETS.items():
        examples = [_shown(i, name, pair) for i in range(number)]
        found = [_found(model, crops, example) for example in examples]
        truths = [branch.truth or {} for _, branch in examples]
        f1, exact = np.array([_marks(found, truths, least) for least in THRESHOLDS]).T
        usual, best = THRESHOLDS.index(LIKELY), int(f1.argmax())
        scores |= {f"{key}_f1": float(f1[usual]), f"{key}_exact": float(exact[usual])}
        scores |= {f"{key}_best": float(f1[best]), f"{key}_at": THRESHOLDS[best]}
    model.train()
    return scores


def _found(model: NanoMolmo2, crops: MultiCrop, shown: Shown) -> list[Found]:
    """In the last picture, the one that is asked about."""
    scenes, branch = shown
    truth = branch.truth or {}
    like, unlike = (
        [Point(x, y, int(image)) for x, y, image in truth[name]] for name in ("examples", "unlike")
    )
    seen = [see(model, crops, scene.image) for scene in scenes]
    return look_for(model, seen, like, unlike)[-1]


def _marks(
    found: list[list[Found]], truths: list[dict[str, object]], least: float
) -> tuple[float, float]:
    """(F1, share of exact counts) of what is at least so sure."""
    marks = []
    for things, truth in zip(found, truths, strict=True):
        places = [(thing.x, thing.y) for thing in things if thing.confidence >= least]
        marks.append((point_f1(places, truth["boxes"]), len(places) == truth["count"]))  # type: ignore[arg-type]
    f1, exact = np.mean(marks, axis=0)
    return float(f1), float(exact)
