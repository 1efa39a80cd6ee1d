"""Generation against a loop without cache, and a batch against its rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanomolmo2.generation import engine as engine_module
from nanomolmo2.generation.engine import Engine, Event, Request, Result
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.prompt import requests_of
from nanomolmo2.generation.sampling import SamplingParams, sample
from nanomolmo2.generation.speculative import StepCosts
from nanomolmo2.models import LanguageModel, NanoMolmo2
from tests.nets import LLM, PAD, pictures, randomize, small_model, text_ids

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
    hook = plain.llm.layers[0].register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    heads: list[int] = []
    head = plain.llm.head
    plain.llm.head = lambda hidden: heads.append(hidden.numel()) or head(hidden)  # type: ignore
    try:
        plain.generate(
            prompts("i.."), pictures(1), max_new_tokens=4, eos_token_id=None, lookup=False
        )
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


# ---- the engine: rows join and leave ----


@pytest.fixture(scope="module")
def llm() -> LanguageModel:
    return randomize(LanguageModel(replace(LLM, tie_word_embeddings=False)), 4).eval()


@dataclass
class Heads:
    """Logits of every position that the engine looked at, by row."""

    engine: Engine
    logits: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        head, take = self.engine._head, self.engine._take
        step: list[Tensor] = []  # logits of the rows whose turn is still to come

        def recorded_head(hidden: Tensor) -> Tensor:
            logits = head(hidden)
            step[:] = logits
            return logits

        def recorded(row: Any, logits: Any, draft: list[int], events: list[Event]) -> None:
            before = len(row.tokens)
            own, step[:] = step[: len(logits)], step[len(logits) :]
            take(row, logits, draft, events)
            self.logits.setdefault(row.id, []).extend(own[: len(row.tokens) - before])

        self.engine._head = recorded_head  # type: ignore[method-assign]
        self.engine._take = recorded  # type: ignore[method-assign]


def random_request(generator: random.Random) -> Request:
    """Greedy or drawn; texts of few different tokens, so that lookup finds something."""
    length = generator.randint(1, 40)
    ids = [generator.randrange(generator.choice([3, 80])) for _ in range(length)]
    drawn = generator.random() < 0.4
    return Request(
        ids,
        max_new_tokens=generator.randint(1, 25),
        sampling=SamplingParams(
            temperature=0.9 if drawn else 0.0, top_p=0.9, seed=generator.randrange(1000)
        ),
        eos_token_ids=tuple(generator.sample(range(80), 2)),
    )


def any_schedule(
    engine: Engine, requests: list[Request], generator: random.Random
) -> list[tuple[int, Result]]:
    """Submit one after the other, with any number of steps in between; cancel a few more.

    Returns: number and result of each.
    """
    results: dict[int, Result] = {}

    def step() -> None:
        for event in engine.step():
            if event.result is not None:
                results[event.request_id] = event.result

    numbers = []
    for request in requests:
        numbers.append(engine.submit(request))
        if generator.random() < 0.2:
            unwanted = engine.submit(random_request(generator))
            for _ in range(generator.randrange(3)):
                step()
            engine.cancel(unwanted)
            results.pop(unwanted, None)
        for _ in range(generator.randrange(6)):
            step()
    while engine.busy:
        step()
    return [(number, results[number]) for number in numbers]


@pytest.fixture(scope="module")
def alone(llm: LanguageModel) -> Callable[..., tuple[Result, list[Tensor]]]:
    """A request by itself, without drafts, reuse or company; remembered."""
    known: dict[tuple[str, bool], tuple[Result, list[Tensor]]] = {}

    def result(request: Request, invariant: bool) -> tuple[Result, list[Tensor]]:
        key = repr(request), invariant
        if key not in known:
            engine = Engine(llm, max_rows=1, batch_invariant=invariant, lookup=False)
            heads = Heads(engine)
            known[key] = engine.run([request])[0], heads.logits[0]
        return known[key]

    return result


POOL = [random_request(random.Random(number)) for number in range(60)]


@pytest.mark.parametrize("schedules", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("invariant", [False, True], ids=["plain", "batch_invariant"])
def test_schedules_of_joining_and_leaving_rows(
    llm: LanguageModel,
    alone: Callable[..., tuple[Result, list[Tensor]]],
    invariant: bool,
    schedules: int,
) -> None:
    """Every row says what it says alone; in the batch-invariant mode the logits have its bits."""
    rows = reused = 0
    for number in range(schedules):
        generator = random.Random(1000 + number)
        requests = generator.sample(POOL, generator.randint(1, 5))
        cache = PrefixCache() if generator.random() < 0.5 else None
        engine = Engine(
            llm,
            max_rows=generator.randint(1, 4),
            batch_invariant=invariant,
            prefix_cache=cache,
            lookup=generator.random() < 0.7,
        )
        engine._costs = FREE_DRAFTS
        heads = Heads(engine)
        for request, (row, found) in zip(
            requests, any_schedule(engine, requests, generator), strict=True
        ):
            expected, expected_logits = alone(request, invariant)
            assert found.token_ids == expected.token_ids, (number, row)
            assert found.finish_reason == expected.finish_reason
            for a, b in zip(heads.logits[row], expected_logits, strict=True):
                if invariant:
                    assert torch.equal(a, b), (number, row)
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
            rows += 1
            reused += found.reused_tokens
    assert rows > 2 * schedules and reused > schedules // 10


class _FreeDrafts(StepCosts):
    """Every step costs the same, whatever a slow machine says: drafts are as long as can be."""

    def seconds(self, positions: int) -> float:
        return 1.0


FREE_DRAFTS = _FreeDrafts()


@pytest.mark.parametrize("invariant", [False, True], ids=["plain", "batch_invariant"])
def test_lookup_gives_the_same_in_fewer_steps(
    plain: NanoMolmo2, invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A net with a tied head says its last token again and again: easy to guess."""
    model = small_model(seed=4)
    requests = [
        Request(text_ids(1, n, seed=n)[0], max_new_tokens=m) for n, m in ((5, 30), (9, 21), (7, 1))
    ]
    wanted = Engine(model.llm, lookup=False, batch_invariant=invariant).run(requests)
    engine = Engine(model.llm, batch_invariant=invariant)
    engine._costs = FREE_DRAFTS
    heads = Heads(engine)
    numbers = [engine.submit(request) for request in requests]
    results, steps = {}, 0
    while engine.busy:
        steps += 1
        results |= {e.request_id: e.result for e in engine.step() if e.result is not None}
    assert [results[number] for number in numbers] == wanted
    assert steps <= 15
    assert len(heads.logits[numbers[0]]) == 30


