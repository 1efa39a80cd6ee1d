"""What does not learn: its dtype, 4 and 8 bits, what checkpoints hold, adapters apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import register_fsdp_forward_method

import nanomolmo2
from nanomolmo2 import cli
from nanomolmo2.accelerate import defaults
from nanomolmo2.accelerate.frozen_linear import FrozenLinear
from nanomolmo2.accelerate.new_rows import NewRowsEmbedding, join_new_rows, split_new_rows
from nanomolmo2.convert.adapters import CONFIG_NAME, OTHERS_NAME, WEIGHTS_NAME
from nanomolmo2.models import NanoMolmo2
from nanomolmo2.recipes import smoke
from nanomolmo2.training import distributed
from nanomolmo2.training.distributed import World, full_tensor, shard
from nanomolmo2.training.frozen import prepare, set_dtypes
from nanomolmo2.training.lora import LoraConfig, LoraLinear, load_lora, lora_parameters, merge_lora
from nanomolmo2.training.optim import OptimConfig, Optimizers, components, set_trainable
from nanomolmo2.training.recipe import Recipe
from nanomolmo2.training.trainer import build, train_recipe
from tests.training.recipes import toy

RATES = OptimConfig(lr=1e-2, matrix_lr=0.0, warmup_steps=0, final_ratio=1.0)
LORA = LoraConfig(rank=4, alpha=8.0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk, from which runs start."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model, processor = build(toy(smoke(), seed=3))
    model.save_pretrained(folder, processor=processor)
    return folder


def recipe_of(base: Path, train=("connector", "lora"), **changes) -> Recipe:
    settings = {
        "model": str(base),
        "architecture": None,
        "train": train,
        "lora": LORA if "lora" in train else None,
        "optimisers": dict.fromkeys(train, RATES),
        "steps": 4,
        "save_every": 2,
    }
    return toy(smoke(), **(settings | changes))


def train(recipe: Recipe, out: Path, **options) -> bool:
    return train_recipe(recipe, out, workers=0, quiet=True, **options)


@pytest.fixture(scope="module", params=["", "nf4"], ids=["lora", "qlora"])
def run(request, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with LoRA that was never stopped."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("run") / "run"
    assert train(recipe_of(base, frozen_weights=request.param), out)
    return out


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return nanomolmo2.load(str(folder), device="cpu")[0].state_dict()


def toy_batch(model: NanoMolmo2, seed: int = 0) -> dict[str, torch.Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(seed)
    visual = config.num_visual_tokens
    ids = torch.randint(0, 600, (1, visual + 24), generator=generator)
    ids[:, :visual] = config.image_token_id
    side = config.vision_config.image_size
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, side, side, generator=generator),
        "labels": ids.masked_fill(ids == config.image_token_id, -100),
        "subsegment_ids": torch.zeros_like(ids),
    }


# ---- dtypes ----


def test_what_learns_is_float32_and_what_does_not_has_the_dtype():
    model = NanoMolmo2(toy(smoke()).architecture)
    prepare(model, recipe_of(Path("tiny"), dtype="bfloat16"))
    dtypes = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    assert dtypes["llm.layers.0.mlp.up_proj.weight"] == (torch.bfloat16, False)
    assert dtypes["llm.layers.0.mlp.up_proj.lora_A"] == (torch.float32, True)
    assert dtypes["llm.layers.0.input_layernorm.weight"] == (torch.float32, False)
    assert dtypes["llm.embed_tokens.weight"] == (torch.bfloat16, False)
    assert dtypes["llm.embed_tokens.new_rows"] == (torch.float32, True)
    assert {d for n, d in dtypes.items() if n.startswith("connector.")} == {(torch.float32, True)}


def test_frozen_weights_in_bfloat16_give_the_bits_of_float32_ones():
    """Their products were in bfloat16 before, too: losses and gradients are the same, whether they
    are rounded once or whenever they are gathered."""
    recipe = recipe_of(Path("tiny"), dtype="bfloat16")

    def step(kept_in: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = defaults(NanoMolmo2(toy(smoke()).architecture))
        prepare(model, recipe)
        set_dtypes(model, kept_in)
        with torch.no_grad():
            for parameter in lora_parameters(model.llm):
                parameter.normal_(std=0.1)
        with World() as world:
            if kept_in is torch.bfloat16:
                shard(model, world, dtype=torch.bfloat16)
            else:  # as it was: float32, and cast whenever it is gathered
                vision = model.vision_encoder.to(torch.bfloat16)
                blocks = list(model.llm.layers)
                whole = set(vision.parameters())
                distributed._fully_shard(model, blocks, world.mesh(), torch.bfloat16, whole)
                register_fsdp_forward_method(model, "loss")
            loss = model.loss(**toy_batch(model), reduction="sum")
            loss.backward()
            found = {
                n: full_tensor(p.grad) for n, p in model.named_parameters() if p.grad is not None
            }
            return loss.detach(), found

    loss, gradients = step(torch.bfloat16)
    before, expected = step(torch.float32)
    assert torch.equal(loss, before)
    assert gradients.keys() == expected.keys() and len(gradients) > 10
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


# ---- rows that learn alone ----


def test_new_rows_apart_learn_as_those_of_a_whole_table():
    """And the table has neither a gradient nor moments."""
    made = []
    for split in (False, True):
        torch.manual_seed(1)
        model = defaults(NanoMolmo2(toy(smoke()).architecture))
        if split:
            split_new_rows(model.llm)
        parts = ("connector", "llm")
        set_trainable(model, parts)
        optimizers = Optimizers(components(model, parts, dict.fromkeys(parts, RATES)))
        for seed in range(2):
            model.loss(**toy_batch(model, seed)).backward()
            optimizers.clip(0.1)
            optimizers.step()
        made.append((model, optimizers))
    (whole, _), (apart, optimizers) = made
    table = apart.llm.embed_tokens
    assert isinstance(table, NewRowsEmbedding) and table.weight.grad is None
    moments = {p.shape for part in optimizers.parts.values() for p in part.state}
    assert table.new_rows.shape in moments and table.weight.shape not in moments
    ids = torch.arange(whole.config.llm_config.num_embeddings)
    torch.testing.assert_close(table(ids), whole.llm.embed_tokens(ids), rtol=0, atol=1e-6)
    join_new_rows(apart.llm)
    assert apart.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(apart.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


# ---- runs ----


def test_a_checkpoint_holds_what_learns_alone(run: Path):
    (newest,) = sorted((run / "checkpoints").iterdir())[-1:]
    stored = torch.load(newest / "checkpoint.pt", weights_only=True)
    kinds = {name.partition(".")[0] for name in stored["weights"]}
    assert kinds == {"connector", "llm"}
    of_llm = {n for n in stored["weights"] if n.startswith("llm.")}
    matrices = {n for n in of_llm if n.endswith(("lora_A", "lora_B"))}
    assert of_llm - matrices == {"llm.embed_tokens.new_rows"} and len(matrices) == 14


def test_a_run_that_goes_on_is_one_that_never_stopped(run: Path, tmp_path: Path):
    recipe = Recipe.load(run / "recipe.json")
    assert not train(recipe, tmp_path / "run", stop_after=2)
    assert train(recipe, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(run)
    ours, theirs = weights_of(tmp_path / "run" / "model"), weights_of(run / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_does_not_go_on_from_another_base(base: Path, tmp_path: Path):
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    recipe = recipe_of(copy)
    assert not train(recipe, tmp_path / "run", stop_after=2)
    model, processor = build(toy(smoke(), seed=4))
    model.save_pretrained(copy, processor=processor)
    with pytest.raises(ValueError, match=r"not those that this run started from.*bring that"):
        train(recipe, tmp_path / "run", resume=True)


def test_a_checkpoint_of_all_weights_is_still_read(base: Path, tmp_path: Path):
    """As runs wrote it before."""
    recipe = recipe_of(base)
    assert not train(recipe, tmp_path / "run", stop_after=2)
    from nanomolmo2.training.checkpoint import Checkpoints

    model, _ = build(recipe, split_table=True)
    plain = Checkpoints(tmp_path / "run")
    model_state = {n: t.clone() for n, t in model.state_dict().items()}
    optimizers = Optimizers(components(model, recipe.train, recipe.optimisers))
    position = plain.newest()
    plain.folder = tmp_path / "whole"
    plain.save(position, model, optimizers)
    for parameter in model.parameters():
        parameter.data.zero_()
    plain.restore(position, model, optimizers)
    assert all(torch.equal(t, model_state[n]) for n, t in model.state_dict().items())


def test_qlora_learns_as_lora_does_beside_rounded_weights(base: Path, tmp_path: Path):
    """Losses are near to LoRA's; gradients are exactly those of plain LoRA on the rounded model."""
    found = {}
    for format in ("", "int8", "nf4"):
        assert train(recipe_of(base, frozen_weights=format), tmp_path / f"run{format}")
        found[format] = losses(tmp_path / f"run{format}")
    for format, tolerance in (("int8", 0.01), ("nf4", 0.05)):
        assert found[format] != found[""]
        assert list(found[format].values()) == pytest.approx(
            list(found[""].values()), rel=tolerance
        )
    quantised, _ = build(recipe_of(base, frozen_weights="nf4"))
    layer = quantised.llm.layers[0].mlp.up_proj
    assert isinstance(layer, LoraLinear) and isinstance(layer.frozen, FrozenLinear)
    plain, _ = build(recipe_of(base))
    for model in (quantised, plain):
        with torch.no_grad():
            for number, matrix in enumerate(lora_parameters(model.llm)):
                generator = torch.Generator().manual_seed(number)
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * 0.1)
    for name, module in quantised.llm.named_modules():
        if isinstance(module, LoraLinear):
            plain.llm.get_submodule(name).weight.data.copy_(module.frozen.dequantized())
    for model in (quantised, plain):
        model.loss(**toy_batch(model)).backward()
    for ours, theirs in zip(
        lora_parameters(quantised.llm), lora_parameters(plain.llm), strict=True
    ):
        assert theirs.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


