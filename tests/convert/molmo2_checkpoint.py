"""A small Molmo2 checkpoint in the released layout, written from random tensors by hand.

Written out name by name, so that nothing of what is tested makes what it is tested with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, ADDITIONAL, WIDTH, MLP, DEPTH, HEADS, KV_HEADS, HEAD_DIM = 256, 16, 64, 64, 2, 4, 2, 16
VIT_WIDTH, VIT_MLP, VIT_DEPTH, PATCHES, PATCH = 48, 96, 12, 16, 14
START, END, IMAGE, COLUMN, LOW_START = (VOCAB + offset for offset in range(5))
BOS = EOS = 250
PAD = 249
# <im_start>, <im_end>, <im_col>, <low_res_im_start>, <im_low>, <frame_start>, <frame_end>
SPECIAL = tuple(VOCAB + offset for offset in (0, 1, 3, 4, 6, 7, 8))


def legacy_config(**changes: Any) -> dict[str, Any]:
    """``config.json`` with the fields of the released files; ``text__x=1`` changes text_config.x.

    None removes a field.
    """
    values: dict[str, Any] = {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "model_type": "molmo2",
        "dtype": "float32",
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "image_start_token_id": START,
        "image_end_token_id": END,
        "image_patch_id": IMAGE,
        "image_high_res_id": IMAGE,
        "image_col_id": COLUMN,
        "low_res_image_start_token_id": LOW_START,
        "image_low_res_id": VOCAB + 6,
        "frame_start_token_id": VOCAB + 7,
        "frame_end_token_id": VOCAB + 8,
        "use_frame_special_tokens": False,
        "text_config": {
            "model_type": "molmo2_text",
            "vocab_size": VOCAB,
            "additional_vocab_size": ADDITIONAL,
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "layer_norm_eps": 1e-6,
            "max_position_embeddings": 512,
            "rope_theta": 5_000_000.0,
            "rope_scaling": None,
            "rope_scaling_layers": None,
            "qkv_bias": False,
            "use_qk_norm": True,
            "qk_norm_type": "qwen3",
            "norm_after": False,
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "residual_dropout": 0.0,
        },
        "vit_config": {
            "model_type": "molmo2",
            "hidden_size": VIT_WIDTH,
            "intermediate_size": VIT_MLP,
            "num_hidden_layers": VIT_DEPTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 12,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "image_default_input_size": [56, 56],
            "image_patch_size": PATCH,
            "image_num_pos": PATCHES,
            "float32_attention": True,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
        },
        "adapter_config": {
            "model_type": "molmo2",
            "vit_layers": [-3, -9],
            "pooling_attention_mask": True,
            "hidden_size": VIT_WIDTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 12,
            "intermediate_size": MLP,
            "text_hidden_size": WIDTH,
            "hidden_act": "silu",
            "float32_attention": True,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "image_feature_dropout": 0.0,
        },
    }
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        place = values[f"{part}_config"] if part else values
        place[field] = value
        if value is None:
            del place[field]
    return values


def legacy_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the file."""
    llm, vision = "model.transformer", "model.vision_backbone"
    query, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        f"{llm}.wte.embedding": (VOCAB, WIDTH),
        f"{llm}.wte.new_embedding": (ADDITIONAL, WIDTH),
        f"{llm}.ln_f.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
        f"{vision}.image_vit.patch_embedding.weight": (VIT_WIDTH, 3 * PATCH**2),
        f"{vision}.image_vit.patch_embedding.bias": (VIT_WIDTH,),
        f"{vision}.image_vit.positional_embedding": (PATCHES, VIT_WIDTH),
        f"{vision}.image_projector.w1.weight": (MLP, VIT_WIDTH),
        f"{vision}.image_projector.w2.weight": (WIDTH, MLP),
        f"{vision}.image_projector.w3.weight": (MLP, VIT_WIDTH),
    }
    for i in range(DEPTH):
        block = f"{llm}.blocks.{i}"
        shapes |= {
            f"{block}.attn_norm.weight": (WIDTH,),
            f"{block}.ff_norm.weight": (WIDTH,),
            f"{block}.self_attn.att_proj.weight": (query + 2 * keys, WIDTH),
            f"{block}.self_attn.attn_out.weight": (WIDTH, query),
            f"{block}.self_attn.q_norm.weight": (HEAD_DIM,),
            f"{block}.self_attn.k_norm.weight": (HEAD_DIM,),
            f"{block}.mlp.ff_proj.weight": (2 * MLP, WIDTH),
            f"{block}.mlp.ff_out.weight": (WIDTH, MLP),
        }
    for i in range(VIT_DEPTH - 2):  # nothing behind the deepest layer that is read is stored
        block = f"{vision}.image_vit.transformer.resblocks.{i}"
        for name in ("wq", "wk", "wv", "wo"):
            shapes[f"{block}.attention.{name}.weight"] = (VIT_WIDTH, VIT_WIDTH)
            shapes[f"{block}.attention.{name}.bias"] = (VIT_WIDTH,)
        for name in ("attention_norm", "ffn_norm"):
            shapes[f"{block}.{name}.weight"] = shapes[f"{block}.{name}.bias"] = (VIT_WIDTH,)
        shapes[f"{block}.feed_forward.w1.weight"] = (VIT_MLP, VIT_WIDTH)
        shapes[f"{block}.feed_forward.w1.bias"] = (VIT_MLP,)
        shapes[f"{block}.feed_forward.w2.weight"] = (VIT_WIDTH, VIT_MLP)
        shapes[f"{block}.feed_forward.w2.bias"] = (VIT_WIDTH,)
    for name, inputs in (("wq", 2), ("wk", 2), ("wv", 2), ("wo", 1)):
        shapes[f"{vision}.image_pooling_2d.{name}.weight"] = (VIT_WIDTH, inputs * VIT_WIDTH)
        shapes[f"{vision}.image_pooling_2d.{name}.bias"] = (VIT_WIDTH,)
    return shapes


def legacy_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random weights: matrices at four times the usual start, so that errors show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in legacy_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            tensors[name] = noise * 0.08
        elif ("norm" in name and name.endswith("weight")) or ".ln_f." in name:
            tensors[name] = 1 + noise * 0.1
        else:
            tensors[name] = noise * 0.05
    return tensors


def write_checkpoint(
    directory: Path, tensors: dict[str, Tensor] | None = None, **changes: Any
) -> dict[str, Tensor]:
    """Write the folder in two shards, with a generation config; returns the tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = legacy_tensors() if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(legacy_config(**changes), indent=2))
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        # A clone each: tests may hand over views.
        shard = {n: tensors[n].clone().contiguous() for n in part}
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors
