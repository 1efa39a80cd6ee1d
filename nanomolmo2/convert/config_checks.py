"""What a ``config.json`` may hold, checked before anything is made of it.

Configs of other programs are checked in their own words, so that an error names the field that is
in the file. Our own are checked by their classes; here are the limits that only a file can break.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanomolmo2.config import Config, describe

_MOST = 2**31 - 1  # of a size or an id
_MOST_LISTED = 1_024  # entries of a list; the deepest models have 126 blocks
_MOST_POOLED = 256  # patches a side of a window

Check = Callable[[Any], bool]


def _is_whole(least: int) -> Check:
    return lambda value: type(value) is int and least <= value <= _MOST


def _is_list(check: Check) -> Check:
    return lambda value: (
        isinstance(value, list) and len(value) <= _MOST_LISTED and all(map(check, value))
    )


def _or(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _is_none(value: Any) -> bool:
    return value is None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e300


_SIZE = (_is_whole(1), "int, at least 1")
_COUNT = (_is_whole(0), "int, at least 0")
_SIDE = (_or(_is_whole(1), _is_list(_is_whole(1))), "int, at least 1, or two of them")
_POSITIVE = (_is_number, "float above 0")
_LAYERS = (_is_list(_is_whole(-_MOST)), f"list of int, at most {_MOST_LISTED:,}")
_IDS = (_or(_is_none, _is_whole(0), _is_list(_is_whole(0))), "int, at least 0, a list or null")
_OBJECT = (_or(_is_none, lambda value: isinstance(value, Mapping)), "an object or null")

# Fields of any part, in either spelling: what they hold, and how to say so.
_FIELDS: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "max_position_embeddings", "num_channels"), _SIZE),
    **dict.fromkeys(("head_dim", "text_hidden_size", "image_num_pos"), _SIZE),
    "num_key_value_heads": (_or(_is_none, _is_whole(1)), "int, at least 1, or null"),
    "num_position_embeddings": (_or(_is_none, _is_whole(1)), "int, at least 1, or null"),
    "additional_vocab_size": _COUNT,
    **dict.fromkeys(("image_size", "patch_size"), _SIDE),
    **dict.fromkeys(("image_default_input_size", "image_patch_size"), _SIDE),
    **dict.fromkeys(("layer_norm_eps", "rms_norm_eps"), _POSITIVE),
    "qkv_bias": (lambda value: value in (None, False), "false"),
    "rope_theta": (_or(_is_none, _is_number), "float above 0"),
    "tie_word_embeddings": (lambda value: value is None or type(value) is bool, "bool"),
    **dict.fromkeys(("vit_layers", "vision_feature_layer"), _LAYERS),
    "rope_scaling_layers": (_or(_is_none, _LAYERS[0]), f"{_LAYERS[1]}, or null"),
    "layer_types": (
        _or(_is_none, _is_list(lambda value: isinstance(value, str))),
        f"list of str, at most {_MOST_LISTED:,}, or null",
    ),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), _OBJECT),
    "eos_token_id": _IDS,
    "pad_token_id": (_or(_is_none, _is_whole(0)), "int, at least 0, or null"),
    **dict.fromkeys(("image_patch_id", "image_start_token_id", "image_end_token_id"), _COUNT),
    **dict.fromkeys(("image_col_id", "low_res_image_start_token_id", "image_low_res_id"), _COUNT),
    **dict.fromkeys(("frame_start_token_id", "frame_end_token_id"), _COUNT),
    **dict.fromkeys(("patch_token_id", "subpatch_token_id", "location_token_id"), _COUNT),
    "image_non_indexable_patch_id": _COUNT,
    "patch_embed_dim": _SIZE,
    "token_prediction_rotary_theta": _POSITIVE,
}
# Parts within a config, by its model_type; a part that is not read is not checked.
_PARTS = {
    "siglip": ("vision_config",),
    **dict.fromkeys(
        ("molmo2", "molmo_point"), ("text_config", "vision_config", "vit_config", "adapter_config")
    ),
}
# Fields that the released files of a kind leave open.
_NULL = {
    "molmo_point": (
        *("low_res_image_start_token_id", "image_non_indexable_patch_id"),
        "token_prediction_rotary_theta",
    ),
}


def check_fields(values: Mapping[str, Any]) -> None:
    """Check the types and ranges in the config of a SigLIP, Qwen3, Molmo2 or MolmoPoint checkpoint.

    Raises: ValueError naming the field, such as ``text_config.hidden_size``.
    """
    kind = values.get("model_type")
    parts = _PARTS.get(kind, ()) if isinstance(kind, str) else ()
    places = {f"{name}.": values.get(name) for name in parts} | {"": values}
    if kind == "siglip":
        del places[""]
    for place, part in places.items():
        if part is None:
            continue  # what reads the parts says which of them have to be there
        if not isinstance(part, Mapping):
            raise ValueError(f"{place[:-1]}: expected an object, found {describe(part)}")
        for name, value in part.items():
            check, expected = _FIELDS.get(name, (None, ""))
            if value is None and name in _NULL.get(str(kind), ()):
                continue
            if check is not None and not check(value):
                raise ValueError(f"{place}{name}: expected {expected}, found {describe(value)}")
            if name in ("rope_parameters", "rope_scaling") and value is not None:
                _check_rope(f"{place}{name}", value)


def _check_rope(place: str, rope: Mapping[str, Any]) -> None:
    for name, value in rope.items():
        wanted = str if name in ("rope_type", "type") else None
        if wanted is not None and not isinstance(value, wanted):
            raise ValueError(f"{place}.{name}: expected str, found {describe(value)}")
        if name == "rope_theta" and not (value is None or _is_number(value)):
            raise ValueError(f"{place}.{name}: expected float above 0, found {describe(value)}")


def check_limits(config: Config, place: str = "") -> None:
    """Check what the class of a config leaves open: that numbers are of a size that can be built.

    Raises: ValueError naming the field, such as ``llm_config.rope_theta``.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name, value = f"{place}{field.name}", getattr(config, field.name)
        if isinstance(value, Config):
            check_limits(value, f"{name}.")
            continue
        several = value if isinstance(value, tuple) else (value,)
        if len(several) > _MOST_LISTED:
            raise ValueError(f"{name} has {len(several):,} entries, expected at most 1,024")
        most = {"pooling_size": _MOST_POOLED, "num_hidden_layers": _MOST_LISTED}
        largest = most.get(field.name, _MOST)
        for number in several:
            if type(number) is int and not -_MOST <= number <= largest:
                raise ValueError(f"{name} is {describe(number)}, expected at most {largest:,}")
            if type(number) is float and not _is_number(number):
                raise ValueError(f"{name} is {describe(number)}, expected float above 0")


@contextlib.contextmanager
def in_file(path: Path, field: str = "") -> Iterator[None]:
    """Put the name of a file before an error that something in it causes, and a field's behind.

    An error repeats what it found, which may be of any length or depth.
    """
    try:
        yield
    except RecursionError:
        raise ValueError(f"{path}: its lists or objects are nested too deeply") from None
    except ValueError as error:
        text = str(error)
        text = text if len(text) <= 400 else f"{text[:300]} ... {text[-90:]}"
        raise ValueError(f"{path}: {text}{f' (in {field})' if field else ''}") from None
