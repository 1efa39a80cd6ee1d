"""Changes of recipes: rates, parts, LoRA, length, any field; and what follows from a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanomolmo2.models import preset
from nanomolmo2.models.connector import MultimodalConnector
from nanomolmo2.recipes import base, finetune, recipe, smoke
from nanomolmo2.recipes.changes import (
    with_lora,
    with_parts,
    with_rate,
    with_steps,
    with_values,
)
from nanomolmo2.recipes.fresh import has_fresh_connector, is_fresh
from nanomolmo2.recipes.length import (
    FEWEST,
    MOST,
    default_epochs,
    with_default_length,
    with_epochs,
)
from nanomolmo2.training.lora import LoraConfig
from nanomolmo2.training.recipe import Recipe
from tests.small_model import small_model, small_processor


def rates(made: Recipe) -> dict[str, float]:
    return {part: made.optimisers[part].lr for part in made.train}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model that was never trained."""
    folder = tmp_path_factory.mktemp("fresh") / "model"
    small_model().save_pretrained(folder, processor=small_processor())
    return str(folder)


def records(path: Path, number: int) -> str:
    """Short texts: each takes 11 to 20 tokens."""
    lines = [{"question": f"What is {n}?", "answer": "A number."} for n in range(number)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


# ---- rates ----


def test_a_rate_is_that_of_the_decoder_and_the_others_keep_their_ratio() -> None:
    assert rates(base()) == {"connector": 2e-4, "llm": 2e-5}
    assert rates(with_rate(base(), 1e-5)) == {"connector": 1e-4, "llm": 1e-5}
    assert rates(with_rate(recipe("stage1"), 1e-4)) == {
        "vision": 3e-5,
        "connector": 1e-3,
        "llm": 1e-4,
    }
    assert with_rate(base(), 2e-5) == base()
    alone = with_parts(base(), ["connector"])
    assert rates(with_rate(alone, 1e-3)) == {"connector": 1e-3}


def test_muon_keeps_its_ratio_too() -> None:
    made = smoke()
    muon = {part: replace(config, matrix_lr=0.03) for part, config in made.optimisers.items()}
    faster = with_rate(replace(made, optimisers=muon), 6e-3)
    assert {(o.lr, o.matrix_lr) for o in faster.optimisers.values()} == {(6e-3, 0.06)}


def test_warm_ups_get_shorter_with_the_run_and_never_longer() -> None:
    made = with_steps(base(), 400)  # a fiftieth
    assert [o.warmup_steps for o in made.optimisers.values()] == [4, 40]
    longer = with_steps(base(), 40_000)
    assert [o.warmup_steps for o in longer.optimisers.values()] == [200, 2000]


# ---- parts and LoRA ----


def test_parts_that_have_no_rate_get_one() -> None:
    made = with_parts(base(), ["llm", "vision", "embeddings"])
    assert made.train == ("vision", "llm", "embeddings")
    assert rates(made) == {"vision": 4e-6, "llm": 2e-5, "embeddings": 2e-5}
    assert set(made.optimisers) == set(made.train)
    with pytest.raises(ValueError, match=r"train is .* expected at least one of vision"):
        with_parts(base(), ["visoin"])


def test_lora_takes_the_place_of_the_decoder_and_goes_with_it() -> None:
    made = with_lora(base(), rank=4)
    assert (made.train, made.lora) == (("connector", "lora"), LoraConfig(rank=4, alpha=8.0))
    assert rates(made) == {"connector": 2e-4, "lora": 2e-4}
    assert with_lora(made) == made
    assert with_parts(made, ["vision"]).train == ("vision", "lora")
    assert with_parts(made, ["llm"]).lora is None


# ---- any field ----


def test_any_field_is_set_by_its_path() -> None:
    settings = [
        "clip_norm=0.5",
        "optimisers.llm.warmup_steps=7",
        "data.0.name=my data",
        "dtype=float32",
    ]
    made = with_values(base(), [*settings, 'train=["llm"]', "feature_cache="])
    assert (made.clip_norm, made.optimisers["llm"].warmup_steps) == (0.5, 7)
    assert (made.data[0].name, made.dtype, made.train) == ("my data", "float32", ("llm",))
    assert with_values(base(), []) == base()
    scenes = with_values(smoke(), ["data.0.options.background=plain"])
    assert scenes.data[0].options["background"] == "plain"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("clip_nrom=1", "the recipe has no field 'clip_nrom': did you mean clip_norm"),
        ("optimisers.vision.lr=1", "optimisers has no field 'vision': it has connector, llm"),
        ("optimisers.llm.l=1", "optimisers.llm has no field 'l': did you mean lr"),
        ("data.9.name=a", "data has no field '9': it has 0, 1, 2, 3"),
        ("lora.rank=4", "lora is None .* has no fields: set it as a whole"),
        ("steps=many", "Recipe.steps: expected int, found 'many'"),
        ("steps=2.5", r"Recipe.steps: expected int, found 2.5"),
        ("steps=0", "steps must be at least 1, found 0"),
        ("compile=yes", "Recipe.compile: expected bool, found 'yes'"),
        ("clip_norm", "found 'clip_norm', expected field=value, as in clip_norm=0.5"),
        ("=1", "found '=1', expected field=value"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(setting: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        with_values(base(), [setting])


# ---- a fresh connector ----


@pytest.mark.parametrize("kind", ["linear", "mlp", "resampler", "pooling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_connector_is_fresh_until_it_learns(kind: str, dtype: torch.dtype) -> None:
    """Five steps are enough, in 16 bit too."""
    config = preset("tiny").connector_config
    assert config is not None
    torch.manual_seed(0)
    connector = MultimodalConnector(
        replace(config, connector_type=kind, vit_layers=None, num_attention_heads=4)
    )
    assert is_fresh(connector.to(dtype))
    connector.float()
    optimizer = torch.optim.AdamW(connector.parameters(), lr=2e-4, weight_decay=0.0)
    for _ in range(5):
        features = torch.randn(1, 144, config.vision_dim)
        outputs = connector(features)
        (outputs * torch.randn_like(outputs)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not is_fresh(connector.to(dtype))


def test_only_a_fresh_connector_learns_so_fast(fresh: str, tmp_path: Path) -> None:
    assert has_fresh_connector(fresh) and has_fresh_connector("base")
    assert not has_fresh_connector("tiny") and not has_fresh_connector("allenai/Molmo2-4B")
    data = records(tmp_path / "my.jsonl", 3)
    assert rates(finetune([data], "base", steps=1)) == {"connector": 2e-4, "llm": 1e-5}
    assert rates(finetune([data], "base", steps=1, lr=1e-3)) == {"connector": 2e-3, "llm": 1e-3}
    assert rates(finetune([data], "base", steps=1, lora=True)) == {"connector": 2e-4, "lora": 2e-4}
    trained, untrained = finetune([data], "tiny", steps=1), finetune([data], fresh, steps=1)
    assert rates(trained)["connector"] == 5e-4 == rates(untrained)["llm"]
    assert rates(untrained)["connector"] == 1e-3


def test_the_vision_encoder_and_the_table_learn_in_small_models_alone(tmp_path: Path) -> None:
    data = records(tmp_path / "my.jsonl", 3)
    small = finetune([data], "tiny", steps=1)
    assert small.train == ("vision", "connector", "llm", "embeddings")
    assert rates(small) == {"vision": 1e-4, "connector": 5e-4, "llm": 5e-4, "embeddings": 5e-4}
    assert finetune([data], "tiny", steps=1, lora=True).train == ("connector", "lora")
    assert finetune([data], "base", steps=1).train == ("connector", "llm")


# ---- length ----


def test_epochs_become_steps(fresh: str, tmp_path: Path) -> None:
    """Twenty tokens a row hold one of these texts."""
    data = records(tmp_path / "my.jsonl", 10)
    made = replace(finetune([data], fresh, steps=40), sequence_length=20, batch_size=2)
    assert with_epochs(made, 3).steps == 15
    assert with_epochs(made, 0.5).steps == 3  # five records, two a step
    assert with_epochs(replace(made, batch_size=5), 3).steps == 6


def test_a_default_length_follows_from_the_size_of_the_data(
    fresh: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = finetune([records(tmp_path / "few.jsonl", 2)], fresh)
    assert (few.steps, few.batch_size) == (FEWEST, 2)
    some = replace(finetune([records(tmp_path / "some.jsonl", 60)], fresh), sequence_length=20)
    assert with_default_length(some).steps == 60 * 25 / 2  # 1,500 examples, two a step
    monkeypatch.setattr("nanomolmo2.recipes.length.MOST", 400)
    longest = with_default_length(some)
    assert (longest.steps, longest.batch_size) == (375, 4)
    assert with_default_length(some, more_rows=False).steps == 400
    assert with_default_length(some, more_rows=False).batch_size == 2
    assert MOST == 10_000


def test_how_often_data_are_seen() -> None:
    assert [default_epochs(n, small=True) for n in (1, 30, 60, 300, 5_000)] == [50, 50, 25, 5, 3]
    assert [default_epochs(n, small=False) for n in (1, 5_000, 200_000)] == [3, 3, 1]


def test_data_that_are_not_there_leave_the_length(tmp_path: Path) -> None:
    """Training itself says what is wrong."""
    assert finetune([str(tmp_path / "none.jsonl")], "tiny").steps == FEWEST
