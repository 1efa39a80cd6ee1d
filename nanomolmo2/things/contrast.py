"""Which patches show things of one kind: a contrastive loss over all pictures of a step.

n cells (patches) of a batch, m of them compared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanomolmo2.things.cell_labels import GROUND, CellLabels

RIVALS = 4.0  # times that a cell of another kind counts, where it is in the same picture
ON_GROUND = 0.25  # the same of a cell that shows the ground
MOST_CELLS = 1536  # compared with each other; of more, some
NEVER = 1e-30  # weight of what does not compete: not 0, whose logarithm has no gradient


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
    """Of all cells of a batch. looks: (K,), of each kind, equal for equal looks."""
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


def like_loss(
    scores: Tensor, pairs: Compared, rivals: float = RIVALS, ground: float = ON_GROUND
) -> Tensor:
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


def some_cells(labels: CellLabels, centred: Tensor, most: int = MOST_CELLS) -> Tensor:
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
