"""Last-position prefill: of a prompt only the last position's logits are needed.

B rows, T positions, D width.
"""

from __future__ import annotations

from torch import Tensor

from nanomolmo2.models import LanguageModel
from nanomolmo2.models.attention import Cache, attend
from nanomolmo2.models.language_model import DecoderLayer
from nanomolmo2.models.layers import Rope, rope_table


def last_state(
    llm: LanguageModel,
    x: Tensor,
    position_ids: Tensor,
    mask: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """`LanguageModel.states` of the last position alone: (B, 1, D).

    For rows without padding on the right; arguments as of ``states``. The last block computes keys
    and values of all positions, and attention and MLP of one. Where the last states of visual
    tokens are needed too, to point at them, it is `LanguageModel.states`.
    """
    rope = rope_table(position_ids, llm.config.head_dim, llm.config.rope_theta)
    *layers, last = llm.layers
    for layer in layers:
        x = layer(x, rope, mask, cache)
    assert isinstance(last, DecoderLayer)
    return _last_position(last, x, rope, mask, cache)


def _last_position(
    block: DecoderLayer, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None
) -> Tensor:
    attention = block.self_attn
    q, k, v = attention.heads(block.input_layernorm(x), rope)
    q = q[:, :, -1:]
    if cache is None:  # the last position attends to all: that is causal without a flag
        y = attend(q, k, v, None if mask is None else mask[:, :, -1:])
    else:
        y = cache.attend(attention.layer, q, k, v)
    x = x[:, -1:] + attention.o_proj(y.transpose(1, 2).flatten(2))
    return x + block.mlp(block.post_attention_layernorm(x))
