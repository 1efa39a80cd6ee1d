"""int4 weights: all linear layers and the head of a decode step, beside ours in int8.

python -m benchmarks.int4 [--threads 1] [--short]

int4 is no mode of the package: this is what it would take. The kernel is PyTorch's own,
groupwise and weight-only; torchao's int4 on a CPU calls the same operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Row, Sizes, compare, in_mode, language_model, main, take_turns
from nanomolmo2.models import LanguageModel

GROUP = 32  # weights with a scale and a zero of their own
POSITIONS = (1, 4)


class Int4Linear:
    """(M, K) float32 -> (M, N). Weights are 0 .. 15, read as (w - 8) * scale + zero."""

    def __init__(self, weight: Tensor) -> None:
        N, K = weight.shape
        groups = weight.view(N, K // GROUP, GROUP)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scale = (high - low).clamp(min=1e-9) / 15
        levels = ((groups - low) / scale).round().clamp(0, 15).int().view(N, K)
        pairs = torch.cat([scale, low + 8 * scale], dim=-1)  # (N, K / GROUP, 2)
        self.pairs = pairs.transpose(0, 1).contiguous().bfloat16()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)

    def __call__(self, x: Tensor) -> Tensor:
        # In float32 the operator takes over ten times as long.
        x = x.bfloat16()
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.pairs).float()


def linears(llm: LanguageModel) -> list[torch.nn.Module]:
    return [m for layer in llm.layers for m in layer.modules() if hasattr(m, "in_features")]


def measure(sizes: Sizes) -> list[Row]:
    llm = language_model(sizes)
    weights = [m.weight for m in linears(llm)] + [llm.embed_tokens.weight[: llm.config.vocab_size]]
    int4 = [Int4Linear(weight) for weight in weights]
    eight = in_mode(llm, "int8")
    int8 = [*linears(eight), eight.head]
    rows = []
    for M in POSITIONS:
        inputs = [torch.randn(M, weight.shape[1]) for weight in weights]
        wanted = inputs[0] @ weights[0].T
        error = (int4[0](inputs[0]) - wanted).norm() / wanted.norm()
        assert error < 0.1, f"int4 is off by {error:.0%}"
        sides = {
            "ours int8": lambda inputs=inputs: _all(int8, inputs),
            "int4": lambda inputs=inputs: _all(int4, inputs),
        }
        times = take_turns(sides, sizes.steps)
        name = f"linears and head, {M} position{'s' * (M > 1)}, int4"
        rows.append(compare(name, times, "int4", "ours int8", unit="ms", scale=1000))
    return rows


def _all(layers: list, inputs: list[Tensor]) -> None:
    for layer, x in zip(layers, inputs, strict=True):
        layer(x)


if __name__ == "__main__":
    main("int4", measure)
