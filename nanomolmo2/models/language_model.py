"""The Qwen3 decoder.

B rows, T new positions, S all positions, D hidden_size, H heads, K key/value heads, Dh head width,
V vocab_size.

Source: Qwen/Qwen3-0.6B-Base (and the other dense Qwen3 sizes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanomolmo2.batch import IGNORED_LABEL
from nanomolmo2.config import Config
from nanomolmo2.models.attention import Mask, attend, causal_mask
from nanomolmo2.models.kernels import Linear, linear
from nanomolmo2.models.kv_cache import KVCache, RaggedStep
from nanomolmo2.models.loss import (
    CHUNK_SIZE,
    Reduction,
    TiedGradient,
    head_loss,
    next_tokens,
    read_rows,
    reduce,
    rows_loss,
)
from nanomolmo2.models.quantized import Modes, QuantizedLinear, project, quantize
from nanomolmo2.models.recompute import computed_again, rms_norm, swiglu, tidy_behind


@dataclass(frozen=True)
class LLMConfig(Config):
    """Sizes of the decoder; the defaults are Qwen3-0.6B-Base.

    ``additional_vocab_size`` rows of the embedding follow the ``vocab_size`` base rows: tokens that
    can be read but never written (Molmo2's image tokens).
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


TIDIED_LAYERS = 2  # backward tidies memory up behind as many


class RMSNorm(nn.Module):
    """Root mean square norm, in float32 whatever the compute dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_table(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, float32, each (B, 1, T, Dh), the two halves alike."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device).float() / head_dim
    angles = position_ids[:, None, :, None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves paired as in Qwen; float32 inside. x: (B, H, T, Dh)."""
    y = x.float()
    first, second = y.chunk(2, dim=-1)
    return (y * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


@dataclass
class Context:
    """What every layer needs to know about the positions of one forward call."""

    cos: Tensor  # (B or 1, 1, T, Dh)
    sin: Tensor
    mask: Mask  # (B or 1, 1, T, S), None = causal or everything
    causal: bool
    cache: KVCache | RaggedStep | None
    key_mask: Tensor | None  # (B, S) for the cache to remember
    next_positions: Tensor  # (B, 1)
    keeps: bool = True  # layers keep something for backward: they are not run again as a whole
    dropout: float = 0.0
    dropout_at: Tensor | None = None  # (B, T, 1) bool, None = everywhere


class Attention(nn.Module):
    """Causal self-attention: grouped heads, q and k normalised per head before RoPE, no biases."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        D, H, K, Dh = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.head_dim = Dh
        self.q_proj = Linear(D, H * Dh, bias=False)
        self.k_proj = Linear(D, K * Dh, bias=False)
        self.v_proj = Linear(D, K * Dh, bias=False)
        self.o_proj = Linear(H * Dh, D, bias=False)
        self.q_norm = RMSNorm(Dh, config.rms_norm_eps)
        self.k_norm = RMSNorm(Dh, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Context, layer: int, last_only: bool = False) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, 1, D) of the last position."""
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim))  # (B, T, H or K, Dh)
            for y in project(x, self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin, mask, causal = context.cos, context.sin, context.mask, context.causal
        if last_only:  # sees everything: that is causal without a flag
            q, cos, sin, causal = q[:, -1:], cos[:, :, -1:], sin[:, :, -1:], False
            mask = mask[:, :, -1:] if isinstance(mask, Tensor) else None

        def turned_q() -> Tensor:
            return rotate(self.q_norm(q).transpose(1, 2), cos, sin)

        def turned_k() -> Tensor:
            return rotate(self.k_norm(k).transpose(1, 2), context.cos, context.sin)

        queries, keys, values = turned_q(), turned_k(), v.transpose(1, 2)
        if isinstance(context.cache, RaggedStep):
            y = context.cache.attend(layer, queries, keys, values)
        elif context.cache is not None:
            y = attend(queries, *context.cache.update(layer, keys, values), mask, causal)
        else:
            with computed_again((queries, turned_q), (keys, turned_k), on=context.keeps):
                y = attend(queries, keys, values, mask, causal)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, in_size: int, intermediate_size: int, out_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(in_size, intermediate_size, bias=False)
        self.up_proj = Linear(in_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, out_size, bias=False)

    def forward(self, x: Tensor, keeps: bool = True) -> Tensor:
        """``keeps``: as in :class:`Context`."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        inner = swiglu(gate, up)
        with computed_again((inner, lambda: swiglu(gate, up)), on=keeps):
            return self.down_proj(inner)


class DecoderLayer(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.mlp = MLP(D, config.intermediate_size, D)

    def forward(self, x: Tensor, context: Context, layer: int, last_only: bool = False) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, 1, D) of the last position."""
        normed = self.input_layernorm(x)
        with computed_again((normed, lambda: self.input_layernorm(x)), on=context.keeps):
            mixed = self.self_attn(normed, context, layer, last_only)
        between = (x[:, -1:] if last_only else x) + self._thin(mixed, context)
        normed = self.post_attention_layernorm(between)
        again = (normed, lambda: self.post_attention_layernorm(between))
        with computed_again(again, on=context.keeps):
            y = self.mlp(normed, context.keeps)
        return between + self._thin(y, context)

    def _thin(self, y: Tensor, context: Context) -> Tensor:
        """Residual dropout, in training."""
        if not self.training or not context.dropout:
            return y
        dropped = F.dropout(y, context.dropout)
        return (
            dropped if context.dropout_at is None else torch.where(context.dropout_at, dropped, y)
        )


# Numbers that the cache holds of a position, from which it is kept in 16 bit beside int8 weights.
_WORTH_ROUNDING = 2**14


class LanguageModel(nn.Module):
    """Token ids, or embeddings in their place, to logits.

    Attributes:
        residual_dropout: share of what attention and MLP add that is left out in training.
        dropout_at_targets: :meth:`loss` does so only where the next token counts (Molmo2 in its
            pre-training); else everywhere.
        gradient_checkpointing: keep one activation a block, compute the rest again in backward;
            else what products give is kept, and only what lies between them computed again.
    """

    def __init__(self, config: LLMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LLMConfig()
        self.embed_tokens = nn.Embedding(config.num_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.gradient_checkpointing = False
        self.residual_dropout = 0.0
        self.dropout_at_targets = False
        nn.init.normal_(self.embed_tokens.weight, std=0.02)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> Any:
        """Run the decoder.

        Args:
            input_ids: (B, T) int64 below ``num_embeddings``; or
            inputs_embeds: (B, T, D).
            attention_mask: (B, T) or, with a past, (B, S): 1 = real token, 0 = padding on either
                side; or (B or 1, 1, T, S): True = see, or additive floats, used as it is; or a
                FlexAttention block mask, without a past.
            position_ids: (B, T); by default real tokens are counted from 0, the past included.
            past_key_values: the cache of earlier calls; the new positions are appended to it.
            use_cache: also return the cache (a new one if none was given).
            output_hidden_states: also return the embeddings, every block's output, and last the
                normed output: ``num_hidden_layers + 2`` tensors.
        Returns: logits (B, T, V); then, if asked for, the cache; then the hidden states.
        Raises: ValueError for ids outside the vocabulary, masks of other shapes, a sequence longer
            than ``max_position_embeddings``.
        """
        if use_cache and past_key_values is None:
            past_key_values = KVCache(self.config.num_hidden_layers, dtype=self.cache_dtype)
        states: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.transform(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            states=states,
        )
        results: list[Any] = [self.head(hidden)]
        if use_cache:
            results.append(past_key_values)
        if states is not None:
            results.append(tuple(states))
        return results[0] if len(results) == 1 else tuple(results)

    def transform(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | RaggedStep | None = None,
        states: list[Tensor] | None = None,
        last_only: bool = False,
        dropout_at: Tensor | None = None,
    ) -> Tensor:
        """The decoder without its head: (B, T, D), normed. Arguments as in :meth:`forward`.

        The output width is the only difference, so callers that need few logits pass only the rows
        they need to :meth:`head`. ``past_key_values`` may be a RaggedStep: then the batch is one
        row, (1, N), and ``position_ids`` are needed.

        ``last_only``: (B, 1, D), of the last position: the last layer computes no other's output.
        For sequences without padding on the right, and a RaggedStep of one row.

        ``dropout_at``: (B, T) bool, the positions that ``residual_dropout`` is for; all by default.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x = self.embed(input_ids) if input_ids is not None else inputs_embeds
        assert x is not None
        T = x.shape[1]
        context = self._context(x, attention_mask, position_ids, past_key_values)
        context.dropout = self.residual_dropout
        context.dropout_at = None if dropout_at is None else dropout_at[:, :, None]
        checkpointing = self.gradient_checkpointing and context.cache is None
        context.keeps = not checkpointing
        for i, layer in enumerate(self.layers):
            if states is not None:
                states.append(x)
            if i % TIDIED_LAYERS == 0:
                tidy_behind(x)
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, context, i, use_reentrant=False)
            else:
                x = layer(x, context, i, last_only and i == len(self.layers) - 1)
        if isinstance(context.cache, RaggedStep):
            context.cache.advance()
        elif context.cache is not None:
            context.cache.advance(T, context.key_mask, context.next_positions)
        if states is not None:
            states.append(x)
        x = self.norm(x)
        if states is not None:
            states.append(x)
        return x

    def embed(self, input_ids: Tensor, tied: TiedGradient | None = None) -> Tensor:
        """(B, T) ids -> (B, T, D). Raises: ValueError for ids outside the vocabulary.

        ``tied``: from :meth:`tied_gradient`; :meth:`loss` of what comes of it needs it too.
        """
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"expected token ids of shape (B, T) and an integer type, found "
                f"{tuple(input_ids.shape)} {input_ids.dtype}"
            )
        # One comparison costs nothing on a CPU; elsewhere it would make every decode step wait.
        if input_ids.numel() and (input_ids.device.type == "cpu" or input_ids.shape[1] > 1):
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.num_embeddings:
                raise ValueError(
                    f"token ids run from {low} to {high}, but the vocabulary has "
                    f"{self.config.num_embeddings} (0..{self.config.num_embeddings - 1}): "
                    f"is this the tokenizer of another model?"
                )
        if tied is not None:
            return read_rows(self.embed_tokens.weight, input_ids, tied)
        return self.embed_tokens(input_ids)

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """Of keys and values in a cache; None = as they are computed.

        Beside int8 weights, whose own rounding is coarser, bfloat16: on a CPU, reading a float32
        cache costs as much as all int8 weights. Small models keep what they compute: they gain no
        time, and `tiny` loses answers by it (docs/quantisation.md).
        """
        config = self.config
        position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        if position < _WORTH_ROUNDING:
            return None
        int8 = any(
            isinstance(m, QuantizedLinear) and m.mode.startswith("int8") for m in self.modules()
        )
        return torch.bfloat16 if int8 else None

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return linear(hidden, self.embed_tokens.weight[: self.config.vocab_size])

    def loss(
        self,
        input_ids: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor | None = None,
        *,
        attention_mask: Mask = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        reduction: Reduction = "mean",
        z_loss: float = 0.0,
        chunk_size: int = CHUNK_SIZE,
        tied: TiedGradient | None = None,
    ) -> Tensor:
        """Weighted cross-entropy of the next token; all logits never exist at once.

        Args:
            input_ids, inputs_embeds, attention_mask, position_ids: as in :meth:`forward`.
            labels: (B, T), the token at its own position (shifted inside); -100 = no loss.
            loss_weights: (B, T) float, 0 or more, aligned with labels; 1 by default.
            reduction: the weighted sum, or the mean: that divided by the sum of the weights.
            z_loss: times the square of each softmax's log-sum is added; 1e-4 keeps logits small.
            chunk_size: logits that exist at a time, about.
            tied: with inputs_embeds, what :meth:`embed` got to make them.
        Returns: scalar, float32; 0 where nothing is labelled, which still leads back.
        Raises: ValueError where shapes or ids do not fit.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is not None and labels.shape != given.shape[:2]:
            raise ValueError(
                f"labels {tuple(labels.shape)} must have the shape of the text "
                f"{tuple(given.shape[:2])}: one for every position"
            )
        self.check_labels(labels)
        rows, tokens, weights = next_tokens(labels, loss_weights)
        if input_ids is not None and inputs_embeds is None:
            tied = self.tied_gradient()
            inputs_embeds, input_ids = self.embed(input_ids, tied), None
        hidden = self.transform(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            dropout_at=self._dropout_at(labels.shape, rows),
        )
        total = self._head_loss(
            hidden.flatten(0, 1)[rows], tokens, weights, z_loss, chunk_size, tied
        )
        return reduce(total, weights, reduction)

    def check_labels(self, labels: Tensor) -> None:
        """Raises: ValueError for labels that are neither -100 nor a token that can be written."""
        real = labels[labels != IGNORED_LABEL]
        if real.numel() and (int(real.min()) < 0 or int(real.max()) >= self.config.vocab_size):
            raise ValueError(
                f"labels run from {int(real.min())} to {int(real.max())}, but the model writes "
                f"tokens 0..{self.config.vocab_size - 1}; positions without loss are marked "
                f"{IGNORED_LABEL}"
            )

    def _dropout_at(self, shape: torch.Size, rows: Tensor) -> Tensor | None:
        """(B, T) bool, the flat positions ``rows``, if dropout is for these alone."""
        if not self.dropout_at_targets:
            return None
        at = torch.zeros(shape.numel(), dtype=torch.bool, device=rows.device)
        return at.index_fill(0, rows, True).view(shape)

    def tied_gradient(self) -> TiedGradient | None:
        """Joins the two gradients of a tied table in one tensor; None where it has but one."""
        trained = self.lm_head is None and self.embed_tokens.weight.requires_grad
        return TiedGradient() if trained and torch.is_grad_enabled() else None

    def _head_loss(
        self,
        hidden: Tensor,
        tokens: Tensor,
        weights: Tensor,
        z_loss: float,
        chunk_size: int,
        tied: TiedGradient | None,
    ) -> Tensor:
        """Weighted sum over the rows (N, D)."""
        V, head = self.config.vocab_size, self.lm_head
        if head is not None and type(head) not in (Linear, nn.Linear):
            return rows_loss(
                head, hidden, tokens, weights, vocab_size=V, z_loss=z_loss, chunk_size=chunk_size
            )
        return head_loss(
            hidden,
            (self.embed_tokens if head is None else head).weight,
            tokens,
            weights,
            vocab_size=V,
            z_loss=z_loss,
            chunk_size=chunk_size,
            tied=tied,
        )

    def quantize(self, mode: Modes, **options: Any) -> Self:
        """8-bit or 16-bit weights, in place; see :func:`nanomolmo2.models.quantized.quantize`.

        The head gets a quantised copy where it is tied; the table stays for reading.
        """
        return quantize(self, mode, **options)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | Sequence[int] | None = None,
        sampling: Any = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        on_token: Callable[[Tensor], None] | None = None,
        on_result: Callable[[int, Any], None] | None = None,
        stops: Callable[[int, int], bool] | None = None,
        lookup: bool = True,
        guide: Callable[[], Any] | None = None,
        batch_invariant: bool = False,
    ) -> Tensor:
        """Continue every row until an end token or ``max_new_tokens``.

        Args:
            input_ids: (B, L); attention_mask: (B, L), 0 = padding on either side.
            temperature: 0 = greedy. top_p: 1 = off. top_k: 0 = off.
            seed: of every row's own generator, or one a row; None = a fresh one.
            sampling: a :class:`nanomolmo2.generation.sampling.SamplingParams` with these and all
                other settings, in place of the four above.
            eos_token_id: ends a row, any of several; None never stops.
            pad_token_id: fills rows that ended before the others; by default the (first) end token.
            on_token, on_result, stops, lookup, guide, batch_invariant: see
                :func:`nanomolmo2.generation.engine.generate`.
        Returns: (B, L + new) prompt and new ids.
        Raises: ValueError for an empty prompt, shapes or ids that do not fit, too long a text.
        """
        from nanomolmo2.generation.engine import generate
        from nanomolmo2.generation.sampling import settings

        sampling = settings(sampling, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids "
                f"{tuple(input_ids.shape)}: one value for every token"
            )
        eos = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id or ())
        if pad_token_id is None:
            ends = (*eos, *sampling.stop_token_ids)
            pad_token_id = ends[0] if ends else 0
        new = generate(
            self,
            self.embed(input_ids),
            input_ids=input_ids,
            key_mask=None if attention_mask is None else attention_mask.bool(),
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            eos_token_ids=eos,
            pad_token_id=pad_token_id,
            on_token=on_token,
            on_result=on_result,
            stops=stops,
            lookup=lookup,
            guide=guide,
            batch_invariant=batch_invariant,
        )
        return torch.cat([input_ids, new], dim=1)

    @classmethod
    def from_pretrained(cls, name_or_path: str | None = None, **options: Any) -> LanguageModel:
        """Load weights; see :func:`nanomolmo2.convert.pretrained.load_language_model`."""
        from nanomolmo2.convert.pretrained import load_language_model

        return load_language_model(name_or_path, **options)

    def _context(
        self,
        x: Tensor,
        attention_mask: Mask,
        position_ids: Tensor | None,
        cache: KVCache | RaggedStep | None,
    ) -> Context:
        """Masks and rotary tables for T new positions behind the cache's past."""
        B, T = x.shape[:2]
        past = cache.length if isinstance(cache, KVCache) else 0
        S = cache.longest if isinstance(cache, RaggedStep) else past + T
        if self.config.max_position_embeddings < S:
            raise ValueError(
                f"the sequence has {S} positions, the model's context holds "
                f"{self.config.max_position_embeddings}: shorten the text or send fewer pictures"
            )
        if isinstance(cache, RaggedStep):
            assert position_ids is not None and attention_mask is None
            cos, sin = rope_table(position_ids, self.config.head_dim, self.config.rope_theta)
            return Context(cos, sin, None, False, cache, None, position_ids)
        mask: Mask = None
        key_mask: Tensor | None = None
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            if cache is not None:
                raise ValueError("a FlexAttention block mask is for whole sequences: pass no cache")
            mask = attention_mask
        elif attention_mask is not None and attention_mask.ndim == 4:
            mask = self._full_mask(attention_mask, B, T, S, x.dtype)
            key_mask = self._key_mask(None, B, T, past, cache)
        else:
            key_mask = self._key_mask(attention_mask, B, T, past, cache)
            if key_mask is not None:
                see = causal_mask(T, S, x.device)[None] & key_mask[:, None, :]
                # A padding query sees itself, so that no softmax is over nothing.
                mask = (see | torch.eye(S, dtype=torch.bool, device=x.device)[past:])[:, None]
            elif past and T > 1:
                mask = causal_mask(T, S, x.device)[None, None]
        if position_ids is None:
            position_ids = self._positions(key_mask, B, T, past, cache, x.device)
        elif tuple(position_ids.shape) not in ((1, T), (B, T)):
            raise ValueError(
                f"position_ids of shape {tuple(position_ids.shape)} do not fit {B} rows of {T} "
                f"positions: pass one for every new position"
            )
        cos, sin = rope_table(position_ids, self.config.head_dim, self.config.rope_theta)
        next_positions = position_ids.amax(dim=1, keepdim=True).expand(B, 1) + 1
        causal = mask is None and T > 1
        return Context(cos, sin, mask, causal, cache, key_mask, next_positions)

    @staticmethod
    def _full_mask(mask: Tensor, B: int, T: int, S: int, dtype: torch.dtype) -> Tensor:
        if mask.shape[0] not in (1, B) or mask.shape[1] != 1 or tuple(mask.shape[2:]) != (T, S):
            raise ValueError(
                f"a 4-D attention mask must be (1 or {B}, 1, {T}, {S}), found {tuple(mask.shape)}"
            )
        return mask.to(dtype) if mask.is_floating_point() else mask.bool()

    @staticmethod
    def _key_mask(
        attention_mask: Tensor | None, B: int, T: int, past: int, cache: KVCache | None
    ) -> Tensor | None:
        """(B, S) bool, or None where every slot is real."""
        remembered = cache.key_mask if cache is not None else None
        if attention_mask is None:
            return None if remembered is None else F.pad(remembered, (0, T), value=True)
        if attention_mask.ndim != 2 or attention_mask.shape[0] != B:
            raise ValueError(
                f"expected an attention mask of shape ({B}, {T}) or 4-D, found "
                f"{tuple(attention_mask.shape)}"
            )
        mask = attention_mask.bool()
        if past and mask.shape[1] == T:
            before = mask.new_ones(B, past) if remembered is None else remembered
            mask = torch.cat([before, mask], dim=1)
        if mask.shape[1] != past + T:
            raise ValueError(
                f"the attention mask covers {mask.shape[1]} positions, but there are {past} past "
                f"and {T} new ones: pass a column for each"
            )
        return None if bool(mask.all()) else mask

    @staticmethod
    def _positions(
        key_mask: Tensor | None,
        B: int,
        T: int,
        past: int,
        cache: KVCache | None,
        device: torch.device,
    ) -> Tensor:
        """(B or 1, T): real tokens counted from 0; padding repeats its left neighbour."""
        if key_mask is not None:
            return (key_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        steps = torch.arange(T, device=device)[None]
        if cache is not None and cache.positions is not None:
            return cache.positions + steps
        return past + steps
