"""The loss without logits beside the plain one, and what it never allocates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanomolmo2.accelerate import checkpoint_activations, chunked_loss
from nanomolmo2.accelerate import cross_entropy as cross_entropy_module
from nanomolmo2.accelerate.cross_entropy import chunked_rows_loss, linear_cross_entropy
from nanomolmo2.batch import IGNORED_LABEL, PACK_SUBSEGMENT, PREFIX_SUBSEGMENT
from nanomolmo2.models import LanguageModel, LLMConfig
from nanomolmo2.models.loss import next_tokens
from tests.nets import (
    EOS,
    IMAGE,
    LLM,
    greatest_difference,
    pictures,
    randomize,
    small_model,
    text_ids,
)

TOLERANCE = 1e-5


def plain_loss(
    logits: Tensor, labels: Tensor, loss_weights: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weighted sum and sum of weights, with all logits at once."""
    logits, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="none")
    losses = losses + z_loss * logits.logsumexp(-1).square()
    weights = (targets != IGNORED_LABEL).float()
    if loss_weights is not None:
        weights = weights * loss_weights[:, 1:].flatten()
    return (losses * weights).sum(), weights.sum()


def assert_same_gradients(found: nn.Module, expected: nn.Module) -> None:
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad is not None:
            assert greatest_difference(a.grad, b.grad) < TOLERANCE, name


def labels_of(ids: Tensor, seed: int = 0) -> Tensor:
    """About half of the tokens are learned."""
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return ids.masked_fill(~chosen, IGNORED_LABEL)


def random_weights(ids: Tensor, seed: int = 1) -> Tensor:
    """A fifth of them 0."""
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    return weights.masked_fill(weights < 0.2, 0)


def decoder(config: LLMConfig) -> LanguageModel:
    return chunked_loss(randomize(LanguageModel(config)))


# --- the head alone ------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 40),
    unwritten=st.integers(0, 3),
    chunk_size=st.integers(1, 400),
    z_loss=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([0.1, 1.0, 200.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_chunk_equals_the_plain_loss(
    rows: int, vocab: int, unwritten: int, chunk_size: int, z_loss: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(rows, 6, generator=generator)).requires_grad_()
    weight = torch.randn(vocab + unwritten, 6, generator=generator).requires_grad_()
    tokens = torch.randint(vocab, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    logits = hidden.double() @ weight[:vocab].double().T
    losses = F.cross_entropy(logits, tokens, reduction="none")
    expected = ((losses + z_loss * logits.logsumexp(-1).square()) * weights).sum()
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    # Of large logits float32 holds fewer digits behind the point.
    tolerance = TOLERANCE * max(1.0, float(logits.detach().abs().max()) / 50)
    for way in ("function", "rows"):
        options: dict[str, Any] = {"vocab_size": vocab, "chunk_size": chunk_size, "z_loss": z_loss}
        if way == "function":
            found = linear_cross_entropy(hidden, weight, tokens, weights, **options)
        else:
            head = lambda x: x @ weight[:vocab].T  # noqa: E731
            found = chunked_rows_loss(head, hidden, tokens, weights, **options)
        assert found.dtype == torch.float32
        assert torch.isclose(found.double(), expected, rtol=TOLERANCE, atol=tolerance)
        gradients = torch.autograd.grad(3 * found, (hidden, weight))
        for a, b in zip(gradients, wanted, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=tolerance * float(1 + b.norm())), way


def test_gradients_by_finite_differences() -> None:
    """In double precision, twice through one graph, without either gradient too."""
    hidden, weight = torch.randn(4, 3).double(), torch.randn(7, 3).double()
    tokens, weights = torch.tensor([0, 6, 3, 3]), torch.rand(4).double()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        # The sum is float32 for whoever calls; its gradients are as fine as the inputs.
        return linear_cross_entropy(hidden, weight, tokens, weights, z_loss=0.2, chunk_size=8)

    logits = (hidden @ weight.T).requires_grad_()
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits, tokens, reduction="none")
    expected = ((losses + 0.2 * logits.logsumexp(-1).square()) * weights).sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))
    found = loss(hidden, weight)
    for _ in range(2):
        for a, b in zip(
            torch.autograd.grad(found, (hidden, weight), retain_graph=True), wanted, strict=True
        ):
            assert a.dtype == torch.float64 and (a - b).abs().max() < 1e-12
    (alone,) = torch.autograd.grad(loss(hidden, weight.detach()), hidden)
    assert torch.equal(alone, torch.autograd.grad(found, hidden)[0])
    (alone,) = torch.autograd.grad(loss(hidden.detach(), weight), weight)
    assert greatest_difference(alone, wanted[1]) < 1e-12
    with torch.no_grad():
        assert torch.equal(loss(hidden, weight), found)


