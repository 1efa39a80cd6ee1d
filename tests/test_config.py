"""Configurations go to JSON and back, and nothing but what they know comes in."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from nanomolmo2.config import Config, read_json_object
from nanomolmo2.models import ConnectorConfig, LLMConfig, NanoMolmo2Config, VisionConfig


@dataclass(frozen=True)
class Inner(Config):
    size: int = 3
    rate: float = 0.5


@dataclass(frozen=True)
class Outer(Config):
    name: str = "a"
    on: bool = True
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    mode: Literal["slow", "fast"] = "slow"
    ids: int | tuple[int, ...] | None = None
    layers: tuple[int, ...] = ()
    pair: tuple[float, str] = (1.0, "x")


FILLED = Outer(
    name="é",
    on=False,
    inner=Inner(size=5),
    maybe=Inner(rate=2.0),
    mode="fast",
    ids=(1, 2),
    layers=(-1, -3),
    pair=(0.25, "y"),
)


@pytest.mark.parametrize("config", [Outer(), FILLED, Outer(ids=7)])
def test_round_trip(config: Outer, tmp_path: Path) -> None:
    assert Outer.from_dict(config.to_dict()) == config
    assert Outer.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save(tmp_path / "new" / "config.json", model_type="outer")
    assert Outer.load(tmp_path / "new" / "config.json", ignore=("model_type",)) == config


def test_the_file_holds_plain_json_with_extra_keys_first(tmp_path: Path) -> None:
    FILLED.save(tmp_path / "c.json", model_type="outer")
    values = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert next(iter(values)) == "model_type"
    assert values["layers"] == [-1, -3]
    assert values["inner"] == {"size": 5, "rate": 0.5}
    assert values["maybe"] == {"size": 3, "rate": 2.0}


def test_fields_left_out_take_their_defaults() -> None:
    assert Outer.from_dict({"inner": {"size": 9}}) == Outer(inner=Inner(size=9))


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    rate = Inner.from_dict({"rate": 2}).rate
    assert rate == 2.0
    assert type(rate) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "b"}, r"Outer does not know the field\(s\) nmae; it has name, on, .*: remove"),
        ({"inner": {"sizes": 1}}, r"Inner does not know the field\(s\) sizes; it has size, rate"),
        ({"maybe": {"sizes": 1}}, r"Inner does not know the field\(s\) sizes"),
        ({"name": 3}, r"Outer\.name: expected str, found 3 \(int\)"),
        ({"name": None}, r"Outer\.name: expected str, found None \(NoneType\)"),
        ({"on": 1}, r"Outer\.on: expected bool, found 1 \(int\)"),
        ({"inner": {"size": True}}, r"Inner\.size: expected int, found True \(bool\)"),
        ({"inner": {"size": 3.0}}, r"Inner\.size: expected int, found 3\.0 \(float\)"),
        ({"inner": {"size": "3"}}, r"Inner\.size: expected int, found '3' \(str\)"),
        ({"inner": {"rate": True}}, r"Inner\.rate: expected float, found True \(bool\)"),
        ({"inner": {"rate": "0.5"}}, r"Inner\.rate: expected float, found '0.5' \(str\)"),
        ({"inner": 4}, r"Inner: expected an object, found 4 \(int\)"),
        ({"maybe": [1]}, r"Inner: expected an object, found \[1\] \(list\)"),
        ({"mode": "medium"}, r"Outer\.mode: expected Literal\['slow', 'fast'\], found 'medium'"),
        ({"mode": ["slow"]}, r"Outer\.mode: expected Literal"),
        ({"ids": "5"}, r"Outer\.ids: expected int \| tuple\[int, \.\.\.\] \| None, found '5'"),
        ({"ids": [1, "2"]}, r"Outer\.ids: expected"),
        ({"ids": True}, r"Outer\.ids: expected"),
        ({"layers": 3}, r"Outer\.layers: expected tuple\[int, \.\.\.\], found 3"),
        ({"layers": [1, 2.5]}, r"Outer\.layers: expected int, found 2\.5"),
        ({"pair": [1.0]}, r"Outer\.pair: expected tuple\[float, str\], found \[1\.0\]"),
        ({"pair": [1.0, 2.0]}, r"Outer\.pair: expected str, found 2\.0"),
    ],
)
def test_what_does_not_fit_is_named(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Outer.from_dict(values)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: .*" + message):
        Outer.load(path)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(ValueError) as error:
        Outer.from_dict({"on": "x" * 1000})
    assert len(str(error.value)) < 150


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"name": ', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1, 2]", r"expected a JSON object, found \[1, 2\] \(list\)"),
        (b"null", "expected a JSON object, found None"),
        (b'{"size": ' + b"9" * 5000 + b"}", "not valid JSON"),  # Python refuses it as a number
        (b"[" * 100_000, "not valid JSON"),
        (b'{"layers": [' + b"1, " * 1_400_000 + b"1]}", "bytes, expected at most 4,000,000"),
    ],
)
def test_a_file_that_is_no_json_object(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json.*" + message):
        read_json_object(path)


@pytest.mark.parametrize("kind", ["a device", "a pipe", "a folder", "of the kernel"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    """A named pipe would wait for ever, a device would never end."""
    path = tmp_path / "config.json"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "a device" else "/proc/self/status")
    with pytest.raises(ValueError, match=r"config\.json is .*expected a regular file"):
        Outer.load(path)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_a_number_that_is_none(number: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"rate": ' + number + "}")
    with pytest.raises(ValueError, match=r"config\.json: Inner\.rate: expected float, found"):
        Inner.load(path)
    path.write_text('{"rate": 1e9}')
    assert Inner.load(path).rate == 1e9


def test_a_value_of_any_size_makes_a_short_message() -> None:
    nested: Any = []
    for _ in range(900):
        nested = [nested]
    shared: Any = [0] * 50
    for _ in range(50):
        shared = [shared] * 50  # 50^51 numbers, if all of them were written out
    for value in (nested, shared, {"a": shared}, "x" * 10**7, [1] * 10**6):
        with pytest.raises(ValueError, match=r"Inner\.size: expected int, found") as error:
            Inner.from_dict({"size": value})
        assert len(str(error.value)) < 150


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    FILLED.save(path)
    with pytest.raises(TypeError):
        Outer().save(path, extra=object())  # not JSON
    assert Outer.load(path) == FILLED
    assert list(tmp_path.iterdir()) == [path]


def test_literals_do_not_mix_numbers_and_truth_values() -> None:
    @dataclass(frozen=True)
    class Switch(Config):
        level: Literal[0, 1] = 0

        # A local class has no module to look its annotations up in.
        __annotations__ = {"level": Literal[0, 1]}

    assert Switch.from_dict({"level": 1}).level == 1
    with pytest.raises(ValueError, match="level"):
        Switch.from_dict({"level": True})


@pytest.mark.parametrize(
    "config",
    [
        NanoMolmo2Config(),
        NanoMolmo2Config(
            vision_config=VisionConfig(hidden_size=32, num_attention_heads=2),
            connector_config=ConnectorConfig(
                vision_dim=32,
                llm_dim=48,
                connector_type="pooling",
                num_attention_heads=2,
                vit_layers=(-1, 3),
            ),
            llm_config=LLMConfig(hidden_size=48, additional_vocab_size=16),
            eos_token_id=(5, 6),
            image_special_token_ids=(1, 2),
            bidirectional_image_attention=True,
        ),
        NanoMolmo2Config(eos_token_id=None),
    ],
)
def test_the_models_configs_round_trip(config: NanoMolmo2Config) -> None:
    assert NanoMolmo2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (VisionConfig, {"hidden_size": 0}, "hidden_size must be at least 1, found 0"),
        (VisionConfig, {"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        (VisionConfig, {"num_attention_heads": 5}, r"hidden_size \(1152\) must be a multiple of"),
        (VisionConfig, {"patch_size": 500}, r"patch_size \(500\) must not be above image_size"),
        (VisionConfig, {"hidden_act": "relu"}, "hidden_act 'relu' is not built"),
        (LLMConfig, {"num_key_value_heads": 0}, "num_key_value_heads must be at least 1"),
        (LLMConfig, {"num_key_value_heads": 3}, r"\(16\) must be a multiple of num_key_value"),
        (LLMConfig, {"head_dim": 63}, r"head_dim \(63\) must be even"),
        (LLMConfig, {"additional_vocab_size": -1}, "additional_vocab_size must be 0 or more"),
        (ConnectorConfig, {"connector_type": "conv"}, "'conv'"),
        (ConnectorConfig, {"num_query_tokens": -1}, "num_query_tokens must be at least 1"),
        (
            ConnectorConfig,
            {"connector_type": "resampler", "num_attention_heads": 7},
            "width 1024, which must be a multiple of num_attention_heads",
        ),
        (
            ConnectorConfig,
            {"connector_type": "pooling", "num_attention_heads": 7},
            "width 1152, which must be a multiple",
        ),
        (
            NanoMolmo2Config,
            {"connector_config": {"vision_dim": 768}},
            "vision_dim is 768, but the part it joins has hidden_size 1152",
        ),
        (
            NanoMolmo2Config,
            {"connector_config": {"llm_dim": 896}},
            "llm_dim is 896, but the part it joins has hidden_size 1024",
        ),
        (NanoMolmo2Config, {"image_token_id": 151936}, "image_token_id 151936 is outside"),
        (
            NanoMolmo2Config,
            {"connector_config": {"vit_layers": [-1, 27]}},
            r"vit_layers is \(-1, 27\), but the vision encoder has 27 blocks",
        ),
        (NanoMolmo2Config, {"connector_config": {"vit_layers": []}}, r"vit_layers is \(\)"),
    ],
)
def test_sizes_that_do_not_fit_each_other(
    kind: type[Config], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind.from_dict(values)


def test_an_unknown_connector_is_refused_by_the_constructor_too() -> None:
    with pytest.raises(ValueError, match="choose one of linear, mlp, resampler, pooling"):
        ConnectorConfig(connector_type="conv")  # type: ignore[arg-type]


def test_a_value_of_any_length_is_cut_in_the_error_about_a_file(tmp_path: Path) -> None:
    values = {**VisionConfig().to_dict(), "hidden_act": "x" * 10_000}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: .*hidden_act") as said:
        VisionConfig.load(tmp_path / "config.json")
    assert len(str(said.value)) < 600
