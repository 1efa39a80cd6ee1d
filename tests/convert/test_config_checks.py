"""A config.json that is not right: a model's config, or one sentence that names file and field.

Every field of every layout is given odd values: nothing is built of them first.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanomolmo2.convert.molmo2 import open_molmo2
from nanomolmo2.convert.parts import LLM, VISION, open_reference
from nanomolmo2.convert.pretrained import load_config, load_processor
from tests.convert.checkpoints import make_nanomolmo2
from tests.convert.molmo2_checkpoint import write_checkpoint
from tests.small_model import small_model, small_processor

DEEP: Any = json.loads("[" * 400 + "]" * 400)
ODD: tuple[Any, ...] = (
    *(0, -1, -(2**40), 1, 3, 10**9, 3 * 10**8, 10**30, 1.5, 0.0, -0.5),
    *(None, True, "", "x", "\x1b]0;t\x07", [], [1], [None], ["x"] * 50, DEEP),
    *({}, {"a": 1}, {"rope_type": 5}, [0] * 100_000, float("nan"), float("inf")),
)
Load = Callable[[Path], object]


def fields(values: dict[str, Any], place: str = "") -> Iterator[str]:
    """``hidden_size``, ``text_config``, ``text_config.hidden_size``, ..."""
    for name, value in values.items():
        yield f"{place}{name}"
        if isinstance(value, dict):
            yield from fields(value, f"{place}{name}.")


def changed(values: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(values)
    inner, *names = found, *field.split(".")
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = value
    return found


def ours(folder: Path) -> str:
    make_nanomolmo2().save_pretrained(folder)
    return "config.json"


def ours_quantised(folder: Path) -> str:
    make_nanomolmo2().quantize("int8").save_pretrained(folder)
    return "config.json"


def released(folder: Path) -> str:
    write_checkpoint(folder)
    return "config.json"


def generation(folder: Path) -> str:
    write_checkpoint(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8], "pad_token_id": 0})
    )
    return "generation_config.json"


def processor(folder: Path) -> str:
    small_model().save_pretrained(folder, processor=small_processor())
    return "processor_config.json"


LAYOUTS: dict[Callable[[Path], str], Load] = {
    ours: load_config,
    ours_quantised: load_config,
    released: open_molmo2,
    generation: open_molmo2,
    processor: load_processor,
}


def loaded(folder: Path, load: Load) -> tuple[str, float]:
    """The error, if there is one, and the seconds of the processor until then."""
    start, text = time.process_time(), ""
    try:
        load(folder)
    except (ValueError, OSError) as error:
        text = str(error)
        assert type(error) is ValueError, error
    return text, time.process_time() - start


def check(folder: Path, load: Load, file: str, field: str, value: Any) -> bool:
    """Whether it loads, quickly in any case; if not, the error is as it should be."""
    text, seconds = loaded(folder, load)
    if seconds >= 1:  # once may be the collector of a process of thousands of tests
        text, seconds = loaded(folder, load)
    assert seconds < 1, (field, value)
    if text:
        of_tensors = text.startswith(f"the tensors of {folder} do not fit the model")
        assert "\n" not in text and (of_tensors or len(text.replace(str(folder), "")) <= 500), text
        of_number = "blocks, but the weights are" in text
        assert file in text or of_tensors or of_number, (field, value, text)
        assert str(folder) in text, (field, value, text)
    return not text


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_field_with_any_value(layout: Callable[[Path], str], tmp_path: Path) -> None:
    file = layout(tmp_path)
    check_all_fields(tmp_path, LAYOUTS[layout], file)


@pytest.mark.parametrize("part", [VISION, LLM], ids=["siglip", "qwen3"])
def test_any_field_of_a_part(
    part: Any, tmp_path: Path, siglip_folder: Path, qwen3_folder: Path
) -> None:
    source = siglip_folder if part is VISION else qwen3_folder
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    check_all_fields(tmp_path, lambda folder: open_reference(folder, part), "config.json")


def check_all_fields(folder: Path, load: Load, file: str) -> None:
    values = json.loads((folder / file).read_text(encoding="utf-8"))
    names = list(fields(values))
    assert len(names) >= 2
    load(folder)  # imports what it needs
    tried = refused = 0
    for number, field in enumerate(names):
        for value in ODD[number % 3 :: 3]:  # every third one, another third for the next field
            text = json.dumps(changed(values, field, value))
            (folder / file).write_text(text, encoding="utf-8")
            tried += 1
            refused += not check(folder, load, file, field, value)
    assert tried > 8 * len(names)
    assert refused > tried / 4  # many fields of other programs' files are not read


@pytest.mark.parametrize(
    ("layout", "field", "value", "message"),
    [
        (ours, "llm_config.num_attention_heads", 0, "llm_config: num_attention_heads must be at"),
        (ours, "llm_config.num_key_value_heads", 4, r"llm_config: num_attention_heads \(6\) must"),
        (ours, "llm_config.rope_theta", "x", r"LLMConfig\.rope_theta: expected float, found 'x'"),
        (ours, "llm_config.rope_theta", -1.0, r"llm_config\.rope_theta is -1\.0.*above 0"),
        (ours, "vision_config.image_size", [1], r"VisionConfig\.image_size: expected int"),
        (ours, "llm_config", [1], "llm_config: LLMConfig: expected an object, found"),
        (ours, "image_special_token_ids", [1] * 2000, "2,000 entries, expected at most 1,024"),
        (
            ours_quantised,
            "quantization.llm",
            5,
            r"quantization entry is an .*\(in quantization\.llm",
        ),
        (ours_quantised, "quantization.llm.mode", ["int8"], r"no quantisation mode \['int8'\]"),
        (released, "text_config", None, "text_config: expected an object, found None"),
        (released, "vit_config", 5, "vit_config: expected an object, found 5"),
        (released, "text_config.num_attention_heads", 0, r"text_config\.num_attention_heads: exp"),
        (released, "vit_config.num_attention_heads", 0, r"vit_config\.num_attention_heads: expec"),
        (released, "text_config.layer_norm_eps", "x", r"text_config\.layer_norm_eps: expected flo"),
        (released, "adapter_config.vit_layers", 5, r"adapter_config\.vit_layers: expected list"),
        (released, "vit_config.image_default_input_size", [1], "only squares"),
        (released, "text_config.rope_scaling_layers", [0] * 2000, "rope_scaling_layers: expected"),
        (
            generation,
            "eos_token_id",
            "x",
            r"eos_token_id: expected int, at least 0, a list or null",
        ),
        (processor, "image_tokens", 10**9, r"image_tokens \(1,000,000,000\) must be at most"),
        (processor, "image_size", 10**6, r"image_size \(1,000,000\) must be at most 2,048"),
        (processor, "image_std", [0.5, float("nan"), 0.5], "image_std: expected float, found nan"),
    ],
    ids=lambda value: str(getattr(value, "__name__", value))[:40],
)
def test_what_the_error_says(
    layout: Callable[[Path], str], field: str, value: Any, message: str, tmp_path: Path
) -> None:
    file = layout(tmp_path)
    values = json.loads((tmp_path / file).read_text(encoding="utf-8"))
    (tmp_path / file).write_text(json.dumps(changed(values, field, value)), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        LAYOUTS[layout](tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer_types", 5, "layer_types: expected list of str, at most 1,024, or null, found 5"),
        ("layer_types", ["full_attention"] * 2000, "layer_types: expected list of str"),
        ("layer_types", [["full_attention"]], "layer_types: expected list of str"),
        ("num_attention_heads", 0, "num_attention_heads: expected int, at least 1, found 0"),
        ("num_key_value_heads", 4, r"multiple of num_key_value_heads \(4\)"),
        ("rope_parameters", {"rope_theta": "x"}, r"rope_parameters\.rope_theta: expected float"),
        ("rope_parameters", {"rope_type": ["x"]}, r"rope_parameters\.rope_type: expected str"),
        ("rms_norm_eps", 0, "rms_norm_eps: expected float above 0, found 0"),
        ("vocab_size", 2**31, "vocab_size: expected int, at least 1, found 2147483648"),
        ("hidden_act", DEEP, "hidden_act is"),
    ],
)
def test_what_the_error_of_a_decoder_says(
    field: str, value: Any, message: str, tmp_path: Path, qwen3_folder: Path
) -> None:
    shutil.copytree(qwen3_folder, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(changed(values, field, value))
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}") as caught:
        open_reference(tmp_path, LLM)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 500


def test_lists_that_only_a_number_asks_for_are_not_made(tmp_path: Path) -> None:
    """A list of 300 million layers was made to compare it with one of none."""
    write_checkpoint(tmp_path, text__num_hidden_layers=3 * 10**8, text__rope_scaling_layers=[0, 1])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"config\.json: .*rope_scaling_layers is \[0, 1\]"):
            open_molmo2(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
