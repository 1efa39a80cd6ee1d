"""The simulated device itself: it refuses what CUDA refuses, and counts what makes a host wait."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.device.simulated import DEVICE, SimTensor, count_waits

ON_CPU = torch.arange(12.0).view(3, 4)
X = ON_CPU.to(DEVICE)


@pytest.mark.parametrize(
    "mix",
    [
        lambda: X + ON_CPU,
        lambda: X + torch.ones(1),  # one number, but with a dimension
        lambda: torch.where(X > 0, X, ON_CPU),
        lambda: X @ torch.ones(4, 2),
        lambda: torch.cat([X, ON_CPU]),
        lambda: F.embedding(torch.tensor([1]), X),
        lambda: F.embedding(torch.tensor([1], device=DEVICE), ON_CPU),
        lambda: X.gather(1, torch.tensor([[0]])),
        lambda: X.index_add(0, torch.tensor([0]), X[:1]),
        lambda: X.masked_fill(ON_CPU > 3, 0.0),
        lambda: ON_CPU[torch.tensor([0], device=DEVICE)],
        lambda: ON_CPU.clone().add_(X),
        lambda: torch.tensor(1.0).add_(X.sum()),
        lambda: F.cross_entropy(X, torch.tensor([0, 1, 2])),
        lambda: torch.mm(X, X.T, out=torch.empty(3, 3)),
        lambda: nn.Linear(4, 4).to(DEVICE)(ON_CPU),
        lambda: F.scaled_dot_product_attention(X[None], X[None], ON_CPU[None]),
        lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
        lambda: X.clone().uniform_(generator=torch.Generator()),
    ],
)
def test_devices_do_not_mix(mix: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="on the same device"):
        mix()


def test_numpy_refuses() -> None:
    with pytest.raises((TypeError, RuntimeError)):
        X.numpy()


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (lambda x: x * torch.tensor(2.0), ON_CPU * 2),
        (lambda x: torch.tensor(2.0) - x, 2 - ON_CPU),
        (lambda x: torch.where(x > 5, x, torch.tensor(0.0)), ON_CPU * (ON_CPU > 5)),
        (lambda x: x.masked_fill(x > 5, torch.tensor(0.0)), ON_CPU * (ON_CPU <= 5)),
        (lambda x: x[torch.tensor([2, 0])], ON_CPU[[2, 0]]),
        (lambda x: torch.empty(3, 4).copy_(x), ON_CPU),
        (lambda x: torch.empty(3, 4, device=DEVICE).copy_(ON_CPU), ON_CPU),
    ],
)
def test_what_cuda_allows(mix: Callable[[Tensor], Tensor], expected: Tensor) -> None:
    assert torch.equal(mix(X).cpu(), expected)


MASK = X > 5


@pytest.mark.parametrize(
    ("waits", "work"),
    [
        (0, lambda: X * 2 + X.sum()),
        (0, lambda: X @ X.T),
        (0, lambda: X[1:, :2].clone()),
        (0, lambda: X.clone().masked_fill_(MASK, 0.0)),
        (0, lambda: X.clone().__setitem__(MASK, 0.0)),  # a masked fill
        (0, lambda: X.clone().__setitem__((0, slice(1, 3)), 7.0)),
        (0, lambda: X.new_zeros(2, 3)),
        (0, lambda: torch.arange(5, device=DEVICE)),
        (0, lambda: X.to(torch.bfloat16)),
        (0, lambda: ON_CPU.to(DEVICE, non_blocking=True)),
        (0, lambda: X * torch.tensor(2.0)),
        (0, lambda: X.argmax(dim=1)),
        (1, lambda: X.sum().item()),
        (1, lambda: bool((X >= 0).all())),
        (1, lambda: int(X.max())),
        (1, lambda: X.tolist()),
        (1, lambda: X.cpu()),
        (1, lambda: X.to("cpu", non_blocking=True)),
        (1, lambda: torch.equal(X, X)),
        (1, lambda: X.nonzero()),
        (1, lambda: X[MASK]),
        (1, lambda: X.masked_select(MASK)),
        (1, lambda: X.unique()),
        (1, lambda: X[torch.tensor([0, 1])]),
        (1, lambda: ON_CPU.to(DEVICE)),
        (1, lambda: torch.tensor([1, 2], device=DEVICE)),
        (1, lambda: torch.empty(3, 4).copy_(X)),
        (1, lambda: X.clone().copy_(ON_CPU)),
        (1, lambda: torch.sim.synchronize()),
    ],
)
def test_waits_are_counted(waits: int, work: Callable[[], Any]) -> None:
    with count_waits() as found:
        work()
    assert len(found) == waits, str(found)


def test_repeat_interleave_waits_for_its_length() -> None:
    counts = torch.tensor([2, 1], device=DEVICE)
    with count_waits() as found:
        torch.repeat_interleave(counts, output_size=3)
    assert not found
    with count_waits() as found:
        torch.repeat_interleave(counts)
    assert len(found) == 1


def test_a_masked_read_waits_once_more_in_backward() -> None:
    x = X.clone().requires_grad_()
    with count_waits() as found:
        x[MASK].sum().backward()
    assert len(found) == 2
    assert torch.equal(x.grad.cpu(), (ON_CPU > 5).float())


def test_layers_learn_as_on_the_cpu() -> None:
    torch.manual_seed(0)
    layers = [nn.Embedding(7, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(5, 3, 2)]
    plain = nn.Sequential(*layers)
    moved = copy.deepcopy(plain).to(DEVICE)
    ids = torch.tensor([[0, 3, 3, 6, 1]])
    for net in (plain, moved):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for _ in range(2):
            place = next(net.parameters()).device
            torch.manual_seed(1)  # the device draws the CPU's numbers
            F.dropout(net(ids.to(place))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(isinstance(p, SimTensor) for p in moved.parameters())
    for a, b in zip(plain.parameters(), moved.parameters(), strict=True):
        assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": True}, {"gqa": True}])
def test_attention_is_the_kernel_of_the_cpu(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    heads = 2 if options.get("gqa") else 4
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, heads, 6, 8)
    mask = torch.ones(6, 6).tril().bool() if options.get("mask") else None
    results = []
    for place in ("cpu", DEVICE):
        a, b = (x.clone().to(place).requires_grad_() for x in (q, k))
        y = F.scaled_dot_product_attention(
            a,
            b,
            b,
            attn_mask=None if mask is None else mask.to(place),
            is_causal=options.get("is_causal", False),
            enable_gqa=heads != 4,
        )
        results.append(
            [x.cpu() for x in (y.detach(), *torch.autograd.grad(y.square().sum(), (a, b)))]
        )
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_views_share_their_numbers() -> None:
    x = X.clone()
    x.view(-1)[0] = 7.0
    x[1:].mul_(0)
    assert x[0, 0].item() == 7 and not x[1:].any().item()
    assert x.view(-1).untyped_storage()._cdata == x.untyped_storage()._cdata


def test_counters_nest_and_end() -> None:
    with count_waits() as outer:
        X.sum().item()
        with count_waits() as inner:
            X.sum().item()
    X.sum().item()
    assert (len(outer), len(inner)) == (2, 1)
    assert "a value is read" in str(inner)
