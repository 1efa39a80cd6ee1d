from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from nanomolmo2.models import LLMConfig, NanoMolmo2
from nanomolmo2.training.distributed import World
from nanomolmo2.training.lora import LoraConfig, add_lora
from nanomolmo2.training.optim import (
    PARTS,
    Muon,
    OptimConfig,
    Optimizers,
    clear_rows,
    components,
    orthogonalise,
    set_trainable,
)
from tests.nets import IMAGE, LLM, pictures, small_model, text_ids


def test_orthogonalise_finds_the_nearest_orthogonal_matrix():
    """The quintic iteration pushes singular values near 1 and leaves the singular vectors alone."""
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16), (1, 24, 24)):
        x = torch.randn(shape)
        got = orthogonalise(x)
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        singular = u.mT @ got @ vh.mT
        diagonal = singular.diagonal(dim1=1, dim2=2)
        assert diagonal.min() > 0.3 and diagonal.max() < 1.3
        assert (singular - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_orthogonalise_in_bfloat16_goes_the_same_way():
    torch.manual_seed(0)
    x = torch.randn(3, 48, 96)
    exact = orthogonalise(x)
    short = orthogonalise(x, bf16=True)
    assert short.dtype == torch.float32 and not torch.equal(short, exact)
    assert torch.nn.functional.cosine_similarity(short.flatten(), exact.flatten(), dim=0) > 0.999


def test_muon_treats_matrices_of_one_shape_as_if_alone():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(8, 12)) for _ in range(3)]
    alone = [nn.Parameter(w.detach().clone()) for w in weights]
    together = Muon([{"params": weights}], lr=0.1)
    singles = [Muon([{"params": [w]}], lr=0.1) for w in alone]
    for _ in range(3):
        for w, a in zip(weights, alone, strict=True):
            w.grad = torch.randn_like(w)
            a.grad = w.grad.clone()
        together.step()
        for single in singles:
            single.step()
    for w, a in zip(weights, alone, strict=True):
        torch.testing.assert_close(w, a, rtol=1e-5, atol=1e-6)


def test_schedule_warms_up_linearly_then_follows_a_cosine():
    config = OptimConfig(warmup_steps=10, final_ratio=0.1)
    assert config.factor(0, 110) == pytest.approx(0.1)
    assert config.factor(9, 110) == pytest.approx(1.0)
    assert config.factor(10, 110) == pytest.approx(1.0)
    assert config.factor(60, 110) == pytest.approx(0.55)
    assert config.factor(110, 110) == pytest.approx(0.1)


class _Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)


def test_components_get_their_own_rates_and_muon_only_hidden_matrices():
    a, b = _Part(), _Part()
    optimizers = Optimizers(
        {"a": (a, OptimConfig(lr=1.0, matrix_lr=2.0)), "b": (b, OptimConfig(lr=3.0, matrix_lr=0))}
    )
    muon = optimizers.parts["muon"].param_groups
    adamw = optimizers.parts["adamw"].param_groups
    assert [[id(p) for p in g["params"]] for g in muon] == [[id(a.linear.weight)]]
    assert {id(p) for g in adamw for p in g["params"]} == {
        id(p) for p in [*a.parameters(), *b.parameters()] if p is not a.linear.weight
    }
    optimizers.set_rates(99, 1000)
    assert muon[0]["lr"] == pytest.approx(2.0)
    assert [g["lr"] for g in adamw] == pytest.approx([1.0, 3.0])
    assert optimizers.rates() == pytest.approx({"a": 1.0, "a_matrices": 2.0, "b": 3.0})


def test_each_component_is_clipped_on_its_own():
    a, b = _Part(), _Part()
    optimizers = Optimizers({"a": (a, OptimConfig()), "b": (b, OptimConfig())})
    for part, size in ((a, 100.0), (b, 1e-3)):
        for p in part.parameters():
            p.grad = torch.full_like(p, size)
    small = [p.grad.clone() for p in b.parameters()]
    norms = optimizers.clip(1.0)
    assert norms["a"] > 100 and norms["b"] < 1
    total = torch.stack([p.grad.norm() for p in a.parameters()]).norm()
    assert float(total) == pytest.approx(1.0, rel=1e-4)
    for p, before in zip(b.parameters(), small, strict=True):
        assert torch.equal(p.grad, before)


