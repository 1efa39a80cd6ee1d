"""What the vision encoder and the connector are taught before, and while, the decoder learns.

Heads that exist only in training. They ask the visual tokens for what the decoder will need to
read off them: the noun of the object whose centre lies in the token's cell, in the direction of
that noun's own embedding, its size, and the digits of its position. Every token tells its row and
column: names do not depend on places, and would let them fade. Every patch of an object is also
asked where the object's centre is and how large it is: without that, the token beside the centre
often claims the object too, and it is counted twice.

B scenes, N patches, n visual tokens (cells), D llm width, C categories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.emoji.scenes import Scene, SceneObject
from nanomolmo2.emoji.sprites import CATEGORIES

NO_LABEL = -100
FEATURE_RMS, TOKEN_RMS = 1.0, 0.15  # of patch features and visual tokens; embeddings have 0.1
BACKGROUND_WEIGHT = 0.2
MIN_COVERAGE = 0.3  # of a patch's pixels: from here on it belongs to the object
USUAL_PX = 48.0  # side of an object: sizes are learned as logarithms relative to it


@dataclass
class SceneLabels:
    """Dense targets of B scenes."""

    patch_class: Tensor  # (B, N) int64: category + 1, 0 = background
    patch_box: Tensor  # (B, N, 4): way to the centre in patches, right and down; log width, height
    cell_owner: Tensor  # (B, n) int64: number of the object that may count here, NO_LABEL if none
    cell_class: Tensor  # (B, n) int64: its category, NO_LABEL if none
    cell_digits: Tensor  # (B, n, 4) int64: hundreds and tens of its x, then y, in thousandths
    cell_box: Tensor  # (B, n, 4): as patch_box, in cells


def label_scenes(
    scenes: list[Scene], patch_size: int, cell_size: int, margin: float = 0.0
) -> SceneLabels:
    """Dense targets for scenes of one size; cells and patches in pixels.

    Args:
        margin: an object may count in any cell that its centre is in, or beside by less than this
            part of a cell. 0 = only where its centre is.
    """
    labels = [(*_patches(s, patch_size), *_cells(s, cell_size, margin)) for s in scenes]
    return SceneLabels(*(torch.from_numpy(np.stack(part)) for part in zip(*labels, strict=True)))


def _patches(scene: Scene, patch: int) -> tuple[np.ndarray, np.ndarray]:
    side = scene.instance_map.shape[0] // patch
    tiles = (
        scene.instance_map.reshape(side, patch, side, patch).swapaxes(1, 2).reshape(-1, patch**2)
    )
    shares = np.stack([(tiles == i).mean(axis=1) for i in range(len(scene.objects))], axis=1)
    winner = shares.argmax(axis=1)
    classes = np.array([CATEGORIES.index(o.category) + 1 for o in scene.objects], np.int64)
    boxes = np.array([_centre_and_size(o) for o in scene.objects], np.float32)[winner]
    boxes[:, :2] = boxes[:, :2] / patch - _middles(side)
    return np.where(shares.max(axis=1) >= MIN_COVERAGE, classes[winner], 0), boxes


def _centre_and_size(o: SceneObject) -> tuple[float, float, float, float]:
    """Centre in pixels, logarithms of width and height."""
    x0, y0, x1, y1 = o.box
    return *o.center, math.log((x1 - x0) / USUAL_PX), math.log((y1 - y0) / USUAL_PX)


def _middles(side: int) -> np.ndarray:
    """(side * side, 2) middles x, y of the tiles of a picture, in tiles."""
    y, x = np.divmod(np.arange(side * side), side)
    return np.stack([x, y], axis=1) + 0.5


def _cells(
    scene: Scene, cell: int, margin: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    size = scene.instance_map.shape[0]
    side = size // cell
    owners = cell_owners([o.center for o in scene.objects], side, cell, margin)
    classes = np.full(side * side, NO_LABEL, np.int64)
    digits = np.full((side * side, 4), NO_LABEL, np.int64)
    boxes = np.zeros((side * side, 4), np.float32)
    for number, o in enumerate(scene.objects):
        mine = owners == number
        classes[mine] = CATEGORIES.index(o.category)
        tens = [min(99, round(100 * v / size)) for v in o.center]
        digits[mine] = [tens[0] // 10, tens[0] % 10, tens[1] // 10, tens[1] % 10]
        boxes[mine] = _centre_and_size(o)
    boxes[:, :2] = boxes[:, :2] / cell - _middles(side)
    return owners, classes, digits, boxes


def cell_owners(
    centres: Sequence[tuple[float, float]], side: int, cell: int, margin: float
) -> np.ndarray:
    """Which of the centres (x, y), in pixels, may count in each of side * side cells; int64.

    See `label_scenes`. NO_LABEL where none may.
    """
    owners = np.full(side * side, NO_LABEL, np.int64)
    middles = _middles(side)
    distance = np.full(side * side, 0.5 + margin)
    for number, (x, y) in enumerate(centres):
        away = np.abs(np.array([x, y]) / cell - middles).max(axis=1)
        # A cell goes to the nearest centre. One in it is always nearer than one beside it.
        mine = away < distance
        mine[int(y // cell) * side + int(x // cell)] = True
        distance[mine] = away[mine]
        owners[mine] = number
    return owners


def scale_loss(x: Tensor, target: float) -> Tensor:
    """How far the root mean square of each vector (..., D) is from ``target``, in squared log.

    Molmo2 has no norm behind the encoder, and nothing else in training cares about the scale: left
    alone it grew to 25 for features and, through the gated projector, to 47,000 for visual tokens,
    where learning came to a halt.
    """
    return (0.5 * x.square().mean(-1).clamp(min=1e-8).log() - math.log(target)).square().mean()


class VisionHeads(nn.Module):
    """Linear readers of patch features and visual tokens."""

    class_weights: Tensor

    def __init__(self, vision_dim: int, llm_dim: int, side: int = 6) -> None:
        """``side``: cells a row, and rows."""
        super().__init__()
        self.side = side
        self.patch_class = nn.Linear(vision_dim, len(CATEGORIES) + 1)
        self.patch_box = nn.Linear(vision_dim, 4)
        self.cell_object = nn.Linear(llm_dim, 1)
        self.cell_digits = nn.Linear(llm_dim, 40)
        self.cell_box = nn.Linear(llm_dim, 4)
        self.cell_place = nn.Linear(llm_dim, 2 * side)
        self.claim = nn.Linear(llm_dim, 1)
        # Most patches are background: unweighted, they keep the head from looking at objects.
        weights = torch.ones(len(CATEGORIES) + 1)
        weights[0] = BACKGROUND_WEIGHT
        self.register_buffer("class_weights", weights, persistent=False)

    def classify(self, features: Tensor) -> Tensor:
        """(..., Dv) -> logits (..., C + 1), 0 is the background."""
        return self.patch_class(F.layer_norm(features, features.shape[-1:]))

    def patch_loss(self, patches: Tensor, labels: SceneLabels) -> tuple[Tensor, dict[str, float]]:
        """What each patch (B, N, Dv) shows; how often it is right where it shows an object."""
        logits = self.classify(patches)
        targets = labels.patch_class
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), self.class_weights)
        right = (logits.argmax(-1) == targets)[targets > 0]
        return loss, {"patch_accuracy": right.float().mean().item()}

    def forward(
        self, patches: Tensor, tokens: Tensor, noun_embeddings: Tensor, labels: SceneLabels
    ) -> tuple[Tensor, dict[str, float]]:
        """The summed loss and what it consists of.

        Args:
            patches: (B, N, Dv) encoder features. tokens: (B, n, D) connector output.
            noun_embeddings: (C, D), the decoder's rows for the categories.
        """
        patch_loss, metrics = self.patch_loss(patches, labels)
        t = F.rms_norm(tokens, tokens.shape[-1:])
        object_logits = self.cell_object(t)[..., 0]
        centred = strongest(object_logits.detach(), labels.cell_owner)
        noun_logits = t[centred] @ F.normalize(noun_embeddings, dim=-1).T
        digit_logits = self.cell_digits(t[centred]).unflatten(-1, (4, 10))
        digits = labels.cell_digits[centred]
        on_object = labels.patch_class > 0
        on_object_features = F.layer_norm(patches[on_object], patches.shape[-1:])
        place_logits = self.cell_place(t).unflatten(-1, (2, self.side))  # row, column
        cells = torch.arange(t.shape[1], device=t.device)
        places = torch.stack([cells // self.side, cells % self.side], dim=-1).expand(len(t), -1, -1)
        losses = {
            "patch": patch_loss,
            "object": 2 * F.binary_cross_entropy_with_logits(object_logits, centred.float()),
            "noun": F.cross_entropy(noun_logits, labels.cell_class[centred]),
            "place": 2 * F.cross_entropy(place_logits.flatten(0, 2), places.flatten()),
            "digits": F.cross_entropy(digit_logits.flatten(0, 1), digits.flatten()),
            "patch_box": F.smooth_l1_loss(
                self.patch_box(on_object_features), labels.patch_box[on_object], beta=0.25
            ),
            "cell_box": 2
            * F.smooth_l1_loss(self.cell_box(t[centred]), labels.cell_box[centred], beta=0.1),
            "scale": 0.1 * (scale_loss(patches, FEATURE_RMS) + scale_loss(tokens, TOKEN_RMS)),
        }
        with torch.no_grad():
            found = object_logits > 0
            hits = (found & centred).sum()
            metrics |= {f"{name}_loss": loss.item() for name, loss in losses.items()}
            metrics["noun_accuracy"] = float(
                (noun_logits.argmax(-1) == labels.cell_class[centred]).float().mean()
            )
            metrics["object_f1"] = float(2 * hits / (found.sum() + centred.sum()).clamp(min=1))
            metrics["place_accuracy"] = float((place_logits.argmax(-1) == places).float().mean())
            metrics["digit_accuracy"] = float((digit_logits.argmax(-1) == digits).float().mean())
        return sum(losses.values(), torch.zeros(())), metrics

    def claim_loss(self, hidden: Tensor, owners: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Which cells still claim an object once the decoder's image tokens have seen each other.

        Pooled tokens can not: a duplicate that is left between two of them is settled here.

        Args:
            hidden: (B, n, D) inside of the decoder. owners: (B, n) `SceneLabels.cell_owner`.
        """
        logits = self.claim(F.rms_norm(hidden, hidden.shape[-1:]))[..., 0]
        centred = strongest(logits.detach(), owners)
        loss = F.binary_cross_entropy_with_logits(logits, centred.float())
        exact = ((logits > 0) == centred).all(dim=-1).float().mean()
        return loss, {"claim_loss": loss.item(), "claims_right": exact.item()}


def strongest(logits: Tensor, owners: Tensor) -> Tensor:
    """(B, n) bool: of the cells where an object may count, the one that says so most.

    A centre on the line between two cells is in both for all that a picture shows. To insist on one
    of them teaches both to claim it, half as strongly each, and the decoder counts it twice; let
    the tokens agree, and one of them does.

    Args:
        logits: (B, n) how much each cell claims an object; of equals, the first cell's counts.
        owners: `SceneLabels.cell_owner`.
    Source: the one-to-one labels of detectors without suppression (DETR, Carion et al. 2020).
    """
    candidate = owners != NO_LABEL
    groups = owners.clamp(min=0)
    best = logits.new_full((len(logits), int(groups.max()) + 1), -torch.inf)
    best = best.scatter_reduce(1, groups, logits.masked_fill(~candidate, -torch.inf), "amax")
    strong = candidate & (logits >= best.gather(1, groups))
    cells = torch.arange(logits.shape[1], device=logits.device).expand_as(owners)
    first = torch.full_like(best, logits.shape[1], dtype=cells.dtype)
    first = first.scatter_reduce(1, groups, cells.where(strong, logits.shape[1]), "amin")
    return strong & (cells == first.gather(1, groups))
