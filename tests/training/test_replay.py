"""What a model was trained on is mixed into its fine-tuning, and asked before and after."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from nanomolmo2 import cli
from nanomolmo2.convert import export_molmo2
from nanomolmo2.convert.pretrained import load, load_processor
from nanomolmo2.data.example import BadExample, Branch, Example
from nanomolmo2.data.loader import PackedLoader, RowPlan
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.sources import SourceConfig, open_mixture
from nanomolmo2.emoji import exam as emoji_exam
from nanomolmo2.processor import Processor
from nanomolmo2.processor.encode import EncodeTree
from nanomolmo2.recipes import finetune, smoke
from nanomolmo2.recipes.molmo2 import adamw
from nanomolmo2.training import replay, trainer
from nanomolmo2.training.distributed import World
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.replay import (
    Abilities,
    Replayed,
    known_sources,
    measure,
    replay_note,
    with_replay,
    with_sources_of,
)
from nanomolmo2.training.trainer import train_recipe
from tests.small_model import small_model, small_processor
from tests.training.recipes import SCENES, toy

SENTENCES = ("dog", "cat", "key", "hat", "car", "bus", "pig", "fox")


def trained_on(*names: str) -> Processor:
    processor = small_processor()
    return Processor(dataclasses.replace(processor.config, trained_on=names), processor.tokenizer)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose card says that it was trained on emoji scenes."""
    folder = tmp_path_factory.mktemp("start") / "model"
    small_model().save_pretrained(folder, processor=trained_on("emoji"))
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exam of a second."""
    monkeypatch.setattr(emoji_exam, "SHORT_SCENES", 1)
    monkeypatch.setattr(emoji_exam, "SHORT_TASKS", ("presence",))


def write(path: Path) -> str:
    records = [{"question": f"Is there a {noun}?", "answer": "Yes."} for noun in SENTENCES]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def recipe_of(start: Path, folder: Path, **changes: object) -> Recipe:
    """Fine-tuning of a small model on eight sentences, of which a step sees some."""
    parts = ("connector", "llm", "embeddings")
    fields: dict = {
        "model": str(start),
        "architecture": None,
        "data": (SourceConfig(write(folder / "my.jsonl")),),
        "steps": 4,
        "sequence_length": 512,
        "train": parts,
        "optimisers": dict.fromkeys(parts, adamw(1e-3, 0)),
        "replay": 0.5,
    }
    return toy(smoke(), **{**fields, **changes})


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load(str(run / "model"))[0].state_dict()


def lines(run: Path) -> list[dict]:
    return [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]


# ---- what is mixed in ----


def test_a_share_comes_from_what_the_model_was_trained_on(start: Path, tmp_path: Path) -> None:
    """The own sources keep their shares among each other: 1 to 3, given or not."""
    one, three = write(tmp_path / "one.jsonl"), write(tmp_path / "three.jsonl")
    for weights in ((0.25, 0.75), (0.1, 0.3), (0.25, None)):
        data = tuple(
            SourceConfig(path, sampling_weight=w)
            for path, w in zip((one, three), weights, strict=True)
        )
        recipe = recipe_of(start, tmp_path, data=data, replay=0.2)
        mixture = with_replay(open_mixture(data, recipe.seed), recipe, trained_on("emoji"))
        assert mixture.weights == pytest.approx([0.2, 0.6, 0.2])
        assert [source.name for source in mixture.sources] == ["one", "three", "emoji (replay)"]


def test_replayed_examples_are_few_questions_of_their_own_task(start: Path, tmp_path: Path) -> None:
    recipe = recipe_of(start, tmp_path)
    mixture = with_replay(open_mixture(recipe.data), recipe, trained_on("emoji"))
    source = mixture.sources[-1]
    assert isinstance(source, Replayed)
    branches = source[3].branches
    assert {branch.task for branch in branches} == {"replay"}
    assert 6 <= len(branches) <= 9
    again = pickle.loads(pickle.dumps(source))  # worker processes get it
    assert [b.messages for b in again[3].branches] == [b.messages for b in branches]


@pytest.mark.parametrize(
    ("names", "known"),
    [
        ((), []),
        (("emoji",), ["emoji"]),
        (("emoji", "emoji"), ["emoji"]),
        (("photos-of-mine", "emoji"), ["emoji"]),
        (("photos-of-mine",), []),
    ],
)
def test_only_built_in_sources_count(names, known, start: Path, tmp_path: Path) -> None:
    """A stranger's card opens no file, though one of that name lies in the working folder."""
    (tmp_path / "photos-of-mine").write_text("{}")
    processor, recipe = trained_on(*names), recipe_of(start, tmp_path)
    assert known_sources(processor) == known
    mixture = with_replay(open_mixture(recipe.data), recipe, processor)
    assert len(mixture.sources) == 1 + len(known)


