"""A trained model on a person's own data."""

from __future__ import annotations

from collections.abc import Sequence

from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.recipes.molmo2 import adamw
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.recipe import Recipe


def finetune(
    data: Sequence[str] = ("my.jsonl",),
    model: str = "tiny",
    *,
    steps: int = 40,
    lora: bool = False,
) -> Recipe:
    """A trained model on own data: the connector and the decoder learn, or LoRA matrices of it.

    Args:
        data: files of records, see docs/data.md.
        model: a folder, ``tiny``, ``base`` or a name on the hub.
        steps: 40 steps of 2 rows are enough to see that it learns.
    """
    small = model == "tiny"
    rate = 5e-4 if small else 1e-5
    rates = adamw(rate, min(10, steps))
    parts = ("connector", "lora") if lora else ("connector", "llm")
    optimisers = dict.fromkeys(parts, rates)
    if lora:  # its matrices start at zero and take larger steps
        optimisers["lora"] = adamw(max(rate, 2e-4), min(10, steps))
    return Recipe(
        name="finetune",
        model=model,
        data=tuple(SourceConfig(path) for path in data),
        steps=steps,
        batch_size=2,
        micro_batch_size=1,
        sequence_length=512 if small else 4096,
        max_crops=8 if small else 64,
        packing_buffer=8,
        train=parts,
        optimisers=optimisers,
        lora=LoraConfig() if lora else None,
        dtype="float32" if small else "bfloat16",
        gradient_checkpointing=not small,
        save_every=100,
    )
