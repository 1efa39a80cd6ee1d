"""Generation: prefill, then one token a step. B rows, T prompt positions, D width.

Knows token ids and embeddings, nothing of pictures or text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanomolmo2.generation.sampling import SamplingParams, sample
from nanomolmo2.models.kv_cache import KVCache
from nanomolmo2.models.language_model import LanguageModel


def generate(
    llm: LanguageModel,
    inputs_embeds: Tensor,
    *,
    key_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    sampling: SamplingParams,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue a batch of prompts.

    Args:
        inputs_embeds: (B, T, D), rows padded on either side.
        key_mask: (B, T) bool, False = padding; None = no padding.
        attention_mask: (B, 1, T, T) of the prompt, where it is more than causal.
        on_token: called after every step with the new ids (B,).
    Returns: (B, new) ids, new <= max_new_tokens; a row that ended is filled with ``pad_token_id``.
    Raises: ValueError for an empty prompt, or if prompt and answer cannot fit the context.
    """
    B, T = inputs_embeds.shape[:2]
    context = llm.config.max_position_embeddings
    if T == 0:
        raise ValueError("the prompt is empty: pass at least one token to continue")
    if max_new_tokens < 0 or max_new_tokens + T > context:
        raise ValueError(
            f"the prompt has {T} positions and max_new_tokens is {max_new_tokens}, but the context "
            f"holds {context}: max_new_tokens may be 0 to {context - T}"
        )
    cache = KVCache(llm.config.num_hidden_layers, capacity=T + max_new_tokens)
    generators = sampling.generators(B)
    hidden = _prefill(llm, inputs_embeds, key_mask, attention_mask, cache)
    eos = torch.tensor(eos_token_ids, device=hidden.device, dtype=torch.long)
    ended = torch.zeros(B, dtype=torch.bool, device=hidden.device)
    steps: list[Tensor] = []
    while len(steps) < max_new_tokens:
        sampled = sample(llm.head(hidden), sampling, generators)
        token = sampled.masked_fill(ended, pad_token_id)
        steps.append(token)
        if on_token is not None:
            on_token(token)
        ended = ended | torch.isin(token, eos)
        if len(steps) == max_new_tokens or bool(ended.all()):
            break
        # A row that ended goes on with what it would say: the result is thrown away, and a pad id
        # need not be one the embedding has.
        hidden = llm.transform(sampled[:, None], past_key_values=cache)[:, 0]
    return torch.stack(steps, dim=1) if steps else eos.new_empty(B, 0)


def _prefill(
    llm: LanguageModel,
    inputs_embeds: Tensor,
    key_mask: Tensor | None,
    attention_mask: Tensor | None,
    cache: KVCache,
) -> Tensor:
    """Run the prompt into the cache; return the state behind each row's last real token, (B, D)."""
    if key_mask is None:
        hidden = llm.transform(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=cache
        )
        return hidden[:, -1]
    position_ids = (key_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    hidden = llm.transform(
        inputs_embeds=inputs_embeds,
        attention_mask=key_mask if attention_mask is None else attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
    )
    cache.key_mask = key_mask  # a 4-D mask cannot tell the cache which slots are padding
    columns = torch.arange(key_mask.shape[1], device=key_mask.device)
    last = (columns * key_mask).amax(dim=1)  # (B,)
    return hidden[torch.arange(len(last), device=last.device), last]
