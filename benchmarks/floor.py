"""What the machine can do: float32 matrix products at the models' shapes, and reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness import Row, Sizes, main


def measure(sizes: Sizes) -> list[Row]:
    M, K, N = sizes.prompt, sizes.llm.hidden_size, sizes.llm.intermediate_size
    x, weight = torch.randn(M, K), torch.randn(N, K)
    numbers = torch.ones((64 if sizes.short else 1024) * 2**18)  # 64 MB or 1 GB
    gflops = max(
        2 * M * K * N / _seconds(lambda: F.linear(x, weight)) / 1e9 for _ in range(5 * sizes.steps)
    )
    bandwidth = max(
        numbers.nbytes / _seconds(lambda: numbers.sum()) / 1e9 for _ in range(sizes.steps)
    )
    return [
        Row("GEMM, float32", gflops, "GFLOP/s"),
        Row("reading memory", bandwidth, "GB/s"),
    ]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main("floor", measure)
