"""What of a model that points learns, at which rate, and how a model gets its point head."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from nanomolmo2.accelerate import defaults
from nanomolmo2.accelerate.new_rows import (
    NewRowsHead,
    NewRowsTiedHead,
    join_new_rows,
    split_new_rows,
)
from nanomolmo2.batch import NO_MORE_POINTS, Batch
from nanomolmo2.convert.pretrained import load, load_processor
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.models import NanoMolmo2, NanoMolmo2Config, preset
from nanomolmo2.processor import MultiCrop, Processor, ProcessorConfig
from nanomolmo2.recipes import finetune, recipe, smoke
from nanomolmo2.training.build import build, start_from
from nanomolmo2.training.new_words import add_new_words
from nanomolmo2.training.optim import OptimConfig, Optimizers, components, set_trainable
from nanomolmo2.training.plan import predict, setup_for
from nanomolmo2.training.point_head import (
    point_processor,
    with_marker_tokens,
    with_point_config,
    with_point_head,
)
from tests.nets import greatest_difference
from tests.training.recipes import toy

RATES = OptimConfig(lr=1e-2, matrix_lr=0.0, warmup_steps=0, final_ratio=1.0)
PARTS = ("vision", "connector", "llm", "points")
BASE = 736  # tokens of tiny's vocabulary, behind which those of its own stand

pytestmark = pytest.mark.usefixtures("one_thread")


def sizes(*, tied: bool = True) -> NanoMolmo2Config:
    """A model of one layer that points."""
    config = toy(recipe("gui")).architecture
    assert config is not None and config.point_config is not None
    llm = dataclasses.replace(config.llm_config, tie_word_embeddings=tied)
    return dataclasses.replace(config, llm_config=llm)


def made(*, tied: bool = True, seed: int = 1) -> NanoMolmo2:
    torch.manual_seed(seed)
    return defaults(NanoMolmo2(sizes(tied=tied)))


def batch_of(model: NanoMolmo2, seed: int = 0) -> Batch:
    """A row with a picture, a point and the end of its list."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    n, side = config.num_visual_tokens, config.vision_config.image_size
    assert config.point_config is not None
    patch, subpatch, location = config.point_config.marker_ids
    text = torch.randint(700, (8,), generator=generator).tolist()
    ids = torch.tensor([[*[config.image_token_id] * n, *text, patch, subpatch, location, 9, patch]])
    labels = ids.clone()
    labels[:, : n + 4] = -100
    return Batch(
        ids,
        labels=labels,
        pixel_values=torch.randn(1, 3, side, side, generator=generator),
        point_targets=torch.tensor([[seed % n, 2, 7], [NO_MORE_POINTS, -1, -1]]),
    )


# ---- what learns ----


def test_point_modules_are_a_part_with_a_rate_of_its_own() -> None:
    model = made()
    rates = {part: dataclasses.replace(RATES, lr=10.0**-k) for k, part in enumerate(PARTS, 3)}
    set_trainable(model, PARTS)
    found = components(model, PARTS, rates)
    assert model.point_predictor is not None
    assert {id(p) for p in found["points"][0].parameters} == {
        *map(id, model.point_predictor.parameters())
    }
    learned = [p for selection, _ in found.values() for p in selection.parameters]
    assert len({*map(id, learned)}) == len(learned)
    assert {*map(id, learned)} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizers = Optimizers(found)
    assert optimizers.rates() == {part: rates[part].lr for part in PARTS}
    set_trainable(model, ("connector",))
    assert not any(p.requires_grad for p in model.point_predictor.parameters())


