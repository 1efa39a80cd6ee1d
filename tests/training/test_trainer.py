from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomolmo2.convert.pretrained import load
from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.models import LanguageModel, NanoMolmo2, preset
from nanomolmo2.recipes import smoke
from nanomolmo2.training.distributed import World
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.trainer import RecipeStage, build, start_from, train_recipe
from tests.training.recipes import toy

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums on several threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(recipe: Recipe, out: Path, **options) -> bool:
    return train_recipe(recipe, out, workers=options.pop("workers", 0), quiet=True, **options)


def start(recipe: Recipe, out: Path, *options: str) -> subprocess.Popen:
    """The command in a process of its own."""
    out.mkdir()
    recipe.save(out.with_suffix(".json"))
    command = [sys.executable, "-m", "nanomolmo2", "train", str(out.with_suffix(".json"))]
    return subprocess.Popen(
        [*command, "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_lines(process: subprocess.Popen, out: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        log = out / "log.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run wrote no {count} lines: {process.communicate()}")


def losses(out: Path) -> dict[int, float]:
    """By step; a repeated step must repeat its loss bit for bit."""
    found: dict[int, float] = {}
    for text in (out / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        assert found.setdefault(line["step"], line["loss"]) == line["loss"]
    return found


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load(str(out / "model"))[0].state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run that was never stopped."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    assert train(toy(smoke()), out)
    torch.set_num_threads(before)
    return out


def check_equal(out: Path, whole: Path) -> None:
    assert losses(out) == losses(whole)
    ours, theirs = weights(out), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_killed_run_goes_on_as_if_it_never_was(whole: Path, tmp_path: Path, workers) -> None:
    moment = random.Random()  # another one each time: any must do
    out = tmp_path / "run"
    process = start(toy(smoke()), out, "--workers", workers)
    wait_for_lines(process, out, moment.randint(1, 11))
    time.sleep(moment.random() * 0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert train(toy(smoke()), out, resume=True)
    check_equal(out, whole)


@pytest.mark.parametrize("send", [pytest.param(os.kill, marks=pytest.mark.slow), os.killpg])
def test_sigterm_saves_and_says_how_to_go_on(whole: Path, tmp_path: Path, send) -> None:
    """To the process, or to its group, where the worker that prepares data gets it too."""
    out = tmp_path / "run"
    process = start(toy(smoke(), save_every=100), out)
    wait_for_lines(process, out, 2)
    send(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    done = max(losses(out))
    assert f"all {done} steps so far are saved" in said
    assert f"go on with: nanomolmo2 train {out}.json --out {out} --resume" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"{done:09d}"]
    assert train(toy(smoke()), out, resume=True)
    check_equal(out, whole)


@pytest.mark.parametrize("stops", [[1], [4, 5], [11]])
def test_stops_and_workers_change_nothing(whole: Path, tmp_path: Path, stops: list[int]) -> None:
    for number, steps in enumerate(stops):
        finished = train(
            toy(smoke()), tmp_path, stop_after=steps, resume=number > 0, workers=number % 2
        )
        assert not finished
    assert train(toy(smoke()), tmp_path, resume=True, workers=1)
    check_equal(tmp_path, whole)


def test_micro_batches_change_nothing_but_rounding(whole: Path, tmp_path: Path) -> None:
    train(toy(smoke(), micro_batch_size=2), tmp_path)
    ours, theirs = losses(tmp_path), losses(whole)
    for step in theirs:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-4)


def test_a_longer_run_goes_on(tmp_path: Path) -> None:
    """The rate of smoke is constant, so that the length changes nothing."""
    recipe = toy(smoke(), steps=3)
    assert train(recipe, tmp_path / "a", max_steps=6)
    assert train(recipe, tmp_path / "b")
    assert train(recipe, tmp_path / "b", resume=True, max_steps=6)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_another_recipe_does_not_go_on(tmp_path: Path) -> None:
    train(toy(smoke()), tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"another recipe: seed differ"):
        train(toy(smoke(), seed=1), tmp_path, resume=True)
    with pytest.raises(ValueError, match="already holds a run"):
        train(toy(smoke()), tmp_path)


def test_the_log_tells_what_happened(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    for line in lines:
        assert {"loss", "tokens", "tokens_per_second", "padding", "row_fill", "data_wait"} <= {
            *line
        }
        assert 0 <= line["padding"] < 1 and 0 < line["row_fill"] <= 1
        tasks = {name for name in line if name.startswith("loss_")}
        assert tasks and tasks <= {"loss_presence", "loss_count", "loss_point"}
    # The mean over all labels lies between the means of the tasks.
    for line in lines:
        parts = [value for name, value in line.items() if name.startswith("loss_")]
        assert min(parts) - 1e-3 <= line["loss"] <= max(parts) + 1e-3


def test_losses_by_task_are_those_of_the_task_alone() -> None:
    recipe = toy(smoke())
    model, processor = build(recipe)
    stage = RecipeStage(recipe, model, processor, World())
    step, _ = next(stage.batches(range(1), None, 0))
    metrics = stage.gradients(step)
    for name in ("presence", "count", "point"):
        total = weight = 0.0
        for micro, branches in zip(step.micro_batches, step.branches, strict=True):
            wanted = torch.tensor([task == name for task in step.tasks])
            keep = wanted[branches.clamp(min=0)] & (branches >= 0)
            keep[:, 0] = False
            labels = torch.where(keep, micro.labels, -100)
            inputs = {**micro.tensors(), "labels": labels}
            total += float(model.loss(**inputs, reduction="sum").detach())
            weight += float((labels != -100).sum())
        assert metrics[f"loss_{name}"] == pytest.approx(total / weight, rel=1e-4)


def test_frozen_parts_and_the_placeholder_stay(tmp_path: Path) -> None:
    recipe = toy(smoke(), train=("connector", "llm"), steps=3)
    before, _ = build(recipe)
    train(recipe, tmp_path)
    after = weights(tmp_path)
    same = {name for name, value in before.state_dict().items() if torch.equal(value, after[name])}
    assert {name for name in after if name.startswith("vision_encoder.")} <= same
    assert not any(name.startswith(("connector.", "llm.layers")) for name in same)
    config = before.config
    table = after["llm.embed_tokens.weight"]
    old = before.state_dict()["llm.embed_tokens.weight"]
    base = config.llm_config.vocab_size
    assert torch.equal(table[:base], old[:base])
    assert not torch.equal(table[base:], old[base:])  # new rows learn with the connector
    assert not table[config.image_token_id].any()


def test_cached_features_give_the_same_run(tmp_path: Path) -> None:
    recipe = toy(smoke(), train=("connector", "llm"), steps=3)
    for name in ("first", "second"):
        train(replace(recipe, feature_cache=str(tmp_path / "cache")), tmp_path / name)
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    train(recipe, tmp_path / "without")
    for a, b in zip(*(losses(tmp_path / n).values() for n in ("first", "without")), strict=True):
        assert a == pytest.approx(b, rel=1e-2)  # the cache rounds to bfloat16


def test_bad_examples_are_counted_in_the_log(tmp_path: Path) -> None:
    records = [{"question": f"Is there a dog? {n}", "answer": "Yes."} for n in range(60)]
    records[7] = {"image": "nowhere.png", "question": "Is there a dog?", "answer": "Yes."}
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = (SourceConfig(str(path)),)
    train(
        toy(smoke(), data=data, packing_buffer=48, max_bad_fraction=0.5),
        tmp_path / "run",
        max_steps=1,
    )
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert line["bad_missing_picture"] >= 1


def test_rows_longer_than_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence_length is 4096, but the model tiny has 2048"):
        build(toy(smoke(), sequence_length=4096))


def test_a_part_may_start_from_a_checkpoint_with_other_ends() -> None:
    """SigLIP has more blocks than Molmo2 reads, Qwen3 fewer rows and a tied head."""
    config = toy(smoke()).architecture
    assert config is not None
    model = NanoMolmo2(config)
    deep = NanoMolmo2(smoke().architecture).vision_encoder
    start_from(model.vision_encoder, deep)
    assert torch.equal(model.vision_encoder.patch_embedding.weight, deep.patch_embedding.weight)
    llm = config.llm_config
    tied = LanguageModel(replace(llm, additional_vocab_size=0))
    untied = LanguageModel(replace(llm, tie_word_embeddings=False))
    new_rows = untied.embed_tokens.weight[tied.embed_tokens.weight.shape[0] :].clone()
    start_from(untied, tied)
    rows = tied.embed_tokens.weight.shape[0]
    assert torch.equal(untied.embed_tokens.weight[:rows], tied.embed_tokens.weight)
    assert torch.equal(untied.embed_tokens.weight[rows:], new_rows)
    assert untied.lm_head is not None
    assert torch.equal(untied.lm_head.weight, tied.embed_tokens.weight)
    with pytest.raises(ValueError, match="choose the checkpoint of the same sizes"):
        start_from(untied, LanguageModel(preset("tiny").llm_config))


@pytest.mark.slow
def test_two_layers_learn_from_scenes_in_200_steps(tmp_path: Path) -> None:
    """From 6.5, the logarithm of the vocabulary, to below 1.5: points, counts and words."""
    recipe = replace(smoke(), steps=200, save_every=200, batch_size=2)
    assert train(recipe, tmp_path)
    found = losses(tmp_path)
    assert found[1] > 6
    last = [found[step] for step in range(191, 201)]
    assert sum(last) / len(last) < 1.5


def test_features_on_disk_change_no_loss(tmp_path: Path) -> None:
    """A second run reads what the first one wrote; a third has no folder."""
    recipe = replace(toy(smoke()), steps=3, train=("connector", "llm"))
    found = []
    for name, folder in (("writes", "cache"), ("reads", "cache"), ("without", "")):
        cached = replace(recipe, feature_cache=str(tmp_path / folder) if folder else "")
        train(cached, tmp_path / name)
        found.append(losses(tmp_path / name))
    assert any((tmp_path / "cache").rglob("*.safetensors"))
    assert found[0] == found[1] == found[2]


def test_residual_dropout_of_a_recipe(tmp_path: Path) -> None:
    recipe = replace(toy(smoke()), steps=2)
    dropped = replace(recipe, residual_dropout=0.5, dropout_at_targets=True)
    train(recipe, tmp_path / "without")
    train(dropped, tmp_path / "with")
    train(dropped, tmp_path / "again", stop_after=1)
    train(dropped, tmp_path / "again", resume=True)
    assert losses(tmp_path / "with")[1] != losses(tmp_path / "without")[1]
    assert losses(tmp_path / "again") == losses(tmp_path / "with")
    model, processor = build(dropped)
    dropout = RecipeStage(dropped, model, processor, World()).dropout
    assert dropout.p == 0.5
    assert all(layer.dropout is dropout for layer in model.llm.layers)