@pytest.mark.parametrize("mode", ["int8", "fp16-weights"])
def test_quantised_rows_are_the_same_in_any_batch(mode: str) -> None:
    """Rows of int8 have the same bits by themselves: each has its own activation scale."""
    config = replace(LLM, hidden_size=64, intermediate_size=96, head_dim=16)
    llm = randomize(LanguageModel(config), 4).eval()
    llm.quantize(mode)
    requests = [Request(text_ids(n, seed=n), max_new_tokens=12) for n in (3, 17, 9, 30)]

    def logits(engine: Engine, batches: list[list[Request]]) -> list[Tensor]:
        heads = Heads(engine)
        for batch in batches:
            engine.run(batch)
        return [torch.stack(heads.logits[number]) for number in sorted(heads.logits)]

    for invariant in (False, True) if mode == "int8" else (True,):
        together = logits(Engine(llm, batch_invariant=invariant, lookup=False), [requests])
        alone = logits(
            Engine(llm, batch_invariant=invariant, lookup=False), [[r] for r in requests]
        )
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


class Alternating:
    """A grammar: ids below 40, even and odd ones by turns."""

    def __init__(self) -> None:
        self.last = 1

    def start(self) -> Alternating:
        return Alternating()

    def allowed(self) -> Tensor:
        return torch.arange(40) % 2 != self.last

    def advance(self, id: int) -> None:
        assert id < 40
        assert id % 2 != self.last
        self.last = id % 2


