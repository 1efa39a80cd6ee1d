"""The four terms in the loss of a model that points, one by one: text, rows, slots and cells.

The step's loss is one sum over all of them, divided by the weight of its labels. Here each term is
divided by its own weight, so that it can be compared with what guessing would cost, and its
selections are counted: how many are right. All is added up on the device and read with the loss.

B rows of T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanomolmo2.models.point_config import PointConfig
from nanomolmo2.models.pointing import PointTerms
from nanomolmo2.training.distributed import sum_over_ranks
from nanomolmo2.training.metrics import LOSSES_OF_TERMS

TERMS = tuple(name.removeprefix("loss_") for name in LOSSES_OF_TERMS)


class TermSums:
    """What the micro-batches of a step add to each term, on this rank."""

    def __init__(self, config: PointConfig, device: torch.device) -> None:
        """``device``: of the model."""
        self.markers = config.marker_ids
        self.sums = torch.zeros(4, len(TERMS), device=device)  # losses, weights, numbers, right

    def add(self, terms: PointTerms, labels: Tensor, weights: Tensor) -> None:
        """Count a micro-batch.

        Args:
            terms: of the model.
            labels, weights: (B, T), what each label weighs; see `trainer.label_weights`.
        """
        weights = weights.detach()
        of_terms = [weights, *(weights * (labels == marker) for marker in self.markers)]
        self.sums += torch.stack(
            (
                torch.stack((terms.text, terms.row, terms.slot, terms.cell)).detach(),
                torch.stack([x.sum() for x in of_terms]),
                torch.stack([(x > 0).sum() for x in of_terms]),
                torch.cat((terms.right_text[None], terms.right)),
            )
        )

    def metrics(self) -> dict[str, float | Tensor]:
        """``loss_row`` and ``accuracy_row``, and so on; call it on every rank.

        What the step has none of is nan, and left out when it is read.
        """
        losses, weights, numbers, right = sum_over_ranks(self.sums)
        means = dict(zip([f"loss_{term}" for term in TERMS], losses / weights, strict=True))
        shares = dict(zip([f"accuracy_{term}" for term in TERMS], right / numbers, strict=True))
        return {**means, **shares}
