"""Prefill and decoding beside llama.cpp, on the same weights written as GGUF.

llama.cpp runs in a process of its own (`llama_side.py`, in .venv-llama: `make bench-llama`). Both
sides wait while the other one works.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import our_steps
from benchmarks.harness import (
    LLAMA,
    Missing,
    Row,
    Sizes,
    compare,
    decode_gbyte,
    in_mode,
    language_model,
    llm_gflop,
    main,
    take_turns,
)
from benchmarks.prefill import prefill
from nanomolmo2.models import LanguageModel

PYTHON = LLAMA / "bin" / "python"
SIDE = str(Path(__file__).with_name("llama_side.py"))

# Our mode, type of the GGUF, targets of prefill and decoding, bytes of a weight.
PAIRS = (("fp16-weights", "F16", 0.75, 0.80, 2), ("int8", "Q8_0", 0.45, 0.95, 1))
# Largest relative error of logits against our float32 model.
ERRORS = {"F16": 0.01, "Q8_0": 0.05}
TOKENS = 3  # greedy ones that must agree


class Llama:
    """llama.cpp with a GGUF, in a process of its own."""

    def __init__(self, path: Path, context: int) -> None:
        threads = str(torch.get_num_threads())
        self.process = subprocess.Popen(
            [PYTHON, SIDE, "serve", path, threads, str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def write_gguf(llm: LanguageModel, path: Path, kind: str) -> None:
    """The weights go through a pipe: the other environment has no torch."""
    writer = subprocess.Popen([PYTHON, SIDE, "write", path, kind], stdin=subprocess.PIPE)
    assert writer.stdin is not None
    tensors = llm.state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    head = {"config": asdict(llm.config), "shapes": shapes}
    writer.stdin.write(json.dumps(head).encode() + b"\n")
    for tensor in tensors.values():
        writer.stdin.write(memoryview(tensor.numpy()).cast("B"))
    writer.stdin.close()
    assert writer.wait() == 0, "no GGUF was written: the message of llama_side.py stands above"


def measure(sizes: Sizes) -> list[Row]:
    if not PYTHON.exists():
        raise Missing("llama.cpp is not installed in .venv-llama; `make bench-llama` builds it")
    llm = language_model(sizes)
    ids = torch.randint(sizes.llm.vocab_size, (1, sizes.prompt))
    room = sizes.steps + TOKENS + 8
    peers: dict[str, Llama] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for _, kind, *_ in PAIRS:
                path = Path(folder) / f"{kind}.gguf"
                write_gguf(llm, path, kind)
                peers[kind] = Llama(path, sizes.prompt + room)
            return _rows(sizes, llm, ids, peers)
        finally:
            for peer in peers.values():
                peer.end()


def _rows(
    sizes: Sizes, llm: LanguageModel, ids: torch.Tensor, peers: dict[str, Llama]
) -> list[Row]:
    prompt = ids[0].tolist()
    check(llm, ids, peers)
    ours = {mode: in_mode(llm, mode) for mode, *_ in PAIRS}
    rows = []

    reading: dict[str, Callable[[], object]] = {}
    for mode, kind, *_ in PAIRS:
        reading[mode] = lambda model=ours[mode]: prefill(model, ids)  # type: ignore[misc]
        reading[_name(kind)] = lambda peer=peers[kind]: peer.ask(prefill=prompt)["seconds"]  # type: ignore[misc]
    times = take_turns(reading, sizes.rounds)
    gflop = llm_gflop(sizes.llm, sizes.prompt)
    for mode, kind, target, _, _ in PAIRS:
        name = f"prefill of {sizes.prompt} tokens, {mode}"
        rows.append(compare(name, times, mode, _name(kind), target=target, gflop=gflop))

    writing: dict[str, Callable[[], object]] = {}  # llama.cpp goes on behind its last prefill
    for mode, kind, *_ in PAIRS:
        writing[mode] = our_steps(ours[mode], ids, sizes.steps + 8)
        writing[_name(kind)] = lambda peer=peers[kind]: peer.ask(step=True)["seconds"]  # type: ignore[misc]
    times = take_turns(writing, sizes.steps)
    for mode, kind, _, target, size in PAIRS:
        row = compare(
            f"decode at {sizes.prompt} tokens, {mode}",
            times,
            mode,
            _name(kind),
            unit="ms a token",
            scale=1000,
            target=target,
            gbyte=decode_gbyte(sizes.llm, sizes.prompt, size, 4),
        )
        rows.append(row)
    return rows


def check(llm: LanguageModel, ids: torch.Tensor, peers: dict[str, Llama]) -> None:
    """Logits within the bound of their type; the first greedy tokens of F16 are ours in float32."""
    expected = prefill(llm, ids).flatten()
    for kind, peer in peers.items():
        answer = peer.ask(prefill=ids[0].tolist(), logits=True)
        error = float((torch.tensor(answer["logits"]) - expected).norm() / expected.norm())
        assert error < ERRORS[kind], f"logits of {kind} are off by {error:.1%}: other weights?"
        if kind == "F16":
            step = our_steps(llm, ids, TOKENS)
            wanted = [int(expected.argmax()), *(int(step()) for _ in range(TOKENS - 1))]
            found = [answer["token"], *(peer.ask(step=True)["token"] for _ in range(TOKENS - 1))]
            assert found == wanted, f"llama.cpp writes {found}, ours in float32 {wanted}"


def _name(kind: str) -> str:
    return f"llama.cpp {kind}"


if __name__ == "__main__":
    main("llama", measure)
