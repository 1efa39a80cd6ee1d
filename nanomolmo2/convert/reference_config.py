"""The ``config.json`` of SigLIP and Qwen3 checkpoints <-> VisionConfig and LLMConfig.

Both spellings are read: transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and
transformers 5 (``rope_parameters``, ``dtype``). A field that is left out has the default of the
reference class, which is not ours. A setting that these networks can not honour stops.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nanomolmo2.config import Config
from nanomolmo2.models.language_model import LLMConfig
from nanomolmo2.models.vision_encoder import VisionConfig

# Defaults of transformers' SiglipVisionConfig: files of transformers 4 hold only what differs.
_SIGLIP_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}

# Defaults of transformers' Qwen3Config. head_dim does not follow from the width.
_QWEN3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

# Fields that do not change what the network computes.
_HARMLESS = """
add_cross_attention architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
gradient_checkpointing id2label initializer_factor initializer_range is_decoder
is_encoder_decoder label2id length_penalty max_length max_window_layers min_length model_type
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
sliding_window suppress_tokens task_specific_params temperature tf_legacy_loss
tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version
typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache vision_use_head
""".split()  # noqa: SIM905


def vision_config_from_reference(values: Mapping[str, Any]) -> VisionConfig:
    """Read the config of a SigLIP checkpoint, whole (``siglip``) or vision tower only.

    Raises: ValueError for another model, an unknown field, a wrong type, a setting not built here.
    """
    model_type = values.get("model_type")
    if model_type == "siglip":
        vision = values.get("vision_config")
        vision = {} if vision is None else vision
        if not isinstance(vision, Mapping):
            raise ValueError(f"vision_config: expected an object, found {vision!r}")
        values = vision
    elif model_type == "siglip2":
        raise ValueError(
            "model_type 'siglip2' is the NaFlex variant with another patch embedding: use a fixed "
            "resolution release, such as google/siglip2-so400m-patch14-384"
        )
    elif model_type != "siglip_vision_model":
        raise ValueError(
            f"model_type {model_type!r} is not a vision encoder: expected 'siglip' or "
            f"'siglip_vision_model'"
        )
    refuse_unknown(values, _SIGLIP_DEFAULTS, extra=("attention_dropout",))
    require(values, "attention_dropout", (0, None), "no dropout is built")
    fields = {name: values.get(name, default) for name, default in _SIGLIP_DEFAULTS.items()}
    for name in ("image_size", "patch_size"):
        fields[name] = square(name, fields[name])
    return VisionConfig.from_dict(fields)


def llm_config_from_reference(values: Mapping[str, Any]) -> LLMConfig:
    """Read the config of a dense Qwen3 checkpoint of any size.

    Raises: ValueError for another model, an unknown field, a wrong type, a setting not built here.
    """
    if values.get("model_type") != "qwen3":
        raise ValueError(
            f"model_type {values.get('model_type')!r} is not a dense Qwen3 decoder: expected "
            f"'qwen3'"
        )
    checked = ("attention_bias", "attention_dropout", "hidden_act", "layer_types")
    rope = ("rope_parameters", "rope_scaling", "use_sliding_window")
    refuse_unknown(values, _QWEN3_DEFAULTS, extra=checked + rope)
    require(values, "attention_bias", (False, None), "the projections have no biases")
    require(values, "attention_dropout", (0, None), "no dropout is built")
    require(values, "hidden_act", ("silu", "swish"), "the MLP is SwiGLU")
    require(values, "use_sliding_window", (False, None), "every layer sees all positions")
    layer_types = values.get("layer_types")
    if layer_types is not None and set(layer_types) - {"full_attention"}:
        raise ValueError(
            f"layer_types holds {sorted(set(layer_types) - {'full_attention'})}, but only "
            f"'full_attention' is built"
        )
    fields = {name: values.get(name, default) for name, default in _QWEN3_DEFAULTS.items()}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields["rope_theta"] = read_rope_theta(values)
    return LLMConfig.from_dict(fields)


def vision_config_to_reference(config: VisionConfig) -> dict[str, Any]:
    """The ``config.json`` that transformers' SiglipVisionModel reads."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **config.to_dict(),
        "vision_use_head": False,
    }


def llm_config_to_reference(config: LLMConfig) -> dict[str, Any]:
    """The ``config.json`` that transformers' Qwen3ForCausalLM reads, version 4 or 5.

    Raises: ValueError if the embedding has rows that Qwen3 has no place for.
    """
    if config.additional_vocab_size:
        raise ValueError(
            f"additional_vocab_size is {config.additional_vocab_size}, but the Qwen3 format has no "
            f"rows without a logit: save the whole model with NanoMolmo2.save_pretrained"
        )
    values = config.to_dict()
    del values["additional_vocab_size"], values["predict_additional_vocab"]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **values,
        "attention_bias": False,
        "hidden_act": "silu",
        # Version 5 moves rope_theta into rope_parameters when it reads this; 4 only knows this.
        "rope_scaling": None,
        "use_sliding_window": False,
    }


def read_rope_theta(values: Mapping[str, Any]) -> object:
    """The base of the rotary frequencies, from either spelling."""
    thetas = [values["rope_theta"]] if values.get("rope_theta") is not None else []
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ValueError(f"{name}: expected an object or null, found {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        rest = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or rest or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"{name} is {dict(rope)}, but only plain rotary embeddings are built: set it to "
                f"null to use the checkpoint within its original context"
            )
        if rope.get("rope_theta") is not None:
            thetas.append(rope["rope_theta"])
    if any(theta != thetas[0] for theta in thetas):
        raise ValueError(f"rope_theta is given more than once and differs: {thetas}")
    return thetas[0] if thetas else _QWEN3_DEFAULTS["rope_theta"]


def square(name: str, value: object) -> object:
    """Newer files may write a size as [height, width]."""
    if not isinstance(value, list):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise ValueError(f"{name} is {value}, but only squares are built")
    return value[0]


def from_table(table: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Fields to write, by a table: each is a constant, or what gives the value from ``config``."""
    return {name: entry(config) if callable(entry) else entry for name, entry in table.items()}


def require(values: Mapping[str, Any], name: str, accepted: tuple[Any, ...], reason: str) -> None:
    if name in values and values[name] not in accepted:
        raise ValueError(f"{name} is {values[name]!r}, expected {accepted[0]!r}: {reason}")


def refuse_unknown(
    values: Mapping[str, Any], fields: Iterable[str], extra: Iterable[str] = ()
) -> None:
    known = {*fields, *extra, *_HARMLESS}
    unknown = sorted(n for n in values if n not in known and not n.startswith("_"))
    if unknown:
        raise ValueError(
            f"unknown field(s) {', '.join(unknown)}: they may change what the network computes; "
            f"remove them from config.json if they do not"
        )
