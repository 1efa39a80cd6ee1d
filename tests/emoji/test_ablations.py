"""Each ablation runs, and takes away what it says and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomolmo2.emoji import exam, plans, train
from nanomolmo2.emoji.model import CONFIG, TinyForTraining
from nanomolmo2.emoji.question_stage import QuestionStage
from nanomolmo2.models.attention import sequence_mask
from nanomolmo2.training.checkpoint import ABOUT, FILE
from nanomolmo2.training.loop import LoopConfig
from scripts import ablate_tiny
from scripts.ablate_tiny import DECODER, LAYOUTS, NAMES, OPTIMISERS, Options

QUIET = LoopConfig(log_every=1, save_every=1, workers=0, quiet=True)
TABLE = "model.llm.embed_tokens.weight"
SMALL = (
    *("--presence-steps", "1", "--coarse-steps", "1", "--pictures", "1", "--scenes", "1"),
    *("--crop-steps", "1", "--crops", "2", "--rounds", "1", "--workers", "0", "--quiet"),
    "--no-compiled",
)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped behind its scenes stage."""
    folder = tmp_path_factory.mktemp("vision")
    train.train_tiny(folder, scale="smoke", config=replace(QUIET, stop_after=8))
    return folder


def weights(name: str) -> dict[str, torch.Tensor]:
    return DECODER[name].start(0).state_dict()


def plans_of(name: str) -> list[plans.QuestionPlan]:
    """Of the presence and the coarse stage."""
    tiny = DECODER[name].start(0)
    stages = DECODER[name].stages(tiny, Options(Path("unused"), pictures=2))
    assert [stage.steps for stage in stages] == [100, 100]
    return [stage.plan for stage in stages if isinstance(stage, QuestionStage)]


# ---- what is different ----


def test_the_baseline_is_the_recipe() -> None:
    expected = TinyForTraining(0).state_dict()
    for name, value in weights("baseline").items():
        assert torch.equal(value, expected[name]), name
    assert plans_of("baseline") == [plans.PRESENCE, plans.COARSE]


def test_without_alignment_only_nouns_are_drawn_anew() -> None:
    before, after = weights("baseline"), weights("alignment")
    assert all(torch.equal(after[name], before[name]) for name in before if name != TABLE)
    tiny = DECODER["alignment"].start(0)
    changed = {*tiny.noun_ids, *tiny.plural_ids.values()}
    for row in range(len(before[TABLE])):
        assert torch.equal(after[TABLE][row], before[TABLE][row]) == (row not in changed)
    for category, plural in tiny.plural_ids.items():
        assert torch.equal(after[TABLE][plural], after[TABLE][tiny.noun_ids[category]])
    new, old = tiny.noun_embeddings(), before[TABLE][tiny.noun_ids]
    assert torch.cosine_similarity(new, old).abs().max() < 0.5
    assert new.std().item() == pytest.approx(old.std().item(), rel=0.1)


def test_without_alignment_vision_is_still_checked_against_the_nouns_it_learned() -> None:
    tiny = DECODER["alignment"].start(0)
    aligned = DECODER["baseline"].start(0)
    assert torch.equal(tiny.visual_targets(), aligned.visual_targets())
    assert torch.equal(aligned.visual_targets(), aligned.noun_embeddings())


def test_without_presence_first_coarse_questions_are_asked_from_the_start() -> None:
    first, coarse = plans_of("presence")
    assert first.mix == plans.COARSE.mix
    assert first == replace(plans.PRESENCE, mix=first.mix)  # as many steps, the same pictures
    assert coarse == plans.COARSE


def test_few_branches() -> None:
    first, coarse = plans_of("branches")
    assert (first.mix.presence, plans.PRESENCE.mix.presence) == (2, 16)
    assert first.mix == replace(plans.PRESENCE.mix, presence=2)
    assert coarse == plans.COARSE


def test_snapping() -> None:
    first, coarse = plans_of("snapping")
    assert (coarse.snap, plans.COARSE.snap) == (1, 50)
    assert (first, coarse) == (plans.PRESENCE, replace(plans.COARSE, snap=1))


def test_without_matcher_only_queries_differ() -> None:
    before, after = weights("baseline"), weights("matcher")
    for name, value in before.items():
        assert torch.equal(after[name], value) == ("llm" not in name or "q_proj" not in name), name