class HalfTruth:
    """Drafts the answer, but every third id of it wrong."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.ids: list[int] = []

    def extend(self, ids: Iterable[int]) -> None:
        self.ids += ids

    def propose(self, width: int) -> list[int]:
        guess = self.answer[len(self.ids) :][:width]
        guess[2::3] = [(id + 2) % 40 for id in guess[2::3]]
        return guess


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_proposer_changes_steps_and_not_answers(llm: LanguageModel, temperature: float) -> None:
    """Penalty, constraint and generator see only the tokens that stay."""
    requests = [
        Request(
            text_ids(n, seed=n),
            max_new_tokens=25,
            sampling=SamplingParams(
                temperature, seed=n, repetition_penalty=1.2, constraint=Alternating(), logprobs=1
            ),
        )
        for n in (3, 8, 5)
    ]
    wanted = Engine(llm, lookup=False, batch_invariant=True).run(requests)
    proposers = [HalfTruth(result.token_ids) for result in wanted]
    engine = Engine(llm, batch_invariant=True)
    engine._costs = FREE_DRAFTS
    numbers = [
        engine.submit(replace(request, proposer=proposer))
        for request, proposer in zip(requests, proposers, strict=True)
    ]
    results, steps = {}, 0
    while engine.busy:
        steps += 1
        results |= {e.request_id: e.result for e in engine.step() if e.result is not None}
    assert [results[number] for number in numbers] == wanted
    assert steps == 9  # the prompts with a token each, then three tokens a step
    assert [proposer.ids for proposer in proposers] == [result.token_ids for result in wanted]
    assert len({tuple(result.token_ids) for result in wanted}) == 3


def test_earlier_answers_are_drafts_of_later_ones() -> None:
    """By another engine of the model, too; a row without lookup leaves nothing."""
    llm = randomize(LanguageModel(replace(LLM, tie_word_embeddings=False)), 4).eval()
    params = SamplingParams(temperature=1.5, seed=3)
    request = Request(text_ids(6, seed=2), max_new_tokens=24, sampling=params)

    def steps(lookup: bool) -> tuple[list[int], int]:
        engine = Engine(llm, lookup=lookup, batch_invariant=True)
        engine._costs = FREE_DRAFTS
        events = []
        engine.submit(request)
        while engine.busy:
            events.append(engine.step())
        assert events[-1][-1].result is not None
        return events[-1][-1].result.token_ids, len(events)

    wanted, plain = steps(False)
    found, first = steps(True)
    again, second = steps(True)
    assert found == again == wanted
    assert len(set(wanted)) > 12, "a net that repeats itself proves little"
    assert plain == 24
    assert first > 12
    assert second == 4  # the prompt with a token, then eight tokens a step


def test_all_settings_or_the_usual_ones(llm: LanguageModel) -> None:
    ids = text_ids(2, 6)
    named = llm.generate(ids, max_new_tokens=9, temperature=0.9, top_k=9, top_p=0.8, seed=[4, 5])
    params = SamplingParams(0.9, top_k=9, top_p=0.8, seed=[4, 5])
    assert torch.equal(llm.generate(ids, max_new_tokens=9, sampling=params), named)
    end = int(named[0, 8])
    params = replace(params, stop_token_ids=(end,))
    stopped = llm.generate(ids[:1], max_new_tokens=9, sampling=replace(params, seed=4))
    assert stopped[0].tolist() == named[0, : named[0].tolist().index(end, 6) + 1].tolist()
    with pytest.raises(ValueError, match=r"found sampling and beside it top_k=3, seed=0"):
        llm.generate(ids, sampling=params, top_k=3, seed=0)


def test_results_and_stops_of_a_batch(llm: LanguageModel) -> None:
    ids = text_ids(3, 6)
    plain = llm.generate(ids, max_new_tokens=9)[:, 6:].tolist()
    results: dict[int, Result] = {}
    seen: list[list[int]] = [[], [], []]

    def stops(row: int, id: int) -> bool:
        seen[row].append(id)
        return row == 1 and len(seen[row]) == 4

    def keep(row: int, result: Result) -> None:
        results[row] = result

    params = SamplingParams(logprobs=0, stop="known to the caller")
    found = llm.generate(ids, max_new_tokens=9, sampling=params, stops=stops, on_result=keep)
    assert seen == [plain[0], plain[1][:4], plain[2]]
    assert found[:, 6:].tolist() == [plain[0], plain[1][:4] + [0] * 5, plain[2]]
    assert [results[row].finish_reason for row in range(3)] == ["length", "stop", "length"]
    assert [results[row].token_ids for row in range(3)] == seen
    assert [len(results[row].sampled) for row in range(3)] == [9, 4, 9]


def test_rows_count_the_drafts_of_the_rows_before() -> None:
    """Six positions are free and a seventh is dear: two rows together stay below it."""
    model = small_model(seed=4)

    class Cliff(StepCosts):
        def seconds(self, positions: int) -> float:
            return 1.0 if positions <= 6 else 100.0

    engine = Engine(model.llm)
    engine._costs = Cliff()
    widths: list[int] = []
    hook = model.llm.layers[0].register_forward_pre_hook(
        lambda module, inputs: widths.append(inputs[0].shape[1])
    )
    try:
        engine.run([Request(text_ids(5, seed=n), max_new_tokens=30) for n in (1, 2)])
    finally:
        hook.remove()
    assert max(widths[2:]) == 6


def test_lookup_where_steps_cost_their_positions_drafts_nothing(llm: LanguageModel) -> None:
    costs = StepCosts({n: float(n) for n in range(1, 9)})
    engine = Engine(llm)
    engine._costs = costs
    widths: list[int] = []
    hook = llm.layers[0].register_forward_pre_hook(
        lambda module, inputs: widths.append(inputs[0].shape[1])
    )
    costs.record = lambda positions, seconds: None  # type: ignore[method-assign]
    try:
        engine.run([Request([1, 2] * 10, max_new_tokens=8)])
    finally:
        hook.remove()
    assert widths == [20] + [1] * 7


def test_a_step_computes_no_padding(llm: LanguageModel) -> None:
    """Prompts one by one, then all rows in one step, however different their lengths."""
    widths: list[int] = []
    hook = llm.layers[0].register_forward_pre_hook(
        lambda module, inputs: widths.append(inputs[0].shape[1])
    )
    engine = Engine(llm, max_rows=2, lookup=False)
    try:
        for length in (3, 40, 5):
            engine.submit(Request(text_ids(length), max_new_tokens=3))
        assert [e.request_id for e in engine.step()] == [0, 1]
        assert [e.request_id for e in engine.step()] == [0, 1]
        last = engine.step()
        assert [e.finished for e in last] == [True, True]
        assert [e.request_id for e in engine.step()] == [2]
    finally:
        hook.remove()
    assert widths == [3, 40, 2, 2, 5]


class Waits(TorchDispatchMode):
    """Counts what waits for a device: values that come to the host, and shapes that depend on them.

    A copy to the host is no operation on a CPU, so `fetch` counts as the one transfer that it is.
    """

    OPS: ClassVar = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] in self.OPS
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("invariant", [False, True], ids=["plain", "batch_invariant"])
def test_a_decoding_step_waits_once(
    model: NanoMolmo2, invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For what the samplers need, whatever the rows ask for, with drafts and without."""
    waits = Waits()
    in_step = False
    log: list[int] = []
    fetch, continue_ = engine_module.fetch, Engine._continue

    def counted_fetch(logits: Tensor, samplers: list[Any]) -> Any:
        before = waits.count
        found = fetch(logits, samplers)
        assert waits.count == before, "the greedy rows are compared on the host"
        waits.count += 1
        if in_step:
            log.append(waits.count)
            waits.__exit__(None, None, None)  # from here on all is on the host
        return found

    def counted_continue(self: Engine, rows: Any, events: list[Event]) -> None:
        nonlocal in_step
        in_step, waits.count = True, 0
        waits.__enter__()
        continue_(self, rows, events)
        in_step = False

    monkeypatch.setattr(engine_module, "check_ids", lambda ids, size: None)  # on the host
    monkeypatch.setattr(engine_module, "fetch", counted_fetch)
    monkeypatch.setattr(Engine, "_continue", counted_continue)
    engine = Engine(model.llm, batch_invariant=invariant)
    engine._costs = FREE_DRAFTS
    sampling = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1, top_p=0.9),
        SamplingParams(repetition_penalty=1.2, logprobs=2),
        SamplingParams(constraint=Alternating()),
    ]
    images = requests_of(model, prompts("i.i.", "...i", "....", "i..."), pictures(4))
    list(
        engine.stream(
            replace(request, sampling=params, max_new_tokens=30)
            for request, params in zip(images, sampling, strict=True)
        )
    )
    assert len(log) > 2 and set(log) == {1}


