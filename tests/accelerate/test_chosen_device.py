"""Which device a name means, and which one is taken without a name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nanomolmo2.accelerate import device
from nanomolmo2.accelerate.device import choose_device, device_text, devices, usual_dtype


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """``machine(cuda=2)``: what PyTorch finds, by kind and number."""

    def install(**counts: int) -> None:
        def module(kind: str) -> SimpleNamespace:
            count = counts.get(kind, 0)
            return SimpleNamespace(is_available=lambda: count > 0, device_count=lambda: count)

        monkeypatch.setattr(torch, "get_device_module", module)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
        # Nothing can be made there: what has no number has the first one.
        monkeypatch.setattr(
            device, "_with_number", lambda d: torch.device(d.type, d.index or 0), raising=True
        )

    return install


def test_the_best_there_is(machine) -> None:
    machine(cuda=2, mps=1)
    assert choose_device() == torch.device("cuda:0")
    assert list(map(str, devices())) == ["cuda:0", "cuda:1", "mps:0", "cpu"]
    machine(mps=1)
    assert choose_device() == torch.device("mps:0")
    machine()
    assert choose_device() == torch.device("cpu")


def test_a_name(machine) -> None:
    machine(cuda=2)
    assert choose_device("cuda") == torch.device("cuda:0")
    assert choose_device("cuda:1") == choose_device(torch.device("cuda:1"))
    assert choose_device("cpu") == choose_device("cpu:0") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda:2", "there is no device 'cuda:2' here"),
        ("mps", "there is no device 'mps' here: choose cpu, cuda:0 or cuda:1"),
        ("cpu:1", "there is no device 'cpu:1' here"),
        ("gpu", "'gpu' is no device: choose cpu, cuda:0 or cuda:1"),
        ("cuda:", "'cuda:' is no device"),
        ("CUDA", "'CUDA' is no device"),
        ("", "'' is no device"),
        ("cuda:99999999999", "'cuda:99999999999' is no device"),
        ("x" * 1000, f"'{'x' * 59} is no device"),
    ],
)
def test_what_is_not_there(machine, name: str, said: str) -> None:
    machine(cuda=2)
    with pytest.raises(ValueError) as raised:
        choose_device(name)
    assert str(raised.value).startswith(said)


def test_this_machine() -> None:
    """What is chosen can hold tensors, and says the number that they have."""
    for chosen in (choose_device(), *map(choose_device, devices())):
        assert torch.empty(1, device=chosen).device == chosen
    assert device_text(torch.device("cpu")) == "the CPU"
    assert device_text(torch.device("mps:0")) == "mps:0"


def test_the_usual_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usual_dtype(torch.device("cpu")) is torch.float32
    assert usual_dtype(torch.device("mps")) is None  # as stored
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, fast=fast: fast
        )
        assert usual_dtype(torch.device("cuda")) is expected
