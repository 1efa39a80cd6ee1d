"""The ``config.json`` of MolmoPoint checkpoints <-> NanoMolmo2Config.

Around the three parts, which are spelled as Molmo2's, stand the ids of the three markers and how
pointing is built. A field that a file leaves out has the value that AI2's class gives it, which is
mostly not the released one. A setting that these networks can not honour stops.

What the format can not say of a model of ours, such as the rule by which it points, is in a file of
our own beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanomolmo2.config import describe
from nanomolmo2.convert import molmo2_config
from nanomolmo2.convert.molmo2_config import (
    REQUIRED,
    WRITTEN_ADAPTER,
    WRITTEN_TEXT,
    WRITTEN_VISION,
    check_heads,
    connector_fields,
    end_ids,
    llm_config_of,
    read_parts,
    special_token_ids,
    vision_config_of,
)
from nanomolmo2.convert.reference_config import from_table, refuse_unknown, require
from nanomolmo2.models.nanomolmo2 import NanoMolmo2Config

MODEL_TYPE = "molmo_point"

_MARKERS = ("patch_token_id", "subpatch_token_id", "location_token_id")
_OVERVIEW = "image_non_indexable_patch_id"
# The ids around an image, by their name in this format. The converter of the released files forgot
# the overview's start, which is a token all the same.
SPECIAL_IDS = {
    _OVERVIEW if name == "image_low_res_id" else name: offset
    for name, offset in molmo2_config.SPECIAL_IDS.items()
}

# How pointing is built: what AI2's class takes where the file says nothing, what it has to be here,
# and why.
_BUILT: dict[str, tuple[Any, Any, str]] = {
    "patch_location": ("3x3", "3x3", "a patch has 3 x 3 places"),
    "no_more_points_class": (False, True, "a list of points ends by a class of its own"),
    "patch_embedding_kind": (
        *("linear", "image_feature0"),
        "a chosen visual token goes in as the connector made it",
    ),
    "embed_selected_vit_patch": (
        *("linear", "linear"),
        "a chosen patch goes in as a linear map of its features",
    ),
    "embed_location": (False, False, "a chosen place goes in as its marker alone"),
    "layer_norm_x": (True, True, "what selects reads normalised states"),
    "norm_logits": (True, True, "scores are divided by a root"),
    "mask_patches": ("always", "always", "points are in the order of the image"),
    "mask_subpatches": ("inference", "inference", "empty slots are masked where points are made"),
    "mask_repeats": ("inference", "inference", "a patch is chosen once where points are made"),
    "token_prediction_rotary": (True, "one_d", "keys turn by the number of their token"),
}
_DEFAULTS: dict[str, Any] = {
    **{name: default for name, (default, _, _) in _BUILT.items()},
    "patch_embed_dim": 256,
    "token_prediction_rotary_theta": 50_000,
    _OVERVIEW: None,
}
_ADAPTER_DEFAULTS = {
    "pooling_attention_mask": False,
    "positional_embeddings": 16,
    "attention_pooling_out_layer": False,
}
# Without the word, AI2's connector takes its other branch, which attends to empty slots too.
_MASKED = {"attn_implementation": "sdpa"}
_REQUIRED = {
    "text_config": {
        **REQUIRED["text_config"],
        "tie_word_embeddings": ((False, True, None), "whether the head is the embedding"),
    },
    "vision_config": REQUIRED["vision_config"],
    "adapter_config": {
        **REQUIRED["adapter_config"],
        "positional_embeddings": ((None,), "the patches of a window have no places"),
        "attention_pooling_out_layer": ((False, True), "whether the pooling has an output layer"),
    },
}
_HARMLESS = ("tie_word_embeddings", "attn_implementation")


def molmo_point_config_from_reference(
    values: Mapping[str, Any],
    *,
    generation: Mapping[str, Any] | None = None,
    pooling_size: int = 2,
) -> NanoMolmo2Config:
    """Read the config of a MolmoPoint checkpoint; it points by the rule ``released``.

    Args:
        values: of ``config.json``.
        generation: of ``generation_config.json``; gives the ids that end and fill up a row.
        pooling_size: side of an image's windows, which only the processor's files say.
    Raises: ValueError for another model, an unknown field, a wrong type, a setting not built here.
    """
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"model_type {values.get('model_type')!r} is not MolmoPoint: expected {MODEL_TYPE!r}"
        )
    parts, own = read_parts(_with_adapter_defaults(values), _REQUIRED)
    _check_own(own)
    own = {**_DEFAULTS, **own}
    text, vision, adapter = (
        parts[name] for name in ("text_config", "vision_config", "adapter_config")
    )
    for name in ("vision_config", "adapter_config"):
        check_heads(name, parts[name])
    tied = bool(text.get("tie_word_embeddings"))
    llm_config = llm_config_of(text, tied=tied, predict_additional_vocab=True)
    vision_config = vision_config_of(vision)
    theta = own["token_prediction_rotary_theta"]
    return NanoMolmo2Config.from_dict(
        {
            "vision_config": vision_config,
            "connector_config": {
                **connector_fields(adapter, vision_config, pooling_size),
                "attention_pooling_out_layer": adapter["attention_pooling_out_layer"],
            },
            "llm_config": llm_config,
            "point_config": {
                **{name: own[name] for name in (*_MARKERS, _OVERVIEW, "patch_embed_dim")},
                "token_prediction_rotary_theta": llm_config.rope_theta if theta is None else theta,
            },
            "image_token_id": own["image_patch_id"],
            "freeze_vision": False,
            "bidirectional_image_attention": True,
            "image_special_token_ids": special_token_ids(own, llm_config.vocab_size, SPECIAL_IDS),
            **end_ids(values, generation),
        }
    )


def molmo_point_config_to_reference(config: NanoMolmo2Config) -> dict[str, Any]:
    """The ``config.json`` of the released files, every field of it.

    Ids that are not in ``config`` follow from ``vocab_size``, as in the released models.

    Raises: ValueError for a model that the format can not express.
    """
    check_point_expressible(config)
    point, connector = config.point_config, config.connector
    assert point is not None
    special = {name: config.llm_config.vocab_size + offset for name, offset in SPECIAL_IDS.items()}
    tied = config.llm_config.tie_word_embeddings
    return {
        "architectures": ["MolmoPointForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "image_patch_id": config.image_token_id,
        "image_high_res_id": config.image_token_id,
        **special,
        **{name: getattr(point, name) for name in (*_MARKERS, _OVERVIEW, "patch_embed_dim")},
        **{name: built for name, (_, built, _) in _BUILT.items()},
        "token_prediction_rotary_theta": point.token_prediction_rotary_theta,
        "use_frame_special_tokens": True,
        "text_config": {
            **from_table(WRITTEN_TEXT, config.llm_config),
            "tie_word_embeddings": tied,
            "use_cache": True,
            **_MASKED,
        },
        "vit_config": {**from_table(WRITTEN_VISION, config.vision_config), **_MASKED},
        "adapter_config": {
            **from_table(WRITTEN_ADAPTER, connector),
            **_MASKED,
            "model_type": MODEL_TYPE,
            "positional_embeddings": None,
            "attention_pooling_out_layer": connector.attention_pooling_out_layer,
        },
    }


def check_point_expressible(config: NanoMolmo2Config) -> None:
    """Raises: ValueError for a model that MolmoPoint's format has no words for."""
    connector, llm = config.connector, config.llm_config
    if config.point_config is None:
        raise ValueError(
            "MolmoPoint's format is of models that point by selecting visual tokens, and this one "
            "writes coordinates (point_config is None): export it with export_molmo2, or train "
            "one that selects, such as the preset 'tiny-point'"
        )
    found = None
    if connector.connector_type != "pooling" or connector.vit_layers is None:
        found = f"the {connector.connector_type!r} connector with vit_layers {connector.vit_layers}"
    elif llm.additional_vocab_size == 0 or not llm.predict_additional_vocab:
        found = (
            f"{llm.additional_vocab_size} additional tokens, predict_additional_vocab "
            f"{llm.predict_additional_vocab}"
        )
    if found is not None:
        raise ValueError(
            f"MolmoPoint's format has an attention-pooling connector over named vision blocks and "
            f"additional tokens that the head writes, this model has {found}: keep it in our own "
            f"format (NanoMolmo2.save_pretrained)"
        )


