"""Generation against a loop without cache, and a batch against its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanomolmo2.generation.sampling import SamplingParams, sample
from nanomolmo2.models import NanoMolmo2
from tests.nets import LLM, PAD, pictures, small_model, text_ids

NEW = 10
IMAGE = LLM.vocab_size  # read and never written: an answer can not ask for one more picture


def model_of(kind: str = "linear", **changes: Any) -> NanoMolmo2:
    # With a tied head a random net says its last token again and again.
    llm_config = replace(LLM, additional_vocab_size=1, tie_word_embeddings=False)
    return small_model(kind, seed=4, llm_config=llm_config, image_token_id=IMAGE, **changes)


@pytest.fixture(scope="module", params=["linear", "both ways", "pooling"])
def model(request: pytest.FixtureRequest) -> NanoMolmo2:
    """The default connector; pictures that see both ways; and Molmo2's with both."""
    kind = "pooling" if request.param == "pooling" else "linear"
    return model_of(kind, bidirectional_image_attention=request.param != "linear")


@pytest.fixture(scope="module")
def plain() -> NanoMolmo2:
    return model_of()


def prompts(*rows: str, seed: int = 0) -> Tensor:
    """Ids of rows: ``.`` text, ``i`` a picture, ``-`` padding."""
    ids = text_ids(len(rows), len(rows[0]), seed=seed)
    cells = torch.tensor([[ord(c) for c in row] for row in rows])
    return ids.masked_fill(cells == ord("i"), IMAGE).masked_fill(cells == ord("-"), PAD)


@torch.no_grad()
def naive(
    model: NanoMolmo2,
    row: Tensor,
    images: list[Tensor],
    *,
    new: int = NEW,
    params: SamplingParams | None = None,
    seed: int = 0,
) -> list[int]:
    """One row, the whole sequence through the model for every token."""
    params = params or SamplingParams()
    generator = torch.Generator().manual_seed(seed)
    answer: list[int] = []
    for _ in range(new):
        ids = torch.cat([row, row.new_tensor(answer)])[None]
        answer += sample(model(ids, images)[:, -1], params, [generator]).tolist()
    return answer


def test_greedy_equals_a_naive_loop(model: NanoMolmo2) -> None:
    """Two, one and no picture; no padding."""
    for row, count in (("..i.i", 2), ("i....", 1), (".....", 0)):
        ids, images = prompts(row), pictures(count)
        found = model.generate(ids, images, max_new_tokens=NEW, eos_token_id=None)
        assert torch.equal(found[:, :5], ids)
        answer = found[0, 5:].tolist()
        assert answer == naive(model, ids[0], list(images))
        assert len(set(answer)) > 2, "a net that repeats itself proves little"


BATCHES = [
    ["-...i", "i...i", "--..."],
    ["...i-", "i...i", "...--"],
    ["-..i-", "i...i", "...--"],
    [".....", "i..i.", "...i."],
]


