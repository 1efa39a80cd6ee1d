"""The SigLIP 2 vision transformer.

B images, N patches, D hidden_size, H heads, Dh head width, P patch_size.

Source: google/siglip2-so400m-patch14-384 (the vision tower without its pooling head).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.config import Config
from nanomolmo2.models.attention import attend
from nanomolmo2.models.layers import LayerNorm


@dataclass(frozen=True)
class VisionConfig(Config):
    """Sizes of the vision encoder; the defaults are SigLIP 2 So400m/14 at 384 pixels."""

    image_size: int = 384
    patch_size: int = 14
    num_channels: int = 3
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        self.check_positive()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}): every head has the same width"
            )
        if self.patch_size > self.image_size:
            raise ValueError(
                f"patch_size ({self.patch_size}) must not be above image_size "
                f"({self.image_size}): a picture holds at least one patch"
            )
        if self.hidden_act != "gelu_pytorch_tanh":
            raise ValueError(
                f"hidden_act {self.hidden_act!r} is not built: SigLIP 2 uses 'gelu_pytorch_tanh'"
            )

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class VisionAttention(nn.Module):
    """Multi-head self-attention over all patches, with biases."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three projections of one input."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in self.qkv(x)
        )  # (B, H, N, Dh)
        return self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linears with a tanh-approximated GELU between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    """Images to one feature a patch.

    Args:
        config: sizes.
        num_layers: blocks to build, where later ones would never be read; all by default.
        post_layernorm: build the norm behind the last block.
    """

    def __init__(
        self,
        config: VisionConfig | None = None,
        *,
        num_layers: int | None = None,
        post_layernorm: bool = True,
    ) -> None:
        super().__init__()
        self.config = config = config or VisionConfig()
        D, P = config.hidden_size, config.patch_size
        depth = config.num_hidden_layers if num_layers is None else num_layers
        self.patch_embedding = nn.Conv2d(config.num_channels, D, kernel_size=P, stride=P)
        self.position_embedding = nn.Embedding(config.num_patches, D)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(depth))
        self.post_layernorm = LayerNorm(D, eps=config.layer_norm_eps) if post_layernorm else None
        self.frozen = False
        nn.init.normal_(self.position_embedding.weight, std=D**-0.5)

    def forward(
        self,
        images: Tensor,
        *,
        layers: Sequence[int] | None = None,
        output_hidden_states: bool = False,
    ) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], tuple[Tensor, ...]]:
        """Encode images.

        Args:
            images: (B, 3, H, W), normalised. A grid other than the configured one interpolates the
                position table; pixels behind the last whole patch are not seen. Or (B, N, 3*P*P):
                already cut into patches of a square grid, each row by row, channels innermost.
            layers: block outputs to return instead of the final features, as indices into the
                ``num_hidden_layers`` blocks of the config (-1 is the last); no block behind the
                deepest is run, and the final norm is not applied.
            output_hidden_states: also return the input of the first block and every block's output.
        Returns:
            (B, N, D); with ``layers`` a list of (B, N, D) in the asked order; with
            ``output_hidden_states`` a pair of that and a tuple of ``len(self.layers) + 1`` tensors.
        Raises: ValueError for images of another rank, channel count or less than one patch.
        """
        wanted = None if layers is None else [self._block_index(i) for i in layers]
        x = self.embed(images)
        states = [x]
        depth = len(self.layers) if wanted is None or output_hidden_states else max(wanted) + 1
        kept: dict[int, Tensor] = {}
        for i, layer in enumerate(self.layers[:depth]):
            x = layer(x)
            if wanted is not None and i in wanted:
                kept[i] = x
            if output_hidden_states:
                states.append(x)
        features: Tensor | list[Tensor]
        if wanted is not None:
            features = [kept[i] for i in wanted]
        else:
            features = x if self.post_layernorm is None else self.post_layernorm(x)
        return (features, tuple(states)) if output_hidden_states else features

    def features(self, images: Tensor, layers: Sequence[int] | None = None) -> Tensor:
        """Features as the connector reads them: (B, N, D), or those of ``layers`` joined.

        Arguments as in :meth:`forward`. A frozen encoder keeps no graph.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self(images, layers=layers)
            return features if layers is None else torch.cat(features, dim=-1)

    def freeze(self) -> Self:
        """No gradients for any weight, and evaluation mode even under ``train()``."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def unfreeze(self) -> Self:
        """Undo :meth:`freeze`."""
        self.frozen = False
        return self.requires_grad_(True)

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def embed(self, images: Tensor) -> Tensor:
        """Images or patches -> (B, N, D): patches projected, positions added."""
        self.check(images)
        images = images.to(self.patch_embedding.weight.dtype)
        if images.ndim == 3:  # patches: the same convolution, as a matrix
            matrix = self.patch_embedding.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*3)
            side = math.isqrt(images.shape[1])
            x = F.linear(images, matrix, self.patch_embedding.bias)
            return x + self.positions(side, side)
        x = self.patch_embedding(images)  # (B, D, rows, columns)
        return x.flatten(2).transpose(1, 2) + self.positions(*x.shape[2:])

    def check(self, images: Tensor) -> None:
        """Raises: ValueError for what is no batch of normalised images or patches."""
        C, P = self.config.num_channels, self.config.patch_size
        if images.ndim == 3 and images.shape[2] == C * P * P:
            side = math.isqrt(images.shape[1])
            if side * side != images.shape[1] or not images.is_floating_point():
                raise ValueError(
                    f"expected normalised patches of a square grid in floating point, found "
                    f"{images.shape[1]} of {images.dtype}: let the processor prepare them"
                )
        elif images.ndim != 4 or images.shape[1] != C or min(images.shape[2:]) < P:
            raise ValueError(
                f"expected pictures of shape (B, {C}, H, W) with sides of at least {P} pixels, "
                f"found {tuple(images.shape)}: let the processor prepare them"
            )
        elif not images.is_floating_point():
            raise ValueError(
                f"expected normalised floating point pictures, found {images.dtype}: scale to "
                f"0..1, subtract the mean and divide by the deviation, or let the processor do it"
            )

    def positions(self, rows: int, columns: int) -> Tensor:
        """(rows * columns, D): the learned table, interpolated where the grid is another one."""
        side = self.config.patches_per_side
        table = self.position_embedding.weight
        if (rows, columns) == (side, side):
            return table
        grid = table.float().unflatten(0, (side, side)).permute(2, 0, 1)[None]  # (1, D, side, side)
        grid = F.interpolate(
            grid, size=(rows, columns), mode="bicubic", align_corners=False, antialias=True
        )
        return grid[0].flatten(1).T.to(table.dtype)

    def _block_index(self, layer: int) -> int:
        index = layer + self.config.num_hidden_layers if layer < 0 else layer
        if not 0 <= index < len(self.layers):
            raise ValueError(
                f"layer {layer} of {self.config.num_hidden_layers} was asked for, but "
                f"{len(self.layers)} blocks are built: choose an earlier layer"
            )
        return index
