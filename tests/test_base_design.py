"""The base design from its parts to a model that is asked, for every connector.

The parts come by name through the real download, from a hub on this machine.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nanomolmo2 import cli
from nanomolmo2.convert.fresh import fresh_config, fresh_processor
from nanomolmo2.convert.pretrained import load
from nanomolmo2.models import PRESETS, LanguageModel, VisionEncoder
from nanomolmo2.training.plan import count_weights
from nanomolmo2.training.recipe import Recipe
from tests.base_design import LLM, QWEN3, SIGLIP, VISION, hub_of, write_llava, write_parts

CONNECTORS = ("linear", "mlp", "resampler", "pooling")


class Trained(NamedTuple):
    connector: str
    folder: Path  # of the run
    parts: dict[str, Path]
    data: Path
    asked: list[str]  # of the hub, files

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def picture(self) -> str:
        return str(self.data.parent / "images" / "0.jpg")


def run(*arguments: object) -> None:
    assert cli.main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module", params=CONNECTORS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """`train base --connector ... --data llava.json`, by the names of the parts."""
    folder = tmp_path_factory.mktemp(request.param)
    parts, data = write_parts(folder), write_llava(folder)
    with pytest.MonkeyPatch.context() as patch, hub_of(parts, folder, patch) as hub:
        patch.chdir(folder)
        options = ("--data", data, "--images", data.parent / "images", "--out", "run")
        short = ("--steps", 2, "--batch-size", 2, "--dtype", "float32", "--workers", 0)
        run("train", "base", "--connector", request.param, *options, *short)
        asked = [path for method, path, _, _ in hub.sent if method == "GET" and "resolve" in path]
        yield Trained(request.param, folder / "run", parts, data, asked)


def test_the_run_began_with_the_named_weights(trained: Trained) -> None:
    """Vision stayed, all of it that is used; the decoder moved away from Qwen3 by a step or two."""
    assert {path.split("/resolve/")[0][1:] for path in trained.asked} == {SIGLIP, QWEN3}
    model, processor = load(trained.model)
    assert model.config.connector.connector_type == trained.connector
    original = VisionEncoder.from_pretrained(str(trained.parts[SIGLIP])).state_dict()
    for name, value in model.vision_encoder.state_dict().items():
        assert torch.equal(value, original[name]), name
    qwen = LanguageModel.from_pretrained(str(trained.parts[QWEN3])).state_dict()
    for name, value in model.llm.state_dict().items():
        moved = (value[: len(qwen[name])] - qwen[name]).abs().max()
        assert moved < 1e-4, name
    learned = model.llm.layers[0].mlp.up_proj.weight
    assert not torch.equal(learned, qwen["layers.0.mlp.up_proj.weight"])
    tokens = {"linear": 16, "mlp": 16, "resampler": 64, "pooling": 4}[trained.connector]
    assert model.config.num_visual_tokens == tokens
    assert processor.config.image_size == (56 if trained.connector == "pooling" else 60)


def test_its_recipe_says_what_it_is_of(trained: Trained) -> None:
    recipe = Recipe.load(trained.folder / "recipe.json")
    assert (recipe.model, recipe.vision, recipe.llm) == ("base", SIGLIP, QWEN3)
    assert recipe.architecture == load(trained.model)[0].config
    assert {part: rate.lr for part, rate in recipe.optimisers.items()} == {
        "connector": 2e-4,
        "llm": 2e-5,
    }


def test_it_goes_on_by_its_folder(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    run("train", "base", "--out", trained.folder, "--resume", "--max-steps", 3, "--workers", 0)
    lines = (trained.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"step"' in line][-1] == 3
    other = "mlp" if trained.connector != "mlp" else "linear"
    again = ["train", "base", "--out", str(trained.folder), "--resume", "--connector", other]
    assert cli.main(again) == 1
    assert f"has --connector {trained.connector}, not {other}" in capsys.readouterr().err


def test_it_is_asked(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ("ask", trained.picture, "What is it?", "--model", trained.model, "--json")
    run(*ask, "--max-new-tokens", 4)
    report = json.loads(capsys.readouterr().out)
    assert 1 <= report["output_tokens"] <= 4
    assert report["images"][0]["width"] == 90


def test_it_is_measured(trained: Trained, tmp_path: Path, capsys) -> None:
    """And not beside what it began with, which could not answer."""
    images = trained.data.parent / "images"
    measured = ("eval", trained.data, "--images", images, "--model", trained.model, "--limit", 2)
    run(*measured, "--json", tmp_path / "scores.json")
    assert capsys.readouterr().err.splitlines() == ["on the CPU, float32"]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores and all(0 <= value <= 1 for value in scores.values())


def test_it_is_quantised(trained: Trained, tmp_path: Path, capsys) -> None:
    run("quantize", trained.model, tmp_path / "int8", "--picture", trained.picture, "--rows", 0)
    run("ask", trained.picture, "?", "--model", tmp_path / "int8", "--max-new-tokens", 2)
    assert "weights int8" in capsys.readouterr().err


def test_it_is_looked_at(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    run("info", trained.model)
    assert f'"connector_type": "{trained.connector}"' in capsys.readouterr().out
    images = trained.data.parent / "images"
    inspect = ("inspect", trained.data, "--pictures", images, "--model", trained.model)
    run(*inspect, "--json", "--count", 1)
    (example,) = json.loads(capsys.readouterr().out)["examples"]
    assert example
    run(*inspect, "--audit")


def test_it_is_exported_or_told_what_can_be_done(trained: Trained, tmp_path: Path, capsys) -> None:
    code = cli.main(["export", trained.model, str(tmp_path / "out")])
    err = capsys.readouterr().err
    if trained.connector == "pooling":
        assert code == 0
        load(tmp_path / "out")
        return
    assert code == 1 and not (tmp_path / "out").exists()
    for hint in (f"{trained.connector!r}", "nanomolmo2 ask", "--connector pooling"):
        assert hint in err


def test_it_is_a_model_to_train_on(trained: Trained, tmp_path: Path) -> None:
    images = trained.data.parent / "images"
    run(
        *("train", "--data", trained.data, "--images", images, "--model", trained.model),
        *("--set", "new_words=[]"),  # the toy tokenizer is tiny's, to which words would be added
        *("--steps", 1, "--workers", 0, "--out", tmp_path / "run"),
    )
    assert load(tmp_path / "run" / "model")[0].config == load(trained.model)[0].config


# ---- sizes ----


def test_the_names_of_the_base_design_are_its_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are known are those of the presets; the ids are of the tokenizer."""
    from nanomolmo2.convert import fresh

    class Stub:
        image_token_id, pad_token_id, stop_token_ids = 151655, 151643, 151643

    monkeypatch.setattr(fresh, "_config", lambda part, name: part.config)
    monkeypatch.setattr(fresh, "fresh_processor", lambda config, llm: Stub)
    assert fresh_config("linear") == PRESETS["nanomolmo2"]
    Stub.image_token_id, Stub.stop_token_ids = 151938, 151645
    assert fresh_config("pooling") == PRESETS["nanomolmo2-pooling"]


