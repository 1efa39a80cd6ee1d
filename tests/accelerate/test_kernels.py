"""Products with 8-bit and 16-bit weights: right, alone or in company, replaced where broken.

M rows, K inputs, N outputs.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanomolmo2.accelerate import kernels
from nanomolmo2.accelerate.kernels import (
    MODES,
    DenseKernel,
    HalfKernel,
    Int8Kernel,
    WeightOnlyKernel,
    kernel_for,
    quantize_weight,
)

on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="FBGEMM is for x86"
)
BOUND = {"int8": 0.02, "int8-weight-only": 0.01, "fp16-weights": 5e-4}


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """Which kernels work is found out again, and forgotten again."""
    kernel_for.cache_clear()
    yield
    kernel_for.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@on_x86
@pytest.mark.parametrize(
    ("mode", "kernel"),
    [("int8", Int8Kernel), ("int8-weight-only", WeightOnlyKernel), ("fp16-weights", HalfKernel)],
)
def test_each_mode_has_its_kernel_here(mode: str, kernel: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_for(mode) is kernel


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (17, 33), (1536, 1024)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_close_to_float32(mode: str, shape: tuple[int, int], with_bias: bool) -> None:
    # PyTorch's weight-only operator crashes, or reads what is not there, unless 32 divides K.
    N, K = shape
    weight, x = random(N, K), random(9, K, seed=1)
    bias = random(N, seed=2) if with_bias else None
    expected = F.linear(x, weight)
    for kernel in (kernel_for(mode), DenseKernel):
        found = kernel(quantize_weight(weight, mode, bias))(x)
        assert found.dtype == torch.float32
        found = found if bias is None else found - bias
        assert error(found, expected) < BOUND[mode] * (1 if K > 8 else 2), kernel


@pytest.mark.parametrize("mode", ["int8", "int8-weight-only"])
def test_a_row_has_the_same_bits_in_any_company(mode: str) -> None:
    """One activation scale for the whole call gave the other rows 44 % error beside a large one."""
    weight, bias, x = random(160, 200), random(160, seed=1), random(200, 200, seed=2)
    x[::7] *= 30
    x[3] = 0
    x[5, 11] = 1e30
    x[6] *= 1e-30
    linear = kernel_for(mode)(quantize_weight(weight, mode, bias))
    together = linear(x)
    for M in (1, 2, 3, 8, 33, 200):
        for start in range(0, 200 - M + 1, max(1, M // 2)):
            rows = slice(start, start + M)
            assert torch.equal(linear(x[rows]), together[rows]), (M, start)
    ordinary = x.abs().amax(dim=1) < 10
    assert 100 < int(ordinary.sum()) < 200
    expected = F.linear(x[ordinary], weight)
    each = (together[ordinary] - bias - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-6)
    each = each[x[ordinary].norm(dim=1) > 1]
    assert float(each.max()) < 0.03
    assert torch.equal(together[3], bias)


def test_a_row_that_is_not_finite_spoils_only_itself() -> None:
    weight, x = random(16, 40), random(6, 40, seed=1)
    linear = kernel_for("int8")(quantize_weight(weight, "int8"))
    expected = linear(x)
    x[1, 3], x[4, 5] = float("nan"), float("inf")
    found = linear(x)
    assert not found[1].isfinite().any()
    assert not found[4].isfinite().any()
    sound = [0, 2, 3, 5]
    assert torch.equal(found[sound], expected[sound])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_activations(mode: str, dtype: torch.dtype) -> None:
    weight, x = random(48, 64), random(5, 64, seed=1).to(dtype)
    for kernel in (kernel_for(mode), DenseKernel):
        found = kernel(quantize_weight(weight, mode))(x)
        assert found.dtype == dtype
        assert error(found.float(), F.linear(x.float(), weight)) < 0.02


@pytest.mark.parametrize("mode", MODES)
def test_unpacking_gives_the_plain_weights_back(mode: str) -> None:
    plain = quantize_weight(random(50, 70), mode, random(50, seed=1))
    for kernel in (kernel_for(mode), DenseKernel):
        assert torch.equal(kernel(plain).unpack(), plain.weight)


def test_weights_at_the_ends() -> None:
    """Zero rows, rows without a normal number, and values beyond float16."""
    weight = random(6, 32)
    weight[0], weight[1] = 0, 1e-42
    x = random(4, 32, seed=1)
    found = kernel_for("int8")(quantize_weight(weight, "int8"))(x)
    assert torch.equal(found[:, 0], torch.zeros(4))
    assert error(found[:, 2:], F.linear(x, weight[2:])) < 0.03
    weight[1, 0] = 1e6
    assert float(quantize_weight(weight, "fp16-weights").weight.max()) == 65504
    weight[2, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        quantize_weight(weight, "int8")


SATURATING = """
import torch
from nanomolmo2.accelerate import kernels
weight, x = torch.ones(32, 256), torch.ones(3, 256)
x[1, ::2] = -1
linear = kernels.kernel_for("int8")(kernels.quantize_weight(weight, "int8"))
torch.testing.assert_close(linear(x), x @ weight.T, rtol=1e-3, atol=1e-3)
rows = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
together = linear(rows)
assert all(torch.equal(linear(rows[i : i + 1])[0], together[i]) for i in range(64))
print(kernels.kernel_for("int8").__name__, kernels._activation_bits())
"""


@on_x86
@pytest.mark.parametrize("instructions", [None, "AVX2"])
def test_the_largest_products_do_not_overflow(instructions: str | None) -> None:
    """Without VNNI two products of 8 bits overflow FBGEMM's 16-bit sums, silently: 1.0 times 1.0,
    256 times, gave 2. A CPU with VNNI can play one without."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if instructions is not None:
        environment |= {"FBGEMM_ENABLE_INSTRUCTIONS": instructions, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SATURATING],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "Int8Kernel"
    if instructions == "AVX2":
        assert done.stdout.split()[1] == "7"


