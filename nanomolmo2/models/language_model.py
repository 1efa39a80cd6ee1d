"""The Qwen3 decoder.

B rows, T positions, D hidden_size, H heads, K key/value heads, Dh head width, V num_logits.

Source: Qwen/Qwen3-0.6B-Base (and the other dense Qwen3 sizes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nanomolmo2.config import Config
from nanomolmo2.models.attention import Cache, attend
from nanomolmo2.models.layers import RMSNorm, Rope, SwiGLU, apply_rope, rope_table
from nanomolmo2.models.loss import NextTokenLoss, Reduction, Targets, reduce


@dataclass(frozen=True)
class LLMConfig(Config):
    """Sizes of the decoder; the defaults are Qwen3-0.6B-Base.

    ``additional_vocab_size`` rows of the embedding follow the ``vocab_size`` base rows: tokens that
    can be read, but written (MolmoPoint's markers) only with ``predict_additional_vocab``.
    """

    vocab_size: int = 151936
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    additional_vocab_size: int = 0
    predict_additional_vocab: bool = False

    def __post_init__(self) -> None:
        self.check_positive(but=("additional_vocab_size",))
        if self.additional_vocab_size < 0:
            raise ValueError(
                f"additional_vocab_size must be 0 or more, found {self.additional_vocab_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads}): each key/value head serves a "
                f"whole group of queries"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE turns pairs")

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding: every id that can be read."""
        return self.vocab_size + self.additional_vocab_size

    @property
    def num_logits(self) -> int:
        """Tokens that can be written: the ids below it."""
        return self.num_embeddings if self.predict_additional_vocab else self.vocab_size


class Attention(nn.Module):
    """Causal self-attention: grouped heads, q and k normalised per head before RoPE, no biases."""

    def __init__(self, config: LLMConfig, layer: int) -> None:
        super().__init__()
        D, H, K, Dh = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.layer, self.head_dim = layer, Dh
        self.q_proj = nn.Linear(D, H * Dh, bias=False)
        self.k_proj = nn.Linear(D, K * Dh, bias=False)
        self.v_proj = nn.Linear(D, K * Dh, bias=False)
        self.o_proj = nn.Linear(H * Dh, D, bias=False)
        self.q_norm = RMSNorm(Dh, config.rms_norm_eps)
        self.k_norm = RMSNorm(Dh, config.rms_norm_eps)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three projections of one input."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def heads(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q (B, H, T, Dh), k and v (B, K, T, Dh), q and k at their positions."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x))
        q = apply_rope(self.q_norm(q).transpose(1, 2), rope)
        k = apply_rope(self.k_norm(k).transpose(1, 2), rope)
        return q, k, v.transpose(1, 2)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """(B, T, D) -> (B, T, D). mask: (B or 1, 1, T, T), None = causal; a cache knows its own."""
        q, k, v = self.heads(x, rope)
        if cache is None:
            y = attend(q, k, v, mask, causal=mask is None)
        else:
            y = cache.attend(self.layer, q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: LLMConfig, layer: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.mlp = SwiGLU(D, config.intermediate_size, D)
        self.dropout: nn.Module = nn.Identity()  # training/dropout.py puts residual dropout here

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class TiedHead(nn.Module):
    """The output layer of tied models: the rows of the embedding table, read as outputs."""

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """(..., D), (V, D) -> (..., V)."""
        return F.linear(hidden, table)


class LanguageModel(nn.Module):
    """Embeddings to hidden states, and hidden states to logits.

    What people call, ``llm(input_ids)``, ``llm.loss(...)``, ``llm.generate(...)``, is in face.py: a
    subclass that checks ids and masks.
    """

    def __init__(self, config: LLMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LLMConfig()
        D = config.hidden_size
        self.embed_tokens = nn.Embedding(config.num_embeddings, D)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(D, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(D, config.num_logits, bias=False)
        self.tied_head = TiedHead()
        self.criterion = NextTokenLoss()
        nn.init.normal_(self.embed_tokens.weight, std=0.02)

    def hidden_states(
        self,
        x: Tensor,
        position_ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """(B, T, D) embeddings at their positions (B or 1, T) -> (B, T, D), normed.

        Args:
            mask: (B or 1, 1, T, T), True = may attend; None = causal.
            cache: attends in place of the layers; it knows its mask and what came before.
        """
        return self.norm(self.states(x, position_ids, mask, cache))

    def states(
        self,
        x: Tensor,
        position_ids: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """:meth:`hidden_states` before the final norm."""
        rope = rope_table(position_ids, self.config.head_dim, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, rope, mask, cache)
        return x

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return self.tied_head(hidden, self.embed_tokens.weight[: self.config.num_logits])

    def targets_loss(
        self,
        hidden: Tensor,
        targets: Targets,
        reduction: Reduction = "mean",
        z_loss: float = 0.0,
        chunk_size: int | None = None,
    ) -> Tensor:
        """The loss of hidden states (B, T, D): only positions that carry loss pass the head."""
        rows, tokens, weights = targets
        of_rows = hidden.flatten(0, 1).index_select(0, rows)  # (N, D)
        total = self.criterion(of_rows, self, tokens, weights, z_loss, chunk_size)
        return reduce(total, weights, reduction)
