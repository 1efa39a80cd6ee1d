"""What is where for each question of a batch, for the module that finds all at once.

Every patch of every picture of an example is asked; what lies in overviews is not. It is asked at
the end of a question, and again where its answer begins to list points: there a decoder that writes
can look up where they are.

n patches of all pictures of a batch, Q questions, J examples of all of them, T things.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanomolmo2.batch import IGNORED_LABEL
from nanomolmo2.data.example import Branch
from nanomolmo2.emoji.heads import NO_LABEL, strongest
from nanomolmo2.emoji.questions import EVERYTHING
from nanomolmo2.emoji.scenes import Scene as EmojiScene
from nanomolmo2.generation.finding import grid_of, grid_places
from nanomolmo2.processor.processor import Encoded
from nanomolmo2.things.cell_labels import SAMPLES, label_cells
from nanomolmo2.things.find_model import CONFIG
from nanomolmo2.things.scenes import Scene, Thing
from nanomolmo2.training.find_terms import (
    FIRST_WEIGHT,
    HITS_WEIGHT,
    WAY_WEIGHT,
    FindPlaces,
    Scored,
)

# Those that ask where things of one kind are, and those that ask only how many.
TASKS = ("like", "count_like", "named", "count_named", "point", "count", "number")
MARGIN = 0.2  # of a patch: a thing may count beside the patch of its middle by so much
CLAIM_WEIGHT = 0.5  # beside the final scores


@dataclass
class FindLabels(FindPlaces):
    """Targets of a batch.

    owner: (n,) int64, number of the thing that may count here, or NO_LABEL.
    way: (n, 3) of patches that show a thing (``shows``, bool), see `cell_labels.CellLabels`.
    asked: (Q, T) bool, whether a question asks for a thing.
    """

    owner: Tensor
    way: Tensor
    shows: Tensor
    asked: Tensor


class Wanted(NamedTuple):
    """The kinds of things that a branch asks for, ids or an emoji's nouns.

    at_end: what is asked at the end of its question; None: nothing that has a place. lists: what
    each list of its answer holds.
    """

    at_end: str | None = None
    lists: tuple[str, ...] = ()


class Asked(NamedTuple):
    """An example: how it was encoded, its pictures, and what each branch asks for."""

    encoded: Encoded
    scenes: Sequence[Scene]
    wanted: Sequence[Wanted]


def wanted_of(branch: Branch) -> Wanted:
    """What is asked for."""
    truth = branch.truth or {}
    if branch.task == "points":
        return Wanted(None, tuple(group["noun"] for group in truth["groups"]))
    if branch.task not in TASKS:
        return Wanted()
    kind = str(truth.get("kind", truth["noun"]))
    return Wanted(kind, (kind,))


def find_labels(examples: Sequence[Asked], length: int) -> FindLabels:
    """Targets of a batch whose rows have ``length`` positions, padded on the right."""
    columns: dict[str, list[np.ndarray]] = {f.name: [] for f in fields(FindLabels)}
    asked: list[set[int]] = []
    patches = rows = things = seen = 0
    for number, (encoded, scenes, all_wanted) in enumerate(examples):
        names: dict[str, set[int]] = {}
        first = things
        index = np.full(num_patches(encoded), -1)  # of each patch among all that are asked
        for view, scene in enumerate(scenes):
            found = of_picture(encoded, view, scene)
            index[found["patch"]] = seen + np.arange(len(found["patch"]))
            seen += len(found["patch"])
            found["patch"] += patches
            found["row"] += rows
            found["owner"][found["owner"] >= 0] += things
            found["example"] = np.full(len(found["patch"]), number)
            for name, values in found.items():
                columns[name].append(values)
            for i, thing in enumerate(scene.things):
                names.setdefault(scene.kinds[thing.kind].id, set()).add(things + i)
            things += len(scene.things)
        names[EVERYTHING] = set(range(first, things))
        for branch, wanted in enumerate(all_wanted):
            place = places_of(encoded, branch)
            lists = zip(wanted.lists, place.lists, strict=False)  # an answer may list none
            for kind, state_at in ((wanted.at_end, place.end), *lists):
                if kind is None:
                    continue
                columns["like_at"].append(place.like_at + number * length)
                columns["like"].append(index[place.like_patch])
                columns["question"].append(np.full(len(place.like_at), len(asked)))
                columns["state_at"].append(np.array([state_at + number * length]))
                columns["of"].append(np.array([number]))
                asked.append(names.get(kind, set()))
        assert encoded.image_token_pooling is not None
        patches += num_patches(encoded)
        rows += len(encoded.image_token_pooling)
    mask = np.zeros((len(asked), things), bool)
    for question, numbers in enumerate(asked):
        mask[question, list(numbers)] = True
    columns["asked"] = [mask]
    return FindLabels(
        **{
            name: torch.from_numpy(np.concatenate(parts or [np.zeros(0, np.int64)]))
            for name, parts in columns.items()
        }
    )


def num_patches(encoded: Encoded) -> int:
    """Of all crops."""
    assert encoded.pixel_values is not None
    return encoded.pixel_values.shape[0] * encoded.pixel_values.shape[1]


def of_picture(encoded: Encoded, view: int, scene: Scene) -> dict[str, np.ndarray]:
    """``patch``, ``row``, ``grid``, ``owner``, ``way`` and ``shows`` of one picture's patches, line
    by line; all counted within the example.
    """
    assert encoded.point_space is not None
    row, patch = grid_of(encoded.point_space, view)
    labels = label_cells(scene, len(row), row.shape[1], SAMPLES, MARGIN)
    return {
        "patch": patch.flatten(),
        "row": row.flatten(),
        "grid": grid_places(len(row), row.shape[1], view),
        "owner": labels["owner"],
        "way": labels["way"],
        "shows": labels["kind"] >= 0,
    }


class Places(NamedTuple):
    """Where a branch ends its last question, where its answer begins to list points, and the points
    in the questions before; see `FindLabels`.

    Positions and patches are counted within the example.
    """

    end: int
    lists: list[int]
    like_at: np.ndarray
    like_patch: np.ndarray


def places_of(encoded: Encoded, branch: int) -> Places:
    """Of a branch of a message tree."""
    assert encoded.labels is not None and encoded.subsegment_ids is not None
    learned = encoded.labels != IGNORED_LABEL
    at = np.flatnonzero(encoded.subsegment_ids == branch)
    begins = learned[at] & ~np.concatenate([[False], learned[at][:-1]])
    first, last = int(at[np.flatnonzero(begins)[-1]]), int(at[-1])  # of the last answer
    lists: dict[int, int] = {}
    if encoded.point_lists is not None:
        markers = patch_places(encoded)
        for number, marker in zip(encoded.point_lists.tolist(), markers.tolist(), strict=True):
            if first <= marker <= last:
                lists.setdefault(number, marker - 1)
    return Places(first - 1, list(lists.values()), *points_before(encoded, at[at < first]))


def patch_places(encoded: Encoded) -> np.ndarray:
    """(P,) positions of the row markers."""
    assert CONFIG.point_config is not None
    return np.flatnonzero(encoded.input_ids == CONFIG.point_config.patch_token_id)


def points_before(encoded: Encoded, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(J,) last position, and patch, of the given points among positions ``at``."""
    space, markers = encoded.point_space, patch_places(encoded)
    assert space is not None
    given = np.isin(markers, at)
    if encoded.labels is not None:
        given &= encoded.labels[markers] == IGNORED_LABEL
    if encoded.point_targets is None:
        none = np.zeros(0, np.int64)
        return none, none
    rows, slots, _ = encoded.point_targets[given].T
    return markers[given] + 2, space.token_pooling[rows, slots]


