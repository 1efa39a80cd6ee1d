"""Optimisers and schedules: AdamW for vectors and tables, Muon for matrices, by component.

A component is a part of the model with rates, a schedule and a gradient norm of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nanomolmo2.accelerate.linear import BF16MatmulLinear, OneDNNLinear, has_bf16_matmul
from nanomolmo2.accelerate.new_rows import NewRowsEmbedding, NewRowsHead
from nanomolmo2.config import Config
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.training.distributed import clip_grad_norm
from nanomolmo2.training.lora import lora_parameters

# Heads that are one matrix, with which nothing but its gradient is done.
PLAIN_HEADS = (nn.Linear, OneDNNLinear, BF16MatmulLinear)
PARTS = ("vision", "connector", "llm", "embeddings", "points", "lora")


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

    def __post_init__(self) -> None:
        for name in ("lr", "matrix_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more")

    def factor(self, step: int, total_steps: int) -> float:
        """Share of the peak rate at a step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * done))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by the nearest orthogonal matrix, found in float32, or in
    bfloat16 where the group has ``bf16``.

    Matrices of one shape are orthogonalised together, which is what makes it cheap on a CPU.

    Source: Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
    """

    def __init__(self, groups: Iterable[Any], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "bf16": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                updates = orthogonalise(updates, bf16=group["bf16"])
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


def orthogonalise(matrices: Tensor, steps: int = 5, *, bf16: bool = False) -> Tensor:
    """Nearest orthogonal matrices (n, rows, columns), by a quintic Newton-Schulz iteration.

    ``bf16``: multiply in bfloat16, in half the time; the direction stays, to a cosine of .9997.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if bf16:
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


@dataclass
class Selection:
    """What a component trains.

    tables: ids of those parameters that are no hidden matrices though they are 2-D.
    frozen_rows: how many first rows of a parameter stay exactly as they are.
    """

    parameters: list[nn.Parameter]
    tables: set[int] = field(default_factory=set)
    frozen_rows: dict[nn.Parameter, int] = field(default_factory=dict)