def _with_adapter_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    adapter = values.get("adapter_config")
    if not isinstance(adapter, Mapping):
        return dict(values)
    absent = {name: value for name, value in _ADAPTER_DEFAULTS.items() if name not in adapter}
    for name, value in absent.items():
        try:
            require(absent, name, *_REQUIRED["adapter_config"][name])
        except ValueError as error:
            raise ValueError(
                f"adapter_config: {error} ({name} is not in the file, which means {value!r})"
            ) from None
    return {**values, "adapter_config": {**absent, **adapter}}


def _check_own(own: Mapping[str, Any]) -> None:
    """What stands beside the parts: nothing unknown, and everything as it is built here."""
    known = ("image_patch_id", "image_high_res_id", "use_frame_special_tokens")
    refuse_unknown(own, (*known, *_MARKERS, *SPECIAL_IDS, *_DEFAULTS), extra=_HARMLESS)
    require(own, "tie_word_embeddings", (False, None), "text_config says what the head is")
    require(
        own, "use_frame_special_tokens", (True, False), "whether frames have marks of their own"
    )
    if absent := [name for name in ("image_patch_id", *_MARKERS) if name not in own]:
        raise ValueError(
            f"{', '.join(absent)} missing: they are the ids of the image token and of the three "
            f"markers of a point; copy config.json from the checkpoint again"
        )
    patch = own["image_patch_id"]
    require(own, "image_high_res_id", (patch, None), "one kind of image token can be selected")
    for name, (default, built, reason) in _BUILT.items():
        value = own.get(name, default)
        if type(value) is not type(built) or value != built:
            absent_text = "" if name in own else ", which is what leaving it out means"
            raise ValueError(
                f"{name} is {describe(value)}{absent_text}; only {built!r} is built, as in the "
                f"released models: {reason}"
            )
