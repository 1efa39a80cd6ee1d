"""The ``config.json`` of Molmo2 checkpoints <-> NanoMolmo2Config.

Two spellings are read: the released one (``vit_config``, ``vit_layers``, ``rope_theta``), which
counts the blocks that are not stored too, and that of transformers (``vision_config``,
``vision_feature_layer``, ``rope_parameters``), which counts the stored ones only. Written is the
released one: every server reads it. A setting that these networks can not honour stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

from nanomolmo2.convert.reference_config import (
    from_table,
    read_rope_theta,
    refuse_unknown,
    require,
    square,
)
from nanomolmo2.models.language_model import LLMConfig
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config
from nanomolmo2.models.presets import (
    FRAME_END,
    FRAME_START,
    IMAGE_COL,
    IMAGE_END,
    IMAGE_LOW,
    IMAGE_START,
    LOW_RES_START,
)
from nanomolmo2.models.vision_encoder import VisionConfig

MODEL_TYPE = "molmo2"

# Tokens that the mask treats like image tokens, by the name of their id in config.json, and how far
# behind vocab_size the released models have them.
SPECIAL_IDS = {
    "image_start_token_id": IMAGE_START,
    "image_end_token_id": IMAGE_END,
    "image_col_id": IMAGE_COL,
    "low_res_image_start_token_id": LOW_RES_START,
    "image_low_res_id": IMAGE_LOW,
    "frame_start_token_id": FRAME_START,
    "frame_end_token_id": FRAME_END,
}
# Where frames have no marks of their own, these ids name an image's: vLLM puts the embeddings of
# the two around every frame, whatever tokens the prompt has.
FRAME_MARKS = {
    "frame_start_token_id": "image_start_token_id",
    "frame_end_token_id": "image_end_token_id",
}
# What tells vLLM whether image tokens see each other in both directions.
_PREFIX_MASK = "is_mm_prefix_lm"

_SIZES = {
    "text_config": (
        *("vocab_size", "additional_vocab_size", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("max_position_embeddings", "rms_norm_eps"),
    ),
    "vision_config": (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("layer_norm_eps", "image_size", "patch_size"),
    ),
    "adapter_config": (
        *("hidden_size", "intermediate_size", "num_attention_heads", "text_hidden_size"),
        "vision_feature_layer",
    ),
}

# Released spelling -> that of transformers.
_RENAMED: dict[str, dict[str, str]] = {
    "text_config": {"qkv_bias": "attention_bias", "layer_norm_eps": "rms_norm_eps"},
    "vision_config": {
        "image_default_input_size": "image_size",
        "image_patch_size": "patch_size",
        "image_num_pos": "num_position_embeddings",
    },
    "adapter_config": {"vit_layers": "vision_feature_layer"},
}

_NO_DROPOUT = ((0, None), "no dropout is built")
# What else a part may say, and what it has to be.
Requirements = Mapping[str, Mapping[str, tuple[tuple[Any, ...], str]]]
REQUIRED: Requirements = {
    "text_config": {
        "qk_norm_type": (("qwen3", None), "query and key are normalised per head, as in Qwen3"),
        "use_qk_norm": ((True, None), "query and key are normalised"),
        "norm_after": ((False, None), "the norms come before attention and MLP"),
        "attention_bias": ((False, None), "the projections have no biases"),
        "hidden_act": (("silu", "swish"), "the MLP is SwiGLU"),
        "tie_word_embeddings": ((False, None), "the head is stored on its own"),
        **dict.fromkeys(
            ("attention_dropout", "embedding_dropout", "residual_dropout"), _NO_DROPOUT
        ),
    },
    "vision_config": {
        "hidden_act": (("gelu_pytorch_tanh",), "SigLIP 2's activation"),
        "attention_bias": ((True, None), "the projections have biases"),
        "num_channels": ((3, None), "pictures are RGB"),
        **dict.fromkeys(("attention_dropout", "residual_dropout"), _NO_DROPOUT),
    },
    "adapter_config": {
        "hidden_act": (("silu", "swish"), "the MLP is SwiGLU"),
        "attention_bias": ((True, None), "the projections have biases"),
        "mlp_bias": ((False, None), "the MLP has no biases"),
        "pooling_attention_mask": ((True, None), "empty slots of a window are left out"),
        **dict.fromkeys(
            ("attention_dropout", "residual_dropout", "image_feature_dropout"), _NO_DROPOUT
        ),
    },
}
# Read where they are used, or without effect on the result.
_OTHERS = {
    "text_config": (
        *("rope_theta", "rope_scaling", "rope_scaling_layers", "rope_parameters"),
        "attn_implementation",
    ),
    "vision_config": (
        *("num_key_value_heads", "head_dim", "num_position_embeddings"),
        *("float32_attention", "attn_implementation"),
    ),
    "adapter_config": (
        *("num_key_value_heads", "head_dim", "float32_attention", "attn_implementation"),
    ),
}


# Our field of the connector -> that of transformers' adapter_config.
_CONNECTOR = {
    "vision_dim": "hidden_size",
    "llm_dim": "text_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vit_layers": "vision_feature_layer",
}


def _same(*names: str) -> dict[str, Callable[[Any], Any]]:
    """Fields that have our name."""
    return {name: attrgetter(name) for name in names}


# What is written, in the released spelling: a constant, or what gives the value from our config.
_NO_DROPOUT_FIELDS = {"attention_dropout": 0.0, "residual_dropout": 0.0}
WRITTEN_TEXT: dict[str, Any] = {
    "model_type": "molmo2_text",
    **_same("vocab_size", "additional_vocab_size", "hidden_size", "intermediate_size"),
    **_same("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    "hidden_act": "silu",
    "layer_norm_eps": attrgetter("rms_norm_eps"),
    **_same("max_position_embeddings", "rope_theta"),
    "rope_scaling": None,
    "rope_scaling_layers": None,
    "qkv_bias": False,
    "use_qk_norm": True,
    "qk_norm_type": "qwen3",
    "norm_after": False,
    "embedding_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    **_NO_DROPOUT_FIELDS,
}
WRITTEN_VISION: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    **_same("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "num_key_value_heads": attrgetter("num_attention_heads"),
    **_same("head_dim", "hidden_act", "layer_norm_eps"),
    "image_default_input_size": lambda vision: [vision.image_size, vision.image_size],
    "image_patch_size": attrgetter("patch_size"),
    "image_num_pos": attrgetter("num_patches"),
    "float32_attention": True,
    "initializer_range": 0.02,
    **_NO_DROPOUT_FIELDS,
}
WRITTEN_ADAPTER: dict[str, Any] = {
    "model_type": MODEL_TYPE,
    "vit_layers": lambda connector: list(connector.vit_layers or ()),
    "pooling_attention_mask": True,
    "hidden_size": attrgetter("vision_dim"),
    "num_attention_heads": attrgetter("num_attention_heads"),
    "num_key_value_heads": attrgetter("num_attention_heads"),
    "head_dim": lambda connector: connector.vision_dim // connector.num_attention_heads,
    "intermediate_size": attrgetter("intermediate_size"),
    "text_hidden_size": attrgetter("llm_dim"),
    "hidden_act": "silu",
    "float32_attention": True,
    "image_feature_dropout": 0.0,
    "initializer_range": 0.02,
    **_NO_DROPOUT_FIELDS,
}


def molmo2_config_from_reference(
    values: Mapping[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    pooling_size: int = 2,
) -> NanoMolmo2Config:
    """Read the config of a Molmo2 checkpoint that is built on Qwen3 (4B, 8B, or one of ours).

    Args:
        values: of ``config.json``, in either spelling.
        generation: of ``generation_config.json``; gives the ids that end and fill up a row.
        pooling_size: side of an image's windows, which only the processor's files say.
    Raises: ValueError for another model, an unknown field, a wrong type, a setting not built here.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"model_type {values.get('model_type')!r} is not Molmo2: expected {MODEL_TYPE!r}"
        )
    parts, own = read_parts(values)
    flags = ("use_frame_special_tokens", _PREFIX_MASK)
    known = ("image_patch_id", "image_high_res_id", *flags, *SPECIAL_IDS)
    refuse_unknown(own, known, extra=("tie_word_embeddings", "attn_implementation"))
    require(own, "tie_word_embeddings", (False, None), "the head is stored on its own")
    require(own, _PREFIX_MASK, (True, False), "whether image tokens see each other")
    vision, adapter = parts["vision_config"], parts["adapter_config"]
    for name, part in (("vision_config", vision), ("adapter_config", adapter)):
        check_heads(name, part)
    llm_config = llm_config_of(parts["text_config"])
    if "image_patch_id" not in own:
        raise ValueError("image_patch_id is missing: it is the id of the image token")
    patch = own["image_patch_id"]
    require(own, "image_high_res_id", (patch, None), "there is one kind of image token")
    vision_config = vision_config_of(vision)
    return NanoMolmo2Config.from_dict(
        {
            "vision_config": vision_config,
            "connector_config": connector_fields(adapter, vision_config, pooling_size),
            "llm_config": llm_config,
            "image_token_id": patch,
            "freeze_vision": False,
            "bidirectional_image_attention": own.get(_PREFIX_MASK, True),
            "image_special_token_ids": special_token_ids(own, llm_config.vocab_size, SPECIAL_IDS),
            **end_ids(values, generation),
        }
    )


