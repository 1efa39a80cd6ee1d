"""Where the time of a decode step and of a prefill goes: linears, attention, norms, head, the rest.

Every part is timed by itself on the CPU, where calls return when they are done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.decode import our_steps
from benchmarks.harness import Sizes, in_mode, language_model
from benchmarks.prefill import prefill
from nanomolmo2.accelerate import fused
from nanomolmo2.generation import kv_cache
from nanomolmo2.models import LanguageModel
from nanomolmo2.models import language_model as language_model_file
from nanomolmo2.models.layers import RMSNorm

MODES = ("float32", "fp16-weights", "int8", "bfloat16")
PARTS = ("linears", "attention", "norms", "head", "rest")


@contextmanager
def watched(model: LanguageModel) -> Iterator[dict[str, float]]:
    """Seconds of every part while the block runs; "rest" is filled in at its end."""
    seconds = dict.fromkeys(PARTS, 0.0)
    inside = False  # of a timed call: layers that are called together may call each other's forward

    def timed(part: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*arguments, **options)
            inside, start = True, time.perf_counter()
            result = function(*arguments, **options)
            seconds[part] += time.perf_counter() - start
            inside = False
            return result

        return call

    changed: list[nn.Module] = []
    for layer in model.layers:
        for module in layer.modules():
            if hasattr(module, "in_features"):
                part = "linears"
            elif isinstance(module, RMSNorm):
                part = "norms"
            else:
                continue
            module.forward = timed(part, module.forward)
            changed.append(module)
    attend, project, plain = kv_cache.attend, fused.project, language_model_file.attend
    kv_cache.attend = timed("attention", attend)
    language_model_file.attend = timed("attention", plain)
    fused.project = timed("linears", project)
    model.head = timed("head", model.head)  # type: ignore[method-assign]
    start = time.perf_counter()
    try:
        yield seconds
        total = time.perf_counter() - start
        seconds["rest"] = total - sum(seconds.values())
    finally:
        kv_cache.attend, fused.project, language_model_file.attend = attend, project, plain
        del model.head
        for module in changed:
            del module.forward


def profile(sizes: Sizes) -> str:
    """A Markdown table: milliseconds of each part, a decode step and a prefill in every mode."""
    llm = language_model(sizes)
    ids = torch.randint(sizes.llm.vocab_size, (1, sizes.prompt))
    lines = [
        f"| | {' | '.join(PARTS)} | together |",
        f"|---|{'---|' * (len(PARTS) + 1)}",
    ]
    for mode in MODES:
        model = llm if mode == "float32" else in_mode(llm, mode)
        step = our_steps(model, ids, sizes.steps + 8)
        step()
        with watched(model) as seconds:
            for _ in range(sizes.steps):
                step()
        lines.append(_line(f"decode step, {mode}", seconds, sizes.steps))
        with watched(model) as seconds:
            prefill(model, ids)
        lines.append(_line(f"prefill of {sizes.prompt}, {mode}", seconds, 1))
    return "\n".join(lines)


def _line(name: str, seconds: dict[str, float], calls: int) -> str:
    milliseconds = [seconds[part] / calls * 1000 for part in PARTS]
    cells = " | ".join(f"{value:.1f}" for value in (*milliseconds, sum(milliseconds)))
    return f"| {name} | {cells} |"
