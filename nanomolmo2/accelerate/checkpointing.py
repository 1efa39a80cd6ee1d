"""Activation checkpointing: what forward keeps for backward, and what is recomputed.

Most memory of training is what forward keeps. Selective checkpointing keeps what matrix products
and attention give and recomputes what lies between them: norms, rotations, SwiGLU. That is half of
the memory for a few hundredths of the time. Full checkpointing keeps the input of a block alone and
runs it twice. Gradients are the same either way, bit for bit.

Source: torch.utils.checkpoint.create_selective_checkpoint_contexts.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from nanomolmo2.accelerate.flex import WholeSequence
from nanomolmo2.accelerate.swap import swap
from nanomolmo2.models.attention import Cache
from nanomolmo2.models.language_model import DecoderLayer
from nanomolmo2.models.layers import Rope
from nanomolmo2.models.vision_encoder import VisionLayer

Model = TypeVar("Model", bound=nn.Module)
Checkpointing: TypeAlias = Literal["selective", "full", "none"]
Contexts: TypeAlias = "tuple[AbstractContextManager[None], AbstractContextManager[None]]"

# FSDP marks its work inside a block for the profiler, in backward at other places than in forward.
SAC_IGNORED_OPS.update(
    (
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
    )
)

# By name: not every build of PyTorch has all of them.
KEPT_OPERATORS = frozenset(
    (
        *("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise"),
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
    )
)


def checkpoint_activations(model: Model, mode: Checkpointing = "selective") -> Model:
    """Choose what blocks keep for backward.

    Swaps every `DecoderLayer`, and with ``full`` every `VisionLayer` too, for a subclass that
    checkpoints; ``none`` undoes it. Blocks that torch.compile compiles decide for themselves with
    ``selective``. Apply it before compiling and sharding.
    """
    if mode not in ("selective", "full", "none"):
        raise ValueError(f"mode is {mode!r}, expected 'selective', 'full' or 'none'")
    decoder = {"selective": SelectiveDecoderLayer, "full": CheckpointedDecoderLayer}
    new = decoder.get(mode, DecoderLayer)
    classes: dict[type[nn.Module], type[nn.Module]]
    classes = dict.fromkeys((DecoderLayer, SelectiveDecoderLayer, CheckpointedDecoderLayer), new)
    vision = CheckpointedVisionLayer if mode == "full" else VisionLayer
    classes |= dict.fromkeys((VisionLayer, CheckpointedVisionLayer), vision)
    return swap(model, classes)


class CheckpointedDecoderLayer(DecoderLayer):
    """`DecoderLayer` that keeps its input alone."""

    context_fn: Any = None

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None) -> Tensor:
        remembers = cache is not None and not isinstance(cache, WholeSequence)
        if remembers or not torch.is_grad_enabled():
            return super().forward(x, rope, mask, cache)
        options = {} if self.context_fn is None else {"context_fn": self.context_fn}
        forward = super().forward
        y: Tensor = checkpoint(forward, x, rope, mask, cache, use_reentrant=False, **options)
        return y


class SelectiveDecoderLayer(CheckpointedDecoderLayer):
    """`DecoderLayer` that keeps what products and attention give."""

    @staticmethod
    def context_fn() -> Contexts:
        return create_selective_checkpoint_contexts(_policy)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None) -> Tensor:
        if torch.compiler.is_compiling():
            return DecoderLayer.forward(self, x, rope, mask, cache)
        return super().forward(x, rope, mask, cache)


class CheckpointedVisionLayer(VisionLayer):
    """`VisionLayer` that keeps its input alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


def _policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = _is_kept(operator)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def _is_kept(operator: Any) -> bool:
    return operator.name().split(".")[0] in KEPT_OPERATORS