def molmo2_config_to_reference(config: NanoMolmo2Config) -> dict[str, Any]:
    """The ``config.json`` of the released files.

    Ids that are not in ``config`` follow from ``vocab_size``, as in the released models.

    Raises: ValueError for a model that the format can not express.
    """
    check_expressible(config)
    special = {name: config.llm_config.vocab_size + offset for name, offset in SPECIAL_IDS.items()}
    return {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "image_patch_id": config.image_token_id,
        "image_high_res_id": config.image_token_id,
        **special,
        **{frame: special[image] for frame, image in FRAME_MARKS.items()},
        "use_frame_special_tokens": False,
        _PREFIX_MASK: config.bidirectional_image_attention,
        "text_config": from_table(WRITTEN_TEXT, config.llm_config),
        "vit_config": from_table(WRITTEN_VISION, config.vision_config),
        "adapter_config": from_table(WRITTEN_ADAPTER, config.connector),
    }


def check_expressible(config: NanoMolmo2Config) -> None:
    """Raises: ValueError for a model that Molmo2's format has no words for."""
    connector, llm = config.connector, config.llm_config
    if config.point_config is not None:
        raise ValueError(
            "Molmo2's format has no words for a model that points by selecting visual tokens "
            "(point_config): export it in MolmoPoint's (export_molmo_point, nanomolmo2 export "
            "--format molmo-point-hf)"
        )
    if connector.connector_type != "pooling":
        raise ValueError(
            f"Molmo2's format can only express the attention-pooling connector, this model has the "
            f"{connector.connector_type!r} one: keep it in our own format "
            f"(NanoMolmo2.save_pretrained), which nanomolmo2 ask, eval and quantize read as it is, "
            f"or train a model with connector_type 'pooling', such as the preset "
            f"'nanomolmo2-pooling' (nanomolmo2 train base --connector pooling)"
        )
    if connector.vit_layers is None:
        raise ValueError(
            "Molmo2's format joins outputs of vision blocks, this model reads the encoder's final "
            "features behind its last norm (vit_layers is None): keep it in our own format "
            "(NanoMolmo2.save_pretrained), or train a model that names its vit_layers"
        )
    if llm.additional_vocab_size == 0:
        raise ValueError(
            f"Molmo2's format keeps the image tokens in rows behind the vocabulary, this model has "
            f"none (additional_vocab_size is 0; the image token is {config.image_token_id} of "
            f"{llm.vocab_size}): keep it in our own format (NanoMolmo2.save_pretrained), or train "
            f"a model with such rows, such as the preset 'nanomolmo2-pooling'"
        )
    if llm.predict_additional_vocab or not connector.attention_pooling_out_layer:
        raise ValueError(
            "Molmo2's format has a head of vocab_size rows and an output layer behind the pooling, "
            "this model differs (predict_additional_vocab, attention_pooling_out_layer): keep it "
            "in our own format (NanoMolmo2.save_pretrained)"
        )