def test_what_is_learned() -> None:
    labels = torch.tensor([[5, -100, 6, 7], [8, 9, -100, 10]])
    rows, tokens, weights = next_tokens(labels)
    assert rows.tolist() == [1, 2, 4, 6]  # nothing stands before the first token of a row
    assert tokens.tolist() == [6, 7, 9, 10]
    assert weights.tolist() == [1, 1, 1, 1]
    given_weights = torch.tensor([[1.0, 1.0, 0.5, 0.0], [9.0, 2.0, 1.0, 0.25]])
    rows, tokens, weights = next_tokens(labels, given_weights)
    assert (rows.tolist(), tokens.tolist()) == ([1, 4, 6], [6, 9, 10])
    assert weights.tolist() == [0.5, 2.0, 0.25]


@pytest.mark.parametrize("value", [-0.5, float("nan")])
def test_weights_that_are_none_stop(value: float) -> None:
    labels, weights = torch.tensor([[1, 2, -100]]), torch.tensor([[1.0, value, 1.0]])
    with pytest.raises(ValueError, match=f"must be 0 or more, found {value}: leave tokens out"):
        next_tokens(labels, weights)
    next_tokens(labels, torch.tensor([[1.0, 1.0, value]]))  # not of a labelled token
    with pytest.raises(ValueError, match=r"\(1, 2\) must have the shape of labels \(1, 3\)"):
        next_tokens(labels, weights[:, :2])