NEW_ROWS = 7


@pytest.mark.parametrize("rate", [{"lr": -1.0}, {"lr": float("nan")}, {"matrix_lr": -0.1}])
def test_no_rate_goes_uphill(rate):
    with pytest.raises(ValueError, match=f"{next(iter(rate))} is .*, expected 0 or more"):
        OptimConfig(**rate)


RATES = {part: OptimConfig(lr=(i + 1) * 1e-3, matrix_lr=0) for i, part in enumerate(PARTS)}


def wide_model(tied: bool = True) -> NanoMolmo2:
    """With rows of the embedding beyond the base vocabulary."""
    llm = LLM.to_dict() | {"additional_vocab_size": NEW_ROWS, "tie_word_embeddings": tied}
    return small_model("pooling", llm_config=LLMConfig.from_dict(llm))


def names_of(model: nn.Module, parameters) -> set[str]:
    ids = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def gradients(model: NanoMolmo2, seed: int) -> None:
    ids = text_ids(2, 12, seed=seed)
    ids[:, 3] = LLM.vocab_size + seed  # one of the new tokens
    ids[:, 5] = IMAGE
    labels = ids.masked_fill((ids == IMAGE) | (ids >= LLM.vocab_size), -100)
    _, loss = model(ids, pictures(2, seed), labels)
    loss.backward()


def test_stages_train_what_molmo2_trains_in_its_groups():
    """Everything but the base rows; the new ones learn with the connector."""
    model = wide_model(tied=False)
    train = ("vision", "connector", "llm")
    set_trainable(model, train)
    groups = components(model, train, RATES)
    found = {part: names_of(model, selection.parameters) for part, (selection, _) in groups.items()}
    everything = {name for name, _ in model.named_parameters()}
    table = "llm.embed_tokens.weight"
    assert found["vision"] == {n for n in everything if n.startswith("vision_encoder.")}
    assert found["connector"] == {n for n in everything if n.startswith("connector.")} | {table}
    assert found["llm"] == {n for n in everything if n.startswith("llm.")} - {table}
    assert "llm.lm_head.weight" in found["llm"]
    assert [config.lr for _, config in groups.values()] == [1e-3, 2e-3, 3e-3]


def test_what_is_not_trained_gets_no_gradient():
    for train in (("connector",), ("llm",), ("embeddings",), ("vision", "lora")):
        model = wide_model()
        if "lora" in train:
            add_lora(model.llm, LoraConfig(rank=2))
        set_trainable(model, train)
        groups = components(model, train, RATES)
        chosen = [p for selection, _ in groups.values() for p in selection.parameters]
        assert len({id(p) for p in chosen}) == len(chosen), "a parameter in two groups"
        gradients(model, 1)
        got = {n for n, p in model.named_parameters() if p.grad is not None}
        assert got == names_of(model, chosen)
        assert not ("vision" not in train and model.vision_encoder.training)


