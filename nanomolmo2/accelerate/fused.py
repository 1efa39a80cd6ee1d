"""Fused QKV: projections of one input as one product."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from nanomolmo2.accelerate.quantized_linear import project
from nanomolmo2.accelerate.swap import swap
from nanomolmo2.models.language_model import Attention
from nanomolmo2.models.layers import SwiGLU
from nanomolmo2.models.vision_encoder import VisionAttention

Model = TypeVar("Model", bound=nn.Module)


def fuse_projections(model: Model) -> Model:
    """Let quantised q, k and v, and gate and up, be one product each.

    Swaps `Attention`, `VisionAttention` and `SwiGLU` for subclasses; layers in floating point are
    called one by one as before.
    """
    classes = {
        Attention: FusedAttention,
        VisionAttention: FusedVisionAttention,
        SwiGLU: FusedSwiGLU,
    }
    return swap(model, classes)


class FusedAttention(Attention):
    """`Attention` with q, k and v of one product."""

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v


class FusedVisionAttention(VisionAttention):
    """`VisionAttention` with q, k and v of one product."""

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v


class FusedSwiGLU(SwiGLU):
    """`SwiGLU` with gate and up of one product."""

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = project(x, (self.gate_proj, self.up_proj))
        return gate, up