@pytest.mark.parametrize("rows", BATCHES, ids=["left", "right", "mixed", "none"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_row_does_not_depend_on_the_others(
    model: NanoMolmo2, rows: list[str], temperature: float
) -> None:
    ids, images = prompts(*rows, seed=3), pictures(3)
    seeds = [11, 22, 33]
    settings: dict[str, Any] = {"temperature": temperature, "top_k": 20, "top_p": 0.95}
    found = model.generate(
        ids,
        images,
        attention_mask=ids != PAD,
        max_new_tokens=NEW,
        eos_token_id=None,
        seed=seeds,
        **settings,
    )
    assert torch.equal(found[:, :5], ids)
    left = list(images)
    for b, row in enumerate(rows):
        own = [left.pop(0) for _ in range(row.count("i"))]
        real = ids[b][ids[b] != PAD]
        params = SamplingParams(**settings)
        answer = naive(model, real, own, params=params, seed=seeds[b])
        assert found[b, 5:].tolist() == answer
        alone = model.generate(
            real[None], own, max_new_tokens=NEW, eos_token_id=None, seed=seeds[b], **settings
        )
        assert alone[0, len(real) :].tolist() == answer


def test_prompts_with_written_out_image_tokens(model: NanoMolmo2) -> None:
    ids, images = prompts(".i.", "i.i"), pictures(3)
    n = model.config.num_visual_tokens
    length = 1 + 2 * n
    written = torch.full((2, length), PAD)
    for b in range(2):
        row = torch.cat([t.repeat(n if t == IMAGE else 1) for t in ids[b]])
        written[b, length - len(row) :] = row
    found = model.generate(
        written, images, attention_mask=written != PAD, max_new_tokens=6, eos_token_id=None
    )
    expected = model.generate(ids, images, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(found[:, length:], expected[:, 3:])
    features = model.encode_images(images)
    again = model.generate(ids, visual_tokens=features, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(again, expected)


@pytest.fixture(scope="module")
def stopping(plain: NanoMolmo2) -> tuple[Tensor, Tensor, list[list[int]], int]:
    """Prompts, pictures, unstopped answers, and a token that ends some rows early, not all."""
    ids, images = prompts("i..", ".i.", "..i", seed=1), pictures(3)
    answers = [naive(plain, row, [image]) for row, image in zip(ids, images, strict=True)]
    everywhere = sorted({token for answer in answers for token in answer})
    some = [t for t in everywhere if sum(t in answer[1:-2] for answer in answers) > 0]
    early = next(t for t in some if not all(t in answer for answer in answers))
    return ids, images, answers, early


def ended(answer: list[int], eos: tuple[int, ...], length: int, pad: int) -> list[int]:
    """Cut behind the first end token, then filled up."""
    at = min([answer.index(token) + 1 for token in eos if token in answer], default=len(answer))
    return (answer[:at] + [pad] * length)[:length]


def test_rows_that_end_are_padded(
    plain: NanoMolmo2, stopping: tuple[Tensor, Tensor, list[list[int]], int]
) -> None:
    ids, images, answers, eos = stopping
    for pad in (PAD, 10**9):  # a pad id need not be one that the model knows
        found = plain.generate(ids, images, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=pad)
        expected = [ended(answer, (eos,), NEW, pad) for answer in answers]
        assert found[:, 3:].tolist() == expected
    assert 0 < sum(pad in row for row in expected) < 3


def test_generation_stops_when_every_row_has_ended(
    plain: NanoMolmo2, stopping: tuple[Tensor, Tensor, list[list[int]], int]
) -> None:
    """Any of several end tokens ends a row, one that the model does not know among them."""
    ids, images, answers, _ = stopping
    eos = (10**6, *{answer[at] for at, answer in zip((1, 4, 2), answers, strict=True)})
    ends = [ended(answer, eos, NEW, PAD) for answer in answers]
    longest = max(sum(token != PAD for token in row) for row in ends)
    assert longest < NEW
    seen: list[Tensor] = []
    found = plain.generate(ids, images, max_new_tokens=NEW, eos_token_id=eos, on_token=seen.append)
    assert found[:, 3:].tolist() == [row[:longest] for row in ends]
    assert len(seen) == longest
    assert torch.equal(torch.stack(seen, dim=1), found[:, 3:])


def test_the_configs_end_and_pad_tokens_are_the_defaults(
    plain: NanoMolmo2, stopping: tuple[Tensor, Tensor, list[list[int]], int]
) -> None:
    ids, images, answers, eos = stopping
    model = model_of(eos_token_id=(IMAGE, eos))
    found = model.generate(ids, images, max_new_tokens=NEW)
    assert found[:, 3:].tolist() == [ended(answer, (eos,), NEW, PAD) for answer in answers]
    unstopped = model.generate(ids, images, max_new_tokens=NEW, eos_token_id=None)
    assert unstopped[:, 3:].tolist() == answers


def test_the_first_token_may_end_it(
    plain: NanoMolmo2, stopping: tuple[Tensor, Tensor, list[list[int]], int]
) -> None:
    ids, images, answers, _ = stopping
    found = plain.generate(ids[:1], images[:1], max_new_tokens=NEW, eos_token_id=answers[0][0])
    assert found[0, 3:].tolist() == answers[0][:1]


@pytest.mark.parametrize("new", [0, 1, 2])
def test_few_new_tokens(plain: NanoMolmo2, new: int) -> None:
    ids, images = prompts("i..", ".i."), pictures(2)
    seen: list[Tensor] = []
    found = plain.generate(ids, images, max_new_tokens=new, eos_token_id=None, on_token=seen.append)
    assert found.shape == (2, 3 + new)
    assert found.dtype == torch.int64
    assert torch.equal(found[:, :3], ids)
    assert len(seen) == new
    for b in range(2):
        assert found[b, 3:].tolist() == naive(plain, ids[b], [images[b]], new=new)


def test_sampling_repeats_with_its_seed(plain: NanoMolmo2) -> None:
    ids = prompts("....", "....")

    def sampled(**settings: Any) -> list[list[int]]:
        settings = {"temperature": 1.5, "max_new_tokens": 8, "eos_token_id": None, **settings}
        return plain.generate(ids, **settings)[:, 4:].tolist()

    first = sampled(seed=0)
    assert sampled(seed=0) == first
    assert sampled(seed=1) != first
    assert sampled(seed=[0, 1])[0] == first[0]
    assert sampled(seed=[0, 1])[1] == sampled(seed=1)[1]
    assert sampled(temperature=0.0, seed=0) == sampled(temperature=0.0, seed=1)
    torch.manual_seed(5)
    fresh = sampled()
    assert sampled() != fresh
    torch.manual_seed(5)
    assert sampled() == fresh


def test_after_the_prompt_only_new_tokens_are_computed(plain: NanoMolmo2) -> None:
    lengths: list[int] = []
    hook = plain.llm.layers[1].register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    heads: list[int] = []
    head = plain.llm.head
    plain.llm.head = lambda hidden: heads.append(hidden.numel()) or head(hidden)  # type: ignore
    try:
        plain.generate(prompts("i.."), pictures(1), max_new_tokens=4, eos_token_id=None)
    finally:
        hook.remove()
        del plain.llm.head
    assert lengths == [3 + plain.config.num_visual_tokens - 1, 1, 1, 1]
    assert heads == [36] * 4  # logits of one position a step, in the prompt too


def test_generation_leaves_the_model_as_it_was(plain: NanoMolmo2) -> None:
    plain.train()
    plain.llm.gradient_checkpointing = True
    try:
        found = plain.generate(prompts("i.."), pictures(1), max_new_tokens=3, eos_token_id=None)
        assert plain.training and plain.llm.training
        assert not plain.vision_encoder.training
    finally:
        plain.eval()
        plain.llm.gradient_checkpointing = False
    assert not found.requires_grad
    assert all(p.grad is None for p in plain.parameters())


def test_the_last_position_of_the_context_can_be_filled(plain: NanoMolmo2) -> None:
    """Prompt with its picture and answer count together."""
    ids = torch.cat([prompts("i"), text_ids(1, 114)], dim=1)  # 9 + 114 of 128 positions
    found = plain.generate(ids, pictures(1), max_new_tokens=5, eos_token_id=None)
    assert found.shape[1] == 115 + 5
    with pytest.raises(ValueError, match=r"has 123 positions and max_new_tokens is 6.* 0 to 5"):
        plain.generate(ids, pictures(1), max_new_tokens=6)


@pytest.mark.parametrize("kind", ["linear", "pooling"])
def test_bfloat16(kind: str) -> None:
    model = model_of(kind, bidirectional_image_attention=True).bfloat16()
    ids, images = prompts("--i.", "i..i"), pictures(3)
    found = model.generate(
        ids, images, attention_mask=ids != PAD, max_new_tokens=6, eos_token_id=None
    )
    assert found.shape == (2, 10)
    assert found[:, 4:].max() < IMAGE
    with torch.no_grad():
        logits = model(ids, images, attention_mask=ids != PAD)
    likeliest = logits[:, -1].float().topk(3).indices
    assert (likeliest == found[:, 4:5]).any(dim=1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, r"max_new_tokens is -1, .*: max_new_tokens may be 0 to 117"),
        ({"prompt_ids": torch.zeros(1, 0).long(), "pixel_values": None}, "the prompt is empty"),
        ({"prompt_ids": torch.full((1, 3), 90), "pixel_values": None}, "run from 90 to 90"),
        ({"pixel_values": None}, r"1 image tokens \(by row: 1\), but 0 picture"),
        ({"pixel_values": pictures(2)}, r"1 image tokens \(by row: 1\), but 2 picture"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask \(1, 4\) must have the shape"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"seed": [1, 2]}, "2 seeds for 1 rows"),
    ],
)
def test_what_does_not_fit_stops(
    plain: NanoMolmo2, arguments: dict[str, Any], message: str
) -> None:
    fitting: dict[str, Any] = {
        "prompt_ids": prompts("i.."),
        "pixel_values": pictures(1),
        "max_new_tokens": 2,
    }
    with pytest.raises(ValueError, match=message):
        plain.generate(**{**fitting, **arguments})