def read_parts(
    values: Mapping[str, Any], required: Requirements = REQUIRED
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The three parts in the spelling of transformers, checked, and what stands beside them.

    required: what a part may say beside its sizes, and has to if it does.
    """
    own = dict(values)
    if "vit_config" in own:
        if "vision_config" in own:
            raise ValueError("vit_config and vision_config are two spellings of one part: keep one")
        own["vision_config"] = own.pop("vit_config")
    parts = {}
    for part, names in _RENAMED.items():
        given = own.pop(part, None)
        if not isinstance(given, Mapping):
            raise ValueError(f"{part}: expected an object, found {given!r}")
        fields = {names.get(str(name), str(name)): value for name, value in given.items()}
        try:
            refuse_unknown(fields, _SIZES[part], extra=(*required[part], *_OTHERS[part]))
            for name, (accepted, reason) in required[part].items():
                require(fields, name, accepted, reason)
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from None
        absent = [name for name in _SIZES[part] if name not in fields]
        if absent:
            raise ValueError(
                f"{part} lacks {', '.join(absent)}: copy config.json from the checkpoint again"
            )
        parts[part] = fields
    return parts, own


def special_token_ids(
    own: Mapping[str, Any], vocab_size: int, offsets: Mapping[str, int]
) -> list[Any]:
    """Ids of the tokens that the mask treats like image tokens; a file may leave some open.

    offsets: of the token of each field behind ``vocab_size``.
    """
    ids = {name: own.get(name) for name in offsets}
    for frame, image in FRAME_MARKS.items():
        if ids[frame] == ids[image]:  # the tokens are there all the same, unused
            ids[frame] = None
    return [vocab_size + offsets[name] if id is None else id for name, id in ids.items()]


def vision_config_of(vision: Mapping[str, Any]) -> VisionConfig:
    """Our config of a checked ``vision_config``."""
    fields = {name: vision[name] for name in _SIZES["vision_config"]}
    config = VisionConfig.from_dict(
        {**fields, "image_size": square("image_size", vision["image_size"])}
    )
    positions = vision.get("num_position_embeddings")
    if positions not in (None, config.num_patches):
        raise ValueError(
            f"{positions} positions do not fit pictures of {config.image_size} pixels with "
            f"{config.num_patches} patches of {config.patch_size}"
        )
    return config


def llm_config_of(
    text: Mapping[str, Any], *, tied: bool = False, predict_additional_vocab: bool = False
) -> LLMConfig:
    """Our config of a checked ``text_config``.

    Args:
        tied: the head is the embedding table.
        predict_additional_vocab: the head writes the additional tokens too.
    """
    layers, depth = text.get("rope_scaling_layers"), text["num_hidden_layers"]
    if not (layers is None or (len(layers) == depth and layers == list(range(depth)))):
        raise ValueError(
            f"text_config.rope_scaling_layers is {layers}, but every layer turns alike here"
        )
    if text.get("rope_theta") is None and not isinstance(text.get("rope_parameters"), Mapping):
        raise ValueError("text_config lacks rope_theta: copy config.json again")
    fields = {name: text[name] for name in _SIZES["text_config"]}
    try:
        theta = read_rope_theta(text)
    except ValueError as error:
        raise ValueError(f"text_config: {error}") from None
    return LLMConfig.from_dict(
        {
            **fields,
            "rope_theta": theta,
            "tie_word_embeddings": tied,
            "predict_additional_vocab": predict_additional_vocab,
        }
    )


def connector_fields(
    adapter: Mapping[str, Any], vision_config: VisionConfig, pooling_size: int
) -> dict[str, Any]:
    """Fields of our connector's config, from a checked ``adapter_config``."""
    if adapter["hidden_size"] != vision_config.hidden_size:
        raise ValueError(
            f"adapter_config.hidden_size is {adapter['hidden_size']}, expected that of the vision "
            f"encoder, {vision_config.hidden_size}"
        )
    return {
        "connector_type": "pooling",
        "pooling_size": pooling_size,
        **{ours: adapter[theirs] for ours, theirs in _CONNECTOR.items()},
    }


def check_heads(name: str, part: Mapping[str, Any]) -> None:
    """Vision and connector have heads of one kind, which fill the width."""
    heads, width = part["num_attention_heads"], part["hidden_size"]
    keys, head = part.get("num_key_value_heads", heads), part.get("head_dim", width // heads)
    if keys != heads or head * heads != width:
        raise ValueError(
            f"{name} has {heads} heads of {head} and {keys} key/value heads in a width of {width}, "
            f"but only as many of both are built, which together have the width"
        )


def end_ids(values: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """``eos_token_id`` and ``pad_token_id`` of the first file that has them."""
    found: dict[str, Any] = {"eos_token_id": None, "pad_token_id": None}
    places: Iterable[Mapping[str, Any]] = (generation or {}, values, values["text_config"])
    for place in places:
        for name in found:
            if found[name] is None:
                found[name] = place.get(name)
    if found["pad_token_id"] is None:
        found["pad_token_id"] = 0
    return found
