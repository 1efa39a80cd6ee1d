"""Points that are selected: the ids of the CPU, and one wait more in a step that selects."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from nanomolmo2.generation.engine import Engine, Result
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.prompt import requests_of
from nanomolmo2.generation.sampling import SamplingParams
from nanomolmo2.models import NanoMolmo2
from tests.device.simulated import DEVICE, count_waits
from tests.generation.point_model import (
    QUOTE,
    batch_of,
    consistent,
    prompt_of,
    released,
    request,
)
from tests.molmo_point import V

DRAWN = {"temperature": 0.5, "seed": 3, "sample_points": True}
RULES = {"released": released, "consistent": consistent}


@cache
def on_device(rule: str) -> NanoMolmo2:
    return copy.deepcopy(RULES[rule]()).to(DEVICE)


def prompts() -> list[Any]:
    one = prompt_of("one")
    asked = one.point(11, 1, 4).then(49, 61, 61, 61, QUOTE)
    return [prompt_of("video"), prompt_of("text"), asked, prompt_of("two")]


def run(
    model: NanoMolmo2, place: Any, cache: PrefixCache | None = None, **options: Any
) -> list[Result]:
    given = batch_of(*prompts())
    moved = {name: None if x is None else x.to(place) for name, x in given.items()}
    invariant = options.pop("batch_invariant", False)
    requests = [
        replace(one, max_new_tokens=14, sampling=SamplingParams(**options))
        for one in requests_of(model, **moved, cache=cache)
    ]
    return Engine(model.llm, batch_invariant=invariant, prefix_cache=cache).run(requests)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5, "seed": 3, "sample_points": True},
        {"logprobs": 3},
        {"batch_invariant": True},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("rule", RULES)
def test_the_ids_of_the_cpu(rule: str, options: dict[str, Any]) -> None:
    expected = run(RULES[rule](), "cpu", **options)
    assert sum(id >= V for result in expected for id in result.token_ids) > 8
    found = run(on_device(rule), DEVICE, **options)
    for a, b in zip(found, expected, strict=True):
        assert a.token_ids == b.token_ids
        for x, y in zip(a.confidences, b.confidences, strict=True):
            assert x == pytest.approx(y, abs=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_reuse(rule: str) -> None:
    cache, expected = PrefixCache(), run(RULES[rule](), "cpu")
    for _ in range(2):
        found = run(on_device(rule), DEVICE, cache)
        assert [r.token_ids for r in found] == [r.token_ids for r in expected]
    assert all(result.reused_tokens for result in found) and cache.reused_images > 0


def waits_of(model: NanoMolmo2, asked: list[Any]) -> list[tuple[list[int], int, str]]:
    """Of every step behind the prompts its tokens, and how often the host waited, and where."""
    engine, log = Engine(model.llm, lookup=False), []
    for one in request(model, *asked):
        engine.submit(one)
    engine.step()
    while engine.busy:
        with count_waits() as waits:
            tokens = [event.token for event in engine.step() if event.token is not None]
        log.append((tokens, len(waits), str(waits)))
    return log


@pytest.mark.parametrize("rule", RULES)
def test_waits_of_one_row(rule: str) -> None:
    """One for text, for a slot and for a cell; two for a row, that of PATCH and that of its scores.

    Three where the released rule takes text in place of a point.
    """
    rows, refused = 55, 0
    log = waits_of(on_device(rule), [prompt_of("two").then(QUOTE, 97)])
    for (token,), number, report in log:
        is_row = V <= token <= V + rows
        refused += token < V and number == 3
        assert number == (2 if is_row else 3 if token < V and number == 3 else 1), report
    assert {token < V for (token,), _, _ in log} == {False, True}
    assert refused == 0 or rule == "released"


@pytest.mark.parametrize("rule", RULES)
def test_waits_of_a_batch(rule: str) -> None:
    """Rows that select do it together; beside them text waits as always."""
    for _, number, report in waits_of(on_device(rule), prompts()):
        assert number <= 3, report
    for tokens, number, report in waits_of(on_device(rule), [prompt_of("text")] * 3):
        assert max(tokens) < V and number == 1, report
