"""What every benchmark shares: sizes, taking turns, rows of the table, JSON.

A machine drifts by 5 to 15 % between minutes, so only programs that take turns in one process are
compared: a ratio is taken within each round, and the table shows the median of the rounds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanomolmo2.accelerate import defaults
from nanomolmo2.convert.parts import build_on_meta
from nanomolmo2.files import atomic_path
from nanomolmo2.models import LanguageModel, LLMConfig, VisionConfig, VisionEncoder

LLAMA = Path(__file__).parents[1] / ".venv-llama"  # made by `make bench-llama`


@dataclass(frozen=True)
class Sizes:
    """What is built and how often it is measured."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    prompt: int = 793  # 729 visual tokens and a question
    steps: int = 15  # rounds of decode steps
    rounds: int = 3  # rounds of what takes seconds
    crops: int = 24
    short: bool = False


SHORT = Sizes(
    vision=VisionConfig(
        image_size=56,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    llm=LLMConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
    prompt=40,
    steps=3,
    rounds=1,
    crops=3,
    short=True,
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ours, peer: median over the rounds, in ``unit``. ratio, low, high: ours / peer within a round,
    median, least and greatest; without a peer the value itself. target: the ratio must be at most
    that, or at least with ``at_least``.
    """

    name: str
    ours: float
    unit: str
    peer_name: str = ""
    peer: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    target: float | None = None
    at_least: bool = False
    gflop: float | None = None  # work of one call, to be held against the floor
    gbyte: float | None = None  # least that one call must read

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        value = self.ours if self.ratio is None else self.ratio
        return value >= self.target if self.at_least else value <= self.target


Times = dict[str, list[float]]


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes; getrusage would count its parent's peak too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def forget_peak() -> int:
    """Begin to measure the peak (VmHWM) here; returns what is held now, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmHWM")


def take_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> Times:
    """Seconds of every side in every round; the first round warms up and is thrown away.

    A side that counts its own seconds returns them as a float: of another process, or of a part.
    """
    seconds: Times = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, work in sides.items():
            start = time.perf_counter()
            done = work()
            passed = time.perf_counter() - start
            seconds[name].append(done if isinstance(done, float) else passed)
    return {name: values[1:] for name, values in seconds.items()}


def compare(
    name: str,
    times: Times,
    ours: str,
    peer: str,
    *,
    unit: str = "s",
    scale: float = 1.0,
    target: float | None = None,
    gflop: float | None = None,
    gbyte: float | None = None,
) -> Row:
    """A row of two sides that took turns; ``scale``: units in a second."""
    ratios = [a / b for a, b in zip(times[ours], times[peer], strict=True)]
    return Row(
        name=name,
        ours=statistics.median(times[ours]) * scale,
        unit=unit,
        peer_name=peer,
        peer=statistics.median(times[peer]) * scale,
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        target=target,
        gflop=gflop,
        gbyte=gbyte,
    )


def gain(
    name: str,
    rates: Mapping[str, Sequence[float]],
    ours: str,
    peer: str,
    *,
    unit: str,
    peer_name: str,
    target: float | None,
) -> Row:
    """A row of amounts a second, of every side in every round: the greater, the better."""
    gains = [a / b for a, b in zip(rates[ours], rates[peer], strict=True)]
    return Row(
        name=name,
        ours=statistics.median(rates[ours]),
        unit=unit,
        peer_name=peer_name,
        peer=statistics.median(rates[peer]),
        ratio=statistics.median(gains),
        low=min(gains),
        high=max(gains),
        target=target,
        at_least=True,
    )


class Missing(Exception):
    """A peer is not installed: the message says how to get it. The other benchmarks go on."""


def random_weights(module: nn.Module) -> nn.Module:
    """Fill a module of the meta device; speed does not depend on the values."""
    module.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=0.02, generator=generator)
        else:
            tensor.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module


def vision_encoder(sizes: Sizes) -> VisionEncoder:
    module = defaults(random_weights(build_on_meta(VisionEncoder, sizes.vision)))
    assert isinstance(module, VisionEncoder)
    return module


def language_model(sizes: Sizes) -> LanguageModel:
    module = defaults(random_weights(build_on_meta(LanguageModel, sizes.llm)))
    assert isinstance(module, LanguageModel)
    return module


def in_mode(module: Any, mode: str) -> Any:
    """The same weights in another precision; float32 tensors are shared, not copied."""
    twin: Any = defaults(build_on_meta(type(module), module.config))
    twin.load_state_dict(module.state_dict(), assign=True)
    twin.eval().requires_grad_(False)
    return twin.to(torch.bfloat16) if mode == "bfloat16" else twin.quantize(mode)


def llm_gflop(config: LLMConfig, tokens: int, logits: int = 1) -> float:
    """Multiplications and additions of a prefill: linears, the causal half of attention, head."""
    D, Dh = config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    weights = D * Dh * (2 * H + 2 * K) + 3 * D * config.intermediate_size
    attention = 2 * tokens**2 * H * Dh  # two products, half of the pairs
    layers = config.num_hidden_layers * (2 * tokens * weights + attention)
    return (layers + 2 * logits * D * config.vocab_size) / 1e9


def vision_gflop(config: VisionConfig) -> float:
    """Multiplications and additions of one picture."""
    D, N = config.hidden_size, config.num_patches
    weights = 4 * D * D + 2 * D * config.intermediate_size
    embedding = 2 * N * D * config.num_channels * config.patch_size**2
    return (config.num_hidden_layers * (2 * N * weights + 4 * N * N * D) + embedding) / 1e9


def decode_gbyte(config: LLMConfig, context: int, weight_bytes: float, cache_bytes: int) -> float:
    """Bytes that a decode step must read: every weight and the whole cache once."""
    D, Dh = config.hidden_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    layer = D * Dh * (2 * H + 2 * K) + 3 * D * config.intermediate_size
    weights = config.num_hidden_layers * layer + D * config.vocab_size
    cache = config.num_hidden_layers * 2 * K * Dh * context
    return (weights * weight_bytes + cache * cache_bytes) / 1e9


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    name, flags = platform.processor(), ""
    if os.path.exists("/proc/cpuinfo"):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        values = {key.strip(): value.strip() for key, _, value in lines}
        name, flags = values.get("model name", name), values.get("flags", "")
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    versions: dict[str, str | None] = {}
    for package in ("torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    peers = [str(path) for path in LLAMA.glob("lib/python*/site-packages")]
    found = importlib.metadata.distributions(name="llama-cpp-python", path=peers)
    versions["llama-cpp-python"] = next((peer.version for peer in found), None)
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "extensions": [flag for flag in wanted if flag in flags.split()],
        "python": platform.python_version(),
        "versions": versions,
    }


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_rows(report: Mapping[str, Any]) -> list[Row]:
    return [Row(**values) for values in report["rows"]]


def main(group: str, measure: Callable[[Sizes], Sequence[Row]]) -> None:
    """Command line of one benchmark: measure its rows, print and write them."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{group}")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="small models: does the script work?")
    parser.add_argument("--rounds", type=int, help="of what takes seconds (default: 3)")
    parser.add_argument("--out", type=Path, help="write the rows to this .json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    sizes = SHORT if arguments.short else Sizes()
    if arguments.rounds:
        sizes = replace(sizes, rounds=arguments.rounds)
    rows: list[Row] = []
    missing = None
    try:
        rows += measure(sizes)
    except Missing as error:
        missing = f"{group}: not measured, {error}"
        print(missing, file=sys.stderr)
    if sizes.short:
        rows = [replace(row, target=None) for row in rows]  # they are for the full size
    for row in rows:
        print(json.dumps(asdict(row)), flush=True)
    if arguments.out is not None:
        report = {
            "group": group,
            "threads": arguments.threads,
            "short": arguments.short,
            "machine": machine(),
            "rows": [asdict(row) for row in rows],
            "missing": missing,
        }
        write_json(arguments.out, report)
