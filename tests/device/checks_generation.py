"""Generation: the ids of the CPU whatever the way, and one wait a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nanomolmo2.generation.engine import Engine, Request
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.sampling import SamplingParams
from nanomolmo2.generation.speculative import StepCosts
from nanomolmo2.models import LanguageModel, NanoMolmo2
from tests import small_model as whole
from tests.device.cases import Case, case
from tests.device.simulated import DEVICE, count_waits
from tests.nets import small_model, text_ids

NEW = 9
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 3}


@pytest.fixture(scope="module", params=["base", "molmo2"])
def both(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


def generate(both: Case, model: NanoMolmo2, place: torch.device | str, **options: Any) -> Tensor:
    """(B, new) on the CPU; the prompts are the rows of the case."""
    batch = both.batch.to(place)
    new: Tensor = model.generate(
        batch.input_ids,
        batch.pixel_values,
        batch.attention_mask,
        image_token_pooling=batch.image_token_pooling,
        max_new_tokens=NEW,
        eos_token_id=None,
        **options,
    )
    assert new.device.type == torch.device(place).type
    return new.cpu()


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("invariant", [False, True], ids=["plain", "batch_invariant"])
@pytest.mark.parametrize("lookup", [False, True], ids=["one_by_one", "lookup"])
def test_the_ids_of_the_cpu(
    both: Case, options: dict[str, Any], invariant: bool, lookup: bool
) -> None:
    options = {**options, "batch_invariant": invariant, "lookup": lookup}
    expected = generate(both, both.on_cpu, "cpu", **options)
    assert torch.equal(generate(both, both.on_device, DEVICE, **options), expected)


def test_a_prefix_cache(both: Case) -> None:
    cache = PrefixCache()
    expected = generate(both, both.on_cpu, "cpu")
    for _ in range(2):
        found = generate(both, both.on_device, DEVICE, prefix_cache=cache)
        assert torch.equal(found, expected)
    assert cache.reused_tokens > 0 and cache.reused_images > 0


def test_batch_invariant_bits() -> None:
    """Log-probabilities of a row alone and beside others, bit for bit."""
    llm = copy.deepcopy(case("base").on_cpu.llm).to(DEVICE)
    sampling = SamplingParams(logprobs=3)
    requests = [Request(text_ids(n, seed=n), max_new_tokens=5, sampling=sampling) for n in (3, 17)]
    together = Engine(llm, batch_invariant=True).run(requests)
    alone = [Engine(llm, batch_invariant=True).run([request])[0] for request in requests]
    assert together == alone


@pytest.fixture
def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step costs the same, whatever the machine says: drafts are as long as can be."""
    monkeypatch.setattr(StepCosts, "seconds", lambda self, positions: 1.0)


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.5, seed=1)])
def test_speculation(free_drafts: None, sampling: SamplingParams) -> None:
    """Drafts that are checked in one step give what the model says one by one, in fewer steps."""
    llm = small_model(seed=4).llm  # a tied head: it repeats itself, and is easy to guess
    moved = copy.deepcopy(llm).to(DEVICE)
    request = Request(text_ids(6), max_new_tokens=30, sampling=sampling)
    (expected,) = Engine(llm, lookup=False).run([request])
    engine = Engine(moved)
    engine.submit(request)
    steps, results = 0, []
    while engine.busy:
        steps += 1
        results += [event.result for event in engine.step() if event.result is not None]
    assert [result.token_ids for result in results] == [expected.token_ids]
    assert steps < (20 if sampling.temperature == 0 else 31)


@pytest.fixture(scope="module")
def pipelines() -> tuple[Pipeline, Pipeline]:
    model = whole.small_model()
    # Random weights would write halves of characters.
    model.llm.embed_tokens.weight.data[:257] = 0
    moved = copy.deepcopy(model).to(DEVICE)
    processor = whole.small_processor()
    return Pipeline(model, processor), Pipeline(moved, processor)


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 200, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": 2, "repetition_penalty": 1.2, "logit_bias": {300: 2.0}},
        DRAWN,
        {"well_formed_points": True, **DRAWN},
        {"batch_invariant": True},
        {"reuse": False, "lookup": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_pipeline(pipelines: tuple[Pipeline, Pipeline], options: dict[str, Any]) -> None:
    for question in ("Point to the dog.", "Point to the dog. Then count."):
        expected, found = (
            pipeline.ask([PICTURE, PICTURE], question, max_new_tokens=12, **options)
            for pipeline in pipelines
        )
        assert (found.text, found.points) == (expected.text, expected.points)
        assert found.reused_tokens == expected.reused_tokens
        for a, b in zip(found.logprobs, expected.logprobs, strict=True):
            assert a.token == b.token
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


# ---- waits ----


def decode_waits(
    llm: LanguageModel, requests: list[Request], **options: Any
) -> tuple[list[int], str]:
    """Host synchronisations of every step behind the prompts; and where they came from."""
    engine = Engine(llm, **options)
    for request in requests:
        engine.submit(request)
    engine.step()
    counts, report = [], ""
    while engine.busy:
        with count_waits() as waits:
            engine.step()
        counts.append(len(waits))
        report = str(waits) if len(waits) == max(counts) else report
    return counts, report


def logprobs_of_greedy() -> SamplingParams:
    return SamplingParams(logprobs=2)


def drawn() -> SamplingParams:
    return SamplingParams(temperature=1.0, top_p=0.9, seed=1)


@pytest.mark.parametrize("sampling", [SamplingParams, drawn, logprobs_of_greedy])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("lookup", [False, True], ids=["one_by_one", "lookup"])
def test_a_decode_step_waits_once(
    free_drafts: None, sampling: Callable[[], SamplingParams], rows: int, lookup: bool
) -> None:
    llm = copy.deepcopy(small_model(seed=4).llm).to(DEVICE)
    requests = [
        Request(text_ids(5 + n, seed=n), max_new_tokens=12, sampling=sampling())
        for n in range(rows)
    ]
    counts, report = decode_waits(llm, requests, lookup=lookup)
    assert counts and max(counts) <= 1, report


@pytest.mark.parametrize("options", [{}, DRAWN, {"batch_invariant": True}], ids="-".join)
def test_generate_waits_once_a_token(both: Case, options: dict[str, Any]) -> None:
    """Two rows and a caller who takes every token: what two lengths differ by."""
    batch, counts = both.batch.to(DEVICE), []
    for new in (2, 8):
        with count_waits() as waits:
            both.on_device.generate(
                batch.input_ids,
                batch.pixel_values,
                batch.attention_mask,
                image_token_pooling=batch.image_token_pooling,
                max_new_tokens=new,
                eos_token_id=None,
                on_token=lambda ids: None,
                lookup=False,
                **options,
            )
        counts.append(len(waits))
    assert counts[1] - counts[0] <= 6, str(waits)
