from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomolmo2.accelerate.quantization import is_quantized
from nanomolmo2.convert import export_molmo2
from nanomolmo2.convert.pretrained import TINY, load, load_processor
from nanomolmo2.data.sources import SourceConfig
from nanomolmo2.models import LanguageModel, NanoMolmo2, preset
from nanomolmo2.processor import MultiCrop, ProcessorConfig
from nanomolmo2.recipes import finetune, smoke
from nanomolmo2.recipes.finetune import Sizes, largest_picture, sizes_of
from nanomolmo2.training import fingerprint
from nanomolmo2.training.distributed import World
from nanomolmo2.training.fingerprint import changed, fingerprints
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.trainer import RecipeStage, build, start_from, train_recipe
from tests.training.recipes import toy

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


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


# ---- data that were edited between stop and resume ----


def answers(path: Path, answer: str, count: int = 12) -> tuple[SourceConfig, ...]:
    lines = [{"question": f"Is there a dog? {n}", "answer": answer} for n in range(count)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (SourceConfig(str(path)),)


@pytest.mark.parametrize("edited", ["No.", "No, there is a small red cat beside the tree."])
@pytest.mark.parametrize("workers", [0, 1])
def test_edited_answers_are_noted_and_the_run_goes_on(
    tmp_path: Path, capsys, edited: str, workers: int
) -> None:
    """Also where examples of another length wait for their row."""
    data = tmp_path / "my.jsonl"
    recipe = toy(smoke(), data=answers(data, "Yes."), steps=6, packing_buffer=4)
    run = tmp_path / "run"
    options = {"workers": workers}
    assert not train_recipe(recipe, run, max_steps=2, **options)
    capsys.readouterr()
    assert not train_recipe(recipe, run, max_steps=3, resume=True, **options)
    assert "is not what it was" not in capsys.readouterr().err
    answers(data, edited)
    assert not train_recipe(recipe, run, max_steps=5, resume=True, **options)
    said = capsys.readouterr().err
    assert said.count("is not what it was when this run was stopped") == 1 and str(data) in said
    assert train_recipe(recipe, run, resume=True, **options)  # the new ones are known now
    assert "is not what it was" not in capsys.readouterr().err
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]


def test_another_number_of_records_does_not_go_on(tmp_path: Path) -> None:
    data = tmp_path / "my.jsonl"
    recipe = toy(smoke(), data=answers(data, "Yes."), steps=4)
    train(recipe, tmp_path / "run", max_steps=2)
    answers(data, "Yes.", count=13)
    with pytest.raises(ValueError, match="resume with the same sources"):
        train(recipe, tmp_path / "run", resume=True)


def test_a_fingerprint_is_of_names_sizes_and_content(tmp_path: Path, monkeypatch) -> None:
    (one,) = answers(tmp_path / "data" / "a.jsonl", "Yes.")
    folder = SourceConfig(str(tmp_path / "data"))
    pattern = SourceConfig(str(tmp_path / "data" / "*.jsonl"))
    of_all = [one, folder, pattern, SourceConfig("emoji"), SourceConfig("hub:a/b")]

    def seen() -> dict[str, str]:
        return fingerprints(of_all)

    first = seen()
    assert list(first) == [one.path, folder.path, pattern.path]
    assert seen() == first and changed(first, seen()) == []
    os.utime(one.path)  # a copy is the same
    assert changed(first, seen()) == []
    text = Path(one.path).read_text()
    for whole in (fingerprint.READ_WHOLE, 0):  # larger sources are sampled
        monkeypatch.setattr(fingerprint, "READ_WHOLE", whole)
        before = seen()
        Path(one.path).write_text(text.replace("Yes.", "No!."))
        assert changed(before, seen()) == [one.path, folder.path, pattern.path]
        Path(one.path).write_text(text)
        assert seen() == before
    answers(tmp_path / "data" / "b.jsonl", "Yes.")
    assert changed(before, seen()) == [folder.path, pattern.path]
    assert changed({}, seen()) == []  # of before there were fingerprints


# ---- where a model comes from ----


def small_folder(folder: Path, quantize: str | None = None, **limits: int) -> Path:
    """A model of one layer, saved under a name that says nothing."""
    config = toy(smoke()).architecture
    assert config is not None
    config = replace(config, llm_config=replace(config.llm_config, **limits))
    torch.manual_seed(3)
    model = NanoMolmo2(config)
    if quantize:
        model.quantize(quantize)
    model.save_pretrained(folder, processor=load_processor("tiny"))
    return folder


def test_a_recipe_follows_the_models_configuration(tmp_path: Path) -> None:
    """Row length, crops, rate and arithmetic hung on the name: a trained copy of tiny got those of
    a model of four billion weights, and more positions than it has."""
    sizes = sizes_of("tiny")
    assert sizes == Sizes(2048, 8, 5e-4, "float32", False)
    large = Sizes(4096, 64, 1e-5, "bfloat16", True)
    assert sizes_of("base") == sizes_of("allenai/Molmo2-4B") == large
    copied = tmp_path / "any name"
    shutil.copytree(TINY, copied)
    assert sizes_of(str(copied)) == sizes
    assert sizes_of(str(small_folder(tmp_path / "a"))) == sizes
    short = small_folder(tmp_path / "short", max_position_embeddings=300)
    assert sizes_of(str(short)).sequence_length == 300
    int8 = small_folder(tmp_path / "int8", "int8")
    assert sizes_of(str(int8)) == sizes


