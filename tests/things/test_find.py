"""The model that finds by example: its words, how it starts, what its stages ask, whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanomolmo2 import cli
from nanomolmo2.convert.export import state_without_finder
from nanomolmo2.convert.pretrained import load
from nanomolmo2.data.example import Branch
from nanomolmo2.emoji.questions import with_exact_points
from nanomolmo2.emoji.sprites import CATEGORIES
from nanomolmo2.emoji.vision_stages import render_scenes
from nanomolmo2.emoji.vocabulary import build_tokenizer, vocab_size
from nanomolmo2.models import NanoMolmo2, preset
from nanomolmo2.processor.point import Point
from nanomolmo2.processor.tokenizer import Tokenizer
from nanomolmo2.things import train
from nanomolmo2.things.drawings import HELD_OUT_SETS
from nanomolmo2.things.find_model import CONFIG, CROPS, FindModel, find_processor
from nanomolmo2.things.find_stage import FindBatch, FindPlan, FindStage, num_tokens, spaced
from nanomolmo2.things.questions import make_branches
from nanomolmo2.things.scenes import test_scene as scene_of_a_test
from nanomolmo2.things.source import Things
from nanomolmo2.things.train import SCALES, train_find
from nanomolmo2.things.vocabulary import build_find_tokenizer, letter_pairs
from nanomolmo2.training.distributed import World
from nanomolmo2.training.loop import LoopConfig
from tests.small_model import small_model, small_processor
from tests.things import find_ranks

ROOT = Path(__file__).parents[2]
QUIET = LoopConfig(log_every=1, save_every=2, workers=0, quiet=True)


# ---- words ----


def pieces_of(text: str) -> list[str]:
    backend = build_find_tokenizer()
    return [backend.id_to_token(i) for i in Tokenizer(backend).encode_text(text)]


def test_its_sizes_are_those_of_its_preset() -> None:
    backend = build_find_tokenizer()
    assert vocab_size(backend) == CONFIG.llm_config.vocab_size == 928
    tokenizer = find_processor().tokenizer
    names = ("<|im_end|>", "<|endoftext|>")
    assert CONFIG.eos_token_id == tuple(map(tokenizer.special_id, names))
    assert CONFIG.pad_token_id == tokenizer.special_id("<|endoftext|>")
    assert CONFIG.point_config is not None
    markers = ("<|token_index|>", "<|vit_index|>", "<|vit_loc|>")
    assert CONFIG.point_config.marker_ids == tuple(map(tokenizer.special_id, markers))
    assert CONFIG.visual_token_ids == tuple(map(tokenizer.special_id, ("<im_patch>", "<im_low>")))
    assert CONFIG.vision_config == preset("tiny").vision_config
    assert CONFIG.connector == preset("tiny").connector


def test_words_of_its_questions_are_single_pieces() -> None:
    assert pieces_of("Point to everything like ") == ["Point", " to", " everything", " like "]
    assert pieces_of('">thing</point>') == ['">', "thing", "</point>"]
    assert pieces_of("How many dogs are there?") == (
        ["How", " many ", "dog", "s", " are", " there", "?"]
    )


def test_names_are_spelled_in_pairs_of_letters() -> None:
    assert pieces_of(" a walnut.") == [" a ", "wa", "ln", "ut", "."]
    assert len(letter_pairs()) == len(set(letter_pairs())) == 160
    for noun in CATEGORIES:
        assert pieces_of(noun) == [noun]


# ---- how it starts ----


def test_it_starts_with_all_that_tiny_knows() -> None:
    find = FindModel(0)
    find.start_from_tiny()
    tiny, processor = load("tiny", dtype=torch.float32, device="cpu")
    for text in ("dog", " there", '<points coords="', "7"):
        (before,) = processor.tokenizer.encode_text(text)
        (now,) = find.processor.tokenizer.encode_text(text)
        rows = tiny.llm.embed_tokens.weight[before], find.model.llm.embed_tokens.weight[now]
        assert torch.equal(*rows)
    (unknown,) = find.processor.tokenizer.encode_text("wa")
    assert find.model.llm.embed_tokens.weight[unknown].std().item() == pytest.approx(0.1, rel=0.2)
    assert find.model.llm.embed_tokens.weight[list(CONFIG.visual_token_ids)].abs().max() == 0
    for part in ("vision_encoder", "connector"):
        mine, theirs = (getattr(m, part).state_dict() for m in (find.model, tiny))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    layer = "layers.5.mlp.down_proj.weight"
    assert torch.equal(find.model.llm.state_dict()[layer], tiny.llm.state_dict()[layer])
    # Captions are answered as before, though tokens come from two views now.
    assert len(build_tokenizer().get_vocab()) < len(build_find_tokenizer().get_vocab())


def test_it_starts_with_another_tiny(tmp_path: Path) -> None:
    """Also where that has no finder yet, and with no other model."""
    tiny, processor = load("tiny", dtype=torch.float32, device="cpu")
    plain = NanoMolmo2(replace(tiny.config, finder_dim=None))
    plain.load_state_dict(state_without_finder(tiny))
    with torch.no_grad():
        plain.connector.layers.image_projector.down_proj.weight.mul_(2)
    plain.save_pretrained(tmp_path / "tiny", processor=processor)
    find = FindModel(0, start=tmp_path / "tiny")
    untaught = {name: value.clone() for name, value in find.model.finder.state_dict().items()}
    find.start_from_tiny()
    assert all(
        torch.equal(value, find.model.finder.state_dict()[n]) for n, value in untaught.items()
    )
    made = find.put_into_tiny()[0].state_dict()
    name = "connector.layers.image_projector.down_proj.weight"
    assert torch.equal(made[name], 2 * tiny.state_dict()[name])
    patches = torch.randn(1, 144, 768)
    tokens = find.tokens_at_start()(patches)
    torch.testing.assert_close(tokens, plain.encode_images(patches), rtol=1e-4, atol=1e-5)
    small_model().save_pretrained(tmp_path / "other", processor=small_processor())
    with pytest.raises(ValueError, match="is a model of other sizes than `tiny`"):
        FindModel(0, start=tmp_path / "other").start_from_tiny()


def test_points_start_as_a_search_for_what_was_learned_to_be_alike() -> None:
    find = FindModel(0)
    points, finder = find.model.point_predictor, find.model.finder
    assert points is not None and finder is not None
    before = points.patch_q.weight.clone()
    FindStage(find, 0, replace(train.ANSWERS, by_looks=False)).begin()
    assert torch.equal(points.patch_q.weight, before)
    FindStage(find, 0, train.ANSWERS).begin()
    for projection in (points.patch_q, points.patch_k):
        assert torch.equal(projection.weight, finder.token.embed.weight)
        assert torch.equal(projection.bias, finder.token.embed.bias)


def test_visual_tokens_of_emoji_stay_near_those_of_tiny() -> None:
    find = FindModel(0)
    find.start_from_tiny()
    stage = FindStage(find, 0, replace(SCALES["smoke"][0], keep=2))
    stage.begin()
    batch = stage.batch(0)
    assert batch.kept is not None and batch.kept.shape == (2, 144, 768)
    assert not torch.equal(batch.kept, stage.batch(1).kept)
    assert stage.changed(batch.kept).item() == pytest.approx(0, abs=1e-9)
    before = stage.loss(batch)[0]
    with torch.no_grad():
        find.model.connector.layers.image_projector.down_proj.weight.mul_(
            1.1
        )  # all tokens are a tenth longer
    assert stage.changed(batch.kept).item() == pytest.approx(0.01, rel=1e-3)
    assert stage.loss(batch)[1]["changed_w"] == pytest.approx(0.01, rel=1e-3)
    assert stage.loss(batch)[0] != before
    # The tokens are those that its decoder reads of a scene: the tile beside the overview.
    (scene,) = render_scenes(0, stage.plan.stream, 0, 1)
    cut = CROPS(scene.image)["pixel_values"]
    assert cut.shape == (2, 144, 768) and np.allclose(cut[1], batch.kept[0], atol=1e-6)
    assert find.tokens_at_start()(batch.kept).shape == (2, 36, 256)


# ---- what a stage asks ----


def stage_of(kinds: str) -> FindStage:
    find = FindModel(0)
    plan = FindPlan("point", 30, 4, kinds=kinds, pictures=2, emoji=2, capacity=120, scored=0)
    return FindStage(find, 0, plan)


def test_a_step_of_things_holds_the_points_of_its_examples() -> None:
    stage = stage_of("t")
    batch, labels, of_emoji = stage.batch(0)
    assert batch.point_targets is not None and batch.labels is not None and labels is not None
    assert batch.point_targets.shape[1] == 3 and not of_emoji
    assert torch.equal(batch.input_ids, stage.batch(0).questions.input_ids)
    assert not torch.equal(batch.input_ids, stage.batch(1).questions.input_ids)
    loss, metrics = stage.loss(stage.batch(0))
    assert loss.item() > 0
    of_terms = {f"{term}_right_t" for term in ("text", "row", "slot", "cell")}
    of_find = {
        "find_loss_t",
        "first_loss_t",
        "claim_loss_t",
        "way_loss_t",
        "find_recall_t",
        "find_precision_t",
    }
    assert set(metrics) == of_terms | of_find
    assert all(0 <= metrics[name] <= 1 for name in of_terms)
    pairs = stage_of("p").batch(0).questions
    assert len(pairs.input_ids) == 1  # half as many, of two pictures each


def test_a_step_of_emoji_is_told_from_one_of_things() -> None:
    stage = stage_of("e")
    batch = stage.batch(0)
    assert batch.of_emoji and batch.labels is not None  # nouns have places too
    assert {name[-2:] for name in stage.loss(batch)[1]} == {"_e"}
    pair = stage.batch([stage.emoji.kind(i) for i in range(9)].index("p"))
    assert pair.of_emoji and pair.labels is None


def test_what_it_learns_from_holds_nothing_that_is_held_out() -> None:
    for plan in SCALES["full"]:
        assert not plan.source.scene.held_out
        scenes, _ = Things(replace(plan.source, pairs=1.0), 0).scenes(0)
        origins = {kind.look.origin for scene in scenes for kind in scene.kinds}
        assert not origins & set(HELD_OUT_SETS)


def test_the_length_of_a_branch_is_known_before_it_is_encoded() -> None:
    processor = find_processor()
    scene = scene_of_a_test(0, "few")
    branches = make_branches([scene], np.random.default_rng(0))
    for branch in branches:
        alone = processor.encode_tree([scene.image], [branch.messages])
        prefix = int((alone.subsegment_ids == 10_000).sum())  # type: ignore[operator]
        length = len(alone.input_ids) - prefix
        assert length <= num_tokens(branch, processor.tokenizer) <= 1.2 * length + 8, branch.task


def test_questions_are_put_with_and_without_spaces_beside_points() -> None:
    point = {"type": "point", "x": 1.0, "y": 2.0, "image": 1}
    content = [{"type": "text", "text": "Find more like "}, point, {"type": "text", "text": "."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    rng, found = np.random.default_rng(0), set()
    for _ in range(20):
        made = spaced(messages, rng)
        assert made[0]["content"][1] == point and made[1] == messages[1]
        found.add(made[0]["content"][0]["text"])
    assert found == {"Find more like ", "Find more like"}


def test_an_answer_of_an_example_selects_its_exact_middle() -> None:
    """Of a thing with its middle at 100.5, 60.5: patch (3, 6) of 16 px in a canvas of one tile."""
    processor = find_processor()
    image = np.zeros((192, 192, 3), np.uint8)
    answer = '<points coords="1 1 523 315">thing</points>'
    text = with_exact_points(answer, [Point(100.5, 60.5)])
    content = [{"type": "point", "x": 20.0, "y": 20.0, "image": 1}]
    branch = Branch([{"role": "user", "content": content}, {"role": "assistant", "content": text}])
    encoded = processor.encode_tree([image], [branch.messages])
    assert encoded.point_targets is not None
    # 36 tokens of the overview come first. Token (1, 3) is number 9; patch (3, 6) is its slot 2;
    # (100.5 - 96) / 16 = .28: column 0, (60.5 - 48) / 16 = .78: row 2.
    assert encoded.point_targets.tolist() == [[36, 3, 0], [36 + 9, 2, 2], [1_000_000, -1, -1]]


# ---- runs ----


@pytest.fixture
def smallest(monkeypatch) -> None:
    few = {"steps": 2, "pictures": 1, "emoji": 1, "scored": 0}
    small, looks, answers = SCALES["smoke"]
    made = (
        *(replace(plan, **few, keep=1) for plan in (small, looks)),
        replace(answers, **few, kinds="te"),
    )
    monkeypatch.setitem(SCALES, "smoke", made)


@pytest.mark.usefixtures("smallest")
def test_a_resumed_run_equals_one_that_never_stopped(tmp_path) -> None:
    assert train_find(tmp_path / "whole", scale="smoke", config=QUIET)
    parts = tmp_path / "parts"
    stops = replace(QUIET, stop_after=1)
    assert not train_find(parts, scale="smoke", config=stops)
    assert not train_find(parts, scale="smoke", config=replace(QUIET, stop_after=2), resume=True)
    assert not train_find(parts, scale="smoke", config=replace(QUIET, stop_at=5), resume=True)
    assert train_find(parts, scale="smoke", config=QUIET, resume="required")
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    whole, resumed = map(load_file, files)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    lines = (parts / "log.jsonl").read_text().splitlines()
    assert {json.loads(line)["stage"] for line in lines} == {"small", "looks", "answers"}
    model, processor = load(str(parts / "model"))
    assert model.config == CONFIG and processor.config.trained_on == ("emoji", "things")
    with pytest.raises(ValueError, match="already holds a run"):
        train_find(parts, scale="smoke", config=QUIET)


def test_at_the_scale_finder_it_stays_tiny_and_finds(tmp_path, monkeypatch) -> None:
    plan = replace(SCALES["smoke"][0], steps=1, pictures=1, keep=1, scored=0)
    monkeypatch.setitem(SCALES, "finder", (plan,))
    monkeypatch.setitem(train.WORDS_STEPS, "finder", (2, 2))
    stops = replace(QUIET, stop_at=1)
    assert not train_find(tmp_path / "parts", scale="finder", config=stops)
    assert not (tmp_path / "parts" / "model").exists()
    assert train_find(tmp_path / "parts", scale="finder", config=QUIET, resume=True)
    assert train_find(tmp_path, scale="finder", config=QUIET)
    before, _ = load("tiny", dtype=torch.float32, device="cpu")
    model, processor = load(str(tmp_path / "model"), dtype=torch.float32, device="cpu")
    assert model.finder is not None and processor.config.points is None
    assert replace(model.config, finder_dim=None) == replace(before.config, finder_dim=None)
    decoders = zip(model.llm.parameters(), before.llm.parameters(), strict=True)
    changed = [not torch.equal(*two) for two in decoders]
    assert sum(changed) > len(changed) / 2
    files = [tmp_path / name / "model" / "model.safetensors" for name in (".", "parts")]
    whole, resumed = map(load_file, files)
    assert whole.keys() == resumed.keys() and "finder.token_claim" in whole
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    name = "vision_encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(model.state_dict()[name], before.state_dict()[name])
    find = FindModel(0)
    find.start_from_tiny()
    assert find.model.finder is not None


def test_two_ranks_learn_what_one_does_from_the_pictures_of_both(tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "tests.things.find_ranks", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in (0, 1)]

    find = FindModel(0)
    stages = [find_ranks.stage_of(find, World(rank, 2)) for rank in (0, 1)]
    stages[0].begin()
    optimizers = stages[0].optimizers()
    pictures = []
    for step in range(find_ranks.PLAN.steps):
        optimizers.set_rates(step, find_ranks.PLAN.steps)
        batches = [stage.batch(step) for stage in stages]
        pictures += [
            (batch.questions if isinstance(batch, FindBatch) else batch).pixel_values
            for batch in batches
        ]
        for batch in batches:
            (stages[0].loss(batch)[0] / 2).backward()
        optimizers.clip(find_ranks.CONFIG.clip_norm)
        optimizers.step()
        stages[0].after_step()
    expected = find.state_dict()
    for weights in found:
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    for mine, others in zip(pictures[::2], pictures[1::2], strict=True):
        assert mine.shape != others.shape or not torch.equal(mine, others)
    alone = FindStage(find, 0, find_ranks.PLAN).batch(0)
    assert len(alone.pixel_values) == len(pictures[0]) + len(pictures[1])


@pytest.mark.slow
def test_all_stages_run_and_are_scored(tmp_path) -> None:
    assert train_find(tmp_path, scale="smoke", config=QUIET)
    lines = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    scores = [line["evaluation"] for line in lines if "evaluation" in line]
    names = {"few_f1", "alike_exact", "crowded_f1", "pair_f1", "made_exact"}
    assert scores and names <= set(scores[-1])


@pytest.mark.usefixtures("smallest")
def test_the_command_trains_by_stages(tmp_path, capsys) -> None:
    out = tmp_path / "run"
    options = ["train", "find", "--scale", "smoke", "--workers", "0", "--out", str(out)]
    assert cli.main([*options, "--stop-after", "1"]) == 0
    said = capsys.readouterr().out
    assert f"nanomolmo2 train find --out {out} --resume --scale smoke" in said
    folder = str(ROOT / "nanomolmo2/assets/tiny")  # a `tiny` by its folder: told where to go on
    options[-1] = str(tmp_path / "of-folder")
    assert cli.main([*options, "--stop-after", "1", "--model", folder]) == 0
    assert f"--resume --scale smoke --model {folder}" in capsys.readouterr().out
    assert cli.main([*options, "--resume", "--stop-after", "1", "--model", folder]) == 0
    capsys.readouterr()
    for more, problem in (
        (["--data", "my.jsonl"], "are not for the recipe find"),
        (["--drawings", str(tmp_path)], "holds no drawings"),
    ):
        assert cli.main([*options[:-1], str(tmp_path / "other"), *more]) != 0
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert cli.main(["train", "smoke", "--drawings", str(tmp_path)]) != 0
    assert "--drawings is for the recipe find" in capsys.readouterr().err
    assert cli.main(["plan", "find"]) != 0
    assert "the stages of find are its own" in capsys.readouterr().err


def test_unknown_scales_and_kinds_are_named() -> None:
    scales = "full, finder, more, small, smoke"
    with pytest.raises(ValueError, match=f"scale is 'huge', expected one of {scales}"):
        train.scale_of("huge")
    with pytest.raises(ValueError, match="kinds are 'tx', expected letters of t, p, e"):
        FindPlan("point", 1, 1, kinds="tx")
