"""What a run needs of every rank, before anything is started.

Weights, gradients and moments are counted on a model without memory (PyTorch's meta device).
`activations.py` runs the model's blocks on fake tensors. docs/scaling.md compares the result with
measured peaks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanomolmo2.models import NanoMolmo2
from nanomolmo2.training.activations import count_activations, shape_of
from nanomolmo2.training.distributed import NORMS
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.optim import Optimizers, components
from nanomolmo2.training.setup import (
    KNOWN,
    Setup,
    count,
    count_weights,
    known_config,
    on_meta,
    setup_for,
)

__all__ = [
    "KNOWN",
    "Memory",
    "Setup",
    "Switch",
    "count_weights",
    "known_config",
    "predict",
    "report",
    "setup_for",
    "switches",
]

GB = 1e9
# Of a GPU, for what is no tensor of ours: CUDA's context, NCCL's buffers, gaps between blocks of
# memory. An assumption: it was not measured.
RESERVED = {"cpu": 0.0, "cuda": 2 * GB}
SHORTEST_ROW = 512


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the highest point of a step.

    temporary: weights of the blocks that compute, of the table and the head, whole, and their
        gradients on the way to the ranks they belong to; or, where that is more, what the optimiser
        computes with at the end of the step, when the next two are nothing.
    activations: what forward keeps for backward, and the work of one block.
    logits: those of a chunk of positions, with their gradients.
    """

    weights: float
    gradients: float
    moments: float
    temporary: float
    activations: float
    logits: float
    reserved: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Switch:
    """A change that makes a run fit."""

    what: str
    setup: Setup
    memory: Memory


