"""Training a model that points, from own data to a folder: exact, logged, and read again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanomolmo2.batch import IGNORED_LABEL, NO_MORE_POINTS
from nanomolmo2.cli import main
from nanomolmo2.convert.pretrained import load
from nanomolmo2.data.audit import audit
from nanomolmo2.data.sources import SourceConfig, open_source
from nanomolmo2.models.forms import check_batch
from nanomolmo2.processor import Processor, collate
from nanomolmo2.processor.encode import EncodeTree
from nanomolmo2.recipes import smoke
from nanomolmo2.training.build import build
from nanomolmo2.training.distributed import World
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.plot import PANELS, read_curves
from nanomolmo2.training.recipe import Recipe, ValidationConfig
from nanomolmo2.training.split import open_split
from nanomolmo2.training.trainer import RecipeStage, label_weights, open_stage, train_recipe
from tests.training.points import RATE, recipe_of, save_start, write_data
from tests.training.recipes import toy

ROOT = Path(__file__).parents[2]
TERMS = ("text", "row", "slot", "cell")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_start(tmp_path_factory.mktemp("start") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def train(recipe: Recipe, out: Path, **options) -> bool:
    return train_recipe(recipe, out, workers=0, quiet=True, **options)


def lines_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines_of(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load(str(out / "model"))[0].state_dict()


@pytest.fixture(scope="module")
def whole(start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    assert train(recipe_of(start, data), out)
    torch.set_num_threads(before)
    return out


def stage_of(recipe: Recipe) -> RecipeStage:
    model, processor = build(recipe)
    return RecipeStage(recipe, model, processor, World())


# ---- from own data to a folder ----


def test_own_data_with_points_become_a_model(start: Path, data: Path, tmp_path: Path, capsys):
    """The command as people type it: what it logs falls, and what it writes is read again."""
    out = tmp_path / "run"
    options = ["--steps", "24", "--batch-size", "2", "--lr", "2e-3", "--workers", "0"]
    options += ["--sequence-length", "256", "--max-crops", "4"]
    command = ["train", "--data", str(data), "--model", str(start), "--out", str(out)]
    assert main([*command, *options]) == 0
    said = capsys.readouterr().err
    recipe = Recipe.load(out / "recipe.json")
    assert recipe.train == ("vision", "connector", "llm", "embeddings", "points")
    points = load(str(start))[0].point_predictor
    assert points is not None
    size = f"{sum(p.numel() for p in points.parameters()) / 1e6:.2f} M"
    assert f"points ({size} of {size} weights, rate 0.002)" in said
    lines = lines_of(out)
    first, last = lines[:5], lines[-5:]
    for term in TERMS:
        before = [line[f"loss_{term}"] for line in first if f"loss_{term}" in line]
        after = [line[f"loss_{term}"] for line in last if f"loss_{term}" in line]
        assert sum(after) / len(after) < 0.9 * sum(before) / len(before), term
        shares = [line[f"accuracy_{term}"] for line in lines if f"accuracy_{term}" in line]
        assert shares and all(0 <= share <= 1 for share in shares)
    assert {"lr_points", "grad_norm_points", "loss_find"} <= lines[-1].keys()
    model, processor = load(str(out / "model"))
    assert model.config.point_config is not None and processor.config.points is not None
    assert model.config == load(str(start))[0].config
    expected, found = load(str(start))[0].state_dict(), model.state_dict()
    assert all(
        not torch.equal(found[name], expected[name])
        for name in found
        if name.startswith("point_predictor.")
    )


def test_the_terminal_and_the_plot_show_the_terms(whole: Path) -> None:
    curves = read_curves(whole)
    for title, prefix in (("loss by term", "loss"), ("share that is right", "accuracy")):
        shown = {name for name in curves if PANELS[title](name)}
        assert shown == {f"{prefix}_{term}" for term in TERMS}
    assert {name for name in curves if PANELS["loss by task"](name)} == {
        *("loss_find", "loss_count", "loss_talk")
    }


def test_a_text_model_learns_to_point_by_selecting(data: Path, tmp_path: Path) -> None:
    out, text_model = tmp_path / "run", tmp_path / "text"
    made, processor = build(toy(smoke(), new_words=None))
    config = dataclasses.replace(processor.config, trained_on=())
    made.save_pretrained(text_model, processor=Processor(config, processor.tokenizer))
    command = ["train", "--data", str(data), "--model", str(text_model), "--out", str(out)]
    command += ["--points", "--steps", "1", "--batch-size", "1", "--workers", "0"]
    command += ["--sequence-length", "128", "--max-crops", "1"]
    assert main(command) == 0
    assert Recipe.load(out / "recipe.json").point_head
    model, processor = load(str(out / "model"))
    assert model.config.point_config is not None and processor.config.points is not None
    said: list[str] = []
    build(
        dataclasses.replace(Recipe.load(out / "recipe.json"), model=str(out / "model")),
        info=said.append,
    )
    assert said == [f"{out / 'model'} already points by selecting: --points adds nothing"]


def test_its_own_data_is_audited(start: Path, data: Path) -> None:
    """Tokens are counted as training has them: three markers a point."""
    processor = load(str(start))[1]
    report = audit(
        open_source(SourceConfig(str(data))), EncodeTree(processor), processor, max_tokens=256
    )
    assert (report.good, report.fatal) == (8, [])
    tokens = [
        len(EncodeTree(processor)(open_source(SourceConfig(str(data)))[i]).input_ids)
        for i in range(8)
    ]
    assert report.tokens == sum(tokens) and report.longest == max(tokens)


# ---- what is logged ----


def test_the_terms_are_those_of_the_step(start: Path, data: Path) -> None:
    """From the logits of every label and selection; together they are the loss of the step."""
    stage = stage_of(recipe_of(start, data, batch_size=4, packing_buffer=4))
    step, _ = next(stage.batches(range(1), None, 0))
    found = {name: float(value) for name, value in stage.gradients(step).items()}
    sums = {term: [0.0, 0, 0] for term in TERMS}  # loss, number, right

    def count(term: str, scores: torch.Tensor, target: torch.Tensor) -> None:
        sums[term][0] += float(F.cross_entropy(scores, target, reduction="sum"))
        sums[term][1] += len(target)
        sums[term][2] += int((scores.argmax(dim=-1) == target).sum())

    model, points = stage.model, stage.model.point_predictor
    assert points is not None and model.config.point_config is not None
    patch_id = model.config.point_config.patch_token_id
    for micro in step.micro_batches:
        assert micro.labels is not None
        with torch.no_grad():
            logits, states, seen = (
                model(micro).logits[0],
                model.states(micro)[0],
                model.see(micro),
            )
            keys = points.row_keys(states[seen.places], seen.position_ids)
        labels = micro.labels[0].clone()
        labels[0] = IGNORED_LABEL
        places = (labels != IGNORED_LABEL).nonzero()[:, 0]
        count("text", logits[places - 1], labels[places])
        if micro.point_targets is None:
            continue
        before, whose = -1, -1
        at = (micro.input_ids[0] == patch_id).nonzero()[:, 0]
        assert micro.subsegment_ids is not None
        example = micro.subsegment_ids[0] // 100_000
        for place, (row, slot, cell) in zip(at, micro.point_targets.tolist(), strict=True):
            if example[place] != whose:
                before, whose = -1, example[place]
            is_row = row != NO_MORE_POINTS
            mine = example[seen.places] == example[place]
            open_rows = F.pad(mine & (torch.arange(len(mine)) >= before), (0, 1), value=True)
            turned = seen.position_ids[before] if before >= 0 else torch.tensor(0)
            with torch.no_grad():
                scores = points.row_logits(
                    states[place - 1][None], keys, turned[None], open_rows[None]
                )
            count("row", scores, torch.tensor([row if is_row else len(mine)]))
            before = row if is_row else -1
            if not is_row:
                continue
            with torch.no_grad():
                windows = seen.windows(torch.tensor([row]))
                slots = points.slot_logits(states[place][None], points.slot_keys(windows))
                cells = points.cell_logits(states[place + 1][None], normed=True)
            filled = seen.filled[row]
            count("slot", slots.masked_fill(~filled, -1e9), torch.tensor([slot]))
            count("cell", cells, torch.tensor([cell]))
    for term, (loss, number, right) in sums.items():
        assert found[f"loss_{term}"] == pytest.approx(loss / number, rel=1e-4)
        assert found[f"accuracy_{term}"] == pytest.approx(right / number)
    total = sum(loss for loss, _, _ in sums.values())
    assert found["loss"] == pytest.approx(total / sums["text"][1], rel=1e-5)


def test_losses_of_tasks_hold_what_their_points_cost(start: Path, data: Path) -> None:
    """Each task's share of the weight times its loss adds up to the loss of the step, and a task's
    loss is that of its labels alone.
    """
    stage = stage_of(recipe_of(start, data, batch_size=4, packing_buffer=4))
    step, _ = next(stage.batches(range(1), None, 0))
    found = stage.gradients(step)
    total = weighed = 0.0
    for name in ("find", "count", "talk"):
        loss = weight = 0.0
        for micro, branches in zip(step.micro_batches, step.branches, strict=True):
            assert micro.labels is not None
            wanted = torch.tensor([task == name for task in step.tasks])
            keep = wanted[branches.clamp(min=0)] & (branches >= 0)
            keep[:, 0] = False
            labels = torch.where(keep, micro.labels, IGNORED_LABEL)
            inputs = {**micro.tensors(), "labels": labels}
            loss += float(stage.model.loss(**inputs, reduction="sum").detach())
            weight += float((labels != IGNORED_LABEL).sum())
        if weight:
            assert float(found[f"loss_{name}"]) == pytest.approx(loss / weight, rel=1e-4)
        total, weighed = total + loss, weighed + weight
    assert float(found["loss"]) == pytest.approx(total / weighed, rel=1e-5)


def test_a_step_without_a_point_logs_the_text_alone(start: Path, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"question": "What is red?", "answer": "A colour."}) + "\n")
    assert train(recipe_of(start, path, steps=2), tmp_path / "run")
    for line in lines_of(tmp_path / "run"):
        assert {"loss_text", "accuracy_text"} <= line.keys()
        assert not {f"{kind}_{term}" for kind in ("loss", "accuracy") for term in TERMS[1:]} & {
            *line
        }
        assert line["loss_text"] == pytest.approx(line["loss"], rel=1e-4)
        assert line["grad_norm_points"] == 0


# ---- exact ----


def test_resumed_is_never_stopped(whole: Path, start: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(start, data)
    assert not train(recipe, tmp_path, stop_after=5)
    assert train(recipe, tmp_path, resume=True)
    assert losses(tmp_path) == losses(whole)
    ours, theirs = weights(tmp_path), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "changes",
    [{"micro_batch_size": 2}, {"gradient_checkpointing": True}],
    ids=["accumulation", "checkpointing"],
)
def test_how_rows_are_put_through_changes_nothing(
    whole: Path, start: Path, data: Path, tmp_path: Path, changes: dict
) -> None:
    train(recipe_of(start, data, **changes), tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=2e-4)
    for ours, theirs in zip(lines_of(tmp_path), lines_of(whole), strict=True):
        for term in TERMS:
            name = f"loss_{term}"
            assert ours.get(name) == pytest.approx(theirs.get(name), rel=1e-3, abs=1e-3)


def test_the_same_example_has_the_same_loss_alone_and_packed(start: Path, data: Path) -> None:
    """The rule of our own training divides rows by the width of their keys: as many examples as fit
    into a row compute what each computes in a row of its own. The step divides by all its labels.
    """
    packed = stage_of(recipe_of(start, data, batch_size=1, packing_buffer=3))
    step, _ = next(packed.batches(range(1), None, 0))
    assert step.counts["examples"] > 1
    (micro,) = step.micro_batches
    micro = check_batch(micro, packed.model.config)
    together = float(packed._loss(micro.prepared(), label_weights(micro)).detach())
    alone = 0.0
    source, encode = open_source(SourceConfig(str(data))), packed.encode
    stream = packed.mixture.slot(0, 1)
    for _ in range(step.counts["examples"]):
        _, index = stream.next()
        batch = collate([encode(source[index])], 0)
        alone += float(packed._loss(batch.prepared(), label_weights(batch)).detach())
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_two_ranks_are_one(whole: Path, start: Path, data: Path, tmp_path: Path) -> None:
    recipe_of(start, data).save(tmp_path / "points.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "nanomolmo2", "train", str(tmp_path / "points.json"), "--workers", "0"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=2e-4)
    for ours, theirs in zip(lines_of(tmp_path / "run"), lines_of(whole), strict=True):
        for name in theirs:
            if name.startswith(("loss_", "accuracy_")):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-3)


def test_cached_features_are_those_of_the_encoder(start: Path, data: Path, tmp_path: Path) -> None:
    """Slots and what SUBPATCH reads come from the cached features."""
    parts = ("connector", "llm", "points")
    recipe = recipe_of(start, data, train=parts, steps=3)
    for name in ("first", "second"):
        train(dataclasses.replace(recipe, feature_cache=str(tmp_path / "cache")), tmp_path / name)
    train(recipe, tmp_path / "without")
    assert losses(tmp_path / "first") == losses(tmp_path / "second") == losses(tmp_path / "without")
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    stage = stage_of(recipe)
    step, _ = next(stage.batches(range(1), None, 0))
    (micro, *_) = step.micro_batches
    cached = float(stage._loss(micro.prepared(), label_weights(micro)).detach())
    with torch.no_grad():
        plain = float(stage.model.loss(micro, reduction="sum"))
    assert cached == pytest.approx(plain, rel=1e-2)  # the cache rounds to bfloat16


def test_dropout_at_targets_is_where_tokens_and_selections_are_learned(
    start: Path, data: Path
) -> None:
    """The row is selected before PATCH, the slot at PATCH and the cell at SUBPATCH: at positions
    whose next token is a label.
    """
    recipe = recipe_of(start, data, residual_dropout=0.5, dropout_at_targets=True)
    stage = stage_of(recipe)
    step, _ = next(stage.batches(range(1), None, 0))
    stage.model.train()
    stage.gradients(step)
    micro, positions = step.micro_batches[-1], stage.dropout.positions
    assert positions is not None and micro.labels is not None
    expected = F.pad(micro.labels[:, 1:] != IGNORED_LABEL, (0, 1))
    assert torch.equal(positions[:, :, 0], expected)


def test_the_validation_loss_is_that_of_the_training(start: Path, data: Path) -> None:
    validation = ValidationConfig(data=(SourceConfig(str(data)),), limit=0, every=1)
    recipe = recipe_of(start, data, validation=validation)
    opened = open_stage(recipe, open_split(recipe), World())
    found = opened.stage.evaluate()["val_loss"]
    total = weight = 0.0
    assert opened.stage.validation is not None
    for batch in opened.stage.validation.rows.batches():
        with torch.no_grad():
            total += float(opened.model.loss(batch, reduction="sum"))
        weight += float(label_weights(batch).sum())
    assert found == pytest.approx(total / weight, rel=1e-5)


def test_answers_to_the_validation_data_are_scored(start: Path, data: Path) -> None:
    """Pictures in one view have windows too, which a cache of prefixes once took for crops."""
    validation = ValidationConfig(data=(SourceConfig(str(data)),), limit=3)
    opened = open_stage(
        recipe_of(start, data, validation=validation),
        open_split(recipe_of(start, data, validation=validation)),
        World(),
    )
    scores = opened.stage.evaluate()
    assert {"val_loss", "val_find"} <= scores.keys()
    assert all(0 <= score <= 1 for name, score in scores.items() if name != "val_loss")
    assert opened.stage.validation is not None and not opened.stage.validation.remarks


# ---- what learns ----


def test_lora_learns_beside_the_point_modules(start: Path, data: Path, tmp_path: Path) -> None:
    """The adapter holds them whole, and the rows of the markers; on its base it is the model."""
    parts = ("connector", "points", "lora")
    recipe = recipe_of(start, data, train=parts, lora=LoraConfig(rank=2), steps=4)
    out = tmp_path / "run"
    assert train(recipe, out)
    found, base = weights(out), load(str(start))[0].state_dict()
    merged = load(str(start), adapter=str(out / "adapter"))[0].state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
        if name.startswith("point_predictor."):
            assert not torch.equal(tensor, base[name])
    table = "llm.embed_tokens.weight"
    assert torch.equal(found[table][:736], base[table][:736])
    assert not torch.equal(found[table][747:750], base[table][747:750])


def test_an_untied_head_is_trained_and_kept_in_the_adapter(data: Path, tmp_path: Path) -> None:
    from tests.training.test_points_parts import sizes

    start = save_start(tmp_path / "start", architecture=sizes(tied=False))
    parts = ("connector", "points", "lora")
    recipe = recipe_of(start, data, train=parts, lora=LoraConfig(rank=2), steps=3)
    out = tmp_path / "run"
    assert train(recipe, out)
    found, base = weights(out), load(str(start))[0].state_dict()
    head = "llm.lm_head.weight"
    assert torch.equal(found[head][:736], base[head][:736])
    assert not torch.equal(found[head][747:750], base[head][747:750])
    merged = load(str(start), adapter=str(out / "adapter"))[0].state_dict()
    torch.testing.assert_close(merged[head], found[head], rtol=1e-5, atol=1e-6)
    whole = recipe_of(start, data, train=("connector", "llm", "points"), steps=2)
    assert train(whole, tmp_path / "whole")
    assert not torch.equal(weights(tmp_path / "whole")[head][:736], base[head][:736])


def test_points_alone_can_learn(start: Path, data: Path, tmp_path: Path) -> None:
    assert train(recipe_of(start, data, train=("points",), steps=2), tmp_path)
    found, base = weights(tmp_path), load(str(start))[0].state_dict()
    changed = {name for name in found if not torch.equal(found[name], base[name])}
    assert changed and all(name.startswith("point_predictor.") for name in changed)
    assert math.isfinite(losses(tmp_path)[-1])
    assert RATE.lr == Recipe.load(tmp_path / "recipe.json").optimisers["points"].lr
