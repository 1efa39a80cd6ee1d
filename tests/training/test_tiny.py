from __future__ import annotations

import json

import pytest
import torch

from nanomolmo2.convert.pretrained import load
from nanomolmo2.models import preset
from nanomolmo2.processor.points import SCALE, parse_points
from nanomolmo2.training import tiny
from nanomolmo2.training.loop import LoopConfig
from nanomolmo2.training.tiny import QuestionStage, train_tiny

QUIET = LoopConfig(log_every=1, save_every=1, workers=0, quiet=True)


def test_all_stages_run_and_leave_a_model_that_loads(tmp_path):
    scored = []
    assert train_tiny(
        tmp_path,
        scale="smoke",
        config=QUIET,
        evaluate=lambda model, processor: scored.append(model) or {"presence": 0.5},
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    stages = [line["stage"] for line in lines if "loss" in line]
    assert list(dict.fromkeys(stages)) == [
        *("crops", "varied", "mosaics", "scenes"),
        *("presence", "coarse", "fine", "finish", "settle", "last", "agree", "several"),
        *("again", "counts"),
    ]
    assert len(scored) == 9
    model, _ = load(str(tmp_path / "model"))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert model.config == preset("tiny")
    with pytest.raises(ValueError, match="already holds a run"):
        train_tiny(tmp_path, scale="smoke", config=QUIET)


def test_the_placeholder_embedding_stays_zero():
    """Adding features to it (transformers) and replacing it (vLLM) are then the same."""
    learner = tiny.Learner(0)
    stage = QuestionStage(learner, 0, 2, tiny.COARSE, batch_size=2)
    stage.begin()
    row = learner.model.llm.embed_tokens.weight[learner.model.config.image_token_id]
    assert row.abs().max() == 0
    loss, _ = stage.loss(stage.batch(0))
    loss.backward()
    with torch.no_grad():
        learner.model.llm.embed_tokens.weight -= learner.model.llm.embed_tokens.weight.grad
    assert row.abs().max() > 0
    stage.after_step()
    assert row.abs().max() == 0


@pytest.mark.parametrize(("plan", "learns"), [(tiny.PRESENCE, False), (tiny.FINE, True)])
def test_frozen_vision_gets_no_gradient(plan, learns):
    learner = tiny.Learner(0)
    stage = QuestionStage(learner, 0, 2, plan, batch_size=2)
    stage.begin()
    loss, _ = stage.loss(stage.batch(0))
    loss.backward()
    model = learner.model
    for part in (model.vision_encoder, model.connector):
        assert all((p.grad is not None) == learns for p in part.parameters())
    matcher = ("q_proj", "k_proj", "q_norm", "k_norm")
    for name, p in model.llm.named_parameters():
        frozen = plan.first and any(part in name for part in matcher)
        frozen |= any(name.startswith(f"layers.{i}.") for i in tiny.SLEEPERS)
        assert (p.grad is None) == frozen, name


def test_the_first_questions_move_no_noun():
    """Vision is aligned with them, and the first steps of Adam have full size in all directions."""
    learner = tiny.Learner(0)
    stage = QuestionStage(learner, 0, 2, tiny.PRESENCE, batch_size=2)
    stage.begin()
    nouns, table = learner.noun_embeddings().clone(), learner.model.llm.embed_tokens.weight
    optimizers = stage.optimizers()
    before = table.clone()
    for step in range(2):
        optimizers.set_rates(step, 2)
        stage.gradients(stage.batch(step))
        optimizers.step()
    assert torch.equal(nouns, learner.noun_embeddings())
    assert not torch.equal(before, table)


def test_words_are_set_apart_from_the_start():
    """In the first layer a word's scores fall for words, and for visual tokens stay."""
    learner = tiny.Learner(0)
    model = learner.model
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(256, generator=generator)
    visual = 0.1 * (common + torch.randn(1, 36, 256, generator=generator))
    words = torch.tensor([[learner.noun_ids[i] for i in range(20)]])

    def scores():
        layer = model.llm.layers[0]
        x = torch.cat([visual, model.llm.embed_tokens(words)], dim=1)
        x = layer.input_layernorm(x)
        attention = layer.self_attn
        q, k = (
            norm(projection(x).unflatten(-1, (-1, 64)))
            for projection, norm in (
                (attention.q_proj, attention.q_norm),
                (attention.k_proj, attention.k_norm),
            )
        )
        return torch.einsum("bqhd,bkhd->bhqk", q[:, 36:, :2], k[:, :, :1].expand(-1, -1, 2, -1))

    with torch.no_grad():
        before = scores() / 8
        learner.set_words_apart()
        change = scores() / 8 - before
    assert change[..., :36].mean().abs() < 0.3
    assert -4 < change[..., 36:].mean() < -0.5


def test_batches_depend_on_seed_and_step_only():
    learner = tiny.Learner(0)
    for stage in tiny.tiny_stages(learner, 0, "smoke"):
        first, again, other = stage.batch(0), stage.batch(0), stage.batch(1)
        if isinstance(stage, QuestionStage):
            first, again, other = (b[0].input_ids for b in (first, again, other))
        else:
            first, again, other = (b[0] for b in (first, again, other))
        assert torch.equal(first, again)
        assert first.shape != other.shape or not torch.equal(first, other)


def test_attention_starts_as_a_matcher():
    attention = tiny.Learner(0).model.llm.layers[0].self_attn
    q = attention.q_proj.weight.unflatten(0, (4, 64))
    k = attention.k_proj.weight.unflatten(0, (2, 64))
    for head in range(4):
        assert torch.equal(q[head], k[head // 2])


def answers(learner: tiny.Learner) -> torch.Tensor:
    ids = torch.tensor([[learner.noun_ids[i] for i in range(9)]])
    with torch.no_grad():
        return learner.model.llm(ids)


def test_sleeping_layers_add_nothing():
    learner = tiny.Learner(0)
    slept = answers(learner)
    with learner.without_sleepers():
        assert len(learner.model.llm.layers) == 4
        torch.testing.assert_close(answers(learner), slept, rtol=0, atol=0)


def test_leaving_sleeping_layers_out_changes_nothing():
    learner = tiny.Learner(0)
    stage = QuestionStage(learner, 0, 2, tiny.COARSE, batch_size=2)
    stage.begin()
    batch = stage.batch(0)
    loss, _ = stage.loss(batch)
    loss.backward()
    table = learner.model.llm.embed_tokens.weight
    gradient, table.grad = table.grad, None
    assert len(learner.model.llm.layers) == 6  # again, behind the loss
    _, whole = learner.model(**batch.questions.tensors())
    whole.backward()
    assert torch.equal(whole, loss)
    assert torch.equal(table.grad, gradient)


def test_layers_wake_as_the_ones_before_and_change_nothing_at_once():
    learner = tiny.Learner(0)
    before = answers(learner)
    stage = QuestionStage(learner, 0, 2, tiny.LAST, batch_size=2)
    stage.begin()
    torch.testing.assert_close(answers(learner), before, rtol=0, atol=0)
    layers = learner.model.llm.layers
    for i in tiny.SLEEPERS:
        assert torch.equal(layers[i].mlp.up_proj.weight, layers[i - 1].mlp.up_proj.weight)
    loss, _ = stage.loss(stage.batch(0))
    loss.backward()
    for i in tiny.SLEEPERS:
        assert layers[i].self_attn.o_proj.weight.grad.abs().max() > 0
        assert layers[i].mlp.down_proj.weight.grad.abs().max() > 0


def test_image_tokens_learn_to_agree_inside_of_the_decoder():
    """Behind `last`: its layers stay as they are; claims reach only the layers before them."""
    learner = tiny.Learner(0)
    stage = QuestionStage(learner, 0, 4, tiny.AGREE, batch_size=2)
    layers, heads = learner.model.llm.layers, learner.heads
    for p in layers.parameters():
        torch.nn.init.normal_(p, std=0.02)
    before = {name: p.clone() for name, p in layers.named_parameters()}
    stage.begin()
    assert all(torch.equal(p, before[name]) for name, p in layers.named_parameters())
    assert torch.equal(heads.claim.weight, heads.cell_object.weight)
    batch = stage.batch(0)
    inputs = batch.questions.tensors()
    *_, states = learner.model(**inputs, output_hidden_states=True)
    image = inputs["input_ids"] == learner.model.config.image_token_id
    hidden = torch.stack([s[i] for s, i in zip(states[tiny.CLAIM_LAYERS], image, strict=True)])
    claims, found = heads.claim_loss(hidden, batch.owners)
    assert stage.loss(batch)[1]["claim_loss"] == pytest.approx(found["claim_loss"], rel=1e-5)
    claims.backward()
    for i, layer in enumerate(layers):
        assert (layer.mlp.down_proj.weight.grad is not None) == (i < tiny.CLAIM_LAYERS)
    assert heads.claim.weight.grad.abs().max() > 0


def test_a_stage_may_show_pictures_and_videos_of_its_own():
    stage = QuestionStage(tiny.Learner(0), 0, 8, tiny.SEVERAL, batch_size=16)
    _, scenes = stage.encode(tiny.SEVERAL.kinds.index("s"))
    kinds = [{o.category for o in scene.objects} for scene in scenes]
    repeated = sum(len(own) < len(scene.objects) for own, scene in zip(kinds, scenes, strict=True))
    assert min(len(scene.objects) for scene in scenes) >= 2
    assert repeated >= 12  # of 16; half of usual pictures
    _, clips = stage.encode(tiny.SEVERAL.kinds.index("c"))
    assert sum(len(clip.video.frames) for clip in clips) >= 32


@pytest.mark.parametrize("name", ["coarse", "finish"])
def test_the_small_scale_points_on_a_coarse_grid_and_leaves_vision_alone(name):
    learner = tiny.Learner(0, scenes=tiny.SCALES["small"].look)
    stages = {stage.name: stage for stage in tiny.tiny_stages(learner, 0, "small")}
    assert set(stages[name].components()) == {"llm"}
    encoded, scenes = stages[name].encode(0)
    assert {o.style for scene in scenes for o in scene.objects} == {"fluent-3d"}
    decode = learner.processor.tokenizer.decode
    texts = [decode(one.input_ids.tolist()) for one in encoded]
    points = [point for text in texts for point in parse_points(text, [(SCALE, SCALE)])]
    numbers = [number for point in points for number in (point.x, point.y)]
    assert len(numbers) > 100
    assert all(n % 100 == 0 for n in numbers)


def test_nobody_labels_pictures_for_stages_that_teach_words_alone():
    for plan, labelled in ((tiny.PRESENCE, False), (tiny.COARSE, False), (tiny.FINISH, True)):
        batch = QuestionStage(tiny.Learner(0), 0, 1, plan, batch_size=1).batch(0)
        assert (batch.owners is not None) == (batch.labels is not None) == labelled


def test_what_is_where_in_videos_is_known_frame_by_frame():
    stage = QuestionStage(tiny.Learner(0), 0, 4, tiny.AGREE, batch_size=2)
    step = tiny.AGREE.kinds.index("c")
    _, clips = stage.encode(step)
    owners = stage.batch(step).owners
    frames = [(clip, i) for clip in clips for i in range(len(clip.video.frames))]
    assert owners.shape == (len(frames), 36)
    for (clip, i), found in zip(frames, owners, strict=True):
        centres = [c for o in clip.objects if (c := o.center(i)) is not None]
        assert set(found.tolist()) - {-100} <= set(range(len(centres)))
        cells = {int(y // 32) * 6 + int(x // 32) for x, y in centres}
        assert all(found[cell] >= 0 for cell in cells)
        assert not centres or len(found[found >= 0]) >= len(cells) > 0


def test_without_a_compiler_nothing_is_compiled(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not tiny.has_compiler()
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setattr(tiny.sysconfig, "get_path", lambda name: str(tmp_path))
    assert not tiny.has_compiler()
    (tmp_path / "Python.h").touch()
    assert tiny.has_compiler()


def test_tiny_is_small_enough_to_ship():
    model = tiny.Learner(0).model
    assert 2 * sum(p.numel() for p in model.parameters()) < 16e6