@pytest.mark.parametrize(
    "name", ["../emoji", "/etc/passwd", "hub:me/data", "https://a.b", "", "a b"]
)
def test_paths_and_addresses_are_no_names_of_sources(name: str) -> None:
    with pytest.raises(ValueError, match="trained_on names"):
        trained_on(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"replay": 0.0},
        {"replay": None},
        {"architecture": toy(smoke()).architecture},
        {"data": (SCENES,)},  # the own data are scenes already
    ],
)
def test_where_nothing_is_mixed_in(changes, start: Path, tmp_path: Path) -> None:
    recipe = recipe_of(start, tmp_path, **changes)
    mixture = open_mixture(recipe.data)
    assert with_replay(mixture, recipe, trained_on("emoji")) is mixture


def test_what_is_said_of_it(start: Path, tmp_path: Path) -> None:
    def note(processor: Processor, **changes: object) -> str:
        return replay_note(recipe_of(start, tmp_path, model="mine", **changes), processor)

    emoji = trained_on("emoji")
    assert note(emoji, replay=0.3).startswith("mixing in 30% of what mine was trained on (emoji)")
    assert "--replay 0 turns it off" in note(emoji)
    assert "it may forget what it knows" in note(emoji, replay=0.0)
    assert "its card names photos, and only built-in" in note(trained_on("photos"))
    assert "does not say what it was trained on" in note(trained_on())
    assert note(emoji, replay=None) == note(emoji, data=(SCENES,)) == ""


@pytest.mark.parametrize("share", ["1", "-0.1", "1.5"])
def test_a_share_that_is_none(share: str, tmp_path: Path, capsys) -> None:
    run = ["train", "--data", write(tmp_path / "my.jsonl"), "--out", str(tmp_path / "run")]
    assert cli.main([*run, "--replay", share]) == 2
    assert "--replay must be 0 to below 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="replay is"):
        dataclasses.replace(smoke(), replay=float(share))


def test_fine_tuning_replays_by_default(start: Path, tmp_path: Path) -> None:
    recipe = finetune([write(tmp_path / "my.jsonl")], str(start), steps=1)
    assert recipe.replay == 0.3
    assert smoke().replay is None


# ---- the own data stay clear ----


class Some:
    """100 texts, of which every tenth is bad."""

    name = "some"

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> Example:
        if i % 10 == 0:
            raise BadExample("bad record", "one of ten")
        return Example([], [Branch([{"role": "user", "content": "Hello"},
                                    {"role": "assistant", "content": "Yes."}])])  # fmt: skip


class Good(Some):
    def __getitem__(self, i: int) -> Example:
        return super().__getitem__(1)


def test_the_share_of_bad_examples_is_that_of_the_own_data() -> None:
    """One in ten of the own examples is bad: too many, though of all drawn it is one in twenty."""
    processor = small_processor()
    rows = RowPlan(batch_size=1, max_tokens=128, max_crops=1, pad_token_id=processor.pad_token_id)

    def learn(other, steps: int = 120) -> int:
        mixture = Mixture([Some(), other], [0.5, 0.5])
        loader = PackedLoader(mixture, EncodeTree(processor), rows, max_bad_fraction=0.08)
        drawn = 0
        for _, step in zip(range(steps), loader, strict=False):
            drawn = step.drawn
        return drawn

    assert learn(Good()) > 500  # both are the person's data
    with pytest.raises(ValueError, match="examples are bad, more than 8%"):
        learn(Replayed(Good()))


def test_losses_of_replay_are_logged_apart(start: Path, tmp_path: Path, short) -> None:
    recipe = recipe_of(start, tmp_path)
    assert train_recipe(recipe, tmp_path / "run", workers=0, quiet=True)
    names = {name for line in lines(tmp_path / "run") for name in line if name.startswith("loss_")}
    assert "loss_replay" in names
    assert not names & {"loss_presence", "loss_count"}


def test_a_resumed_run_with_replay_is_one_that_was_never_stopped(
    start: Path, tmp_path: Path, short
) -> None:
    recipe = recipe_of(start, tmp_path)
    assert train_recipe(recipe, tmp_path / "whole", workers=0, quiet=True)
    assert not train_recipe(recipe, tmp_path / "run", workers=0, quiet=True, stop_after=2)
    assert train_recipe(recipe, tmp_path / "run", workers=1, quiet=True, resume=True)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
    other = dataclasses.replace(recipe, replay=0.0)
    with pytest.raises(ValueError, match="another recipe: replay differ"):
        train_recipe(other, tmp_path / "run", workers=0, quiet=True, resume=True)


# ---- the card ----