# --- the decoder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_and_gradients_of_the_decoder(
    tied: bool, reduction: Any, weighted: bool, z_loss: float
) -> None:
    config = replace(LLM, tie_word_embeddings=tied, additional_vocab_size=4)
    ours = decoder(config)
    theirs = copy.deepcopy(ours)
    ids = text_ids(3, 12)
    ids[0, 3] = 91  # read, never written
    labels = labels_of(ids)
    labels[0, 3] = IGNORED_LABEL
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, :2] = False
    labels[1, :3] = IGNORED_LABEL
    weights = random_weights(ids) if weighted else None
    loss = ours.loss(
        ids, labels, weights, attention_mask=mask, reduction=reduction, z_loss=z_loss, chunk_size=50
    )
    total, weight = plain_loss(theirs(ids, attention_mask=mask), labels, weights, z_loss)
    expected = total / weight if reduction == "mean" else total
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert greatest_difference(loss, expected) < TOLERANCE * max(1.0, float(expected.detach()))
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("frozen", ["embed_tokens", "layers", "lm_head", "all but the head"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_frozen_parts(frozen: str, tied: bool) -> None:
    ours = decoder(replace(LLM, tie_word_embeddings=tied))
    for name, parameter in ours.named_parameters():
        is_head = name.startswith("embed_tokens" if tied else "lm_head")
        freeze = not is_head if frozen == "all but the head" else name.startswith(frozen)
        parameter.requires_grad_(not freeze)
    theirs = copy.deepcopy(ours)
    ids = text_ids(2, 9)
    labels = labels_of(ids)
    ours.loss(ids, labels, reduction="sum").backward()
    plain_loss(theirs(ids), labels)[0].backward()
    assert_same_gradients(ours, theirs)


def test_the_table_gets_one_gradient_where_it_is_used_twice() -> None:
    """Head and embedding join theirs in one tensor, also over two losses and embeddings given."""
    ours = decoder(LLM)
    theirs = copy.deepcopy(ours)
    a, b = text_ids(2, 9), text_ids(1, 7, seed=1)
    found = ours.loss(a, a) + ours.loss(None, b, inputs_embeds=ours.embed(b))
    found.backward()
    expected = torch.tensor(0.0)
    for ids in (a, b):
        total, weight = plain_loss(theirs(ids), ids)
        expected = expected + total / weight
    expected.backward()
    assert_same_gradients(ours, theirs)
    graph = ours.loss(a, a)
    first = torch.autograd.grad(graph, ours.embed_tokens.weight, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(graph, ours.embed_tokens.weight)[0], first)


def test_a_quantised_head_has_a_loss_too() -> None:
    llm = decoder(replace(LLM, hidden_size=64))
    ids = text_ids(2, 9)
    exact = llm.loss(ids, ids)
    llm.quantize("fp16-weights")
    with torch.no_grad():
        found = llm.loss(ids, ids, z_loss=1e-4)
        total, weight = plain_loss(llm(ids), ids, z_loss=1e-4)
    assert greatest_difference(found, total / weight) < TOLERANCE
    assert greatest_difference(found, exact) < 0.1


@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_bfloat16(way: str) -> None:
    """The softmax is float32: no worse than the plain loss on bfloat16 logits."""
    llm = decoder(replace(LLM, additional_vocab_size=2))
    ids = text_ids(3, 12)
    labels = labels_of(ids)
    exact = llm.loss(ids, labels)
    exact.backward()
    wanted = {name: p.grad.clone() for name, p in llm.named_parameters() if p.grad is not None}
    llm.zero_grad()
    if way == "cast":
        llm.bfloat16()
    plain = copy.deepcopy(llm)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss = llm.loss(ids, labels)
        total, weight = plain_loss(plain(ids), labels)
    assert loss.dtype == torch.float32
    assert greatest_difference(loss, exact) < 0.05
    loss.backward()
    (total / weight).backward()
    errors = []
    for net in (llm, plain):
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in net.parameters())
        off = [p.grad.float() - wanted[name] for name, p in net.named_parameters()]  # type: ignore[union-attr]
        errors.append(torch.cat([x.flatten() for x in off]).norm())
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_nothing_to_learn_is_loss_zero_with_gradients_of_zero(tied: bool) -> None:
    llm = decoder(replace(LLM, tie_word_embeddings=tied))
    ids = text_ids(2, 5)
    nothing = torch.full_like(ids, IGNORED_LABEL)
    for labels, weights in ((nothing, None), (ids, torch.zeros(2, 5)), (ids[:, :1], None)):
        llm.zero_grad()
        loss = llm.loss(ids[:, : labels.shape[1]], labels, weights, z_loss=0.1)
        assert loss.item() == 0
        loss.backward()
        for name, p in llm.named_parameters():
            assert p.grad is not None and not p.grad.any(), name
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    for loss in (
        linear_cross_entropy(hidden, weight, torch.zeros(0).long(), torch.zeros(0)),
        chunked_rows_loss(
            nn.Identity(), hidden, torch.zeros(0).long(), torch.zeros(0), vocab_size=4
        ),
    ):
        assert loss == 0
        loss.backward()
    assert weight.grad is not None and not weight.grad.any()


def test_what_does_not_fit_stops() -> None:
    llm, ids = decoder(LLM), text_ids(2, 5)
    with pytest.raises(ValueError, match=r"labels \(2, 4\) must have the shape of the text \(2, 5"):
        llm.loss(ids, ids[:, :4])
    with pytest.raises(ValueError, match=r"writes tokens 0\.\.88; .* marked -100"):
        llm.loss(ids, torch.full_like(ids, 89))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        llm.loss(None, ids)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        llm.loss(ids, ids, inputs_embeds=llm.embed(ids))
    with pytest.raises(ValueError, match="reduction is 'none', expected 'mean' or 'sum'"):
        llm.loss(ids, ids, reduction="none")  # type: ignore[arg-type]


# --- the whole model -----------------------------------------------------------------------------


def packed_trees(n: int) -> dict[str, Any]:
    """Two examples in a row, two branches each; a second row with padding; n tokens a picture."""
    first = [PREFIX_SUBSEGMENT] * (n + 3) + [0] * 4 + [1] * 3
    second = [PACK_SUBSEGMENT + s for s in [PREFIX_SUBSEGMENT] * 2 + [0] * 3 + [1] * 2]
    row = first + second
    other = [PREFIX_SUBSEGMENT] * 4 + [0] * 5 + [1] * 2
    subsegments = torch.tensor([row, other + [-1] * (len(row) - len(other))])
    ids = text_ids(2, len(row))
    ids[0, :n] = IMAGE
    branch = (subsegments % PACK_SUBSEGMENT != PREFIX_SUBSEGMENT) & (subsegments >= 0)
    begins = torch.ones_like(branch)
    begins[:, 1:] = subsegments[:, 1:] != subsegments[:, :-1]
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(~branch | begins, IGNORED_LABEL),
        "attention_mask": subsegments >= 0,
        "subsegment_ids": subsegments,
        "loss_weights": random_weights(ids),
        "pixel_values": pictures(1),
    }