def predict(setup: Setup) -> Memory:
    """Memory of the rank that needs most. Nothing of the model is allocated."""
    model = on_meta(setup)
    shared = setup.ranks if setup.is_sharded else 1
    whole = _whole(setup, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = Optimizers(components(model, setup.recipe.train, setup.recipe.optimisers))
    moments = {"adamw": 8, "muon": 4}  # bytes a weight
    saved, work, head = count_activations(shape_of(setup, model))
    always, with_block, at_end = _temporary(setup, model, whole)
    activations, logits = saved + max(0.0, work - head), head
    if activations + logits + with_block < at_end:
        activations, logits, with_block = 0.0, 0.0, at_end
    return Memory(
        weights=sum(_bytes(p) / (1 if p in whole else shared) for p in model.parameters())
        + sum(map(_bytes, model.buffers())),  # 4 or 8 bits: whole on every rank
        gradients=4 * count(trained) / shared,
        moments=sum(
            moments[name] * count(group["params"]) / shared
            for name, part in optimizers.parts.items()
            for group in part.param_groups
        ),
        temporary=always + with_block,
        activations=activations,
        logits=logits,
        reserved=RESERVED[setup.device],
    )


def switches(setup: Setup, limit: float) -> list[Switch]:
    """Changes that bring a run below ``limit`` bytes a rank, those that harm least first.

    Each alone, where any is enough; else each together with those that leave the numbers nearly as
    they are; else with LoRA too, or QLoRA; else none.
    """
    found = _fitting(setup, [], limit)
    if found:
        return found
    names: list[str] = []
    for name, fields in _FREE:
        if any(getattr(setup.recipe, k) != v for k, v in fields.items()):
            setup, names = setup.change(**fields), [*names, name]
    for name, changed in [("", setup), *_fewer_weights(setup)]:
        together = [*names, *([name] if name else [])]
        if not together:
            continue
        memory = predict(changed)
        if memory.total <= limit:
            return [Switch(" + ".join(together), changed, memory)]
        if found := _fitting(changed, together, limit):
            return found
    return []


def _fitting(setup: Setup, names: list[str], limit: float) -> list[Switch]:
    """Of every kind of change the smallest that is enough."""
    found = []
    for kind in _changes(setup):
        for name, changed in kind:
            memory = predict(changed)
            if memory.total <= limit:
                found.append(Switch(" + ".join([*names, name]), changed, memory))
                break
    return found


# Changes that leave what is learned nearly as it is.
_FREE: list[tuple[str, dict[str, Any]]] = [
    ("gradient_checkpointing", {"gradient_checkpointing": True}),
    ("micro_batch_size 1", {"micro_batch_size": 1}),
    ("dtype bfloat16", {"dtype": "bfloat16"}),
]
# How a change is said to `nanomolmo2 train`.
_OPTIONS = {
    "gradient_checkpointing": "--set gradient_checkpointing=true",
    "micro_batch_size 1": "--micro-batch-size 1",
    "dtype bfloat16": "--dtype bfloat16",
    "LoRA in place of llm": "--lora",
    "QLoRA": "--qlora",
}


def _changes(setup: Setup) -> Iterator[Iterator[tuple[str, Setup]]]:
    """Kinds of changes, each from the smallest change on."""
    recipe = setup.recipe
    for name, fields in _FREE:
        if any(getattr(recipe, k) != v for k, v in fields.items()):
            yield iter([(name, setup.change(**fields))])
    yield _more_ranks(setup)
    yield _fewer_weights(setup)
    yield _shorter_rows(setup)


def _more_ranks(setup: Setup) -> Iterator[tuple[str, Setup]]:
    for ranks in range(setup.ranks + 1, setup.recipe.batch_size + 1):
        if setup.recipe.batch_size % ranks == 0:
            yield f"{ranks} ranks", dataclasses.replace(setup, ranks=ranks)


def _fewer_weights(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """LoRA in place of the decoder, then beside 4 bits."""
    recipe = setup.recipe
    if "llm" in recipe.train:
        train = tuple("lora" if part == "llm" else part for part in recipe.train)
        rates = {**recipe.optimisers, "lora": recipe.optimisers["llm"]}
        setup = setup.change(train=train, optimisers=rates, lora=LoraConfig())
        yield "LoRA in place of llm", setup
    if setup.recipe.lora is not None and not setup.recipe.frozen_weights:
        yield "QLoRA", setup.change(frozen_weights="nf4")


def _shorter_rows(setup: Setup) -> Iterator[tuple[str, Setup]]:
    """A row that is half as long holds half as many crops."""
    while setup.recipe.sequence_length >= 2 * SHORTEST_ROW:
        tokens = setup.recipe.sequence_length // 2
        crops = max(1, setup.recipe.max_crops // 2)
        setup = setup.change(sequence_length=tokens, max_crops=crops)
        yield f"sequence_length {tokens} and max_crops {crops}", setup


def _option(change: str) -> str:
    """A change as options of `nanomolmo2 train`; of `torchrun` for ranks."""
    if change.endswith(" ranks"):
        return f"torchrun --nproc-per-node {change.split()[0]}"
    if change.startswith("sequence_length"):
        _, tokens, _, _, crops = change.split()
        return f"--sequence-length {tokens} --max-crops {crops}"
    return _OPTIONS[change]


def report(setup: Setup, limit: float | None = None, data: Sequence[str] = ()) -> str:
    """The plan as text.

    Args:
        limit: bytes that a rank has.
        data: lines on the data of the run.
    """
    recipe, memory = setup.recipe, predict(setup)
    tokens = recipe.batch_size * recipe.sequence_length
    total = count_weights(setup.model)
    model = on_meta(setup)
    trained = count(p for p in model.parameters() if p.requires_grad)
    passes = math.ceil(recipe.batch_size / setup.ranks / setup.rows)
    beside = f", beside {recipe.frozen_weights} weights" if recipe.frozen_weights else ""
    lines = [
        f"{recipe.name}: {total / 1e6:,.0f} M weights, {trained / 1e6:,.0f} M of them learn "
        f"({', '.join(recipe.train)}{beside})",
        f"a step: {recipe.batch_size} rows of up to {recipe.sequence_length:,} tokens and "
        f"{recipe.max_crops} crops = {tokens:,} tokens; on each of {setup.ranks} rank(s) {passes} "
        f"pass(es) of {setup.rows} row(s), in {recipe.dtype}"
        f"{', with gradient checkpointing' if recipe.gradient_checkpointing else ''}",
        f"steps: {recipe.steps:,}, up to {recipe.steps * tokens:,} tokens",
        *data,
        "",
        "memory of a rank at its highest, predicted",
        *(
            f"  {name:<12} {value / GB:>9.2f} GB"
            for name, value in dataclasses.asdict(memory).items()
            if value
        ),
        f"  {'total':<12} {memory.total / GB:>9.2f} GB",
    ]
    if limit is None:
        return "\n".join(lines)
    if memory.total <= limit:
        return "\n".join([*lines, f"fits into {limit / GB:,.4g} GB"])
    largest = max(dataclasses.asdict(memory).items(), key=lambda entry: entry[1])
    lines.append(
        f"does not fit into {limit / GB:,.4g} GB: {(memory.total - limit) / GB:.2f} GB too much, "
        f"most of it {largest[0]}"
    )
    found = switches(setup, limit)
    for switch in found:
        options = " ".join(map(_option, switch.what.split(" + ")))
        lines.append(f"  fits with {switch.what} ({options}): {switch.memory.total / GB:.2f} GB")
    if not found:
        lines.append(
            "  no single switch, nor the usual ones together, make it fit: use a smaller model"
        )
    return "\n".join(lines)


def _whole(setup: Setup, model: NanoMolmo2) -> set[Tensor]:
    """Weights that are not sharded, as `training.distributed.shard` decides."""
    if not setup.is_sharded:
        return set()
    whole = set[Tensor]()
    if "vision" not in setup.recipe.train:
        whole |= set(model.vision_encoder.parameters())
    if setup.ranks == 1:
        norms = {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()}
        whole |= {p for p in model.parameters() if not p.requires_grad and p not in norms}
    return whole


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _temporary(
    setup: Setup, model: NanoMolmo2, whole: Collection[Tensor]
) -> tuple[float, float, float]:
    """Bytes of whole weights and gradients: always; while a block goes backward; at the end.

    The root's own weights (table, head) stay whole from forward to the end of backward. Two blocks
    are whole at a time: one computes, the next is fetched. A gradient is whole in the dtype of the
    arithmetic, then once more in float32 to be summed over the ranks. At the end there are no
    activations, but the gradient of the table and what the optimiser computes with.

    Args:
        whole: weights that are whole anyway.
    """
    size, train = setup.dtype.itemsize, setup.recipe.train
    trained = [p for p in model.parameters() if p.requires_grad]
    if setup.device == "cuda":  # AdamW updates all weights at once, else one after the other
        update = 4 * count(trained) / setup.ranks
    else:
        update = 2 * 4 * max(p.numel() for p in trained) / setup.ranks
    table = model.llm.embed_tokens.weight
    dense = size * count([table] if table.requires_grad else [])  # an embedding's gradient is
    if not setup.is_sharded:
        # Where table and head are one, the head's gradient waits for the table's.
        weight = table if model.llm.lm_head is None else model.llm.lm_head.weight
        waiting = size * count([weight] if weight.requires_grad else [])
        return waiting, 0.0, max(dense, update)
    vision = list(model.vision_encoder.layers) if "vision" in train else []
    blocks = [*model.llm.layers, model.connector, *vision]
    inside = {p for block in blocks for p in block.parameters()}
    root = [p for p in model.parameters() if p not in inside and p not in whole]
    its_gradient = count(p for p in root if p.requires_grad)
    largest = max(count(p for p in b.parameters() if p not in whole) for b in blocks)
    gradient = max(count(p for p in b.parameters() if p.requires_grad) for b in blocks)
    return (
        size * (count(root) + its_gradient),
        2 * size * largest + (size + 4) * gradient,
        max(dense, 4 * its_gradient, update),
    )