# ---- adapters ----


def test_the_adapter_on_its_base_is_the_model_that_was_written(run: Path, base: Path):
    adapter = run / "adapter"
    assert {p.name for p in adapter.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, OTHERS_NAME}
    config = json.loads((adapter / CONFIG_NAME).read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert config["base_model_name_or_path"] == str(base)
    assert len(config["nanomolmo2"]["base"]) == 32
    others = load_file(adapter / OTHERS_NAME)
    assert {n.partition(".")[0] for n in others} == {"connector", "llm"}
    merged = nanomolmo2.load(str(base), adapter=adapter, device="cpu")[0].state_dict()
    written = weights_of(run / "model")
    assert merged.keys() == written.keys()
    assert all(torch.equal(merged[name], written[name]) for name in written)
    assert not torch.equal(
        written["llm.layers.0.mlp.up_proj.weight"],
        weights_of(base)["llm.layers.0.mlp.up_proj.weight"],
    )


def test_unmerged_computes_what_merged_computes(run: Path, base: Path):
    merged, _ = nanomolmo2.load(str(base), adapter=run / "adapter", device="cpu")
    beside, _ = nanomolmo2.load(str(base), device="cpu")
    load_lora(beside, run / "adapter")
    assert len(lora_parameters(beside.llm)) == 14
    batch = toy_batch(merged)
    with torch.no_grad():
        found, expected = beside.loss(**batch), merged.loss(**batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_adapters_add_up(base: Path, tmp_path: Path):
    """W + sum of weight * alpha / rank * B A, whatever their ranks; whole weights by their
    differences."""
    for seed, rank in ((1, 2), (2, 5)):
        lora = LoraConfig(rank=rank, alpha=6.0)
        assert train(recipe_of(base, seed=seed, lora=lora, steps=2), tmp_path / str(seed))
    folders = [tmp_path / "1" / "adapter", tmp_path / "2" / "adapter"]
    factors = [0.5, 2.0]
    start, made = weights_of(base), [weights_of(tmp_path / n / "model") for n in ("1", "2")]
    merged, _ = nanomolmo2.load(
        str(base), adapter=folders, adapter_weights=factors, device="cpu", dtype="float32"
    )
    for name, tensor in merged.state_dict().items():
        change = sum(f * (m[name] - start[name]) for f, m in zip(factors, made, strict=True))
        torch.testing.assert_close(tensor, start[name] + change, rtol=1e-5, atol=1e-6)
    beside, _ = nanomolmo2.load(str(base), device="cpu")
    load_lora(beside, folders, factors)
    merge_lora(beside.llm, final=True)
    for name, tensor in beside.state_dict().items():
        torch.testing.assert_close(tensor, merged.state_dict()[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="3 weights were given for 2 adapters"):
        nanomolmo2.load(str(base), adapter=folders, adapter_weights=[1, 2, 3], device="cpu")


def test_what_an_adapter_does_not_belong_to_is_refused(run: Path, base: Path, tmp_path: Path):
    other, processor = build(toy(smoke(), seed=5))
    other.save_pretrained(tmp_path / "other", processor=processor)
    with pytest.raises(ValueError, match=r"trained on other weights of the same shape.*base"):
        nanomolmo2.load(str(tmp_path / "other"), adapter=run / "adapter", device="cpu")
    with pytest.raises(ValueError, match="was made for another model"):
        nanomolmo2.load("tiny", adapter=run / "adapter", device="cpu")
    with pytest.raises(ValueError, match="holds no LoRA: expected"):
        nanomolmo2.load(str(base), adapter=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="give the whole model"):
        load_lora(nanomolmo2.load(str(base), device="cpu")[0].llm, run / "adapter")


def test_ask_takes_an_adapter(run: Path, base: Path, capsys):
    picture = str(Path(nanomolmo2.__file__).parent / "assets" / "demo" / "scene.png")
    options = ["--max-new-tokens", "4", "--device", "cpu"]
    question = ["ask", picture, "What is here?", "--model"]
    assert cli.main([*question, str(run / "model"), *options]) == 0
    expected = capsys.readouterr().out
    assert cli.main([*question, str(base), "--adapter", str(run / "adapter"), *options]) == 0
    assert capsys.readouterr().out == expected
    wrong = [*question, "tiny", "--adapter", str(run / "adapter"), *options]
    assert cli.main(wrong) == 1
    assert "was made for another model" in capsys.readouterr().err


def test_peft_reads_the_matrices(run: Path, base: Path, tmp_path: Path):
    """The language model alone, as PEFT wraps transformers' Qwen3."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from nanomolmo2.convert.state_dict import to_reference
    from nanomolmo2.convert.tables import QWEN3

    ours, _ = nanomolmo2.load(str(base), device="cpu")
    load_lora(ours, run / "adapter")
    start = nanomolmo2.load(str(base), device="cpu")[0].llm
    config = start.config
    reference = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**config.to_dict(), attention_bias=False)
    ).eval()
    reference.resize_token_embeddings(config.num_embeddings)
    for name, layer in ours.llm.named_modules():  # rounded where the run was QLoRA
        if isinstance(layer, LoraLinear):
            start.get_submodule(name).weight.data.copy_(layer.base_weight())
    reference.load_state_dict(to_reference(start.state_dict(), QWEN3), strict=False)
    wrapped = peft.PeftModel.from_pretrained(reference, str(run / "adapter")).eval()
    ids = torch.randint(0, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = wrapped(ids).logits[..., : config.vocab_size]
    torch.testing.assert_close(found, ours.llm(ids), rtol=1e-4, atol=1e-4)
