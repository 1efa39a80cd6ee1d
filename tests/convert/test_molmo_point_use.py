"""Models that point by selecting: own folders, names on the hub, 8 bits, adapters, commands."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanomolmo2 import NanoMolmo2, accelerate, cli
from nanomolmo2.accelerate.kernels import MODES
from nanomolmo2.accelerate.quantization import is_quantized, quantization_report
from nanomolmo2.convert.adapters import Adapter, LoraConfig, merge_adapters, write_adapter
from nanomolmo2.convert.pretrained import load, load_config
from nanomolmo2.models.point_config import PointConfig
from nanomolmo2.models.presets import PRESETS
from nanomolmo2.training.lora import add_lora, merge_lora
from tests.convert.fake_hub import FakeHub
from tests.convert.molmo_point_checkpoint import (
    CHECKPOINT,
    NUM_EMBEDDINGS,
    VOCAB,
    tied_tensors,
    write_point_checkpoint,
)
from tests.convert.test_molmo_point import logits_of, same_weights
from tests.convert.test_molmo_point_processor import official_folder
from tests.golden_points import picture
from tests.molmo_point import training_batch

RULE: dict[str, Any] = {"several_lists": True, "row_divisor": "width", "patch_embed_dim": 32}


def golden() -> NanoMolmo2:
    return NanoMolmo2.from_pretrained(str(CHECKPOINT))


def tied(folder: Path) -> NanoMolmo2:
    write_point_checkpoint(folder, tied_tensors(), text__tie_word_embeddings=True)
    return NanoMolmo2.from_pretrained(str(folder))


# ---- own folders ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["5GB", "200KB"])
def test_an_own_folder_keeps_every_field(tmp_path: Path, dtype: torch.dtype, size: str) -> None:
    released = golden().to(dtype)
    assert released.config.point_config is not None
    point = replace(released.config.point_config, **RULE)
    model = NanoMolmo2(replace(released.config, point_config=point, freeze_vision=True)).to(dtype)
    model.load_state_dict(released.state_dict())
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "200KB")
    again = NanoMolmo2.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert again.config.point_config is not None
    assert again.config.point_config.rule == "own"
    assert same_weights(again, model)
    assert "by the rule `own`" in (tmp_path / "README.md").read_text()
    assert "| Pointing | 16,233 |" in (tmp_path / "README.md").read_text()


def test_an_own_folder_of_an_earlier_time_has_no_points(tmp_path: Path) -> None:
    """Its config.json knows none of the new fields."""
    NanoMolmo2(PRESETS["tiny"]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["point_config"], values["llm_config"]["predict_additional_vocab"]
    del values["connector_config"]["attention_pooling_out_layer"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert NanoMolmo2.from_pretrained(str(tmp_path)).config == PRESETS["tiny"]


# ---- names ----


@pytest.mark.parametrize("name", ["MolmoPoint-8B", "MolmoPoint-GUI-8B", "MolmoPoint-Vid-4B"])
def test_a_name_is_all_that_is_typed(
    name: str,
    fake_hub: FakeHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights, tokenizer and processor files are fetched, once; code is not."""
    folder = official_folder(tmp_path / "hub" / name)
    (folder / "modeling_molmo_point.py").write_text("raise SystemExit('was run')")
    fake_hub.repositories[f"allenai/{name}"] = folder
    image = tmp_path / "lamp.png"
    picture(0, (150, 100)).save(image)
    arguments = ["--model", f"allenai/{name}", "--max-new-tokens", "12", "--json"]
    assert cli.main(["ask", str(image), "Point to the lamps.", *arguments]) == 0
    first = json.loads(capsys.readouterr().out)
    assert not any(".py" in path for _, path, _, _ in fake_hub.sent)
    model, processor = load(f"allenai/{name}", device="cpu")
    assert model.config == load_config(folder)
    assert processor.config.points is not None
    assert cli.main(["ask", str(image), "Point to the lamps.", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == first["text"]


# ---- quantised ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_tied", [False, True])
def test_quantised_weights_come_back_and_leave_what_points(
    tmp_path: Path, mode: str, is_tied: bool
) -> None:
    """What selects is 0.2 % of an 8B and decides between neighbours: it stays as it is."""
    model = tied(tmp_path / "in") if is_tied else golden()
    expected = logits_of(model)
    before = {n: t.clone() for n, t in model.point_predictor.state_dict().items()}  # type: ignore[union-attr]
    model.quantize(mode)
    points = model.point_predictor
    assert points is not None
    assert not is_quantized(points)
    assert all(torch.equal(t, before[n]) for n, t in points.state_dict().items())
    for part in (model.llm.layers, model.connector, model.vision_encoder):
        assert is_quantized(part)
    head = model.llm.lm_head
    assert head is not None
    assert (head.in_features, head.out_features) == (64, NUM_EMBEDDINGS)
    found = logits_of(model)
    assert found.shape == expected.shape
    error = (found - expected).norm() / expected.norm()
    assert 0 < float(error) < 0.15
    model.save_pretrained(tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert sorted(entry) == ["connector", "llm", "vision_encoder"]
    again = NanoMolmo2.from_pretrained(str(tmp_path / "out"))
    assert again.config == model.config
    assert torch.equal(logits_of(again), found)
    assert same_weights(again, model)


def test_what_points_is_quantised_where_it_is_named(tmp_path: Path) -> None:
    model = golden().quantize({"point_predictor": "fp16-weights"})
    assert model.point_predictor is not None
    assert is_quantized(model.point_predictor)
    assert not is_quantized(model.llm)
    model.save_pretrained(tmp_path)
    again = NanoMolmo2.from_pretrained(str(tmp_path))
    assert same_weights(again, model)


def test_the_report_lists_what_is_quantised() -> None:
    model = golden()
    samples = {"input_ids": torch.arange(5, 40)[None]}
    names = {row.name for row in quantization_report(model, samples)}
    assert "llm.layers.0.mlp.up_proj" in names
    assert not any(name.startswith("point_predictor") for name in names)


# ---- accelerations ----


def loss_and_gradients(model: NanoMolmo2) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    loss = model.loss(training_batch("single"), z_loss=1e-4)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_tied", [False, True])
def test_accelerations_change_no_result(tmp_path: Path, is_tied: bool) -> None:
    """Connector without an output layer, head over the additional rows, selectors: all of them."""
    loaded = tied(tmp_path / "in") if is_tied else golden()
    plain = NanoMolmo2(loaded.config)
    plain.load_state_dict(loaded.state_dict())
    fast = NanoMolmo2(loaded.config)
    fast.load_state_dict(loaded.state_dict())
    fast = accelerate.defaults(fast)
    points = fast.point_predictor
    assert points is not None
    assert type(points.patch_q) is not nn.Linear  # swapped like every layer
    assert fast.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits_of(fast), logits_of(plain), rtol=0, atol=1e-5)
    (loss, gradients), (expected, theirs) = loss_and_gradients(fast), loss_and_gradients(plain)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == theirs.keys()
    assert {"point_predictor.patch_q.weight", "llm.embed_tokens.weight"} <= gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5, msg=name)
    rows = "llm.embed_tokens.weight" if is_tied else "llm.lm_head.weight"
    assert float(gradients[rows][VOCAB:].norm()) > 0  # the head learns to write the markers


# ---- adapters ----


def test_lora_is_merged_into_the_decoder_alone() -> None:
    model = golden()
    expected = logits_of(model)
    add_lora(model.llm, LoraConfig(rank=2))
    layer = model.llm.layers[0].self_attn.q_proj
    assert hasattr(layer, "lora_A")
    points = model.point_predictor
    assert points is not None
    assert not any(hasattr(module, "lora_A") for module in points.modules())
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.llm.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
    adapted = logits_of(model)
    assert float((adapted - expected).abs().max()) > 0.1
    merge_lora(model.llm, final=True)
    torch.testing.assert_close(logits_of(model), adapted, rtol=0, atol=1e-4)


def test_an_adapter_with_what_points(tmp_path: Path) -> None:
    """Parts that learned whole, the selectors and the rows of the markers among them."""
    model, base = golden(), golden()
    torch.manual_seed(0)
    matrices, config = {}, LoraConfig(rank=2, targets=("q_proj",))
    for name, layer in base.llm.named_modules():
        if name.endswith("q_proj"):
            assert isinstance(layer, nn.Linear)
            matrices[f"{name}.lora_A"] = torch.randn(2, layer.in_features) * 0.1
            matrices[f"{name}.lora_B"] = torch.randn(layer.out_features, 2) * 0.1
    weights = base.state_dict()
    others = {
        name: torch.randn_like(weights[name])
        for name in ("point_predictor.patch_q.weight", "point_predictor.build_vit_embedding.bias")
    }
    others["llm.embed_tokens.new_rows"] = torch.randn(NUM_EMBEDDINGS - VOCAB, 64)
    write_adapter(Adapter("", config, matrices, others), tmp_path / "adapter")
    merge_adapters(model, tmp_path / "adapter")
    merged = model.state_dict()
    for name in others:
        if name.startswith("point_predictor"):
            assert torch.equal(merged[name], others[name])
    assert torch.equal(merged["llm.embed_tokens.weight"][VOCAB:], others[_NEW])
    assert torch.equal(
        merged["point_predictor.patch_k.weight"], weights["point_predictor.patch_k.weight"]
    )
    query = "layers.0.self_attn.q_proj"
    product = matrices[f"{query}.lora_B"] @ matrices[f"{query}.lora_A"] * (32 / 2)
    torch.testing.assert_close(
        merged[f"llm.{query}.weight"], weights[f"llm.{query}.weight"] + product
    )
    loaded = NanoMolmo2.from_pretrained(str(CHECKPOINT), adapter=tmp_path / "adapter")
    assert same_weights(loaded, model)


_NEW = "llm.embed_tokens.new_rows"


def test_an_adapter_of_a_model_without_points_is_refused(tmp_path: Path) -> None:
    others = {"point_predictor.patch_q.weight": torch.zeros(64, 256)}
    write_adapter(Adapter("", LoraConfig(targets=("q_proj",)), {}, others), tmp_path / "adapter")
    model = NanoMolmo2(PRESETS["tiny"])
    with pytest.raises(ValueError, match="made for another model"):
        merge_adapters(model, tmp_path / "adapter")


# ---- commands ----


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return official_folder(tmp_path_factory.mktemp("official") / "model")


def test_info_shows_how_it_points(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(official)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\| Pointing +\| yes +\| +16,233 \|", text)
    assert re.search(r"\| Total +\| - +\| +401,369 \|", text)
    assert "by the rule 'released'; keys of 32 numbers; classes from 384 on" in text
    assert '"location_token_id": 269' in text
    assert cli.main(["info", "molmo-point-8b"]) == 0
    assert "8,677,855,065" in capsys.readouterr().out
    assert cli.main(["info", "molmo-point-vid-4b"]) == 0
    assert "4,471,625,561" in capsys.readouterr().out


def test_export_takes_the_format_of_the_design(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(official), str(tmp_path / "out")]) == 0
    assert "warning" not in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "molmo_point"
    assert same_weights(NanoMolmo2.from_pretrained(str(tmp_path / "out")), golden())
    code = cli.main(["export", str(official), str(tmp_path / "no"), "--format", "molmo2-hf"])
    assert code != 0
    assert "--format molmo-point-hf" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_export_says_what_the_format_can_not(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = load(official, device="cpu")
    assert model.config.point_config is not None
    ids = ("patch_token_id", "subpatch_token_id", "location_token_id")
    fields = {name: getattr(model.config.point_config, name) for name in ids}
    point = PointConfig.consistent(**fields, image_non_indexable_patch_id=262, patch_embed_dim=32)
    other = NanoMolmo2(replace(model.config, point_config=point))
    points = replace(processor.config.points, points_in_prompt=True)  # type: ignore[type-var]
    processor.config = replace(processor.config, points=points)
    other.save_pretrained(tmp_path / "own", processor=processor)
    assert cli.main(["export", str(tmp_path / "own"), str(tmp_path / "out")]) == 0
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("warning:")]
    assert len(lines) == 1
    assert "the rule 'consistent'" in lines[0]
    again, its_processor = load(tmp_path / "out", device="cpu")
    assert again.config == other.config
    assert its_processor.config == processor.config


@pytest.mark.parametrize("mode", ["int8", "fp16-weights"])
def test_quantize(
    official: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["quantize", str(official), str(out), "--mode", mode]) == 0
    assert "loads in" in capsys.readouterr().out
    model, processor = load(out, device="cpu")
    assert is_quantized(model.llm)
    assert processor.config.points is not None
    assert cli.main(["info", str(out)]) == 0
    assert "401,369" in capsys.readouterr().out  # every weight is counted, once
