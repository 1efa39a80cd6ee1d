"""Quantised models in files: the same bits back, small, and refused where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanomolmo2 import cli
from nanomolmo2.accelerate.kernels import MODES
from nanomolmo2.accelerate.quantization import (
    is_quantized,
    quantization_config,
    quantization_report,
)
from nanomolmo2.cli.loading import load_module
from nanomolmo2.convert import export_molmo2
from nanomolmo2.convert.pretrained import TINY, load, save_pretrained
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.models import LanguageModel, NanoMolmo2, VisionEncoder
from nanomolmo2.processor import collate
from tests.accelerate.test_quantization import picture_inputs
from tests.nets import LLM, VISION, randomize, text_ids
from tests.small_model import small_model, small_processor


def whole(mode: Any = "int8", **options: Any) -> NanoMolmo2:
    return randomize(small_model()).quantize(mode, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved int8 model."""
    whole().save_pretrained(tmp_path / "model", processor=small_processor())
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- the same bits back ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("used_before", [False, True])
def test_a_whole_model_comes_back_bit_for_bit(mode: str, used_before: bool, tmp_path: Path) -> None:
    model = whole(mode)
    inputs = picture_inputs(model)
    if used_before:
        model(**inputs)  # packed: the plain weights are made from what was packed
    model.save_pretrained(tmp_path)
    back = NanoMolmo2.from_pretrained(tmp_path)
    assert torch.equal(back(**inputs), model(**inputs))
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert quantization_config(back.llm) == quantization_config(model.llm) == {"mode": mode}


def test_parts_exceptions_and_calibration_come_back(tmp_path: Path) -> None:
    model = randomize(small_model())
    inputs = picture_inputs(model)
    model.quantize(
        {"vision_encoder": "fp16-weights", "llm": "int8"},
        calibration=inputs,
        keep=["llm.layers.0.mlp.up_proj"],
    )
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization"] == {
        "vision_encoder": {"mode": "fp16-weights"},
        "llm": {
            "mode": "int8",
            "exceptions": {"layers.0.mlp.up_proj": "fp16-weights"},
            "calibrated": True,
        },
    }
    with torch.no_grad():  # the connector is not quantised, so it would ask for gradients
        assert torch.equal(NanoMolmo2.from_pretrained(tmp_path)(**inputs), model(**inputs))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_comes_back(mode: str, tied: bool, tmp_path: Path) -> None:
    llm = randomize(LanguageModel(replace(LLM, tie_word_embeddings=tied))).eval().quantize(mode)
    save_pretrained(llm, tmp_path)
    back = LanguageModel.from_pretrained(tmp_path)
    assert torch.equal(back(text_ids(2, 7)), llm(text_ids(2, 7)))
    assert type(load_module(str(tmp_path), tmp_path)) is LanguageModel
    # No program for Qwen3 checkpoints shall take it for one.
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nanomolmo2_llm"


def test_a_vision_encoder_comes_back(tmp_path: Path) -> None:
    encoder = randomize(VisionEncoder(VISION)).eval().quantize("int8")
    save_pretrained(encoder, tmp_path)
    pictures = torch.randn(1, 3, 22, 22)
    assert torch.equal(VisionEncoder.from_pretrained(tmp_path)(pictures), encoder(pictures))
    assert isinstance(load_module(str(tmp_path), tmp_path), VisionEncoder)


def test_a_part_of_a_quantised_whole(saved: Path) -> None:
    llm = LanguageModel.from_pretrained(saved)
    assert torch.equal(llm(text_ids(1, 5)), whole().llm(text_ids(1, 5)))


