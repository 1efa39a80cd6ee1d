"""Optimisers and schedules: AdamW for vectors and tables, Muon for matrices, by component."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanomolmo2.config import Config


@dataclass(frozen=True)
class OptimConfig(Config):
    """How one component learns.

    lr: peak rate of AdamW: embeddings, heads, biases, norms.
    matrix_lr: peak rate of Muon for the hidden matrices; 0 = AdamW there too.
    warmup_steps: linear from 0; then cosine to ``final_ratio`` of the peak at the last step.
    """

    lr: float = 1e-3
    matrix_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    weight_decay: float = 0.0
    warmup_steps: int = 100
    final_ratio: float = 0.1

    def factor(self, step: int, total_steps: int) -> float:
        """Share of the peak rate at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix, in float32.

    Matrices of one shape are orthogonalised together, which is what makes it cheap on a CPU.

    Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
    """

    def __init__(self, groups: Iterable[Any], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                updates = orthogonalise(updates)
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.add_(update, alpha=-scale)

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        buffer = state["momentum"]
        assert parameter.grad is not None
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrices (n, rows, columns), by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Optimizers:
    """AdamW and Muon over named components, each with its own rates, stepped as one.

    A parameter is a hidden matrix, and Muon's, if it is 2-D and no embedding.
    """

    def __init__(self, components: dict[str, tuple[nn.Module, OptimConfig]]) -> None:
        vectors: list[dict[str, Any]] = []
        matrices: list[dict[str, Any]] = []
        self.components = {name: module for name, (module, _) in components.items()}
        for name, (module, config) in components.items():
            tables = {
                id(m.weight) for m in module.modules() if isinstance(m, (nn.Embedding, nn.Conv2d))
            }
            trainable = [p for p in module.parameters() if p.requires_grad]
            hidden = [p for p in trainable if p.ndim == 2 and id(p) not in tables]
            if config.matrix_lr == 0:
                hidden = []
            chosen = {id(p) for p in hidden}
            rest = [p for p in trainable if id(p) not in chosen]
            shared = {"component": name, "config": config}
            if rest:
                vectors.append(
                    {
                        "params": rest,
                        "peak_lr": config.lr,
                        "lr": config.lr,
                        "betas": config.betas,
                        "eps": config.eps,
                        "weight_decay": config.weight_decay,
                        **shared,
                    }
                )
            if hidden:
                matrices.append({"params": hidden, "peak_lr": config.matrix_lr, **shared})
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if vectors:
            self.parts["adamw"] = torch.optim.AdamW(vectors)
        if matrices:
            self.parts["muon"] = Muon(matrices)

    def set_rates(self, step: int, total_steps: int) -> None:
        """Put every group on its schedule."""
        for optimizer in self.parts.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * group["config"].factor(step, total_steps)

    def clip(self, max_norm: float) -> dict[str, float]:
        """Clip every component's gradient on its own; return the norms before."""
        return {
            name: float(nn.utils.clip_grad_norm_(list(module.parameters()), max_norm))
            for name, module in self.components.items()
        }

    def step(self) -> None:
        """One update, then no gradients."""
        for optimizer in self.parts.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Moments only: rates follow from the step."""
        return {name: part.state_dict()["state"] for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            whole = part.state_dict()
            part.load_state_dict({**whole, "state": state[name]})
