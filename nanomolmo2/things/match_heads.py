"""What a picture's patches and visual tokens are taught before there are questions: which of them
holds the middle of a thing, and which show things of one kind.

n cells (patches or visual tokens) of a batch, D their width, E of the embeddings in which things of
one kind are near to each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomolmo2.config import Config
from nanomolmo2.emoji.heads import strongest
from nanomolmo2.models.finder import Reader, plain_norm
from nanomolmo2.things.match_labels import GROUND, CellLabels

EMBED_DIM = 64  # as wide as the keys of `models.point_predictor`
NEVER = 1e-30  # weight of what does not compete: not 0, whose logarithm has no gradient


@dataclass(frozen=True)
class MatchConfig(Config):
    """How much each part of the loss weighs.

    middle: which cells hold a middle. like: the contrastive loss. pair: whether two cells of one
        picture show one kind. way: where the middle is, from every patch of a thing.
    rivals: how many times a cell of another kind counts among what an example is told from, where
        it is in the same picture.
    ground: the same of cells that show the ground, in the same picture.
    most: cells that are compared with each other, of a kind of cells; drawn at random of more.
    temperature: at first.
    """

    middle: float = 2.0
    like: float = 1.0
    pair: float = 1.0
    way: float = 0.5
    rivals: float = 4.0
    ground: float = 0.25
    most: int = 1536
    temperature: float = 0.1


class Compared(NamedTuple):
    """Which of m cells may be compared; all bool (m, m) with the examples in the rows.

    alike: they show one kind, in one picture. rivals: in one picture, another kind. ground: in one
    picture, the second is ground. others: of another picture, and clearly another look.
    """

    alike: Tensor
    rivals: Tensor
    ground: Tensor
    others: Tensor


def compared(labels: CellLabels, looks: Tensor) -> Compared:
    """Of all cells of a batch. looks: (K,), see `MatchBatch`."""
    kind, picture = labels.kind, labels.picture
    shows = kind >= 0
    look = torch.where(shows, looks[kind.clamp(min=0)], -1)
    same_picture = picture[:, None] == picture
    both = shows[:, None] & shows
    alike = both & (kind[:, None] == kind)
    alike.fill_diagonal_(False)
    return Compared(
        alike,
        both & same_picture & (kind[:, None] != kind),
        shows[:, None] & same_picture & (kind == GROUND),
        both & ~same_picture & (look[:, None] != look),
    )


def like_loss(scores: Tensor, pairs: Compared, rivals: float, ground: float) -> Tensor:
    """Supervised contrastive loss: for each example, and each cell like it, how likely that cell is
    among itself and all that is not like it.

    Other cells like the example do not compete. What is in its own picture weighs more.

    Args: scores: (m, m) similarities, example in the rows, as logits.
    Source: Khosla et al. 2020, but for the competition of what is alike.
    """
    weights = rivals * pairs.rivals + ground * pairs.ground + pairs.others.to(scores.dtype)
    against = scores + weights.clamp(min=NEVER).log()
    against = against.logsumexp(dim=1, keepdim=True)
    losses = F.softplus(against - scores)
    counts = pairs.alike.sum(dim=1)
    sums = torch.where(pairs.alike, losses, 0.0).sum(dim=1)
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def pair_loss(scores: Tensor, pairs: Compared) -> Tensor:
    """Binary cross-entropy of whether two cells of a picture show one kind, balanced: for every
    example all that is like it weighs as much as all rivals, and twice as much as the ground.
    """
    total = scores.new_zeros(())
    for which, sign, weight in ((pairs.alike, -1, 1), (pairs.rivals, 1, 1), (pairs.ground, 1, 0.5)):
        losses = torch.where(which, F.softplus(sign * scores), 0.0).sum(dim=1)
        counts = which.sum(dim=1)
        each = losses / counts.clamp(min=1)
        total = total + weight * each.sum() / (counts > 0).sum().clamp(min=1)
    return total


def some_cells(labels: CellLabels, centred: Tensor, most: int) -> Tensor:
    """Numbers of the cells that are compared: middles first, then others, spread evenly.

    Args: centred: (n,) bool, which hold a middle.
    """
    clear = torch.nonzero((labels.kind >= 0) | (labels.kind == GROUND))[:, 0]
    if len(clear) <= most:
        return clear
    middles = clear[centred[clear]]
    others = clear[~centred[clear]]
    step = max(1, -(-len(others) // max(1, most - len(middles))))
    return torch.cat([middles, others[::step]]).sort().values


class MatchHead(Reader):
    """Reads cells of width D, and learns to."""

    def __init__(self, width: int, config: MatchConfig) -> None:
        super().__init__(width, EMBED_DIM, config.temperature)
        self.config = config

    def forward(
        self, cells: Tensor, labels: CellLabels, looks: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The weighted loss of cells (n, D), and what it consists of."""
        config = self.config
        claims = self.claim(cells)
        centred = strongest(claims.detach()[None], labels.owner[None])[0]
        shows = labels.kind >= 0
        on_things = plain_norm(cells[shows])
        some = some_cells(labels, centred, config.most)
        pairs = compared(labels.of_cells(some), looks)
        embedded = self.look(cells[some])
        similar = embedded @ embedded.T
        losses = {
            "middle": F.binary_cross_entropy_with_logits(claims, centred.float()),
            "like": like_loss(self.scale() * similar, pairs, config.rivals, config.ground),
            "pair": pair_loss(self.alike(similar), pairs),
            "way": F.smooth_l1_loss(self.way(on_things), labels.way[shows], beta=0.25),
        }
        with torch.no_grad():
            found = claims > 0
            hits = (found & centred).sum()
            metrics = {f"{name}_loss": loss.item() for name, loss in losses.items()}
            metrics["middle_f1"] = float(2 * hits / (found.sum() + centred.sum()).clamp(min=1))
            said = similar > -self.bias
            right = (said & pairs.alike).sum(), (~said & pairs.rivals).sum()
            metrics["alike_right"] = float(right[0] / pairs.alike.sum().clamp(min=1))
            metrics["rivals_right"] = float(right[1] / pairs.rivals.sum().clamp(min=1))
        total = sum((getattr(config, name) * x for name, x in losses.items()), torch.zeros(()))
        return total, metrics