def test_shards(tmp_path: Path) -> None:
    model = whole()
    model.save_pretrained(tmp_path, max_shard_size=40_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    inputs = picture_inputs(model)
    assert torch.equal(NanoMolmo2.from_pretrained(tmp_path)(**inputs), model(**inputs))


def test_what_is_in_the_file(saved: Path) -> None:
    """Plain tensors that any program can read; the table in 16 bit."""
    tensors = load_file(saved / "model.safetensors")
    assert tensors["llm.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert tensors["llm.layers.0.mlp.up_proj.scale"].dtype == torch.float32
    assert tensors["llm.embed_tokens.weight"].dtype == torch.float16
    assert tensors["vision_encoder.patch_embedding.weight"].dtype == torch.float32
    original = randomize(small_model()).llm.layers[0].mlp.up_proj.weight.detach()
    weight, scale = (tensors[f"llm.layers.0.mlp.up_proj.{n}"] for n in ("weight", "scale"))
    step = scale[:, None]
    assert float(((weight * step - original) / step).abs().max()) < 0.5001


def test_sizes() -> None:
    """`tiny` in float32 is 25 MB; the linears are nearly all of it."""
    full = sum(t.nbytes for t in load("tiny", dtype="float32")[0].state_dict().values())
    for mode, share in (("int8", 0.30), ("fp16-weights", 0.55)):
        model = load("tiny", quantize=mode)[0]
        linear = sum(t.nbytes for t in model.state_dict().values())
        assert linear < share * full, mode


# ---- at load ----


@pytest.mark.parametrize("mode", MODES)
def test_quantize_at_load(mode: str) -> None:
    model = NanoMolmo2.from_pretrained("tiny", dtype="float32", quantize=mode)
    by_hand = NanoMolmo2.from_pretrained("tiny", dtype=torch.float32).quantize(mode)
    ids = text_ids(1, 6)
    assert torch.equal(model.llm(ids), by_hand.llm(ids))
    assert LanguageModel.from_pretrained(TINY, quantize=mode).layers[0].mlp.up_proj.mode == mode
    assert quantization_config(VisionEncoder.from_pretrained(TINY, quantize=mode)) == {"mode": mode}
    assert is_quantized(Pipeline.from_pretrained("tiny", quantize=mode).model)
    parts = Pipeline.from_pretrained("tiny", quantize={"llm": mode}, dtype="float32").model
    assert not is_quantized(parts.vision_encoder)


def test_dtype_of_a_quantised_checkpoint(saved: Path) -> None:
    """The weights that are not quantised follow; the others are what they are."""
    model = NanoMolmo2.from_pretrained(saved, dtype="bfloat16")
    assert model.llm.embed_tokens.weight.dtype == torch.bfloat16
    state = model.state_dict()
    assert state["llm.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert state["llm.layers.0.mlp.up_proj.scale"].dtype == torch.float32
    assert model.llm(text_ids(1, 4)).dtype == torch.bfloat16
    assert NanoMolmo2.from_pretrained(saved).llm.embed_tokens.weight.dtype == torch.float32


def test_a_quantised_checkpoint_keeps_its_mode(saved: Path) -> None:
    for mode in ("int8", "auto", {"llm": "int8"}):
        assert is_quantized(NanoMolmo2.from_pretrained(saved, quantize=mode))
    with pytest.raises(ValueError, match=r"quantised already, vision_encoder int8.*fp16-weights"):
        NanoMolmo2.from_pretrained(saved, quantize="fp16-weights")


# ---- what is refused ----


def test_int8_without_a_word_in_the_config(saved: Path) -> None:
    """A checkpoint of another program's int8 must not pass for floating point weights."""
    edit(saved, lambda values: values.pop("quantization"))
    with pytest.raises(ValueError, match="is stored as I8, expected one of"):
        NanoMolmo2.from_pretrained(saved)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"llm": {"mode": "int2"}}, r"config\.json: there is no quantisation mode 'int2'"),
        ({"text": {"mode": "int8"}}, r"one entry a part \(vision_encoder, connector, llm\)"),
        ([], "one entry a part"),
        ({"llm": {"mode": "int8", "group_size": 32}}, "use a newer nanomolmo2"),
        ({"llm": {"mode": "int8"}}, "scale"),
        (
            {n: {"mode": "fp16-weights"} for n in ("vision_encoder", "connector", "llm")},
            "scale",
        ),
    ],
)
def test_a_config_that_does_not_fit(saved: Path, entry: Any, message: str) -> None:
    edit(saved, lambda values: values.update(quantization=entry))
    with pytest.raises(ValueError, match=message):
        NanoMolmo2.from_pretrained(saved)


def test_weights_of_another_dtype(saved: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        name = "llm.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].float()

    edit_weights(saved, widen)
    with pytest.raises(ValueError, match=r"up_proj\.weight is stored as torch\.float32, but"):
        NanoMolmo2.from_pretrained(saved)


def test_export_of_a_quantised_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantised, expected floating point weights"):
        export_molmo2(whole(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the command ----


def test_the_command_writes_what_answers_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tiny-int8"
    assert cli.main(["quantize", "tiny", str(out), "--rows", "3"]) == 0
    said = capsys.readouterr().out
    assert "3 of 86 layers" in said
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert f"{size / 1e6:,.1f} MB, 28% of float32; loads in" in said
    picture = Path(cli.__file__).parents[1] / "assets" / "demo" / "scene.png"
    answers = [
        Pipeline.from_pretrained(name, quantize=mode).ask(str(picture), "Point to the snail.").text
        for name, mode in ((out, None), ("tiny", "int8"))
    ]
    assert answers[0] == answers[1]
    assert "<points" in answers[0]
    assert cli.main(["info", str(out)]) == 0
    assert "7,979,497" in capsys.readouterr().out


def test_the_command_keeps_what_is_worse_than_a_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three layers, however well this CPU rounds: the bound is taken from the report."""
    model, processor = load("tiny")
    picture = Path(cli.__file__).parents[1] / "assets" / "demo" / "scene.png"
    question = [{"role": "user", "content": "Describe this picture."}]
    sample = collate([processor.encode(question, [picture])], processor.pad_token_id).tensors()
    report = quantization_report(model, sample, calibration=sample)
    report.sort(key=lambda row: -row.error)
    bound = (report[2].error + report[3].error) / 2
    out = tmp_path / "mixed"
    arguments = ["--max-error", str(bound), "--calibrate", "--rows", "0"]
    assert cli.main(["quantize", "tiny", str(out), *arguments]) == 0
    entry = json.loads((out / "config.json").read_text())["quantization"]
    assert {e["mode"] for e in entry.values()} == {"int8"}
    assert all(e["calibrated"] for e in entry.values())
    kept = {
        f"{part}.{name}": mode
        for part, e in entry.items()
        for name, mode in e.get("exceptions", {}).items()
    }
    assert kept == {row.name: "fp16-weights" for row in report[:3]}
    assert "layers" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--max-error", "0"], 2, "--max-error must be above 0"),
        (["--mode", "fp16-weights", "--calibrate"], 2, "are for --mode int8"),
        (["--rows", "-1"], 2, "--rows must be 0 or more"),
        (["--mode", "int4"], 2, "int4"),
    ],
)
def test_command_lines_that_are_refused(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["quantize", "tiny", str(tmp_path / "out"), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_what_is_quantised(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quantize", str(saved), str(saved.parent / "again")]) == 1
    assert "quantised already" in capsys.readouterr().err
