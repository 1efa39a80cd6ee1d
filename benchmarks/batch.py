"""Four rows decoded together against one alone: tokens a second."""

from __future__ import annotations

import torch

from benchmarks.decode import our_steps
from benchmarks.harness import Row, Sizes, gain, in_mode, language_model, main, take_turns

ROWS = 4
TARGETS = {"float32": None, "fp16-weights": 3.0, "int8": 3.0}


def measure(sizes: Sizes) -> list[Row]:
    llm = language_model(sizes)
    ids = torch.randint(sizes.llm.vocab_size, (ROWS, sizes.prompt))
    rows = []
    for mode, target in TARGETS.items():
        model = llm if mode == "float32" else in_mode(llm, mode)
        room = sizes.steps + 8
        sides = {"one": our_steps(model, ids[:1], room), "four": our_steps(model, ids, room)}
        times = take_turns(sides, sizes.steps)
        rates = {"one": [1 / s for s in times["one"]], "four": [ROWS / s for s in times["four"]]}
        name = f"decode of {ROWS} rows at {sizes.prompt} tokens, {mode}"
        rows.append(
            gain(
                name,
                rates,
                "four",
                "one",
                target=target,
                unit="tokens/s",
                peer_name="ours, one row",
            )
        )
    return rows


if __name__ == "__main__":
    main("batch", measure)
