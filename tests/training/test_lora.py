from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanomolmo2.convert.pretrained import save_pretrained
from nanomolmo2.models import LanguageModel, LLMConfig
from nanomolmo2.training.lora import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    LoraConfig,
    add_lora,
    load_lora,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    save_lora,
    unmerge_lora,
)
from tests.nets import LLM, in_bfloat16, randomize, small_model, text_ids

SMALL = LoraConfig(rank=3, alpha=5.0)
LINEAR = {
    *(f"self_attn.{n}_proj" for n in "qkvo"),
    *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
}


def base(seed: int = 0, config: LLMConfig = LLM) -> LanguageModel:
    return randomize(LanguageModel(config), seed).eval()


def adapted(seed: int = 0, config: LoraConfig = SMALL) -> LanguageModel:
    """With matrices as after training: B is not zero."""
    llm = add_lora(base(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_parameters(llm):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return llm


@torch.no_grad()
def logits(llm: LanguageModel) -> torch.Tensor:
    return llm(text_ids(2, 9))


def test_the_start_is_the_base_exactly():
    for llm in (base(), in_bfloat16(base())):
        before = logits(llm)
        add_lora(llm, SMALL)
        assert torch.equal(logits(llm), before)


def test_every_layer_of_attention_and_mlp_adds_its_product():
    """Against the formula, layer by layer: W + alpha / rank * B A."""
    llm, plain = adapted(), base()
    assert {n.rpartition(".lora_")[0] for n in lora_state_dict(llm)} == {
        f"layers.{i}.{name}" for i in range(LLM.num_hidden_layers) for name in LINEAR
    }
    with torch.no_grad():
        for name, matrices in by_layer(lora_state_dict(llm)).items():
            weight = plain.get_parameter(f"{name}.weight")
            weight += 5.0 / 3 * matrices["lora_B"] @ matrices["lora_A"]
    torch.testing.assert_close(logits(llm), logits(plain), rtol=1e-4, atol=1e-4)
    assert (logits(llm) - logits(base())).abs().max() > 0.1


def by_layer(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        layer, _, matrix = name.rpartition(".")
        layers.setdefault(layer, {})[matrix] = tensor
    return layers


def test_merged_gives_the_same_and_unmerged_the_same_bits():
    llm = adapted()
    before, weights = logits(llm), {n: t.clone() for n, t in llm.state_dict().items()}
    merge_lora(merge_lora(llm))  # a second time changes nothing
    torch.testing.assert_close(logits(llm), before, rtol=1e-4, atol=1e-4)
    name = "layers.0.mlp.up_proj.weight"
    assert not torch.equal(llm.get_parameter(name), weights[name])
    unmerge_lora(llm)
    assert all(torch.equal(t, weights[n]) for n, t in llm.state_dict().items())
    assert torch.equal(logits(llm), before)


def test_merged_for_good_is_a_plain_model(tmp_path):
    """It is saved, loaded and quantised; with matrices left, both refuse."""
    llm = adapted()
    with pytest.raises(ValueError, match="no checkpoint holds: merge_lora"):
        save_pretrained(llm, tmp_path)
    with pytest.raises(ValueError, match="would be lost: merge_lora"):
        llm.quantize("int8")
    before = logits(llm)
    merge_lora(llm, final=True)
    assert not lora_parameters(llm)
    assert llm.state_dict().keys() == base().state_dict().keys()
    torch.testing.assert_close(logits(llm), before, rtol=1e-4, atol=1e-4)
    save_pretrained(llm, tmp_path)
    assert (logits(llm.quantize("fp16-weights")) - before).abs().max() < 0.1


def test_only_the_matrices_learn_and_the_base_stays():
    model = small_model(freeze_vision=False)
    add_lora(model.llm, SMALL)
    weights = {n: t.clone() for n, t in model.llm.state_dict().items()}
    model.llm(text_ids(2, 9)).square().mean().backward()
    got = {n for n, p in model.llm.named_parameters() if p.grad is not None}
    assert got == set(lora_state_dict(model.llm))
    optimizer = torch.optim.AdamW(lora_parameters(model.llm), lr=1e-2, weight_decay=0)
    optimizer.step()
    changed = {n for n, t in model.llm.state_dict().items() if not torch.equal(t, weights[n])}
    assert changed == {n for n in got if n.endswith("lora_B")}  # A waits for a B that is not zero


def test_a_few_steps_learn():
    torch.manual_seed(0)
    llm = add_lora(base(), LoraConfig(rank=4, alpha=8.0))
    ids = text_ids(2, 9)
    optimizer = torch.optim.AdamW(lora_parameters(llm), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(
            llm(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_dropout_is_for_training_alone():
    llm = adapted(config=LoraConfig(rank=3, dropout=0.5))
    assert torch.equal(logits(llm), logits(llm))
    llm.train()
    assert not torch.equal(logits(llm), logits(llm))
    merge_lora(llm)
    assert torch.equal(logits(llm), logits(llm))


def test_saved_apart_and_loaded_onto_the_same_base(tmp_path):
    llm = adapted()
    save_lora(llm, tmp_path / "lora")
    files = {p.name: p.stat().st_size for p in (tmp_path / "lora").iterdir()}
    assert files.keys() == {CONFIG_NAME, WEIGHTS_NAME}
    matrices = sum(p.numel() for p in lora_parameters(llm))
    assert matrices * 4 < files[WEIGHTS_NAME] < matrices * 4 + 8000  # names take the rest
    fresh = load_lora(base(), tmp_path / "lora")
    assert torch.equal(logits(fresh), logits(llm))
    other = load_lora(adapted(seed=5), tmp_path / "lora")  # onto matrices that are there
    assert torch.equal(logits(other), logits(llm))
    merged = merge_lora(adapted())
    save_lora(merged, tmp_path / "merged")  # the base is the one it was added to
    assert torch.equal(logits(load_lora(base(), tmp_path / "merged")), logits(llm))
    half = load_lora(in_bfloat16(base()), tmp_path / "lora")  # the base in its smaller dtype
    assert (logits(half) - logits(llm)).abs().max() < 0.2


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    llm = adapted()
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("a cat")
    with pytest.raises(ValueError, match=r"holds other things, such as cat\.jpg"):
        save_lora(llm, photos)
    assert (photos / "cat.jpg").read_text() == "a cat"
    save_lora(llm, tmp_path / "lora")
    save_lora(llm, tmp_path / "lora")
    (tmp_path / "lora" / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds other things"):
        save_lora(llm, tmp_path / "lora")


@pytest.mark.parametrize("merge_first", [False, True])
def test_another_base_is_refused_and_left_as_it_was(tmp_path, merge_first):
    save_lora(adapted(), tmp_path / "lora")
    other = merge_lora(adapted(), final=True) if merge_first else base(seed=1)
    before = logits(other)
    with pytest.raises(ValueError, match="trained on other weights of the same shape"):
        load_lora(other, tmp_path / "lora")
    assert torch.equal(logits(other), before) and not lora_parameters(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, r"is \(36, 3\), but this model's would be \(48, 3\)"),
        ({"num_hidden_layers": 3}, "layers.2.mlp.down_proj.lora_A is not there"),
        ({"num_hidden_layers": 1}, "this model's would be not there"),
    ],
)
def test_another_shape_is_refused(tmp_path, change, message):
    save_lora(adapted(), tmp_path / "lora")
    other = LanguageModel(LLMConfig.from_dict(LLM.to_dict() | change))
    with pytest.raises(ValueError, match=message):
        load_lora(other, tmp_path / "lora")
    assert not lora_parameters(other)


def test_damaged_and_foreign_files_are_clear_errors(tmp_path):
    folder = tmp_path / "lora"
    with pytest.raises(ValueError, match="holds no LoRA: expected"):
        load_lora(base(), folder)
    save_lora(adapted(), folder)
    with pytest.raises(ValueError, match="merge that first"):
        load_lora(adapted(config=LoraConfig(rank=2)), folder)
    whole = (folder / WEIGHTS_NAME).read_bytes()
    (folder / WEIGHTS_NAME).write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        load_lora(base(), folder)
    (folder / WEIGHTS_NAME).write_bytes(whole)
    config = json.loads((folder / CONFIG_NAME).read_text())
    for change, message in (
        ({"use_dora": True}, "only plain LoRA is read"),
        ({"r": "3"}, "LoraConfig.rank: expected int"),
    ):
        (folder / CONFIG_NAME).write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_lora(base(), folder)


def test_targets_and_a_second_time():
    llm = add_lora(base(), LoraConfig(rank=2, targets=("q_proj", "v_proj")))
    assert {n.split(".")[3] for n in lora_state_dict(llm)} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="has LoRA matrices already"):
        add_lora(llm)
    with pytest.raises(ValueError, match="'c_attn' is no linear layer of this model"):
        add_lora(base(), LoraConfig(targets=("c_attn",)))
    with pytest.raises(ValueError, match="a quantised model has no weights to train"):
        add_lora(base().quantize("fp16-weights"), SMALL)
    with pytest.raises(
        ValueError, match="rank is 100000, but no layer that it is for has a rank above"
    ):
        add_lora(base(), LoraConfig(rank=100_000))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match="below 1, found 1"):
        LoraConfig(dropout=1)


def test_generates_with_matrices_as_merged():
    """Through the cache and the engine."""
    llm = adapted()
    options = {"max_new_tokens": 12, "eos_token_id": None}
    assert llm.generate(text_ids(2, 5), **options).tolist() == (
        merge_lora(adapted()).generate(text_ids(2, 5), **options).tolist()
    )


def test_files_have_the_names_of_peft(tmp_path):
    """PEFT wraps transformers' Qwen3: its names less ``base_model.model.`` are that model's."""
    transformers = pytest.importorskip("transformers")
    from nanomolmo2.convert.state_dict import to_reference
    from nanomolmo2.convert.tables import QWEN3

    llm = adapted()
    save_lora(llm, tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / WEIGHTS_NAME)
    config = json.loads((tmp_path / "lora" / CONFIG_NAME).read_text())
    reference = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**LLM.to_dict(), attention_bias=False)
    ).eval()
    reference.load_state_dict(to_reference(base().state_dict(), QWEN3), strict=False)
    with torch.no_grad():
        for name, a in stored.items():
            if name.endswith(".lora_A.weight"):
                target = name.removeprefix("base_model.model.").replace("lora_A.", "")
                b = stored[name.replace("lora_A", "lora_B")]
                reference.get_parameter(target).add_(config["lora_alpha"] / config["r"] * b @ a)
        found = reference(text_ids(2, 9)).logits
    torch.testing.assert_close(found, logits(llm), rtol=1e-4, atol=1e-4)


def test_a_file_of_peft_without_our_fingerprint_loads(tmp_path):
    llm = adapted()
    save_lora(llm, tmp_path / "lora")
    path = tmp_path / "lora" / WEIGHTS_NAME
    save_file(load_file(path), path, {"format": "pt"})
    assert torch.equal(logits(load_lora(base(), tmp_path / "lora")), logits(llm))


def test_an_adapter_without_the_weights_that_learned_whole_is_refused(tmp_path):
    """It loaded without a word, and answered by a connector that had learned nothing."""
    from nanomolmo2.convert.adapters import OTHERS_NAME, Adapter, read_adapter, write_adapter

    matrices, others = {"layers.0.mlp.up_proj.lora_A": torch.ones(2, 3)}, {"c": torch.ones(2)}
    write_adapter(Adapter("", SMALL, matrices, others), tmp_path / "lora")
    assert torch.equal(read_adapter(tmp_path / "lora").others["c"], torch.ones(2))
    (tmp_path / "lora" / OTHERS_NAME).unlink()
    with pytest.raises(ValueError, match="1 weights learned whole and 0 are there: copy"):
        read_adapter(tmp_path / "lora")
