"""Which tensor of a reference checkpoint is which of ours.

A table maps every name a reference file may hold to our name. ``{}`` stands for the index of a
block; None means dropped on purpose. Names not in the table are an error, so a file of another
model can not be half understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Table = Mapping[str, str | None]


@dataclass(frozen=True)
class Rows:
    """Tensors that are the same once each side is stacked row upon row, in this order.

    One name on both sides is a renaming; several on one side are what the other keeps as one
    tensor. ``{}`` stands for the index of a block. ``patches``: theirs holds a patch as a vector
    (row, column, channel), ours is the weight of a convolution (channel, row, column).
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    patches: bool = False


RowTable = tuple[Rows, ...]

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
    # The pooling head makes one vector of an image; the connector wants all patches.
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


def _same(theirs: str, ours: str, *names: str) -> RowTable:
    """``names`` under two homes; ``a=b`` where the last part is called ``a`` there, ``b`` here."""
    pairs = [(n.split("=")[0], n.split("=")[-1]) for n in names]
    return tuple(Rows((f"{theirs}.{a}",), (f"{ours}.{b}",)) for a, b in pairs)


def _both(*names: str) -> tuple[str, ...]:
    """Weight and bias of each."""
    return tuple(
        "=".join(f"{side}.{kind}" for side in name.split("="))
        for name in names
        for kind in ("weight", "bias")
    )


_HEAD = _same("lm_head", "llm.lm_head", "weight")
_BLOCK = "llm.layers.{}"
_VIT_BLOCK = "vision_encoder.layers.{}"
_POOLING = "connector.layers.image_pooling_2d"
_PROJECTOR = "connector.layers.image_projector"
_POINTS = "point_predictor"


def _pooling(home: str) -> RowTable:
    """The connector of released files: ``w1`` of its MLP is the gate, ``w3`` up.

    MolmoPoint has no ``wo``: a rule is asked for only where our model has its tensors.
    """
    return (
        *_same(
            *(f"{home}.image_pooling_2d", _POOLING),
            *_both("wq=q_proj", "wk=k_proj", "wv=v_proj", "wo=o_proj"),
        ),
        *_same(
            *(f"{home}.image_projector", _PROJECTOR),
            *("w1.weight=gate_proj.weight", "w2.weight=down_proj.weight"),
            "w3.weight=up_proj.weight",
        ),
    )


def _released_vision(home: str) -> RowTable:
    """The vision encoder of released files."""
    return (
        Rows(
            (f"{home}.patch_embedding.weight",),
            ("vision_encoder.patch_embedding.weight",),
            patches=True,
        ),
        *_same(
            *(home, "vision_encoder"),
            "patch_embedding.bias",
            "positional_embedding=position_embedding.weight",
        ),
        *_same(
            *(f"{home}.transformer.resblocks.{{}}", _VIT_BLOCK),
            *_both("attention_norm=layer_norm1", "ffn_norm=layer_norm2"),
            *_both("attention.wq=self_attn.q_proj", "attention.wk=self_attn.k_proj"),
            *_both("attention.wv=self_attn.v_proj", "attention.wo=self_attn.out_proj"),
            *_both("feed_forward.w1=mlp.fc1", "feed_forward.w2=mlp.fc2"),
        ),
    )


def _released_decoder(home: str, attention: str = "self_attn.", mlp: str = "mlp.") -> RowTable:
    """The decoder of released files, without its head.

    Their halves of ``ff_proj`` are up, then gate: swapped they would load just as well.
    """
    block = f"{home}.blocks.{{}}"
    return (
        Rows((f"{home}.wte.embedding", f"{home}.wte.new_embedding"), ("llm.embed_tokens.weight",)),
        *_same(home, "llm", "ln_f.weight=norm.weight"),
        *_same(
            *(block, _BLOCK),
            "attn_norm.weight=input_layernorm.weight",
            "ff_norm.weight=post_attention_layernorm.weight",
            f"{attention}attn_out.weight=self_attn.o_proj.weight",
            f"{attention}q_norm.weight=self_attn.q_norm.weight",
            f"{attention}k_norm.weight=self_attn.k_norm.weight",
            f"{mlp}ff_out.weight=mlp.down_proj.weight",
        ),
        Rows(
            (f"{block}.{attention}att_proj.weight",),
            tuple(f"{_BLOCK}.self_attn.{p}_proj.weight" for p in "qkv"),
        ),
        Rows(
            (f"{block}.{mlp}ff_proj.weight",),
            (f"{_BLOCK}.mlp.up_proj.weight", f"{_BLOCK}.mlp.gate_proj.weight"),
        ),
    )


MOLMO2_LEGACY: RowTable = (
    *_released_decoder("model.transformer"),
    *_HEAD,
    *_released_vision("model.vision_backbone.image_vit"),
    *_pooling("model.vision_backbone"),
)

_SELECTORS = (
    *("x_norm.weight", "add_no_point_class_embed.vector"),
    *_both("patch_q", "patch_k", "subpatch_q", "subpatch_k", "subpatch_loc_k"),
)
_VIT_EMBEDDING = _both("build_vit_embedding")

# The released files of MolmoPoint. The head is two tensors, without ".weight"; tied models have
# neither.
MOLMO_POINT: RowTable = (
    *_released_decoder("model.transformer"),
    Rows(("lm_head.output_embeddings", "lm_head.new_output_embeddings"), ("llm.lm_head.weight",)),
    *_released_vision("model.vit"),
    *_pooling("model.connector"),
    *_same("model", _POINTS, *_VIT_EMBEDDING),
    *_same("model.point_predictor", _POINTS, *_SELECTORS),
)

# What AI2's training code calls them.
MOLMO_POINT_TRAINING: RowTable = (
    *_released_decoder("transformer", attention="", mlp=""),
    Rows(("transformer.ff_out.weight", "transformer.ff_out.new_weight"), ("llm.lm_head.weight",)),
    *_released_vision("vit"),
    *_pooling("connector"),
    *(Rows((name,), (f"{_POINTS}.{name}",)) for name in (*_VIT_EMBEDDING, *_SELECTORS)),
)

# What transformers itself (5.23) calls them.
MOLMO2_NATIVE: RowTable = (
    *_same("model.language_model", "llm", "embed_tokens.weight", "norm.weight"),
    *_HEAD,
    *_same("model.language_model.layers.{}", _BLOCK, *_QWEN3_BLOCK),
    Rows(
        ("model.vision_tower.patch_embedding.weight",),
        ("vision_encoder.patch_embedding.weight",),
        patches=True,
    ),
    *_same(
        *("model.vision_tower", "vision_encoder"),
        "patch_embedding.bias",
        "positional_embedding=position_embedding.weight",
    ),
    *_same(
        *("model.vision_tower.layers.{}", _VIT_BLOCK),
        *(f"{n.replace('out_proj', 'o_proj')}={n}" for n in _SIGLIP_BLOCK),
    ),
    *_same(
        *("model.multi_modal_projector.image_pooling_2d", _POOLING),
        *_both("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    *_same(
        *("model.multi_modal_projector.image_projector", _PROJECTOR),
        *("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    ),
)
