from __future__ import annotations

import json

import pytest
import torch

from nanomolmo2.convert.pretrained import load
from nanomolmo2.models import preset
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
        *("crops", "scenes", "presence", "coarse", "fine", "relations")
    ]
    assert len(scored) == 4
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
    assert all(p.grad is not None for p in model.llm.parameters())


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


def test_tiny_is_small_enough_to_ship():
    model = tiny.Learner(0).model
    assert 2 * sum(p.numel() for p in model.parameters()) < 16e6
