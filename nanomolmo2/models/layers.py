"""The small parts that several files build on: norms, rotary positions, the gated MLP.

B rows, T positions, D width, H heads, Dh head width.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rope: TypeAlias = "tuple[Tensor, Tensor]"  # cosine and sine, each (B or 1, 1, T, Dh) float32


class RMSNorm(nn.Module):
    """Root mean square norm, in float32 whatever the compute dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm, in float32 whatever the compute dtype."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return y.to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, in_size: int, intermediate_size: int, out_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(in_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, out_size, bias=False)

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two projections of one input."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x)
        return self.down_proj(F.silu(gate) * up)


def rope_table(position_ids: Tensor, head_dim: int, theta: float) -> Rope:
    """Cosine and sine of every position (B or 1, T); the two halves of Dh are alike."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[:, None, :, None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotary position embedding, halves paired as in Qwen; float32 inside. x: (B, H, T, Dh)."""
    y, (cos, sin) = x.float(), rope
    first, second = y.chunk(2, dim=-1)
    return (y * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