def test_parts_of_folders_and_of_whole_models(trained: Trained) -> None:
    vision, llm = (str(trained.parts[name]) for name in (SIGLIP, QWEN3))
    config = fresh_config("mlp", vision, llm)
    assert (config.vision_config, config.llm_config) == (VISION, LLM)
    assert config.connector.hidden_dim == 2 * LLM.hidden_size
    assert fresh_processor(config, llm).config.image_tokens == 16
    of_model = fresh_config("mlp", trained.model, llm)
    assert of_model.vision_config.hidden_size == VISION.hidden_size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--connector", "mlp"), "--connector is for the recipe base"),
        (("base", "--vision", "a/b", "--model", "tiny"), "--vision starts from parts and --model"),
        (("base", "--vision", "no-such-folder"), "there is no model 'no-such-folder'"),
        (("base", "--llm", "EMPTY"), "holds no config.json"),
    ],
)
def test_what_cannot_be(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "empty").mkdir()
    with hub_of(write_parts(tmp_path), tmp_path, monkeypatch):
        given = [str(tmp_path / "empty") if o == "EMPTY" else o for o in options]
        assert cli.main(["train", *given, "--data", "x.jsonl", "--out", "run"]) in (1, 2)
    assert said in capsys.readouterr().err


def test_a_language_model_without_a_tokenizer(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    (parts[QWEN3] / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        fresh_config("linear", str(parts[SIGLIP]), str(parts[QWEN3]))


# ---- the page ----

PAGE = Path(__file__).parents[1] / "docs" / "base.md"


def commands_of_the_page() -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash in-order\n([\s\S]*?)^```$", text, re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def shortened(words: list[str]) -> list[str]:
    """Two steps of two rows, in place of what the page says."""
    if words[0] != "train":
        return words + (["--max-new-tokens", "3"] if words[0] == "ask" else [])
    for option in ("--epochs", "--batch-size"):
        if option in words:
            place = words.index(option)
            words = words[:place] + words[place + 2 :]
    short = ["--workers", "0"]
    return words + short + ([] if "--resume" in words else ["--steps", "2", "--batch-size", "2"])


@pytest.mark.slow
def test_the_page_is_followed_from_its_first_command_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_llava(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = commands_of_the_page()
    assert {words[1] for words in commands} >= {"train", "eval", "quantize", "export", "ask"}
    with hub_of(write_parts(tmp_path / "hub"), tmp_path, monkeypatch):
        for tool, *words in commands:
            assert tool == "nanomolmo2"
            code = cli.main(shortened(words))
            assert code == 0, (words, capsys.readouterr().err)
    scores = json.loads(Path("scores.json").read_text())
    assert scores and all(isinstance(value, (int, float)) for value in scores.values())
    kinds = {n: load(f"runs/{n}/model")[0].config.connector for n in ("base", *CONNECTORS[2:])}
    assert [c.connector_type for c in kinds.values()] == ["mlp", "resampler", "pooling"]


def test_the_page_has_the_sizes_of_the_models() -> None:
    """In millions of weights, as its table tells them, and the rows of a step."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    told = {name: row for name, row in rows if name in CONNECTORS}
    base = PRESETS["nanomolmo2"]
    for kind in CONNECTORS:
        config = PRESETS["nanomolmo2-pooling"]
        if kind != "pooling":
            joint = replace(base.connector, connector_type=kind)
            config = replace(base, connector_config=joint)
        assert f"| {count_weights(config) / 1e6:,.0f} M |" in told[kind]
        assert told[kind].split()[0].strip(",") == str(config.num_visual_tokens)