def test_a_row_holds_the_largest_picture_of_the_processor() -> None:
    config = preset("molmo2-4b")
    assert largest_picture(config) == (config.num_visual_tokens, 1)
    cut = ProcessorConfig.molmo2(multicrop=MultiCrop(max_crops=24))
    tokens, crops = largest_picture(config, cut)
    assert crops == 25
    with_rows = 25 * 14 * 15
    assert tokens == with_rows


def test_a_trained_model_is_trained_again_and_again(tmp_path: Path) -> None:
    data = answers(tmp_path / "my.jsonl", "Yes.")
    model = str(small_folder(tmp_path / "first"))
    for name in ("second", "third", "fourth"):
        recipe = finetune([data[0].path], model, steps=1, lora=name == "third")
        assert (recipe.sequence_length, recipe.dtype) == (2048, "float32")
        assert train(recipe, tmp_path / name)
        model = str(tmp_path / name / "model")
    before, after = weights(tmp_path / "second"), weights(tmp_path / "fourth")
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_an_exported_model_is_trained(tmp_path: Path) -> None:
    model, processor = load("tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_molmo2(model, tmp_path / "exported", processor)
    data = answers(tmp_path / "my.jsonl", "Yes.")
    recipe = finetune([data[0].path], str(tmp_path / "exported"), steps=1)
    assert (recipe.dtype, recipe.optimisers["llm"].lr) == ("float32", 5e-4)
    assert recipe.sequence_length <= 2048
    assert train(recipe, tmp_path / "run")


@pytest.mark.parametrize("mode", ["int8", "int8-weight-only", "fp16-weights"])
def test_a_quantised_model_is_trained_from_its_rounded_weights(
    tmp_path: Path, capsys, mode: str
) -> None:
    folder = small_folder(tmp_path / "small", mode)
    quantised, _ = load(str(folder))
    recipe = finetune([answers(tmp_path / "my.jsonl", "Yes.")[0].path], str(folder), steps=1)
    model, _ = build(recipe)
    stored = quantised.state_dict()
    for name, weight in model.state_dict().items():
        scale = stored.get(f"{name.removesuffix('.weight')}.scale")
        expected = stored[name].float() * (1 if scale is None else scale[:, None])
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)
    assert model.llm.lm_head is None  # tied: the table is not quantised
    assert train_recipe(recipe, tmp_path / "run", workers=0)
    assert f"weights of {folder} are quantised: training starts" in capsys.readouterr().err
    trained, _ = load(str(tmp_path / "run" / "model"))
    assert not is_quantized(trained)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}


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


def test_what_is_probably_a_mistake_in_the_data_is_said_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of days learned without its pictures: their field had another name."""
    path = tmp_path / "mine.jsonl"
    record = {"image_path": "a.png", "question": "Red?", "answer": "Yes.", "by": "Ann"}
    path.write_text(json.dumps(record) + "\n")
    made = toy(smoke(), data=(SourceConfig(str(path)),), steps=1)
    assert train_recipe(made, tmp_path / "run", workers=0)
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert said == [
        "warning: mine: its field 'image_path' looks like a picture and is not read: name it "
        "'image', 'images' or 'video', or leave it out (1 of 1 records looked at)",
        "warning: mine: fields that are not read, of 1 records looked at: by (1)",
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_picture_is_one_sentence(workers: int, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"image": "none.png", "question": "Red?", "answer": "Yes."}\n')
    made = toy(smoke(), data=(SourceConfig(str(path)),), steps=1)
    with pytest.raises(ValueError) as error:
        train_recipe(made, tmp_path / "run", workers=workers, quiet=True)
    assert str(error.value).startswith("100 of 100 examples are bad, more than 5% (missing picture")
    assert f"line 1: there is no {tmp_path / 'none.png'}; mend" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_short_run_leaves_out_is_said(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the records were left out, and the run ended as if it had learned them all: too few
    were drawn to judge their share."""
    path = tmp_path / "mine.jsonl"
    good = {"question": "Red?", "answer": "Yes."}
    bad = [{"image": "none.png", **good}, {"question": "Red?"}]
    path.write_text("".join(json.dumps(one) + "\n" for one in [good, good, *bad, *bad]))
    made = toy(smoke(), data=(SourceConfig(str(path)),), steps=3)
    assert train_recipe(made, tmp_path / "run", workers=workers)
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert [line.split(":")[:2] for line in sorted(said)[:-1]] == [
        ["warning", " left out (missing picture)"],
        ["warning", " left out (no answer)"],
    ]
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    missing, empty = int(logged["bad_missing_picture"]), int(logged["bad_no_answer"])
    assert said[-1].startswith(f"warning: left out {missing + empty} of ")
    assert f"missing picture {missing}" in said[-1] and f"no answer {empty}" in said[-1]


def test_a_run_that_leaves_nothing_out_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = answers(tmp_path / "my.jsonl", "Yes.")
    assert train_recipe(toy(smoke(), data=data, steps=2), tmp_path / "run", workers=0)
    assert "warning" not in capsys.readouterr().err