def test_base_rows_stay_bit_for_bit_and_new_rows_learn_as_if_alone():
    """Also with weight decay, and also where the table is the head: the norm of the connector's
    group does not count the rows that stay."""
    model, plain = wide_model(), wide_model()
    train = ("connector", "llm")
    config = OptimConfig(lr=1e-2, matrix_lr=0, weight_decay=0.1, warmup_steps=0, final_ratio=1.0)
    set_trainable(model, train)
    optimizers = Optimizers(components(model, train, {"connector": config, "llm": config}))
    before = model.llm.embed_tokens.weight.detach().clone()

    # The same in plain PyTorch: the new rows are a parameter of their own.
    set_trainable(plain, train)
    table = plain.llm.embed_tokens.weight
    base = LLM.vocab_size
    rows = nn.Parameter(table.detach()[base:].clone())
    own = list(plain.connector.parameters())
    rest = [p for n, p in plain.llm.named_parameters() if n != "embed_tokens.weight"]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6}
    decayed = torch.optim.AdamW([*own, *rest], weight_decay=0.1, **options)
    kept = torch.optim.AdamW([rows], weight_decay=0.0, **options)

    for step in range(3):
        gradients(model, step)
        norms = optimizers.clip(0.5)
        optimizers.set_rates(step, 3)
        optimizers.step()

        gradients(plain, step)
        rows.grad = table.grad[base:].clone()
        expected = [nn.utils.clip_grad_norm_(group, 0.5) for group in ([*own, rows], rest)]
        decayed.step()
        kept.step()
        plain.zero_grad()
        with torch.no_grad():
            table[base:] = rows
        assert list(norms.values()) == pytest.approx([float(n) for n in expected], rel=1e-5)
    after = model.llm.embed_tokens.weight.detach()
    assert torch.equal(after[:base], before[:base])
    assert not torch.equal(after[base:], before[base:])
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    moments = optimizers.parts["adamw"].state[model.llm.embed_tokens.weight]
    assert not moments["exp_avg"][:base].any() and not moments["exp_avg_sq"][:base].any()


def test_the_whole_table_learns_as_embeddings():
    model = wide_model()
    set_trainable(model, ("embeddings", "connector"))
    groups = components(model, ("embeddings", "connector"), RATES)
    before = model.llm.embed_tokens.weight.detach().clone()
    optimizers = Optimizers(groups)
    gradients(model, 0)
    optimizers.step()
    assert (model.llm.embed_tokens.weight != before).any(dim=1)[: LLM.vocab_size].all()


def test_a_schedule_and_a_warm_up_for_each_group():
    """The rates of a whole run equal a plain AdamW loop with LambdaLR."""
    torch.manual_seed(0)
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    plain = [nn.Linear(3, 3), nn.Linear(3, 3)]
    for theirs, ours in zip(plain, (a, b), strict=True):
        theirs.load_state_dict(ours.state_dict())
    configs = [
        OptimConfig(lr=2e-2, matrix_lr=0, warmup_steps=2),
        OptimConfig(lr=5e-3, matrix_lr=0, warmup_steps=6),
    ]
    optimizers = Optimizers({"a": (a, configs[0]), "b": (b, configs[1])})
    reference = torch.optim.AdamW(
        [
            {"params": list(part.parameters()), "lr": config.lr}
            for part, config in zip(plain, configs, strict=True)
        ],
        betas=(0.9, 0.95),
        eps=1e-6,
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        reference, [lambda step, config=config: config.factor(step, 20) for config in configs]
    )
    x = torch.randn(5, 3)
    for step in range(20):
        for first, second in ((a, b), plain):
            second(first(x)).square().sum().backward()
        optimizers.set_rates(step, 20)
        optimizers.clip(1.0)
        for part in plain:
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizers.step()
        reference.step()
        reference.zero_grad()
        schedule.step()
    for ours, theirs in zip((a, b), plain, strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_frozen_rows_of_a_sharded_gradient():
    with World() as world:
        gradient = distribute_tensor(torch.ones(5, 3), world.mesh(), [Shard(0)])
        clear_rows(gradient, 3)
        assert gradient.full_tensor().sum(dim=1).tolist() == [0, 0, 0, 3, 3]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((), "train names nothing: choose among vision"),
        (("vison",), "train names vison: choose among vision"),
        (("lora",), "call add_lora first"),
    ],
)
def test_parts_that_cannot_be_trained(train, message):
    with pytest.raises(ValueError, match=message):
        set_trainable(wide_model(), train)


def test_what_is_left_out_is_said():
    model = wide_model()
    with pytest.raises(ValueError, match="llm is trained, but has no optimiser"):
        components(model, ("llm",), {})
    set_trainable(model, ("connector",))
    with pytest.raises(ValueError, match="llm is frozen, but to be trained"):
        components(model, ("llm",), RATES)
    add_lora(model.llm)
    with pytest.raises(ValueError, match="train lora, or merge them first"):
        set_trainable(model, ("llm",))
