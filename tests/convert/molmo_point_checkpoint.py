"""Small MolmoPoint checkpoints in the released layout: the golden one of AI2's code, changed.

The names and shapes of the large ones are written out from the layout's description, so that
nothing of what is tested makes what it is tested with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "data" / "molmo_point"
CHECKPOINT = GOLDEN / "checkpoint"

VOCAB, ADDITIONAL, WIDTH, EMBED = 256, 128, 64, 32
NUM_EMBEDDINGS = VOCAB + ADDITIONAL
BOS, EOS, PAD = 250, 250, 249
HEAD = ("lm_head.output_embeddings", "lm_head.new_output_embeddings")
ROWS = ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding")


def point_config(**changes: Any) -> dict[str, Any]:
    """The golden ``config.json``; ``text__x=1`` changes text_config.x, ``x=ABSENT`` removes x."""
    values: dict[str, Any] = json.loads((CHECKPOINT / "config.json").read_text())
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        place = values[f"{part}_config"] if part else values
        place[field] = value
        if value is ABSENT:
            del place[field]
    return values


ABSENT = object()


def point_tensors() -> dict[str, Tensor]:
    """The golden tensors."""
    return load_file(CHECKPOINT / "model.safetensors")


def write_point_checkpoint(
    directory: Path,
    tensors: dict[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    shards: int = 2,
    **changes: Any,
) -> dict[str, Tensor]:
    """Write the folder, with a generation config; returns the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = point_tensors() if tensors is None else tensors
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        changes.setdefault("dtype", str(dtype).removeprefix("torch."))
    (directory / "config.json").write_text(json.dumps(point_config(**changes), indent=2))
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    names, weight_map = sorted(tensors), {}
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        # A clone each: tests may hand over views.
        shard = {n: tensors[n].clone().contiguous() for n in part}
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def tied_tensors(tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Without a head of their own, as a tied model is saved."""
    tensors = point_tensors() if tensors is None else tensors
    return {name: tensor for name, tensor in tensors.items() if name not in HEAD}


def released_shapes(D: int, mlp: int, tied: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of a released checkpoint of decoder width ``D``, by its name in the files."""
    vit, vit_mlp, F, E = 1152, 4304, 2304, 512
    shapes: dict[str, tuple[int, ...]] = {
        ROWS[0]: (151936, D),
        ROWS[1]: (128, D),
        "model.transformer.ln_f.weight": (D,),
        "model.vit.patch_embedding.weight": (vit, 588),
        "model.vit.patch_embedding.bias": (vit,),
        "model.vit.positional_embedding": (729, vit),
        "model.connector.image_projector.w1.weight": (mlp, vit),
        "model.connector.image_projector.w2.weight": (D, mlp),
        "model.connector.image_projector.w3.weight": (mlp, vit),
        "model.build_vit_embedding.weight": (D, F),
        "model.build_vit_embedding.bias": (D,),
        "model.point_predictor.x_norm.weight": (D,),
        "model.point_predictor.subpatch_k.weight": (E, F),
        "model.point_predictor.subpatch_k.bias": (E,),
        "model.point_predictor.subpatch_loc_k.weight": (9, D),
        "model.point_predictor.subpatch_loc_k.bias": (9,),
        "model.point_predictor.add_no_point_class_embed.vector": (E,),
    }
    if not tied:
        shapes |= {HEAD[0]: (151936, D), HEAD[1]: (128, D)}
    for name in ("wq", "wk", "wv"):
        shapes[f"model.connector.image_pooling_2d.{name}.weight"] = (vit, F)
        shapes[f"model.connector.image_pooling_2d.{name}.bias"] = (vit,)
    for name in ("patch_q", "patch_k", "subpatch_q"):
        shapes[f"model.point_predictor.{name}.weight"] = (E, D)
        shapes[f"model.point_predictor.{name}.bias"] = (E,)
    for i in range(36):
        block = f"model.transformer.blocks.{i}"
        shapes |= {
            f"{block}.attn_norm.weight": (D,),
            f"{block}.ff_norm.weight": (D,),
            f"{block}.self_attn.att_proj.weight": (4096 + 2 * 1024, D),
            f"{block}.self_attn.attn_out.weight": (D, 4096),
            f"{block}.self_attn.q_norm.weight": (128,),
            f"{block}.self_attn.k_norm.weight": (128,),
            f"{block}.mlp.ff_proj.weight": (2 * mlp, D),
            f"{block}.mlp.ff_out.weight": (D, mlp),
        }
    for i in range(25):
        block = f"model.vit.transformer.resblocks.{i}"
        for name in ("wq", "wk", "wv", "wo"):
            shapes[f"{block}.attention.{name}.weight"] = (vit, vit)
            shapes[f"{block}.attention.{name}.bias"] = (vit,)
        for name in ("attention_norm", "ffn_norm"):
            shapes[f"{block}.{name}.weight"] = shapes[f"{block}.{name}.bias"] = (vit,)
        shapes[f"{block}.feed_forward.w1.weight"] = (vit_mlp, vit)
        shapes[f"{block}.feed_forward.w1.bias"] = (vit_mlp,)
        shapes[f"{block}.feed_forward.w2.weight"] = (vit, vit_mlp)
        shapes[f"{block}.feed_forward.w2.bias"] = (vit,)
    return shapes