@pytest.mark.parametrize("connector_type", ["linear", "pooling"])
@pytest.mark.parametrize("form", ["packed trees", "placeholders"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_loss_and_gradients_of_the_whole_model(
    connector_type: str, form: str, checkpointing: Any
) -> None:
    ours = chunked_loss(small_model(connector_type, bidirectional_image_attention=True)).train()
    if form == "packed trees":
        inputs = packed_trees(ours.config.num_visual_tokens)
    else:
        ids = text_ids(2, 8)
        ids[0, 2] = IMAGE
        labels = labels_of(ids).masked_fill(ids == IMAGE, IGNORED_LABEL)
        inputs = {"input_ids": ids, "labels": labels, "pixel_values": pictures(1)}
    theirs = copy.deepcopy(ours)
    checkpoint_activations(ours, checkpointing)
    loss = ours.loss(**inputs)
    _, expected = theirs(**inputs)
    assert greatest_difference(loss, expected) < TOLERANCE
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, theirs)
    total = ours.loss(**inputs, reduction="sum")
    weights = next_tokens(inputs["labels"], inputs.get("loss_weights")).weights
    assert greatest_difference(total / weights.sum(), expected) < TOLERANCE


def test_a_row_without_labels_warns_as_in_forward() -> None:
    model = small_model()
    ids = text_ids(2, 5)
    labels = torch.full_like(ids, IGNORED_LABEL)
    with pytest.warns(UserWarning, match="a row has no label to learn from"):
        loss = model.loss(ids, labels=labels)
    assert loss == 0
    loss.backward()
    with pytest.raises(ValueError, match="the loss needs labels, found None"):
        model.loss(ids)


# --- memory --------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Notes operators and the tensors they return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.seen.append((str(operator), max(sizes, default=0)))
        return result


@contextmanager
def recorded() -> Iterator[list[tuple[str, int]]]:
    with _Recorder() as recorder:
        yield recorder.seen


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("share", [1.0, 0.1], ids=["all learned", "a tenth"])
def test_no_tensor_is_as_large_as_the_logits(tied: bool, share: float) -> None:
    """Of any operator, forward or backward; the plain loss has many."""
    B, T, V = 2, 96, 512
    config = LLMConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    llm = decoder(config)
    ids = text_ids(B, T, vocab_size=V)
    labels = ids.clone()
    labels[:, : int(T * (1 - share))] = IGNORED_LABEL
    llm.loss(ids, labels)  # what checks itself at its first use has done so
    with recorded() as seen:
        llm.loss(ids, labels, z_loss=1e-4).backward()
    names = {name for name, _ in seen}
    assert any("logsumexp" in name for name in names) and any("backward" in n for n in names)
    # The largest: scores of attention or a quarter of the logits; a whole gradient of the head.
    assert max(size for _, size in seen) <= max(B * 2 * T * T, V * 32, B * T * V // 4)
    with recorded() as seen:
        plain_loss(llm(ids), labels)[0].backward()
    assert sum(size >= B * (T - 1) * V for _, size in seen) > 3


def test_only_learned_positions_pass_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chunked_loss(small_model())
    ids = text_ids(2, 9)
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[0, 3], labels[1, 4:6] = EOS, 5
    weights = torch.ones(2, 9)
    weights[1, 5] = 0
    calls: list[int] = []

    def watched(x: Tensor, part: Tensor) -> Tensor:
        calls.append(len(x))
        return F.linear(x, part)

    monkeypatch.setattr(cross_entropy_module, "linear", watched)
    with torch.no_grad():
        loss = model.loss(ids, labels=labels, loss_weights=weights)
    assert set(calls) == {2}
    assert greatest_difference(loss, model(ids, labels=labels, loss_weights=weights)[1]) < TOLERANCE


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_plain_loss_and_the_chunked_one_are_the_same(tied: bool) -> None:
    plain = randomize(LanguageModel(replace(LLM, tie_word_embeddings=tied)))
    chunked = chunked_loss(copy.deepcopy(plain))
    assert type(plain.criterion) is not type(chunked.criterion)
    ids = text_ids(2, 30)
    labels, weights = labels_of(ids), random_weights(ids)
    losses = [net.loss(ids, labels, weights, z_loss=0.01) for net in (plain, chunked)]
    assert greatest_difference(*losses) < TOLERANCE
    for loss in losses:
        loss.backward()
    assert_same_gradients(plain, chunked)


def test_a_table_whose_head_is_not_used_has_a_dense_gradient() -> None:
    """The lookup's own gradient is sparse, which optimisers do not take."""
    llm = decoder(LLM)
    ids = text_ids(2, 9)
    llm.hidden_states(llm.embed(ids), torch.arange(9)[None]).square().sum().backward()
    gradient = llm.embed_tokens.weight.grad
    assert gradient is not None and not gradient.is_sparse and bool(gradient.any())
