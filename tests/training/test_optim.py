from __future__ import annotations

import pytest
import torch
from torch import nn

from nanomolmo2.training.optim import Muon, OptimConfig, Optimizers, orthogonalise


def test_orthogonalise_finds_the_nearest_orthogonal_matrix():
    """The quintic iteration pushes singular values near 1 and leaves the singular vectors alone."""
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16), (1, 24, 24)):
        x = torch.randn(shape)
        got = orthogonalise(x)
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        singular = u.mT @ got @ vh.mT
        diagonal = singular.diagonal(dim1=1, dim2=2)
        assert diagonal.min() > 0.3 and diagonal.max() < 1.3
        assert (singular - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_muon_treats_matrices_of_one_shape_as_if_alone():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(8, 12)) for _ in range(3)]
    alone = [nn.Parameter(w.detach().clone()) for w in weights]
    together = Muon([{"params": weights}], lr=0.1)
    singles = [Muon([{"params": [w]}], lr=0.1) for w in alone]
    for _ in range(3):
        for w, a in zip(weights, alone, strict=True):
            w.grad = torch.randn_like(w)
            a.grad = w.grad.clone()
        together.step()
        for single in singles:
            single.step()
    for w, a in zip(weights, alone, strict=True):
        torch.testing.assert_close(w, a, rtol=1e-5, atol=1e-6)


def test_schedule_warms_up_linearly_then_follows_a_cosine():
    config = OptimConfig(warmup_steps=10, final_ratio=0.1)
    assert config.factor(0, 110) == pytest.approx(0.1)
    assert config.factor(9, 110) == pytest.approx(1.0)
    assert config.factor(10, 110) == pytest.approx(1.0)
    assert config.factor(60, 110) == pytest.approx(0.55)
    assert config.factor(110, 110) == pytest.approx(0.1)


class _Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)


def test_components_get_their_own_rates_and_muon_only_hidden_matrices():
    a, b = _Part(), _Part()
    optimizers = Optimizers(
        {"a": (a, OptimConfig(lr=1.0, matrix_lr=2.0)), "b": (b, OptimConfig(lr=3.0, matrix_lr=0))}
    )
    muon = optimizers.parts["muon"].param_groups
    adamw = optimizers.parts["adamw"].param_groups
    assert [[id(p) for p in g["params"]] for g in muon] == [[id(a.linear.weight)]]
    assert {id(p) for g in adamw for p in g["params"]} == {
        id(p) for p in [*a.parameters(), *b.parameters()] if p is not a.linear.weight
    }
    optimizers.set_rates(99, 1000)
    assert muon[0]["lr"] == pytest.approx(2.0)
    assert [g["lr"] for g in adamw] == pytest.approx([1.0, 3.0])


def test_each_component_is_clipped_on_its_own():
    a, b = _Part(), _Part()
    optimizers = Optimizers({"a": (a, OptimConfig()), "b": (b, OptimConfig())})
    for part, size in ((a, 100.0), (b, 1e-3)):
        for p in part.parameters():
            p.grad = torch.full_like(p, size)
    small = [p.grad.clone() for p in b.parameters()]
    norms = optimizers.clip(1.0)
    assert norms["a"] > 100 and norms["b"] < 1
    total = torch.stack([p.grad.norm() for p in a.parameters()]).norm()
    assert float(total) == pytest.approx(1.0, rel=1e-4)
    for p, before in zip(b.parameters(), small, strict=True):
        assert torch.equal(p.grad, before)
