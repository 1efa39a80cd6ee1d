"""One token after the other behind a prompt, greedy, one row."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import (
    Row,
    Sizes,
    compare,
    decode_gbyte,
    in_mode,
    language_model,
    main,
    take_turns,
)
from benchmarks.prefill import normed_last_state
from nanomolmo2.accelerate.quantization import cache_dtype
from nanomolmo2.generation.kv_cache import KVCache
from nanomolmo2.models import LanguageModel
from tests.parity.references import qwen3

# Target against transformers in float32, bytes of a weight, bytes of a cached number.
MODES = {"float32": (0.83, 4, 4), "fp16-weights": (0.55, 2, 4), "int8": (0.35, 1, 4)}
PEER = "transformers float32"


def our_steps(model: LanguageModel, ids: torch.Tensor, room: int) -> Callable[[], torch.Tensor]:
    """Read the prompt; every call then writes one token a row: (B, 1)."""
    cache = KVCache(model.config.num_hidden_layers, ids.shape[1] + room, cache_dtype(model))
    token = model.head(normed_last_state(model, ids, cache)).argmax(-1)

    def step() -> torch.Tensor:
        nonlocal token
        token = model.head(normed_last_state(model, token, cache)).argmax(-1)
        return token

    return step


def their_steps(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    out = model(ids, use_cache=True, logits_to_keep=1)
    cache, token = out.past_key_values, out.logits.argmax(-1)

    def step() -> torch.Tensor:
        nonlocal token
        token = model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
        return token

    return step


def measure(sizes: Sizes) -> list[Row]:
    llm = language_model(sizes)
    ids = torch.randint(sizes.llm.vocab_size, (1, sizes.prompt))
    room = sizes.steps + 8
    first, second = our_steps(llm, ids, room), their_steps(qwen3(llm, "sdpa"), ids)
    assert [int(first()) for _ in range(3)] == [int(second()) for _ in range(3)]
    sides: dict[str, Callable[[], object]] = {PEER: second, "float32": first}
    for mode in ("fp16-weights", "int8"):
        sides[mode] = our_steps(in_mode(llm, mode), ids, room)
    half = in_mode(llm, "bfloat16")
    sides["bfloat16"] = our_steps(half, ids, room)
    sides["transformers bfloat16"] = their_steps(qwen3(half, "sdpa"), ids)
    times = take_turns(sides, sizes.steps)
    name = f"decode at {sizes.prompt} tokens"
    rows = []
    for mode, (target, weight, cache) in MODES.items():
        gbyte = decode_gbyte(sizes.llm, sizes.prompt, weight, cache)
        row = compare(
            f"{name}, {mode}",
            times,
            mode,
            PEER,
            unit="ms a token",
            scale=1000,
            target=target,
            gbyte=gbyte,
        )
        rows.append(row)
    gbyte = decode_gbyte(sizes.llm, sizes.prompt, 2, 2)
    for other in (PEER, "transformers bfloat16"):
        rows.append(
            compare(
                f"{name}, bfloat16",
                times,
                "bfloat16",
                other,
                unit="ms a token",
                scale=1000,
                gbyte=gbyte,
            )
        )
    return rows


if __name__ == "__main__":
    main("decode", measure)
