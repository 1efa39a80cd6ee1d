"""A few exact training steps on any number of processes: what `test_distributed.py` starts.

``torchrun ... -m tests.training.ranks FOLDER`` runs every case and writes what came out.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanomolmo2.batch import IGNORED_LABEL, NO_MORE_POINTS, Batch
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.models.connector import ConnectorConfig
from nanomolmo2.models.language_model import LLMConfig, RMSNorm
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.models.point_config import PointConfig
from nanomolmo2.models.vision_encoder import LayerNorm, VisionConfig
from nanomolmo2.training.distributed import (
    World,
    clip_grad_norm,
    full_state_dict,
    load_sharded,
    save_sharded,
    shard,
    sum_over_ranks,
)

SLOTS = 4  # packs a step, whatever the number of ranks
STEPS = 3
IMAGE_TOKEN = 60


@dataclass(frozen=True)
class Case:
    """One way to train."""

    connector_type: str = "pooling"
    freeze_vision: bool = False
    freeze_llm: bool = False
    tied: bool = True
    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False
    points: bool = False


CASES = {
    "all": Case(),
    "checkpointing": Case(gradient_checkpointing=True, tied=False),
    "frozen vision": Case("linear", freeze_vision=True),
    "connector alone": Case("resampler", freeze_vision=True, freeze_llm=True),
    "bfloat16": Case(dtype=torch.bfloat16, gradient_checkpointing=True),
    "points": Case(points=True),
    "points beside frozen vision": Case(freeze_vision=True, tied=False, points=True),
}
MARKERS = (57, 58, 59)  # PATCH, SUBPATCH, LOCATION


MARKER_FIELDS = ("patch_token_id", "subpatch_token_id", "location_token_id")


def build(case: Case) -> NanoMolmo2:
    """The same small model on every rank."""
    torch.manual_seed(0)
    model = NanoMolmo2(
        NanoMolmo2Config(
            vision_config=VisionConfig(
                image_size=16,
                patch_size=4,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
            ),
            connector_config=ConnectorConfig(
                vision_dim=16,
                llm_dim=32,
                connector_type=case.connector_type,  # type: ignore[arg-type]
                num_query_tokens=4,
                num_attention_heads=2,
                hidden_dim=24,
                intermediate_size=24,
            ),
            llm_config=LLMConfig(
                vocab_size=63,  # no multiple of the ranks
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                tie_word_embeddings=case.tied,
            ),
            image_token_id=IMAGE_TOKEN,
            freeze_vision=case.freeze_vision,
            point_config=PointConfig.consistent(
                **dict(zip(MARKER_FIELDS, MARKERS, strict=True)), patch_embed_dim=8
            )
            if case.points
            else None,
        )
    )
    if case.freeze_llm:
        model.llm.requires_grad_(False)
    return model


def pack(case: Case, step: int, slot: int) -> Batch:
    """Other lengths and pictures in every slot; some without pictures, some without labels."""
    generator = torch.Generator().manual_seed(100 * step + slot)
    pictures = (2, 0, 1, 3)[(slot + step) % SLOTS]
    length = 12 + 3 * slot
    ids = torch.randint(0, IMAGE_TOKEN, (1, length), generator=generator)
    ids[0, 1 : 1 + pictures] = IMAGE_TOKEN
    labels = torch.where(torch.arange(length)[None] < 6, IGNORED_LABEL, ids)
    if step == 1 and slot in (1, 2):
        labels = torch.full_like(ids, IGNORED_LABEL)
    weights = torch.rand(1, length, generator=generator)
    pixels = torch.randn(pictures, 3, 16, 16, generator=generator) if pictures else None
    batch = Batch(ids, labels=labels, loss_weights=weights, pixel_values=pixels)
    return with_points(batch, pictures) if case.points else batch


def with_points(batch: Batch, pictures: int) -> Batch:
    """The same row, its images written out, with two points and the end of their list where it has
    pictures: so a rank may learn from points while the other has none.
    """
    ids = batch.input_ids.clone()
    ids[(ids >= MARKERS[0]) & (ids <= MARKERS[-1])] = 1
    if pictures:
        ids[0, -7:] = torch.tensor([*MARKERS, *MARKERS, MARKERS[0]])
    targets = torch.tensor([[1, 0, 4], [4 * pictures - 1, 3, 8], [NO_MORE_POINTS, -1, -1]])
    labels = torch.where(batch.labels == IGNORED_LABEL, IGNORED_LABEL, ids)  # type: ignore[arg-type]
    many = torch.where(ids[0] == IMAGE_TOKEN, 4, 1)  # visual tokens of a picture
    expanded = {
        name: value.repeat_interleave(many, dim=1)
        for name, value in (
            ("input_ids", ids),
            ("labels", labels),
            ("loss_weights", batch.loss_weights),
        )
        if value is not None
    }
    is_image = expanded["input_ids"] == IMAGE_TOKEN
    expanded["labels"] = expanded["labels"].masked_fill(is_image, IGNORED_LABEL)
    return dataclasses.replace(
        batch, **expanded, point_targets=targets if pictures else targets[:0]
    )


def weight_of(batch: Batch) -> Tensor:
    assert batch.labels is not None and batch.loss_weights is not None
    labelled = batch.labels[:, 1:] != IGNORED_LABEL
    return (batch.loss_weights[:, 1:] * labelled).sum()


class Run:
    """A model, its optimiser and the exact step."""

    def __init__(self, case: Case, world: World) -> None:
        self.case, self.world = case, world
        self.model = build(case)
        self.dtypes: dict[str, set[torch.dtype]] = {"norms": set(), "matrices": set()}
        for module in self.model.modules():
            if isinstance(module, (RMSNorm, LayerNorm, nn.Linear)):
                module.register_forward_pre_hook(self._note_dtype)
        shard(
            self.model,
            world,
            dtype=case.dtype,
            gradient_checkpointing=case.gradient_checkpointing,
        )
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = {"adamw": torch.optim.AdamW(trainable, lr=1e-3, eps=1e-6)}

    def _note_dtype(self, module: nn.Module, _: object) -> None:
        kind = "matrices" if isinstance(module, nn.Linear) else "norms"
        self.dtypes[kind].add(module.weight.dtype)

    def step(self, step: int) -> dict[str, float]:
        own = [
            pack(self.case, step, slot)
            for slot in range(self.world.rank, SLOTS, self.world.size)  # one pack at a time
        ]
        weight = sum_over_ranks(torch.stack([weight_of(batch) for batch in own]).sum())
        total = torch.zeros(())
        for batch in own:
            if self.case.points:  # as the trainer has it
                loss = self.model.loss_terms(batch).total / weight
            else:
                loss = self.model.loss(**batch.tensors(), reduction="sum") / weight
            if loss.requires_grad:  # not where only the connector learns and there is no picture
                loss.backward()
            total += loss.detach()
        self.gradients = {
            name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        norms = {
            name: float(clip_grad_norm(part.parameters(), 0.5))
            for name, part in self.model.named_children()
            if any(p.requires_grad for p in part.parameters())
        }
        self.optimizers["adamw"].step()
        self.optimizers["adamw"].zero_grad()
        return {"loss": float(sum_over_ranks(total)), **norms}


def train(case: Case, world: World) -> dict[str, object]:
    run = Run(case, world)
    steps = [run.step(step) for step in range(STEPS)]
    local = sum(
        (p.to_local() if isinstance(p, DTensor) else p).numel() for p in run.model.parameters()
    )
    return {
        "steps": steps,
        "held": local / sum(p.numel() for p in run.model.parameters()),
        "gradients": run.gradients,
        "weights": full_state_dict(run.model),
        "dtypes": {kind: sorted(map(str, found)) for kind, found in run.dtypes.items()},
    }


def resume(folder: Path, world: World) -> dict[str, object]:
    """One more step behind a checkpoint, wherever it was written."""
    run = Run(CASES["all"], world)
    state = load_sharded(folder, run.model, run.optimizers)
    line = run.step(state["step"])
    return {"state": state, "steps": [line], "weights": full_state_dict(run.model)}


def save(folder: Path, world: World) -> None:
    run = Run(CASES["all"], world)
    for step in range(STEPS):
        run.step(step)
    save_sharded(folder, run.model, run.optimizers, {"step": STEPS, "data": {"slots": [1, 2]}})


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with World.from_env("cpu") as world:
        results = {name: train(case, world) for name, case in CASES.items()}
        save(folder / f"saved-on-{world.size}", world)
        for saved in sorted(folder.glob("saved-on-*")):
            results[saved.name] = resume(saved, world)
        if world.is_main:
            torch.save(results, folder / f"ranks-{world.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
