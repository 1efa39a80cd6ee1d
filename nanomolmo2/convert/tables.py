"""Which tensor of a reference checkpoint is which of ours.

A table maps every name a reference file may hold to our name. ``{}`` stands for the index of a
block; None means dropped on purpose. Names not in the table are an error, so a file of another
model can not be half understood.
"""

from __future__ import annotations

from collections.abc import Mapping

Table = Mapping[str, str | None]

_SIGLIP_BLOCK = (
    *("layer_norm1.weight", "layer_norm1.bias", "layer_norm2.weight", "layer_norm2.bias"),
    *(f"self_attn.{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")),
    *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
)

# Vision-only files leave out the prefix "vision_model.".
SIGLIP2_PREFIX = "vision_model."
SIGLIP2: Table = {
    "vision_model.embeddings.patch_embedding.weight": "patch_embedding.weight",
    "vision_model.embeddings.patch_embedding.bias": "patch_embedding.bias",
    "vision_model.embeddings.position_embedding.weight": "position_embedding.weight",
    **{f"vision_model.encoder.layers.{{}}.{n}": f"layers.{{}}.{n}" for n in _SIGLIP_BLOCK},
    "vision_model.post_layernorm.weight": "post_layernorm.weight",
    "vision_model.post_layernorm.bias": "post_layernorm.bias",
    # The pooling head makes one vector of a picture; the connector wants all patches.
    "vision_model.head.probe": None,
    "vision_model.head.attention.in_proj_weight": None,
    "vision_model.head.attention.in_proj_bias": None,
    "vision_model.head.attention.out_proj.weight": None,
    "vision_model.head.attention.out_proj.bias": None,
    "vision_model.head.layernorm.weight": None,
    "vision_model.head.layernorm.bias": None,
    "vision_model.head.mlp.fc1.weight": None,
    "vision_model.head.mlp.fc1.bias": None,
    "vision_model.head.mlp.fc2.weight": None,
    "vision_model.head.mlp.fc2.bias": None,
    # The text tower and the two numbers of the contrastive loss.
    "text_model.embeddings.token_embedding.weight": None,
    "text_model.embeddings.position_embedding.weight": None,
    **{f"text_model.encoder.layers.{{}}.{n}": None for n in _SIGLIP_BLOCK},
    "text_model.final_layer_norm.weight": None,
    "text_model.final_layer_norm.bias": None,
    "text_model.head.weight": None,
    "text_model.head.bias": None,
    "logit_scale": None,
    "logit_bias": None,
}

_QWEN3_BLOCK = (
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *(f"self_attn.{p}.weight" for p in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    *("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
)

# Files of the decoder without its head leave out the prefix "model.".
QWEN3_PREFIX = "model."
QWEN3: Table = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    **{f"model.layers.{{}}.{n}": f"layers.{{}}.{n}" for n in _QWEN3_BLOCK},
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    # Computed from rope_theta; some converters store it.
    "model.rotary_emb.inv_freq": None,
    "model.layers.{}.self_attn.rotary_emb.inv_freq": None,
}
