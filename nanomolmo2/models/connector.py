"""The connector: vision features to tokens of the language model's width.

B images or crops, N patches, n visual tokens, F feature width, Dv vision_dim, D llm_dim, W slots
of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.config import Config
from nanomolmo2.models.attention import attend
from nanomolmo2.models.layers import LayerNorm, SwiGLU


@dataclass(frozen=True)
class ConnectorConfig(Config):
    """Which connector, and its sizes.

    connector_type: ``linear`` (one projection), ``mlp`` (two, GELU between), ``resampler`` (learned
        queries read all patches: ``num_query_tokens`` tokens whatever the grid), ``pooling``
        (Molmo2: attention over ``pooling_size`` x ``pooling_size`` patches, then SwiGLU).
    hidden_dim: inner width of ``mlp`` and of the resampler's MLP.
    intermediate_size: inner width of the pooling connector's SwiGLU.
    vit_layers: vision blocks whose outputs are joined, in this order; None = the final features.
    attention_pooling_out_layer: the pooling attention has an output projection; MolmoPoint's not.
    """

    vision_dim: int = 1152
    llm_dim: int = 1024
    connector_type: Literal["linear", "mlp", "resampler", "pooling"] = "linear"
    hidden_dim: int = 2048
    num_query_tokens: int = 64
    num_attention_heads: int = 16
    pooling_size: int = 2
    intermediate_size: int = 3072
    vit_layers: tuple[int, ...] | None = None
    attention_pooling_out_layer: bool = True

    def __post_init__(self) -> None:
        self.check_positive()
        known = ("linear", "mlp", "resampler", "pooling")
        if self.connector_type not in known:
            raise ValueError(
                f"connector_type {self.connector_type!r} is unknown: choose one of "
                f"{', '.join(known)}"
            )
        width = {"resampler": self.llm_dim, "pooling": self.vision_dim}.get(self.connector_type)
        if width is not None and width % self.num_attention_heads:
            raise ValueError(
                f"the {self.connector_type} connector attends with width {width}, which must be a "
                f"multiple of num_attention_heads ({self.num_attention_heads})"
            )

    @property
    def feature_dim(self) -> int:
        """F: width of what the vision encoder hands over."""
        return self.vision_dim * (1 if self.vit_layers is None else len(self.vit_layers))

    def num_visual_tokens(self, num_patches: int) -> int:
        """n: visual tokens of an image with a square grid of ``num_patches`` patches."""
        if self.connector_type == "resampler":
            return self.num_query_tokens
        if self.connector_type == "pooling":
            return math.ceil(math.isqrt(num_patches) / self.pooling_size) ** 2
        return num_patches


def window_index(rows: int, columns: int, size: int) -> Tensor:
    """Patches of every pooling window: (n, size * size) int64, -1 where the window leaves the grid.

    Windows run row by row, and so do the patches in a window. A grid that is no multiple of the
    window is padded by half before and the rest behind.

    Source: Molmo2, olmo/preprocessing/multicrop_preprocessor.py (pooling index).
    """
    grid = torch.arange(rows * columns).view(rows, columns)
    extra_rows, extra_columns = -rows % size, -columns % size
    top, left = extra_rows // 2, extra_columns // 2
    grid = F.pad(grid, (left, extra_columns - left, top, extra_rows - top), value=-1)
    windows = grid.unfold(0, size, size).unfold(1, size, size)  # (n rows, n columns, size, size)
    return windows.reshape(-1, size * size)


class CrossAttention(nn.Module):
    """Multi-head attention of queries over other features, with biases."""

    def __init__(self, query_dim: int, key_dim: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.q_proj = nn.Linear(query_dim, width)
        self.k_proj = nn.Linear(key_dim, width)
        self.v_proj = nn.Linear(key_dim, width)
        self.o_proj: nn.Module = nn.Linear(width, width)

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, query_dim), (B, S, key_dim), (B, 1, 1, S) True = attend -> (B, T, width)."""
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for x in (self.q_proj(query), self.k_proj(keys), self.v_proj(keys))
        )
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class LinearConnector(nn.Module):
    """One projection."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.feature_dim, config.llm_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class MLPConnector(nn.Module):
    """Two projections with a GELU between."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.feature_dim, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, config.llm_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features)))


class ResamplerConnector(nn.Module):
    """Learned queries read all patches once, then an MLP with a residual."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        D = config.llm_dim
        self.queries = nn.Parameter(torch.randn(config.num_query_tokens, D) * D**-0.5)
        self.norm_features = LayerNorm(config.feature_dim, eps=1e-6)
        self.norm_queries = LayerNorm(D, eps=1e-6)
        self.attention = CrossAttention(D, config.feature_dim, D, config.num_attention_heads)
        self.norm_mlp = LayerNorm(D, eps=1e-6)
        self.fc1 = nn.Linear(D, config.hidden_dim)
        self.fc2 = nn.Linear(config.hidden_dim, D)

    def forward(self, features: Tensor) -> Tensor:
        x = self.queries.expand(features.shape[0], -1, -1)
        x = x + self.attention(self.norm_queries(x), self.norm_features(features))
        return x + self.fc2(F.gelu(self.fc1(self.norm_mlp(x))))


class PoolingConnector(nn.Module):
    """Molmo2's connector: the mean of a window asks its patches, the answer goes through SwiGLU.

    Source: Molmo2, olmo/nn/vision_backbone.py (attention pooling with ``pooling_attention_mask``).
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.pooling_size = config.pooling_size
        self.image_pooling_2d = CrossAttention(
            config.feature_dim, config.feature_dim, config.vision_dim, config.num_attention_heads
        )
        if not config.attention_pooling_out_layer:
            self.image_pooling_2d.o_proj = nn.Identity()
        self.image_projector = SwiGLU(config.vision_dim, config.intermediate_size, config.llm_dim)

    def forward(self, features: Tensor, image_token_pooling: Tensor | None = None) -> Tensor:
        """(B, N, F) -> (B, n, D) by square windows; with an index (n, W) over all B * N -> (n, D).

        -1 in the index is an empty slot. It leaves the mean and the keys: a vector of zeros would
        still be attended to through the key bias.
        """
        index = image_token_pooling
        if index is None:
            index = self.square_windows(features)
        valid = index >= 0
        windows = features.flatten(0, 1)[index.clamp(min=0)] * valid[:, :, None]  # (n, W, F)
        query = windows.sum(dim=1) / valid.sum(dim=1).clamp(min=1)[:, None]  # (n, F)
        pooled = self.image_pooling_2d(query[:, None], windows, valid[:, None, None, :])
        tokens = self.image_projector(pooled[:, 0])  # (n, D)
        if image_token_pooling is not None:
            return tokens
        return tokens.unflatten(0, (len(features), -1))

    def square_windows(self, features: Tensor) -> Tensor:
        """(B * n, W): the windows of B images, each a square grid of N patches."""
        B, N, _ = features.shape
        side = math.isqrt(N)
        if side * side != N:
            raise ValueError(
                f"the pooling connector cuts a square grid into windows, found {N} patches: "
                f"send square pictures"
            )
        index = window_index(side, side, self.pooling_size).to(features.device, non_blocking=True)
        first = torch.arange(0, B * N, N, device=index.device)[:, None, None]
        return torch.where(index < 0, index, index + first).flatten(0, 1)


CONNECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "resampler": ResamplerConnector,
    "pooling": PoolingConnector,
}


class MultimodalConnector(nn.Module):
    """Vision features (B, N, F) to visual tokens (B, n, D), by the configured connector."""

    def __init__(self, config: ConnectorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ConnectorConfig()
        self.layers = CONNECTORS[config.connector_type](config)

    def forward(self, features: Tensor, image_token_pooling: Tensor | None = None) -> Tensor:
        """Args:
            features: (B, N, F).
            image_token_pooling: (n, W) patches of every visual token, counted over all B * N, -1 =
                empty slot; only for ``pooling``. The tokens are then (n, D), empty rows left out.
        Raises: ValueError for features of another width, an index that does not fit.
        """
        if features.ndim != 3 or features.shape[-1] != self.config.feature_dim:
            raise ValueError(
                f"the connector expects features of shape (B, N, {self.config.feature_dim}), found "
                f"{tuple(features.shape)}: does vision_dim fit the vision encoder?"
            )
        if image_token_pooling is None:
            return self.layers(features)
        if self.config.connector_type != "pooling":
            raise ValueError(
                f"image_token_pooling belongs to the pooling connector, this one is "
                f"{self.config.connector_type!r}: send whole pictures (I, 3, H, W) instead"
            )
        index = image_token_pooling
        if index.device.type == "cpu":  # elsewhere a look at values makes the host wait
            index = checked_pooling(index, *features.shape[:2])
        return self.layers(features, index.to(features.device))


def checked_pooling(index: Tensor, B: int, N: int) -> Tensor:
    """The rows of an index (n, W) over B crops of N patches that are not empty.

    Raises: ValueError for an index of another form or range.
    """
    if index.ndim != 2 or index.is_floating_point():
        raise ValueError(
            f"expected image_token_pooling of shape (tokens, slots) and an integer type, found "
            f"{tuple(index.shape)} {index.dtype}"
        )
    if index.numel() and (int(index.min()) < -1 or int(index.max()) >= B * N):
        raise ValueError(
            f"image_token_pooling runs from {int(index.min())} to {int(index.max())}, but "
            f"{B} crop(s) of {N} patches were given: it counts the patches of all crops of the "
            f"batch from 0, -1 = empty"
        )
    return index[(index >= 0).any(dim=1)]