# ---- kernels that are missing or wrong ----


def missing(*arguments: Any) -> None:
    raise RuntimeError("Didn't find engine for this operation")


def test_int8_falls_back_to_weight_only_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_prepack_int8", missing)
    with pytest.warns(UserWarning, match="int8 weights cannot be used.*WeightOnlyKernel") as caught:
        assert kernel_for("int8") is WeightOnlyKernel
        assert kernel_for("int8") is WeightOnlyKernel
    assert len(caught) == 1
    weight, x = random(30, 40), random(4, 40, seed=1)
    found = kernel_for("int8")(quantize_weight(weight, "int8"))(x)
    assert error(found, F.linear(x, weight)) < BOUND["int8"]


def test_int8_falls_back_to_dense_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_prepack_int8", missing)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", missing)
    with pytest.warns(UserWarning, match="WeightOnlyKernel: Didn't find.*DenseKernel") as caught:
        assert kernel_for("int8") is DenseKernel
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="int8-weight-only weights cannot") as caught:
        assert kernel_for("int8-weight-only") is DenseKernel
    assert len(caught) == 1


def test_a_missing_fp16_operator_falls_back_to_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a build without FBGEMM: the name itself is not there."""
    monkeypatch.setattr(kernels.torch.ops, "quantized", SimpleNamespace())
    with pytest.warns(UserWarning, match="fp16-weights weights cannot.*DenseKernel") as caught:
        assert kernel_for("fp16-weights") is DenseKernel
    assert len(caught) == 1


def test_a_kernel_that_computes_nonsense_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Int8Kernel.__call__
    monkeypatch.setattr(Int8Kernel, "__call__", lambda self, x: real(self, x) * 1.2)
    with pytest.warns(UserWarning, match=r"Int8Kernel: a product is off by 2\d%"):
        assert kernel_for("int8") is WeightOnlyKernel


@on_x86
def test_another_engine_of_the_program_does_not_matter() -> None:
    """`torch.backends.quantized.engine` decides what is packed, and may be set for other layers."""
    before = torch.backends.quantized.engine
    weight, x = random(32, 48), random(3, 48, seed=1)
    expected = kernel_for("int8")(quantize_weight(weight, "int8"))(x)
    try:
        torch.backends.quantized.engine = "qnnpack"
        found = kernel_for("int8")(quantize_weight(weight, "int8"))(x)
        assert torch.backends.quantized.engine == "qnnpack"
    finally:
        torch.backends.quantized.engine = before
    assert torch.equal(found, expected)


def test_the_random_numbers_of_the_program_stay() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    for mode in MODES:
        kernel_for(mode)
    assert torch.equal(torch.rand(3), expected)
