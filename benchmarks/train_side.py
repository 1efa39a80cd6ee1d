"""One side of benchmarks/train.py, in a process of its own: its peak is that of training.

python -m benchmarks.train_side ours|transformers ROWS STEPS [--optimizer] [--short]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import SHORT, Sizes, forget_peak, language_model, resident
from nanomolmo2.batch import IGNORED_LABEL
from tests.parity.references import qwen3

# A picture of 729 visual tokens and 128 of text: question and answer.
TOKENS, LABELLED = 857, 127
SHORT_TOKENS, SHORT_LABELLED = 100, 15


def lengths(sizes: Sizes) -> tuple[int, int]:
    """Tokens of a row, and how many of them are learned."""
    return (SHORT_TOKENS, SHORT_LABELLED) if sizes.short else (TOKENS, LABELLED)


def train(side: str, rows: int, steps: int, optimizer: bool, sizes: Sizes) -> dict[str, Any]:
    """Seconds of the last step; bytes that memory grew by at most; losses of all steps."""
    start = forget_peak()  # behind the imports
    ours = language_model(sizes)
    model: Any = ours if side == "ours" else qwen3(ours, "sdpa")
    model.train().requires_grad_(True)
    tokens, labelled = lengths(sizes)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(sizes.llm.vocab_size, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :-labelled] = IGNORED_LABEL

    def loss() -> Tensor:
        if side == "ours":
            return ours.loss(ids, labels)
        found: Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
        return found

    # What transformers' Trainer takes by default.
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if optimizer else None
    losses, seconds = [], 0.0
    for _ in range(steps):
        began = time.perf_counter()
        value = loss()
        value.backward()
        if adamw is not None:
            adamw.step()
        model.zero_grad(set_to_none=True)
        losses.append(value.item())
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": max(resident("VmHWM") - start, 1), "losses": losses}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_side")
    parser.add_argument("side", choices=("ours", "transformers"))
    parser.add_argument("rows", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--optimizer", action="store_true")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = SHORT if options.short else Sizes()
    print(json.dumps(train(options.side, options.rows, options.steps, options.optimizer, chosen)))
