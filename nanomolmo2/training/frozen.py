"""What does not learn: it takes little memory, and checkpoints name it instead of holding it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from nanomolmo2.accelerate.new_rows import NewRowsEmbedding, join_new_rows, split_new_rows
from nanomolmo2.convert.adapters import write_adapter
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.training.checkpoint import Start
from nanomolmo2.training.distributed import NORMS, World, full_tensor
from nanomolmo2.training.feature_cache import bytes_of
from nanomolmo2.training.lora import (
    adapter_of,
    add_lora,
    add_qlora,
    lora_parameters,
    merge_lora,
)
from nanomolmo2.training.optim import set_trainable
from nanomolmo2.training.recipe import Recipe


def prepare(model: NanoMolmo2, recipe: Recipe, *, split_table: bool = True) -> NanoMolmo2:
    """Give a model the form in which a recipe trains it, in place.

    LoRA matrices stand beside the decoder's layers, which `frozen_weights` rounds to 4 or 8 bits.
    What learns is float32, and what does not has the recipe's dtype, but for norms, which compute
    in float32.

    Args:
        split_table: where the connector learns, let the rows beyond the base vocabulary, of the
            table and of a head that writes them, stand apart: the others need neither gradients nor
            moments, and those of the head learn at the connector's rate beside the decoder. Not of
            a table that learns as a whole.
    """
    has_new_rows = split_table and model.config.llm_config.additional_vocab_size > 0
    if has_new_rows and "connector" in recipe.train:
        adapted = recipe.lora is not None and "lm_head" in recipe.lora.targets
        split_new_rows(model.llm, table="embeddings" not in recipe.train, head=not adapted)
    if recipe.lora is not None and recipe.frozen_weights:
        add_qlora(model.llm, recipe.lora, recipe.frozen_weights)
    elif recipe.lora is not None:
        add_lora(model.llm, recipe.lora)
    set_trainable(model, recipe.train)
    set_dtypes(model, getattr(torch, recipe.dtype))
    return model


@torch.no_grad()
def set_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """Float32 for what learns and for norms, ``dtype`` for what else does not learn, in place."""
    norms = {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()}
    for parameter in model.parameters():
        wide = parameter.requires_grad or parameter in norms
        parameter.data = parameter.data.to(torch.float32 if wide else dtype)


def finish(model: NanoMolmo2, dtype: torch.dtype) -> NanoMolmo2:
    """Undo :func:`prepare`, in place: a plain model, matrices merged, in ``dtype``."""
    join_new_rows(model.llm)
    merge_lora(model.llm, final=True, dtype=dtype)
    return model.to(dtype)


def save_adapter(recipe: Recipe, model: NanoMolmo2, folder: Path, world: World) -> None:
    """Write what a run with LoRA learned apart from its base; call it on every rank.

    Matrices are float32; what learned whole has the recipe's dtype, as in the whole model.
    """
    adapters = set(lora_parameters(model.llm))
    others = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in adapters:
            whole = full_tensor(parameter)
            if world.is_main:
                others[name] = whole.to(getattr(torch, recipe.dtype)).cpu()
    adapter = adapter_of(model.llm, others, recipe.model)
    if world.is_main:
        write_adapter(adapter, folder)


def placeholder(model: NanoMolmo2) -> tuple[Tensor, int]:
    """The parameter that holds the embedding of the image token, and its row there."""
    table: nn.Module = model.llm.embed_tokens
    row = model.config.image_token_id
    if isinstance(table, NewRowsEmbedding) and row >= table.first_new:
        return table.new_rows, row - table.first_new
    return model.llm.embed_tokens.weight, row


def start_of(model: NanoMolmo2, recipe: Recipe) -> Start:
    """The weights that need not be in a checkpoint: frozen, and read from files.

    Fresh weights that stay are kept in checkpoints: another machine may draw others.

    Args:
        model: prepared, not sharded.
    """
    parts: tuple[str, ...] = ("",)
    if recipe.architecture is not None:
        given = (("vision_encoder.", recipe.vision), ("llm.", recipe.llm))
        parts = tuple(part for part, path in given if path)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    stays = {
        name: tensor
        for name, tensor in sorted(model.state_dict().items())
        if name not in learns and name.startswith(parts)
    }
    hashed = hashlib.blake2b(digest_size=16)
    for name, tensor in stays.items():
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        hashed.update(bytes_of(tensor))
    return Start(recipe.model, frozenset(stays), hashed.hexdigest())