def find_loss(scored: Scored, labels: FindLabels) -> tuple[Tensor, dict[str, float]]:
    """Mean over the examples of the mean over their questions, and what it consists of.

    A question's loss is the sum over the patches, over 1 + the number of things asked for. Of a
    crowded picture few questions fit into a row, since their answers are long: so that it counts as
    much as others, examples weigh the same.
    """
    scores, mine, patches = scored
    owner = labels.owner
    of_asked = F.pad(labels.asked, (0, 1))[:, owner.where(owner >= 0, labels.asked.shape[1])]
    owners = torch.where(of_asked & mine, owner, NO_LABEL)
    hits = strongest(scores.final.detach(), owners)
    weights = torch.where(hits, HITS_WEIGHT, 1.0) * mine

    share = 1 / torch.bincount(labels.of)[labels.of]  # (Q,)
    share = share / share.sum()

    def loss_of(logits: Tensor) -> Tensor:
        each = F.binary_cross_entropy_with_logits(logits, hits.float(), reduction="none")
        return ((each * weights).sum(dim=1) / (1 + hits.sum(dim=1)) * share).sum()

    first, final = loss_of(scores.first), loss_of(scores.final)
    middles = strongest(patches.claim.detach()[None], owner[None])[0]
    claims = F.binary_cross_entropy_with_logits(patches.claim, middles.float(), reduction="sum")
    claims = claims / (1 + middles.sum())
    shows = labels.shows
    way = F.smooth_l1_loss(patches.way[shows], labels.way[shows], beta=0.25)
    with torch.no_grad():
        said = (scores.final > 0) & mine
        right = (said & hits).sum()
        metrics = {
            "find_loss": float(final),
            "first_loss": float(first),
            "claim_loss": float(claims),
            "way_loss": float(way),
            "find_recall": float(right / hits.sum().clamp(min=1)),
            "find_precision": float(right / said.sum().clamp(min=1)),
        }
    total = final + FIRST_WEIGHT * first + CLAIM_WEIGHT * claims + WAY_WEIGHT * way
    return total, metrics


def of_emoji(encoded: Encoded, scene: EmojiScene, branches: Sequence[Branch]) -> Asked:
    """A scene of emoji as one of things, a kind for each noun."""
    names = list(dict.fromkeys(o.category for o in scene.objects))
    kinds = tuple(_Noun(name) for name in names)
    things = tuple(Thing(names.index(o.category), o.box, o.center, 1.0, 0.0) for o in scene.objects)
    shown = Scene(scene.image, things, kinds, scene.instance_map, "")  # type: ignore[arg-type]
    return Asked(encoded, [shown], [wanted_of(branch) for branch in branches])


class _Noun(NamedTuple):
    """As much of a `Kind` as labels need."""

    id: str
