"""Cross-entropy of the next token.

B rows of T positions, N positions that carry loss, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.batch import IGNORED_LABEL

if TYPE_CHECKING:
    from nanomolmo2.models.language_model import LanguageModel

Reduction: TypeAlias = Literal["mean", "sum"]


class Targets(NamedTuple):
    """The positions that carry loss: those that stand before a token to learn."""

    rows: Tensor  # (N,) index into the B * T positions
    tokens: Tensor  # (N,) the token behind each
    weights: Tensor  # (N,) float32, greater than 0


def next_tokens(
    labels: Tensor, loss_weights: Tensor | None = None, rows: Tensor | None = None
) -> Targets:
    """What is to be learned; the shift by one position happens here, and nowhere else.

    Args:
        labels: (B, T), the token at its own position; -100 = no loss.
        loss_weights: (B, T), of the label at the same position; 1 by default.
        rows: (N,), the positions where they are known already, see :meth:`Batch.prepared`.
    Raises: ValueError for weights below 0, or of another shape.
    """
    if loss_weights is not None and loss_weights.device.type == "cpu":
        check_weights(labels, loss_weights)
    if rows is None:
        chosen = labels[:, 1:] != IGNORED_LABEL
        if loss_weights is not None:
            chosen = chosen & (loss_weights[:, 1:] > 0)
        rows = F.pad(chosen, (0, 1)).flatten().nonzero()[:, 0]
    tokens = labels.flatten()[rows + 1]
    if loss_weights is None:
        return Targets(rows, tokens, torch.ones_like(tokens, dtype=torch.float32))
    return Targets(rows, tokens, loss_weights.flatten()[rows + 1].float())


def check_weights(labels: Tensor, loss_weights: Tensor) -> None:
    """Raises: ValueError for weights below 0, or of another shape."""
    if loss_weights.shape != labels.shape:
        raise ValueError(
            f"loss_weights {tuple(loss_weights.shape)} must have the shape of labels "
            f"{tuple(labels.shape)}: one weight for every label"
        )
    of_labels = loss_weights[:, 1:][labels[:, 1:] != IGNORED_LABEL]
    if not bool((of_labels >= 0).all()):
        raise ValueError(
            f"loss_weights of labelled tokens must be 0 or more, found {of_labels.min():g}: "
            f"leave tokens out with 0"
        )


def reduce(total: Tensor, weights: Tensor, reduction: Reduction) -> Tensor:
    """A weighted sum, or the mean; the mean of nothing is 0. weights: (N,)."""
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise ValueError(f"reduction is {reduction!r}, expected 'mean' or 'sum'")
    return total / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


def weighted_loss(logits: Tensor, tokens: Tensor, weights: Tensor, z_loss: float = 0.0) -> Tensor:
    """The formula of :class:`NextTokenLoss`, of logits (N, V)."""
    logits = logits.float()
    losses = F.cross_entropy(logits, tokens, reduction="none")
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square()
    return (losses * weights).sum()


class NextTokenLoss(nn.Module):
    """The plain loss, with all logits of the N positions in memory; accelerate/ has one without."""

    def forward(
        self,
        hidden: Tensor,
        llm: LanguageModel,
        tokens: Tensor,
        weights: Tensor,
        z_loss: float = 0.0,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Weighted sum of -log p(token) + z_loss * log(Z)**2, Z the sum of the softmax: float32.

        Args:
            hidden: (N, D). llm: whose head gives the logits. tokens, weights: (N,).
            chunk_size: for the loss of accelerate/; this one holds all logits.
        Source: the z-loss is that of PaLM ("Training Setup"), which Molmo2 uses too.
        """
        return weighted_loss(llm.head(hidden), tokens, weights, z_loss)
