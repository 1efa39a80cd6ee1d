"""A prompt of a picture and a question through the decoder, logits of its last position."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import (
    Row,
    Sizes,
    compare,
    in_mode,
    language_model,
    llm_gflop,
    main,
    take_turns,
)
from nanomolmo2.accelerate.prefill import last_state
from nanomolmo2.accelerate.quantization import cache_dtype
from nanomolmo2.generation.kv_cache import KVCache, PaddedStep
from nanomolmo2.models import LanguageModel
from tests.parity.references import qwen3

TARGETS = {"float32": None, "fp16-weights": 0.85, "int8": 0.60}
PEER = "transformers float32"


def prefill(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    cache = KVCache(model.config.num_hidden_layers, ids.shape[1], cache_dtype(model))
    return model.head(normed_last_state(model, ids, cache))


def normed_last_state(model: LanguageModel, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """(B, 1, D) of the last of some new ids (B, T), as `LanguageModel.head` takes it."""
    places = torch.arange(cache.length, cache.length + ids.shape[1])[None]
    state = last_state(model, model.embed(ids), places, cache=PaddedStep(cache, None))
    cache.advance(ids.shape[1], None, places[:, -1:] + 1)
    return model.norm(state)


def measure(sizes: Sizes) -> list[Row]:
    llm = language_model(sizes)
    ids = torch.randint(sizes.llm.vocab_size, (1, sizes.prompt))
    reference = qwen3(llm, "sdpa")

    def peer() -> torch.Tensor:
        return reference(ids, logits_to_keep=1, use_cache=True).logits

    error = (prefill(llm, ids) - peer()).abs().max()
    assert error < 1e-3, f"the two sides differ by {error}"
    sides: dict[str, Callable[[], object]] = {PEER: peer}
    for mode in TARGETS:
        model = llm if mode == "float32" else in_mode(llm, mode)
        sides[mode] = lambda model=model: prefill(model, ids)  # type: ignore[misc]
    half = in_mode(llm, "bfloat16")
    half_reference = qwen3(half, "sdpa")
    sides["bfloat16"] = lambda: prefill(half, ids)
    sides["transformers bfloat16"] = lambda: half_reference(ids, logits_to_keep=1, use_cache=True)
    times = take_turns(sides, sizes.rounds)
    gflop = llm_gflop(sizes.llm, sizes.prompt)
    name = f"prefill of {sizes.prompt} tokens"
    rows = [
        compare(f"{name}, {mode}", times, mode, PEER, target=target, gflop=gflop)
        for mode, target in TARGETS.items()
    ]
    for other in (PEER, "transformers bfloat16"):
        rows.append(compare(f"{name}, bfloat16", times, "bfloat16", other, gflop=gflop))
    return rows


if __name__ == "__main__":
    main("prefill", measure)
