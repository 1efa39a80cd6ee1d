"""Chunked linear cross-entropy: the loss of the next token without logits in memory.

N positions that carry loss, D hidden_size, V vocab_size.

Logits are the widest tensor of training by far: 857 positions of 151,936 float32 are 0.5 GB, and a
plain loss holds several tensors of that size. Here the N positions pass the head with some columns
of the vocabulary at a time, in forward and once more in backward; what stays in between is one
number a position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nanomolmo2.accelerate.linear import BF16MatmulLinear, OneDNNLinear, linear
from nanomolmo2.accelerate.memory import trim
from nanomolmo2.accelerate.new_rows import NewRowsEmbedding, NewRowsTiedHead
from nanomolmo2.accelerate.swap import swap
from nanomolmo2.models import language_model
from nanomolmo2.models.loss import NextTokenLoss, weighted_loss

Model = TypeVar("Model", bound=nn.Module)

CHUNK_SIZE = 2**24  # logits that exist at a time: 64 MB in float32
_LEAST_CHUNKS = 4  # also of few positions or a small vocabulary: never all logits at once


def chunked_loss(model: Model) -> Model:
    """Let the loss never hold all logits, nor two gradients of a tied embedding table.

    Swaps `NextTokenLoss` of decoders for `ChunkedLoss`, and where the head is the table, the table
    for `TiedEmbedding`.
    """
    for module in model.modules():
        if isinstance(module, language_model.LanguageModel):
            swap(module, {NextTokenLoss: ChunkedLoss})
            if module.lm_head is None:
                swap(module, {nn.Embedding: TiedEmbedding})
    return model


class TiedEmbedding(nn.Embedding):
    """An embedding lookup whose gradient joins that of the head in one tensor.

    Autograd would make two tensors of the table's size and add them up. Here the lookup also gives
    the table itself, for the head to be computed with: so the gradient of the head goes through the
    lookup, which adds its own rows to it in place.
    """

    _table: Tensor | None = None  # of the newest lookup

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        x: Tensor
        x, self._table = _TiedLookup.apply(self.weight, input)
        return x

    def table(self) -> Tensor:
        """(V, D), by way of the newest lookup where there is one."""
        table, self._table = self._table, None
        return self.weight if table is None or not torch.is_grad_enabled() else table

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_table"}  # it belongs to a graph


class _TiedLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.ids, ctx.shape = ids, weight.shape
        ctx.set_materialize_grads(False)
        return F.embedding(ids, weight), weight.detach()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: Tensor | None, grad_table: Tensor | None
    ) -> tuple[Tensor | None, None]:
        if grad_x is not None:
            if grad_table is None:
                grad_table = grad_x.new_zeros(ctx.shape)
            grad_table.index_add_(0, ctx.ids.flatten(), grad_x.flatten(0, -2))
        return grad_table, None


class ChunkedLoss(NextTokenLoss):
    """The loss of `NextTokenLoss`, by :func:`linear_cross_entropy`."""

    def forward(
        self,
        hidden: Tensor,
        llm: language_model.LanguageModel,
        tokens: Tensor,
        weights: Tensor,
        z_loss: float = 0.0,
        chunk_size: int | None = None,
    ) -> Tensor:
        """``chunk_size``: logits that exist at a time, about; `CHUNK_SIZE` by default."""
        head = llm.embed_tokens if llm.lm_head is None else llm.lm_head
        options: dict[str, Any] = {
            "vocab_size": llm.config.num_logits,
            "z_loss": z_loss,
            "chunk_size": chunk_size or CHUNK_SIZE,
        }
        if type(head) in _ONE_MATRIX and not isinstance(llm.tied_head, NewRowsTiedHead):
            matrix = head.table() if isinstance(head, TiedEmbedding) else head.weight
            return linear_cross_entropy(hidden, matrix, tokens, weights, **options)
        return chunked_rows_loss(llm.head, hidden, tokens, weights, **options)


# Heads that are a matrix: of a `NewRowsEmbedding`, where no head reads the rows that learn.
_ONE_MATRIX = (
    *(nn.Embedding, TiedEmbedding, NewRowsEmbedding),
    *(nn.Linear, OneDNNLinear, BF16MatmulLinear),
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    weights: Tensor,
    *,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Weighted sum of -log p(token) + z_loss * log(Z)**2, Z the sum of the softmax: float32.

    Args:
        hidden: (N, D).
        weight: (V or more, D), of the head; rows from ``vocab_size`` on are never written.
        tokens: (N,) below V; weights: (N,) float32.
        chunk_size: logits that exist at a time, about.
    Source: the z-loss is that of PaLM ("Training Setup"), which Molmo2 uses too.
    """
    V = len(weight) if vocab_size is None else vocab_size
    kind = hidden.device.type
    # As a linear layer would compute.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(
            hidden.to(dtype), weight, tokens, weights, V, z_loss, chunk_size
        )
    return total


def chunked_rows_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    tokens: Tensor,
    weights: Tensor,
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """:func:`linear_cross_entropy` for a head that is more than one matrix (quantised, LoRA).

    The rows pass it some at a time, and again in backward.
    """

    def chunk_loss(rows: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
        return weighted_loss(head(rows), tokens, weights, z_loss)

    N = len(hidden)
    size = max(1, min(chunk_size // vocab_size, math.ceil(N / _LEAST_CHUNKS)))
    total = hidden.float().sum() * 0.0  # leads back also where there is nothing to learn
    for part in zip(*(x.split(size) for x in (hidden, tokens, weights)), strict=True):
        total = total + checkpoint(chunk_loss, *part, use_reentrant=False)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
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
        ctx.V, ctx.z_loss, ctx.size = V, z_loss, size
        return (losses * weights).sum().float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens, weights, log_z, losses = ctx.saved_tensors
        trim(weight)  # before its gradient comes on top
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.zeros_like(hidden, dtype=log_z.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            grad_weight[ctx.V :] = 0
        scale = gradient * weights  # (N,)
        # d/dlogits of log Z is the softmax, and of log(Z)**2 it is 2 log Z times that.
        of_softmax = (scale * (1 + 2 * ctx.z_loss * log_z))[:, None]
        for columns in _chunks(ctx.V, ctx.size):
            grad_logits = _logits(hidden, weight[columns])
            grad_logits.sub_(log_z[:, None]).exp_().mul_(of_softmax)
            inside, index = _inside(tokens, columns)
            grad_logits.scatter_add_(1, index, -(scale * inside)[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden += linear(grad_logits, weight[columns].to(hidden.dtype).t())
            if grad_weight is not None:
                _multiply_into(grad_weight[columns], grad_logits.t(), hidden)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden.dtype)
        # What the sum gains by a weight is the loss of its position: so are losses told by task.
        grad_weights = (gradient * losses).to(weights.dtype) if ctx.needs_input_grad[3] else None
        return grad_hidden, grad_weight, None, grad_weights, None, None, None


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