def test_points_of_a_model_without_them_cannot_learn() -> None:
    config = toy(smoke()).architecture
    with pytest.raises(ValueError, match="writes coordinates as text and has no such part"):
        set_trainable(NanoMolmo2(config), ("points",))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_rows_of_the_markers_learn_with_the_connector(tied: bool, split: bool) -> None:
    """Trap 30: the head has to learn to write the markers, also where the decoder stays: of table
    and head the base rows stay as they are, bit for bit.
    """
    model = made(tied=tied)
    if split:
        split_new_rows(model.llm)
    parts = ("connector", "points")
    set_trainable(model, parts)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizers = Optimizers(components(model, parts, dict.fromkeys(parts, RATES)))
    model.loss(batch_of(model)).backward()
    optimizers.clip(1.0)
    optimizers.step()
    join_new_rows(model.llm)
    after = model.state_dict()
    tables = ["llm.embed_tokens.weight"] + ([] if tied else ["llm.lm_head.weight"])
    for name in tables:
        was = before[name]
        if split:
            was = torch.cat((was, before[f"{name.removesuffix('weight')}new_rows"]))
        assert torch.equal(after[name][:BASE], was[:BASE])
        assert not torch.equal(after[name][BASE + 11 :], was[BASE + 11 :])  # the markers
    for name, value in after.items():
        if name.startswith(("llm.layers", "vision_encoder.")):
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("tied", [True, False])
def test_rows_apart_compute_and_learn_as_those_of_whole_tables(tied: bool) -> None:
    models = []
    for split in (False, True):
        model = made(tied=tied)
        if split:
            split_new_rows(model.llm)
        parts = ("vision", "connector", "points")
        set_trainable(model, parts)
        optimizers = Optimizers(components(model, parts, dict.fromkeys(parts, RATES)))
        for seed in range(2):
            model.loss(batch_of(model, seed), z_loss=1e-2).backward()
            optimizers.clip(0.1)
            optimizers.step()
        models.append(model)
    whole, apart = models
    head = apart.llm.tied_head if tied else apart.llm.lm_head
    assert isinstance(head, NewRowsTiedHead if tied else NewRowsHead)
    batch = batch_of(whole, 5)
    for model in models:
        model.eval()
    with torch.no_grad():
        expected, found = whole(batch), apart(batch)
    assert found.logits.shape[-1] == whole.config.llm_config.num_embeddings == BASE + 16
    assert greatest_difference(found.logits, expected.logits) < 2e-4
    join_new_rows(apart.llm)
    assert apart.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(apart.state_dict()[name], tensor, rtol=1e-3, atol=2e-5)
    with torch.no_grad():
        assert greatest_difference(apart(batch).logits, expected.logits) < 2e-4


def test_rows_of_a_head_learn_at_the_connectors_rate_beside_the_decoder() -> None:
    """As in MolmoPoint's training, where they are weights of their own."""
    model = made(tied=False)
    split_new_rows(model.llm)
    set_trainable(model, PARTS)
    found = components(model, PARTS, dict.fromkeys(PARTS, RATES))
    head = model.llm.lm_head
    assert isinstance(head, NewRowsHead)
    of = {part: {*map(id, selection.parameters)} for part, (selection, _) in found.items()}
    assert id(head.new_rows) in of["connector"] and id(head.weight) in of["llm"]
    assert not found["connector"][0].frozen_rows


# ---- rates of recipes ----


def test_molmopoints_numbers() -> None:
    names = ("molmo_point_stage1", "molmo_point_stage2", "molmo_point_stage3", "gui")
    recipes = [recipe(name) for name in names]
    for made_ in recipes:
        assert made_.train == PARTS and made_.optimisers["points"].lr == 1e-4
        for rate in made_.optimisers.values():
            assert (rate.betas, rate.eps, rate.weight_decay) == ((0.9, 0.95), 1e-6, 0.0)
            assert (rate.final_ratio, rate.matrix_lr) == (0.1, 0.0)
        assert (made_.z_loss, made_.clip_norm, made_.dtype) == (1e-4, 1.0, "bfloat16")
        assert made_.residual_dropout == 0.1
    rates = [[made_.optimisers[part].lr for part in PARTS[:3]] for made_ in recipes]
    assert rates == [[6e-6, 2e-4, 2e-5], *[[5e-6, 5e-6, 1e-5]] * 3]
    warmups = [[made_.optimisers[part].warmup_steps for part in PARTS] for made_ in recipes]
    assert warmups == [[2000, 200, 2000, 200], *[[200] * 4] * 3]
    assert [made_.steps for made_ in recipes] == [31_000, 22_000, 2_000, 2_000]
    assert [made_.batch_size for made_ in recipes] == [128, 160, 160, 128]
    assert [made_.sequence_length for made_ in recipes] == [2536, 16_384, 37_376, 12_288]
    assert [made_.max_crops for made_ in recipes] == [16, 128, 384, 49]
    assert recipes[3].packing_buffer == 32 and recipes[3].crop_weight == 10
    shares = [source.sampling_weight for source in recipes[1].data]
    assert sum(share or 0 for share in shares) == pytest.approx(1)
    architecture, released = recipes[0].architecture, preset("molmo-point-8b")
    assert architecture is not None and architecture.point_config is not None
    assert architecture.point_config.rule == "consistent"
    assert released.point_config is not None
    assert architecture.point_config.marker_ids == released.point_config.marker_ids
    assert dataclasses.replace(architecture, point_config=released.point_config) == released
    for name, left in zip(names[1:], ("stage1", "stage2", "stage3"), strict=True):
        assert recipe(name).model == f"runs/molmo_point_{left}/model"


