"""Cross-entropy of the next token without logits in memory.

B rows of T positions, N positions that carry loss, D hidden_size, V vocab_size.

Logits are the widest tensor of training by far: 857 positions of 151,936 float32 are 0.5 GB, and a
plain loss holds several tensors of that size. Here only the N positions pass the head, some columns
of the vocabulary at a time, in forward and once more in backward; what stays in between is one
number a position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nanomolmo2.batch import IGNORED_LABEL
from nanomolmo2.models.kernels import linear
from nanomolmo2.models.recompute import tidy

Reduction: TypeAlias = Literal["mean", "sum"]

CHUNK_SIZE = 2**24  # logits that exist at a time: 64 MB in float32
_LEAST_CHUNKS = 4  # also of few positions or a small vocabulary: never all logits at once


class Targets(NamedTuple):
    """The positions that carry loss: those that stand before a token to learn."""

    rows: Tensor  # (N,) index into the B * T positions
    tokens: Tensor  # (N,) the token behind each
    weights: Tensor  # (N,) float32, greater than 0


def next_tokens(labels: Tensor, loss_weights: Tensor | None = None) -> Targets:
    """Find what is to be learned; the shift happens here.

    Args:
        labels: (B, T), the token at its own position; -100 = no loss.
        loss_weights: (B, T), of the label at the same position; 1 by default.
    Raises: ValueError for weights below 0, or of another shape.
    """
    chosen = labels[:, 1:] != IGNORED_LABEL
    if loss_weights is not None:
        if loss_weights.shape != labels.shape:
            raise ValueError(
                f"loss_weights {tuple(loss_weights.shape)} must have the shape of labels "
                f"{tuple(labels.shape)}: one weight for every label"
            )
        of_chosen = loss_weights[:, 1:][chosen]
        if not bool((of_chosen >= 0).all()):
            raise ValueError(
                f"loss_weights of labelled tokens must be 0 or more, found {of_chosen.min():g}: "
                f"leave tokens out with 0"
            )
        chosen = chosen & (loss_weights[:, 1:] > 0)
    rows = F.pad(chosen, (0, 1)).flatten().nonzero()[:, 0]
    tokens = labels.flatten()[rows + 1]
    if loss_weights is None:
        return Targets(rows, tokens, torch.ones_like(tokens, dtype=torch.float32))
    return Targets(rows, tokens, loss_weights.flatten()[rows + 1].float())


def reduce(total: Tensor, weights: Tensor, reduction: Reduction) -> Tensor:
    """A weighted sum, or the mean; the mean of nothing is 0. weights: (N,)."""
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise ValueError(f"reduction is {reduction!r}, expected 'mean' or 'sum'")
    return total / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)


class TiedGradient:
    """Carries a table's gradient as head to where it gets its gradient as embedding.

    Autograd would make two tensors of the table's size and add them to a third. Here the embedding,
    whose turn in backward comes last, adds its rows to the head's.
    """

    whole: Tensor | None = None

    def take(self) -> Tensor | None:
        whole, self.whole = self.whole, None
        return whole


def read_rows(weight: Tensor, ids: Tensor, tied: TiedGradient) -> Tensor:
    """``F.embedding``; the gradient holds that of the head too, where ``head_loss`` gets ``tied``.

    Args:
        weight: (V or more, D); ids: (...) int64.
    Returns: (..., D), which the hidden states of ``head_loss`` must be computed from.
    """
    rows: Tensor = _ReadRows.apply(weight, ids, tied)
    return rows


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    weights: Tensor,
    *,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
    tied: TiedGradient | None = None,
) -> Tensor:
    """Weighted sum of -log p(token) + z_loss * log(Z)**2, Z the sum of the softmax: float32.

    Args:
        hidden: (N, D).
        weight: (V or more, D), of the head; rows from ``vocab_size`` on are never written.
        tokens: (N,) below V; weights: (N,) float32.
        chunk_size: logits that exist at a time, about.
        tied: takes the weight's gradient, see :func:`read_rows`.
    Source: the z-loss is that of PaLM ("Training Setup"), which Molmo2 uses too.
    """
    V = len(weight) if vocab_size is None else vocab_size
    kind = hidden.device.type
    # As a linear layer would compute.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        total: Tensor = _HeadLoss.apply(
            hidden.to(dtype), weight, tokens, weights, V, z_loss, chunk_size, tied
        )
    return total


def rows_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    tokens: Tensor,
    weights: Tensor,
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """:func:`head_loss` for a head that is more than one matrix (quantised, LoRA).

    The rows pass it some at a time, and again in backward.
    """

    def chunk_loss(rows: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        logits = head(rows).float()
        losses = F.cross_entropy(logits, tokens, reduction="none")
        if z_loss:
            losses = losses + z_loss * logits.logsumexp(-1).square()
        return (losses * weights).sum()

    N = len(hidden)
    size = max(1, min(chunk_size // vocab_size, math.ceil(N / _LEAST_CHUNKS)))
    total = hidden.float().sum() * 0.0  # leads back also where there is nothing to learn
    for part in zip(*(x.split(size) for x in (hidden, tokens, weights)), strict=True):
        total = total + checkpoint(chunk_loss, *part, use_reentrant=False)
    return total


class _HeadLoss(torch.autograd.Function):
    """Chunks are columns of the logits: each part of the weight is read once, its gradient written
    once, and rounded as that of one product would be."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        weights: Tensor,
        V: int,
        z_loss: float,
        chunk_size: int,
        tied: TiedGradient | None,
    ) -> Tensor:
        N = len(hidden)
        size = max(1, min(chunk_size // max(N, 1), math.ceil(V / _LEAST_CHUNKS)))
        log_z = hidden.new_full((N,), -torch.inf, dtype=_wide(hidden))
        at_token = torch.zeros_like(log_z)
        for columns in _chunks(V, size):
            logits = _logits(hidden, weight[columns])
            log_z = torch.logaddexp(log_z, logits.logsumexp(-1))
            inside, index = _inside(tokens, columns)
            at_token = torch.where(inside, logits.gather(1, index)[:, 0], at_token)
        losses = log_z - at_token + z_loss * log_z.square()
        ctx.save_for_backward(hidden, weight, tokens, weights, log_z, losses)
        ctx.V, ctx.z_loss, ctx.size, ctx.tied = V, z_loss, size, tied
        return (losses * weights).sum().float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, weights, log_z, losses = ctx.saved_tensors
        tidy(weight)  # before its gradient comes on top
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            of_hidden = torch.zeros_like(hidden, dtype=log_z.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
            of_weight[ctx.V :] = 0
        scale = gradient * weights  # (N,)
        # d/dlogits of log Z is the softmax, and of log(Z)**2 it is 2 log Z times that.
        of_softmax = (scale * (1 + 2 * ctx.z_loss * log_z))[:, None]
        for columns in _chunks(ctx.V, ctx.size):
            of_logits = _logits(hidden, weight[columns])
            of_logits.sub_(log_z[:, None]).exp_().mul_(of_softmax)
            inside, index = _inside(tokens, columns)
            of_logits.scatter_add_(1, index, -(scale * inside)[:, None])
            of_logits = of_logits.to(hidden.dtype)
            if of_hidden is not None:
                of_hidden += linear(of_logits, weight[columns].to(hidden.dtype).t())
            if of_weight is not None:
                _multiply_into(of_weight[columns], of_logits.t(), hidden)
        if of_hidden is not None:
            of_hidden = of_hidden.to(hidden.dtype)
        if ctx.tied is not None:
            ctx.tied.whole, of_weight = of_weight, None
        # What the sum gains by a weight is the loss of its position: so are losses told by task.
        of_weights = (gradient * losses).to(weights.dtype) if ctx.needs_input_grad[3] else None
        return of_hidden, of_weight, None, of_weights, None, None, None, None


class _ReadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.tied = tied
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, ids = ctx.saved_tensors
        whole = ctx.tied.take()
        if whole is None:
            whole = torch.zeros_like(weight)
        return whole.index_add_(0, ids.flatten(), gradient.flatten(0, -2)), None, None


def _wide(x: Tensor) -> torch.dtype:
    """Float32 for whatever is shorter."""
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(V: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, V)) for start in range(0, V, size))


def _logits(hidden: Tensor, part: Tensor) -> Tensor:
    """(N, columns); a fresh tensor."""
    logits = linear(hidden, part.to(hidden.dtype))
    return logits.to(_wide(logits))


def _multiply_into(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target = a @ b."""
    if target.dtype == b.dtype:
        torch.mm(a, b, out=target)
    else:
        target.copy_(a @ b)


def _inside(tokens: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether the token is among the columns (N,), and the column (N, 1), 0 if it is not."""
    index = tokens - columns.start
    inside = (index >= 0) & (tokens < columns.stop)
    return inside, index.masked_fill(~inside, 0)[:, None]