def test_the_mask_is_causal_over_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A visual token is not changed by those behind it, and in the recipe it is."""
    seen = {}

    def keep(length, **values):
        seen["image"] = values["image_tokens"]
        return sequence_mask(length, **values)

    monkeypatch.setattr("nanomolmo2.models.nanomolmo2.sequence_mask", keep)
    for name, whole in (("baseline", True), ("mask", False)):
        tiny = DECODER[name].start(0)
        assert tiny.model.config.bidirectional_image_attention == whole
        stage = DECODER[name].stages(tiny, Options(Path("unused"), pictures=1))[0]
        stage.loss(stage.batch(0))
        assert (seen["image"] is not None) == whole
    assert CONFIG.bidirectional_image_attention


def test_the_optimisers() -> None:
    tiny = TinyForTraining(0)
    for name, rates in OPTIMISERS.items():
        stage = ablate_tiny.crop_stage(name, tiny, Options(Path("unused")))
        assert set(stage.optimizers().parts) == ({"adamw", "muon"} if name == "muon" else {"adamw"})
        assert (rates.lr, rates.matrix_lr) == (
            (2e-3, 0.02) if name == "muon" else (float(name.removeprefix("adamw-")), 0)
        )


def test_the_layouts_ask_the_same() -> None:
    tiny, options = TinyForTraining(0), Options(Path("unused"), pictures=2)
    trees = LAYOUTS["trees"](tiny, options)
    tree, rows = trees.sides.values()
    assert sum(len(b.input_ids) for b in tree) == 2
    assert sum(len(b.input_ids) for b in rows) == trees.questions > 10
    packing = LAYOUTS["packing"](tiny, options)
    padded, packed = packing.sides.values()
    assert packing.steps == len(padded) == len(plans.FINE.kinds)
    for one, other in ((tree, rows), (padded, packed)):
        labels = [
            sorted(i for b in side for i in b.labels[b.labels >= 0].tolist())
            for side in (one, other)
        ]
        assert labels[0] == labels[1]
    assert max(b.input_ids.shape[1] for b in packed) <= ablate_tiny.ROW_TOKENS


def test_layouts_with_another_loss_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tiny: TinyForTraining, options: Options) -> ablate_tiny.Layouts:
        stage = QuestionStage(tiny, 0, 2, plans.PRESENCE, batch_size=1)
        sides = {str(step): [stage.batch(step)[0]] for step in range(2)}
        return ablate_tiny.Layouts(sides, 1, 16)

    monkeypatch.setitem(LAYOUTS, "trees", wrong)
    with pytest.raises(ValueError, match="the sides do not learn the same"):
        ablate_tiny.run_cost("trees", Options(Path("unused"), rounds=1), Path("unused"))


# ---- the script ----


@pytest.mark.slow
def test_all_runs(vision: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """One step of each; lines and logs stay, and what is done is not done again."""
    # Untrained, it never ends by itself.
    monkeypatch.setattr(exam, "EMOJI", replace(exam.EMOJI, default_max_new_tokens=4))
    monkeypatch.setattr(plans, "FINE", replace(plans.FINE, kinds="cs"))  # fewer to time
    page = tmp_path / "page.md"
    page.write_text("<!-- table -->\n<!-- end of table -->\n")
    out = tmp_path / "out"
    command = ["--vision", str(vision), "--out", str(out), "--page", str(page), *SMALL]
    assert ablate_tiny.main(command) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == list(NAMES)
    for name in (*DECODER, *OPTIMISERS):
        assert (out / name / "log.jsonl").exists()
        assert not (out / name / "checkpoints").exists()
    for line in lines:
        if line["name"] in DECODER:
            assert {"presence", "blind"} <= set(line["scores"])
            assert len(line["settings"]["vision"]) == 64
    text = page.read_text()
    assert all(f"| {name} |" in text for name in NAMES)

    def fail(*_: object) -> None:
        raise AssertionError("a finished run began again")

    monkeypatch.setattr(ablate_tiny, "run_stages", fail)
    monkeypatch.setattr(ablate_tiny, "take_turns", fail)
    assert ablate_tiny.main(command) == 0
    assert ablate_tiny.main([*command, "--seed", "1"]) == 1
    assert "give the same options, or another --out" in capsys.readouterr().err


def test_what_the_presence_stage_learned(tmp_path: Path) -> None:
    """Two of three tokens of an answer are the same for yes and no; steps count once."""
    steps = [0.0] * 10 + [2 / 3] * 10 + [1.0] * 10
    lines = [
        {"stage": "presence", "step": i, "loss": 0.1, "token_accuracy_s": value}
        for i, value in enumerate(steps)
    ]
    lines = [*lines[:25], *lines[15:]]  # stopped behind step 24, resumed from a checkpoint at 14
    lines += [
        {"stage": "presence", "step": 29, "presence": 0.5},
        {"stage": "coarse", "step": 1, "loss": 5.0, "token_accuracy_s": 0.1},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ablate_tiny.answers_right(tmp_path) == pytest.approx(0.5)


@pytest.mark.slow
def test_without_coarse_steps_nothing_is_asked(vision: Path, tmp_path: Path, capsys) -> None:
    command = ["--vision", str(vision), "--out", str(tmp_path), *SMALL, "--coarse-steps", "0"]
    assert ablate_tiny.main([*command, "--only", "baseline", "presence"]) == 0
    baseline, presence = ablate_tiny.read_results(tmp_path).values()
    assert set(baseline["scores"]) == {"learned"}
    assert presence["scores"] == {}  # its presence stage asks other questions
    baseline["scores"]["learned"] = 0.75
    text = ablate_tiny.table({"baseline": baseline, "presence": presence})
    assert text.startswith("1 steps of presence, 1 pictures each, scale full, seed 0:")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[-1] for row in rows] == [ablate_tiny.COLUMNS["learned"], "---", "0.750", "-"]


def test_a_stopped_run_goes_on(vision: Path, tmp_path: Path, monkeypatch) -> None:
    done = []

    def scores(model, processor, plan):
        done.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        raise KeyboardInterrupt if len(done) == 1 else ValueError

    monkeypatch.setattr(ablate_tiny, "evaluate", scores)
    command = ["--vision", str(vision), "--out", str(tmp_path), "--only", "baseline", *SMALL]
    with pytest.raises(KeyboardInterrupt):
        ablate_tiny.main(command)
    log = (tmp_path / "baseline" / "log.jsonl").read_bytes()
    assert not (tmp_path / "results.jsonl").exists()
    assert ablate_tiny.main(command) == 1
    assert torch.equal(*done)  # read from the checkpoint
    assert (tmp_path / "baseline" / "log.jsonl").read_bytes() == log


def test_runs_start_with_the_vision_of_the_checkpoint(vision: Path) -> None:
    checkpoint = ablate_tiny.find_vision(vision)
    assert json.loads((checkpoint / ABOUT).read_text())["stage"] == 3
    assert ablate_tiny.find_vision(checkpoint) == checkpoint
    stored = torch.load(checkpoint / FILE, weights_only=True)["weights"]
    fresh = TinyForTraining(0).state_dict()
    for ablation in DECODER.values():
        tiny = ablation.start(0)
        decoder = {n: p.clone() for n, p in tiny.state_dict().items() if "model.llm." in n}
        ablate_tiny.load_vision(tiny, checkpoint)
        for name, value in tiny.state_dict().items():
            assert torch.equal(value, decoder.get(name, stored[name])), name
        assert torch.equal(tiny.visual_targets(), stored[TABLE][tiny.noun_ids])
    changed = "model.vision_encoder.patch_embedding.weight"
    assert not torch.equal(stored[changed], fresh[changed])


def test_nouns_come_with_the_vision(vision: Path, tmp_path: Path) -> None:
    """A run of another seed, or one whose presence stage has begun, has nouns of its own."""
    other = TinyForTraining(1)
    ablate_tiny.load_vision(other, ablate_tiny.find_vision(vision))
    nouns = TinyForTraining(0).noun_embeddings()
    assert torch.equal(other.noun_embeddings(), nouns)
    table = other.model.llm.embed_tokens.weight
    for category, plural in other.plural_ids.items():
        assert torch.equal(table[plural], nouns[category])
    later = tmp_path / "later"
    shutil.copytree(vision, later)
    train.train_tiny(later, scale="smoke", resume=True, config=replace(QUIET, stop_after=1))
    checkpoint = ablate_tiny.find_vision(later)
    assert json.loads((checkpoint / ABOUT).read_text())["stage"] == 4
    ablate_tiny.load_vision(other, checkpoint)
    torch.testing.assert_close(other.noun_embeddings(), nouns)


def test_wrong_vision_is_refused(vision: Path, tmp_path: Path, capsys) -> None:
    checkpoint = ablate_tiny.find_vision(vision)
    with pytest.raises(
        ValueError, match="no checkpoint of the scenes, the presence or the settle stage"
    ):
        ablate_tiny.find_vision(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    with open(damaged / FILE, "ab") as stream:
        stream.write(b"x")
    with pytest.raises(ValueError, match="is not as it was written"):
        ablate_tiny.find_vision(damaged)
    assert ablate_tiny.main(["--out", str(tmp_path / "o"), "--only", "baseline"]) == 1
    assert "give --vision" in capsys.readouterr().err
    assert ablate_tiny.main(["--out", str(tmp_path / "o"), "--only", "sleep"]) == 1
    assert "no run 'sleep': choose from baseline, alignment" in capsys.readouterr().err