def test_the_stages_of_molmopoint_are_planned_before_they_ran() -> None:
    for name in ("molmo_point_stage2", "gui"):
        setup = setup_for(recipe(name), 8, "cuda")
        assert setup.model == preset("molmo-point-8b")
        assert predict(setup).total > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_counts_the_point_modules(tied: bool) -> None:
    """And of table and head only the rows that learn."""
    config = sizes(tied=tied)
    planned = toy(recipe("gui"), dtype="float32", architecture=config)
    model, memory = NanoMolmo2(config), predict(setup_for(planned, 1, "cpu"))
    total = sum(p.numel() for p in model.parameters())
    frozen = BASE * config.llm_config.hidden_size  # of the table; a head of its own learns
    assert memory.weights == 4 * total
    assert memory.gradients == 4 * (total - frozen)
    assert memory.moments == 8 * (total - frozen)


def test_a_point_model_is_fine_tuned_with_its_point_modules(tmp_path: Path) -> None:
    model, processor = build(toy(recipe("gui")))
    model.save_pretrained(tmp_path / "model", processor=processor)
    small = finetune(("my.jsonl",), str(tmp_path / "model"), steps=2)
    assert small.train == ("vision", "connector", "llm", "embeddings", "points")
    assert small.optimisers["points"].lr == 5e-4
    lora = finetune(("my.jsonl",), str(tmp_path / "model"), steps=2, lora=True, lr=1e-5)
    assert lora.train == ("connector", "points", "lora")
    large = finetune(("my.jsonl",), "allenai/MolmoPoint-8B", steps=2)
    assert large.train == ("connector", "llm", "points")
    assert {part: rate.lr for part, rate in large.optimisers.items()} == {
        "connector": 1e-5,
        "llm": 1e-5,
        "points": 1e-4,
    }
    assert finetune(("my.jsonl",), "tiny", steps=2).train[-1] == "embeddings"
    assert finetune(("my.jsonl",), "tiny", steps=2, points=True).train[-1] == "points"


# ---- fresh point modules ----


def test_what_is_fresh_starts_as_molmopoint_does() -> None:
    """Matrices N(0, 0.02), biases and the vector of no-more-points 0; rows of the head likewise."""
    stage = toy(recipe("gui"), architecture=sizes(tied=False))
    model, _ = build(stage)
    points, head = model.point_predictor, model.llm.lm_head
    assert points is not None and head is not None
    for name, parameter in points.named_parameters():
        if name.endswith(("bias", "vector")):
            assert not parameter.any()
        elif name != "x_norm.weight":
            spread = 0.02 * (1 + 4 * parameter.numel() ** -0.5)
            assert 0.04 - spread < parameter.std() < spread
            assert abs(float(parameter.detach().mean())) < 5 * 0.02 * parameter.numel() ** -0.5
    assert 0.018 < head.weight[BASE:].std() < 0.022
    start = NanoMolmo2(dataclasses.replace(sizes(tied=False), point_config=None)).llm
    rows = head.weight[BASE:].clone()
    llm = dataclasses.replace(start.config, predict_additional_vocab=False)
    pretrained = type(start)(llm)
    start_from(model.llm, pretrained)
    assert torch.equal(head.weight[:BASE], pretrained.lm_head.weight)
    assert torch.equal(head.weight[BASE:], rows)