def select(module: nn.Module) -> Selection:
    """All parameters of a module that get a gradient."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, (nn.Embedding, nn.Conv2d))}
    return Selection([p for p in module.parameters() if p.requires_grad], tables)


def set_trainable(model: NanoMolmo2, train: Sequence[str]) -> None:
    """Give gradients to the parts of ``train``, and to nothing else.

    Args:
        train: of ``vision``; ``connector``, with the rows that the embedding has beyond the base
            vocabulary, and an untied head that writes those tokens; ``llm``: blocks, norms and an
            untied head; ``embeddings``: the whole table, which is the head too where they are tied;
            ``points``: what selects visual tokens, and what finds all at once;
            ``lora``: the matrices of ``add_lora``.
    Raises: ValueError for unknown parts, ``lora`` where there are none or beside ``llm``, and
        ``points`` of a model that writes coordinates as text.
    """
    adapters = lora_parameters(model.llm)
    if not train or set(train) - set(PARTS):
        raise ValueError(
            f"train names {', '.join(train) or 'nothing'}: choose among {', '.join(PARTS)}"
        )
    if "lora" in train and not adapters:
        raise ValueError("train names lora, but the model has no such layers: call add_lora first")
    if adapters and "llm" in train:
        raise ValueError(
            "train names llm, but its layers have LoRA matrices, whose base stays as it is: train "
            "lora, or merge them first"
        )
    if "points" in train and model.point_predictor is None:
        raise ValueError(
            "train names points, but the model writes coordinates as text and has no such part: "
            "leave it out, or give the model a point head first (--points, or point_head)"
        )
    if "vision" in train:
        model.vision_encoder.unfreeze()
    else:
        model.vision_encoder.freeze()
    model.connector.requires_grad_("connector" in train)
    model.llm.requires_grad_("llm" in train)
    for part in (model.point_predictor, model.finder):
        if part is not None:
            part.requires_grad_("points" in train)
    for parameter in adapters:
        parameter.requires_grad_("lora" in train)
    new_rows = "connector" in train and model.config.llm_config.additional_vocab_size > 0
    if (head := _rows_of_head(model)) is not None:
        is_apart = isinstance(model.llm.lm_head, NewRowsHead)
        head.requires_grad_(new_rows or ("llm" in train and not is_apart))
    table: nn.Module = model.llm.embed_tokens
    if isinstance(table, NewRowsEmbedding):
        if "embeddings" in train:
            raise ValueError(
                "train names embeddings, but the rows beyond the base vocabulary stand apart: join "
                "them first (join_new_rows)"
            )
        table.requires_grad_(False)
        table.new_rows.requires_grad_(new_rows)
    else:
        model.llm.embed_tokens.weight.requires_grad_("embeddings" in train or new_rows)


def _rows_of_head(model: NanoMolmo2) -> nn.Parameter | None:
    """What holds the rows by which an untied head writes tokens beyond the base vocabulary: rows of
    their own, see `split_new_rows`, or the whole head; None where there are none, and where the
    head has LoRA matrices.
    """
    head: nn.Module | None = model.llm.lm_head
    if isinstance(head, NewRowsHead):
        return head.new_rows
    config = model.config.llm_config
    if type(head) in PLAIN_HEADS and config.num_logits > config.vocab_size:
        assert isinstance(head, nn.Linear) and isinstance(head.weight, nn.Parameter)
        return head.weight
    return None


def components(
    model: NanoMolmo2, train: Sequence[str], optimizers: Mapping[str, OptimConfig]
) -> dict[str, tuple[Selection, OptimConfig]]:
    """The trained parts for :class:`Optimizers`, each parameter in one of them.

    The embedding table belongs to ``embeddings``. Where that is not trained, its additional rows
    learn with the connector, and the base rows stay bit for bit; and so do those of an untied head
    that writes them, where ``llm`` is not trained. After `split_new_rows` the others have neither
    gradients nor moments, and the rows of the head learn with the connector beside ``llm`` too.

    Args:
        model: after :func:`set_trainable`, sharded or not.
        optimizers: rates of every part in ``train``.
    Source: Molmo2, olmo/train/optim.py (groups ``vit``, ``connector``, ``llm``, and
        ``frame_selector``, which is ``points`` here).
    """
    if missing := [part for part in train if part not in optimizers]:
        raise ValueError(f"{missing[0]} is trained, but has no optimiser: give it an OptimConfig")
    table = model.llm.embed_tokens.weight
    assert isinstance(table, nn.Parameter)
    adapters = lora_parameters(model.llm)
    apart = {id(table), *map(id, adapters)}
    rows: nn.Module = model.llm.embed_tokens
    if isinstance(rows, NewRowsEmbedding):
        apart.add(id(rows.new_rows))
    head = _rows_of_head(model)
    if isinstance(model.llm.lm_head, NewRowsHead):
        apart.add(id(head))
    chosen = {
        "vision": select(model.vision_encoder),
        "connector": select(model.connector),
        "llm": Selection([p for p in select(model.llm).parameters if id(p) not in apart]),
        "embeddings": Selection([table], {id(table)}),
        "lora": Selection(adapters),
    }
    if model.point_predictor is not None:
        chosen["points"] = select(model.point_predictor)
        if model.finder is not None:
            chosen["points"].parameters.extend(select(model.finder).parameters)
    base = model.config.llm_config.vocab_size
    if isinstance(rows, NewRowsEmbedding):
        chosen["connector"].parameters.append(rows.new_rows)
        chosen["connector"].tables.add(id(rows.new_rows))
    elif "embeddings" not in train and table.shape[0] > base:
        chosen["connector"].parameters.append(table)
        chosen["connector"].tables.add(id(table))
        chosen["connector"].frozen_rows[table] = base
    if head is not None and (id(head) in apart or "llm" not in train):
        chosen["connector"].parameters.append(head)
        chosen["connector"].tables.add(id(head))
        if id(head) not in apart:
            chosen["connector"].frozen_rows[head] = base
    result = {part: (chosen[part], optimizers[part]) for part in PARTS if part in train}
    for part, (selection, _) in result.items():
        if not all(p.requires_grad for p in selection.parameters) or not selection.parameters:
            raise ValueError(f"{part} is frozen, but to be trained: call set_trainable first")
    return result


class Optimizers:
    """AdamW and Muon over named components, each with its own rates, stepped as one.

    A parameter is a hidden matrix, and Muon's, if it is 2-D and no embedding. Muon multiplies in
    bfloat16 where the part's layers do, see `accelerate.bf16_matmul`.
    """

    def __init__(self, components: Mapping[str, tuple[nn.Module | Selection, OptimConfig]]) -> None:
        vectors: list[dict[str, Any]] = []
        matrices: list[dict[str, Any]] = []
        self.components: dict[str, Selection] = {}
        for name, (part, config) in components.items():
            learns = part if isinstance(part, Selection) else select(part)
            self.components[name] = learns
            hidden = [p for p in learns.parameters if p.ndim == 2 and id(p) not in learns.tables]
            if config.matrix_lr == 0:
                hidden = []
            chosen = {id(p) for p in hidden} | {id(p) for p in learns.frozen_rows}
            rest = [p for p in learns.parameters if id(p) not in chosen]
            shared = {"component": name, "config": config}
            # Weight decay would move rows that stay.
            for parameters, decay in ((rest, config.weight_decay), (learns.frozen_rows, 0.0)):
                if parameters:
                    vectors.append(
                        {
                            "params": list(parameters),
                            "peak_lr": config.lr,
                            "lr": config.lr,
                            "betas": config.betas,
                            "eps": config.eps,
                            "weight_decay": decay,
                            **shared,
                        }
                    )
            if hidden:
                bf16 = isinstance(part, nn.Module) and has_bf16_matmul(part)
                group = {"params": hidden, "peak_lr": config.matrix_lr, "bf16": bf16}
                matrices.append({**group, **shared})
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

    def rates(self) -> dict[str, float]:
        """The rate of every component now; where both move parts of it, that of AdamW by its name,
        and that of Muon as ``NAME_matrices``.
        """
        found: dict[str, float] = {}
        for optimizer in self.parts.values():
            own: dict[str, float] = {}
            for group in optimizer.param_groups:
                name = group["component"]
                own[f"{name}_matrices" if name in found else name] = group["lr"]
            found |= own
        return found

    def clip(self, max_norm: float) -> dict[str, Tensor]:
        """Clip every component's gradient on its own; return the norms before, on the device."""
        self._hold_rows()
        return {
            name: clip_grad_norm(learns.parameters, max_norm)
            for name, learns in self.components.items()
        }

    def step(self) -> None:
        """One update, then no gradients."""
        self._hold_rows()
        for optimizer in self.parts.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Moments only: rates follow from the step."""
        return {name: part.state_dict()["state"] for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError for moments of other weights."""
        for name, part in self.parts.items():
            whole = part.state_dict()
            part.load_state_dict({**whole, "state": state[name]})

    def _hold_rows(self) -> None:
        """Clear gradients of frozen rows: their moments stay zero, and so does AdamW's update."""
        for learns in self.components.values():
            for parameter, rows in learns.frozen_rows.items():
                if parameter.grad is not None:
                    clear_rows(parameter.grad, rows)


@torch.no_grad()
def clear_rows(gradient: Tensor, end: int, *, first: int = 0) -> None:
    """Zero the rows from ``first`` to before ``end`` of a tensor, sharded or not, in place."""
    if not isinstance(gradient, DTensor):
        gradient[first:end] = 0
        return
    rows = torch.arange(gradient.shape[0], device=gradient.device)[:, None]
    cleared = (rows >= first) & (rows < end)
    # Every rank cuts its part out of the same mask: nothing is sent.
    mask = distribute_tensor(cleared, gradient.device_mesh, gradient.placements, src_data_rank=None)
    gradient.to_local().masked_fill_(mask.to_local(), 0)