def test_no_mask_where_nothing_is_seen_ahead(
    model: NanoMolmo2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, and a known picture: nothing of size T x T."""
    masks: list[bool] = []
    transform = Engine._transform

    def recorded(self: Engine, rows: Any, *rest: Any, **named: Any) -> Tensor:
        mask = rest[3] if len(rest) > 3 else None
        masks.append(mask is not None)
        return transform(self, rows, *rest, **named)

    monkeypatch.setattr(Engine, "_transform", recorded)
    engine = Engine(model.llm, prefix_cache=PrefixCache())
    both_ways = model.config.bidirectional_image_attention
    for row, count in (("....", 0), ("i...", 1), ("i.i.", 2)):
        ids, images = prompts(row), pictures(count) if count else None
        ids = torch.cat([ids, torch.tensor([[1, 2]])], dim=1)
        for last in (3, 4):
            ids[0, -1] = last
            (request,) = requests_of(model, ids, images, cache=engine.prefix_cache)
            assert request.attention_mask is None
            engine.run([replace(request, max_new_tokens=1)])
        assert masks == [both_ways and count > 0, False]
        masks.clear()


def test_streamed_events_are_the_results(llm: LanguageModel) -> None:
    requests = POOL[:4]
    events = list(Engine(llm, max_rows=2).stream(requests))
    for number, expected in enumerate(Engine(llm).run(requests)):
        own = [event for event in events if event.request_id == number]
        assert [event.token for event in own] == expected.token_ids
        assert [event.finished for event in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].result == expected


def test_cancelled_rows_say_no_more(llm: LanguageModel) -> None:
    engine = Engine(llm, max_rows=1)
    first, second, third = (engine.submit(Request([1, 2], max_new_tokens=5)) for _ in range(3))
    engine.step()
    assert engine.cancel(first) and engine.cancel(second)
    assert not engine.cancel(first)
    events = [event for _ in range(5) for event in engine.step()]
    assert {event.request_id for event in events} == {third}
    assert not engine.busy


def test_no_new_tokens(llm: LanguageModel) -> None:
    (event,) = Engine(llm).stream([Request([1, 2], max_new_tokens=0)])
    assert event.token is None and event.result is not None
    assert event.result.token_ids == [] and event.result.finish_reason == "length"


def test_stop_ids_stop_callables_and_log_probabilities(llm: LanguageModel) -> None:
    ids = [1, 2, 3, 4]
    (whole,) = Engine(llm).run([Request(ids, max_new_tokens=8)])
    end = whole.token_ids[3]
    cut = whole.token_ids[: whole.token_ids.index(end) + 1]
    params = SamplingParams(stop_token_ids=(end,), logprobs=2)
    stopped, called = Engine(llm).run(
        [
            Request(ids, max_new_tokens=8, sampling=params),
            Request(ids, max_new_tokens=8, stops=lambda id: id == end),
        ]
    )
    assert stopped.token_ids == called.token_ids == cut
    assert stopped.finish_reason == called.finish_reason == "stop"
    assert called.sampled == ()
    with torch.no_grad():
        logprobs = llm(torch.tensor([ids]))[0, -1].log_softmax(-1)
    first = stopped.sampled[0]
    assert first.token == cut[0] == first.top[0][0]
    assert first.logprob == pytest.approx(float(logprobs.max()), abs=1e-4)
    assert len(stopped.sampled) == len(cut)


def test_a_penalty_and_a_bias_hold_with_drafts(llm: LanguageModel) -> None:
    params = SamplingParams(repetition_penalty=1.3, logit_bias={7: 2.0})
    requests = [Request([1, 2] * 8, max_new_tokens=20, sampling=params)]
    engine = Engine(llm)
    engine._costs = FREE_DRAFTS
    assert engine.run(requests) == Engine(llm, lookup=False).run(requests)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "needs input_ids or inputs_embeds"),
        (Request([]), "the prompt is empty"),
        (Request([1, 89]), "token ids run from 1 to 89"),
        (Request([1], sampling=SamplingParams(stop="x")), r"stop texts \['x'\], but the engine"),
        (Request([1] * 100, max_new_tokens=29), "max_new_tokens may be 0 to 28"),
        (
            Request([1, 2], max_new_tokens=1, attention_mask=torch.ones(1, 2)),
            r"must be \(2, 2\) bool",
        ),
    ],
)
def test_requests_that_do_not_fit(llm: LanguageModel, request_: Request, message: str) -> None:
    engine = Engine(llm)
    with pytest.raises(ValueError, match=message):
        engine.submit(request_)
    assert not engine.busy
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        Engine(llm, max_rows=0)


# ---- text only ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_language_model_generates(llm: LanguageModel, side: str) -> None:
    rows = [text_ids(n, seed=n) for n in (3, 6)]
    ids = torch.full((2, 6), PAD)
    for b, row in enumerate(rows):
        ids[b, slice(6 - len(row), 6) if side == "left" else slice(len(row))] = row
    found = llm.generate(ids, ids != PAD, max_new_tokens=7, temperature=0.8, top_k=30, seed=[1, 2])
    assert torch.equal(found[:, :6], ids)
    for b, row in enumerate(rows):
        generator = torch.Generator().manual_seed(b + 1)
        params = SamplingParams(temperature=0.8, top_k=30)
        own = row
        for _ in range(7):
            with torch.no_grad():
                token = sample(llm(own[None])[:, -1], params, [generator])
            own = torch.cat([own, token])
        assert found[b, 6:].tolist() == own[len(row) :].tolist()


def test_a_language_model_stops(llm: LanguageModel) -> None:
    ids = text_ids(2, 4)
    whole = llm.generate(ids, max_new_tokens=8)
    end = int(whole[0, 6])
    found = llm.generate(ids[:1], max_new_tokens=8, eos_token_id=end)
    at = whole[0, 4:].tolist().index(end)
    assert torch.equal(found[0], whole[0, : 5 + at])
    both = llm.generate(ids, max_new_tokens=8, eos_token_id=[end, 88])
    assert (both[0, 5 + at :] == end).all(), "filled with the end token"
    with pytest.raises(ValueError, match="must have the shape of input_ids"):
        llm.generate(ids, torch.ones(2, 3))