def test_a_text_model_gets_a_point_head_and_keeps_all_it_has() -> None:
    before, processor = load("tiny", device="cpu")
    torch.manual_seed(0)
    model, ours = with_point_head(load("tiny", device="cpu")[0], processor)
    old, new = before.state_dict(), model.state_dict()
    assert {n for n in new if n not in old} == {n for n in new if n.startswith("point_predictor.")}
    assert all(torch.equal(new[name], value) for name, value in old.items())
    rule = model.config.point_config
    assert rule is not None and rule.rule == "consistent" and rule.marker_ids == (747, 748, 749)
    assert rule.image_non_indexable_patch_id is None and rule.patch_embed_dim == 64
    assert ours.config.points is not None and ours.config.points.num_embeddings == 752
    assert ours.tokenizer.special_ids["<|token_index|>"] == 747
    assert ours.tokenizer.vocab_size == processor.tokenizer.vocab_size
    text = "Point to the dog."
    assert ours.tokenizer.encode_text(text) == processor.tokenizer.encode_text(text)
    assert with_point_head(model, ours) == (model, ours)
    for mixed in ((model, processor), (before, ours)):
        with pytest.raises(
            ValueError, match="the processor does not belong to the model: it writes"
        ):
            Pipeline(*mixed)
    ids = torch.randint(700, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, expected = model.eval()(ids), before.eval()(ids)
    torch.testing.assert_close(logits[..., :BASE], expected, rtol=1e-4, atol=1e-4)


def test_with_crops_overviews_stay_what_they_were() -> None:
    """They are shown by a token of their own, which starts as the image token's row."""
    side = toy(smoke()).architecture
    assert side is not None
    vision = dataclasses.replace(side.vision_config, image_size=96)
    config = dataclasses.replace(side, vision_config=vision)
    crops = MultiCrop(image_size=96, patch_size=vision.patch_size, overlap_margins=(1, 1))
    settings = ProcessorConfig.molmo2(multicrop=crops)
    processor = Processor(settings, load_processor("tiny").tokenizer)
    model = NanoMolmo2(config)
    with torch.no_grad():
        model.llm.embed_tokens.weight[config.image_token_id] = 0.25
    model, ours = with_point_head(model, processor)
    rule = model.config.point_config
    assert rule is not None and rule.image_non_indexable_patch_id == 742
    row = model.llm.embed_tokens.weight[742]
    assert torch.equal(row, torch.full_like(row, 0.25))
    assert ours.config.points is not None and ours.config.points.overview_token == "<im_low>"


def test_where_no_marker_has_a_place_is_said() -> None:
    processor = load_processor("tiny")
    with pytest.raises(ValueError, match=r"no place for <\|token_index\|>.*11 ids"):
        with_marker_tokens(processor.tokenizer, BASE, 11)
    with pytest.raises(ValueError, match=r"place for <im_start>.*reserved_14\|>' at 725"):
        with_marker_tokens(processor.tokenizer, BASE - 11, 16)
    linear = NanoMolmo2Config(freeze_vision=False)
    with pytest.raises(ValueError, match="connector is 'linear', and only of windows"):
        with_point_config(linear)
    changed = dataclasses.replace(
        preset("tiny-point"),
        point_config=dataclasses.replace(
            preset("tiny-point").point_config,  # type: ignore[type-var]
            patch_token_id=750,
        ),
    )
    with pytest.raises(ValueError, match=r"markers \(750, 748, 749\).*\(747, 748, 749\)"):
        point_processor(processor, changed)


def test_new_words_move_the_tokens_of_points() -> None:
    """A word for which no base row is left makes the base vocabulary grow."""
    model, processor = with_point_head(*load("tiny", device="cpu"))
    words = [f"zz{a}{b}" for a in "abcdef" for b in "klmnopq"]
    grown, ours = add_new_words(model, processor, words[:30])
    added = grown.config.llm_config.vocab_size - BASE
    assert added == 5  # 25 tokens were reserved
    rule = grown.config.point_config
    assert rule is not None and rule.marker_ids == (752, 753, 754)
    assert [ours.tokenizer.special_ids[name] for name in ours.config.points.markers] == [  # type: ignore[union-attr]
        *rule.marker_ids
    ]
    assert ours.config.points is not None and ours.config.points.num_embeddings == 752 + added
    assert grown.config.llm_config.num_logits == 752 + added