def test_what_a_model_was_trained_on_goes_from_model_to_model(
    start: Path, tmp_path: Path, short
) -> None:
    """Through fine-tuning, quantising and an export, and into the card for people."""
    assert train_recipe(recipe_of(start, tmp_path), tmp_path / "run", workers=0, quiet=True)
    model, processor = load(str(tmp_path / "run" / "model"))
    assert processor.config.trained_on == ("emoji",)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "\ntrained_on:\n- emoji\n---\n" in card
    assert "`emoji`" in card.split("## Training data")[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_molmo2(model, tmp_path / "exported", processor)
    assert load_processor(str(tmp_path / "exported")).config.trained_on == ("emoji",)
    model.quantize("int8")
    model.save_pretrained(tmp_path / "int8", processor=processor)
    assert load_processor(str(tmp_path / "int8")).config.trained_on == ("emoji",)


def test_a_model_names_the_sources_that_it_learned_from(start: Path, tmp_path: Path) -> None:
    own, scenes = recipe_of(start, tmp_path), recipe_of(start, tmp_path, data=(SCENES,))
    fresh = dataclasses.replace(scenes, architecture=toy(smoke()).architecture)
    nothing, emoji = trained_on(), trained_on("emoji")
    assert with_sources_of(own, nothing) is nothing
    assert with_sources_of(own, emoji) is emoji
    assert with_sources_of(scenes, nothing).config.trained_on == ("emoji",)
    assert with_sources_of(fresh, trained_on("photos")).config.trained_on == ("emoji",)
    assert load_processor("tiny").config.trained_on == ("emoji",)


# ---- the report ----


def test_the_report_in_words() -> None:
    found = Abilities(
        before={"emoji": {"presence": 1.0, "count": 0.95, "caption_f1": 0.5}},
        after={"emoji": {"presence": 0.97, "count": 0.6, "caption_f1": 0.75}},
        questions={"emoji": 96},
    )
    assert found.forgotten("emoji") == ["count"]
    assert found.table() == [
        "what it could do before (emoji, 96 questions): before -> after",
        "  presence (balanced)  1.00 -> 0.97",
        "  count exact, all     0.95 -> 0.60  forgotten",
        "  caption category F1  0.50 -> 0.75",
    ]
    lost = "it forgot some of what it could do before: count exact, all; try "
    assert found.verdict(replays=False) == f"{lost}--replay 0.3"
    assert found.verdict(replays=True) == f"{lost}a larger --replay share, a lower --lr"
    found.after["emoji"]["count"] = 0.86
    assert found.verdict(replays=True) == "it kept what it could do before"


def test_the_start_model_is_asked_once(start: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """A run that is resumed finds what it said in its folder; the finished model is asked once a
    length of the run."""
    asked: list[str] = []

    def scripted(model: str, *_: object, device: torch.device, **__: object):
        assert device == World().device  # the run's, whatever else there is
        asked.append(model)
        score = 1.0 if model == str(start) else 0.25
        return {"emoji": {"presence": score}}, {"emoji": 2}

    monkeypatch.setattr(replay, "measure", scripted)
    recipe, run = recipe_of(start, tmp_path), tmp_path / "run"
    assert not train_recipe(recipe, run, workers=0, stop_after=1)
    assert asked == [str(start)]
    assert json.loads((run / "abilities.json").read_text())["after"] == {}
    assert train_recipe(recipe, run, workers=0, resume=True)
    assert train_recipe(recipe, run, workers=0, resume=True)
    assert asked == [str(start), str(run / "model")]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("presence (balanced) 1.00 -> 0.25 forgotten") == 2
    assert json.loads((run / "abilities.json").read_text()) == {
        "before": {"emoji": {"presence": 1.0}},
        "after": {"emoji": {"presence": 0.25}},
        "questions": {"emoji": 2},
        "steps": 4,
    }
    (run / "abilities.json").write_text('{"before": {"emoji": 3}}')
    assert train_recipe(recipe, run, workers=0, quiet=True, resume=True)
    assert asked[2:] == [str(start), str(run / "model")]  # damaged: asked again


def test_the_report_changes_no_bit_of_the_training(
    start: Path, tmp_path: Path, monkeypatch, short
) -> None:
    recipe = recipe_of(start, tmp_path)
    assert train_recipe(recipe, tmp_path / "with", workers=0, quiet=True)
    assert (tmp_path / "with" / "abilities.json").exists()
    monkeypatch.setattr(trainer, "start_abilities", lambda *_: None)
    assert train_recipe(recipe, tmp_path / "without", workers=0, quiet=True)
    assert not (tmp_path / "without" / "abilities.json").exists()
    ours, theirs = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_asking_takes_no_random_numbers(start: Path, short) -> None:
    def draw() -> list[float]:
        return [torch.rand(1).item(), float(np.random.rand()), random.random()]

    def seed() -> None:
        torch.manual_seed(1), np.random.seed(1), random.seed(1)

    seed()
    expected = draw()
    seed()
    scores, questions = measure(str(start))
    assert draw() == expected
    assert questions == {"emoji": 2}
    assert set(scores["emoji"]) == {"presence"}


def test_models_of_which_nothing_is_known_are_not_asked(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small_model().save_pretrained(folder, processor=small_processor())
    assert train_recipe(recipe_of(folder, tmp_path), tmp_path / "run", workers=0, quiet=True)
    assert not (tmp_path / "run" / "abilities.json").exists()


def test_the_short_exam_of_emoji_has_every_row_it_reports() -> None:
    exam = emoji_exam.make_short_exam()
    assert len(exam.examples) == 12
    tasks = {one.branch.task for one in exam.asked}
    assert tasks == {"presence", "count", "point", "caption", "unknown"}
    assert set(emoji_exam.EMOJI.short_rows) <= set(emoji_exam.ROWS)
