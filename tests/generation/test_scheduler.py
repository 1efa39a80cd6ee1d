"""Requests of several threads on one engine, against the same requests alone."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from nanomolmo2.generation.engine import Engine, Event, Request
from nanomolmo2.generation.prefix_cache import PrefixCache
from nanomolmo2.generation.sampling import SamplingParams
from nanomolmo2.generation.scheduler import Cancelled, Scheduler, Way
from nanomolmo2.models import LanguageModel
from tests.generation.test_engine import model_of
from tests.nets import text_ids


@pytest.fixture(scope="module")
def llm() -> LanguageModel:
    return model_of().llm


@pytest.fixture
def scheduler(llm: LanguageModel) -> Scheduler:
    scheduler = Scheduler(llm, PrefixCache(), max_rows=4)
    yield scheduler
    scheduler.close()


def request(number: int, new: int = 12, **fields: object) -> Request:
    ids = text_ids(1, 3 + number % 5, seed=number)[0]
    return Request(ids, max_new_tokens=new, **fields)


def answer(events: object) -> list[int]:
    return [event.token for event in events if event.token is not None]


def test_many_threads_get_the_answers_of_one_by_one(
    llm: LanguageModel, scheduler: Scheduler
) -> None:
    expected = [Engine(llm, lookup=False).run([request(n)])[0].token_ids for n in range(24)]
    order = list(range(24)) * 3
    random.Random(1).shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: answer(scheduler.submit(request(n))), order))
    assert found == [expected[n] for n in order]
    assert scheduler.stats.requests == {"length": 72}
    assert scheduler.stats.output_tokens == 72 * 12


def test_requests_join_while_others_run(scheduler: Scheduler) -> None:
    """The second one is answered before the first, longer one has ended."""
    long = iter(scheduler.submit(request(0, new=90)))
    first = [next(long), next(long)]
    assert len(answer(scheduler.submit(request(1, new=3)))) == 3
    rest = list(long)
    assert len(first) + len(rest) == 90
    assert rest[-1].result is not None


def test_a_cancelled_request_frees_its_row(llm: LanguageModel) -> None:
    scheduler = Scheduler(llm, max_rows=1)
    first = scheduler.submit(request(0, new=90))
    next(iter(first))
    first.cancel()
    assert len(answer(scheduler.submit(request(1, new=3)))) == 3  # it would wait for the only row
    with pytest.raises(Cancelled):
        list(first)
    first.cancel()  # has ended: nothing
    assert scheduler.stats.requests == {"cancelled": 1, "length": 1}
    scheduler.close()


class Broken:
    """A constraint that fails at its third token."""

    def start(self) -> Broken:
        self.left = 3
        return self

    def allowed(self) -> Tensor | None:
        self.left -= 1
        if not self.left:
            raise ValueError("no token is left")
        return None

    def advance(self, id: int) -> None:
        pass


def test_what_goes_wrong_in_a_row_is_its_own(llm: LanguageModel, scheduler: Scheduler) -> None:
    expected = Engine(llm, lookup=False).run([request(3, new=30)])[0].token_ids
    beside = scheduler.submit(request(3, new=30))
    sampling = SamplingParams(constraint=Broken())
    broken = scheduler.submit(request(4, sampling=sampling))
    events: list[Event] = []
    with pytest.raises(ValueError, match="no token is left"):
        events.extend(broken)
    assert answer(beside) == expected
    with pytest.raises(ValueError, match="no token is left"):
        Engine(llm).run([request(4, sampling=SamplingParams(constraint=Broken()))])


def test_what_the_engine_refuses_is_raised_where_it_is_submitted(scheduler: Scheduler) -> None:
    with pytest.raises(ValueError, match="max_new_tokens may be 0 to"):
        scheduler.submit(request(0, new=100_000))
    with pytest.raises(ValueError, match="the prompt is empty"):
        scheduler.submit(Request(torch.zeros(0, dtype=torch.long)))
    assert len(answer(scheduler.submit(request(0)))) == 12


def test_ways_have_engines_of_their_own(llm: LanguageModel, scheduler: Scheduler) -> None:
    invariant = Way(batch_invariant=True, lookup=False)
    tickets = [scheduler.submit(request(n), way) for n in range(4) for way in (Way(), invariant)]
    found = [answer(ticket) for ticket in tickets]
    engine = Engine(llm, batch_invariant=True, lookup=False)
    assert found[1::2] == [engine.run([request(n)])[0].token_ids for n in range(4)]


def test_closing(llm: LanguageModel) -> None:
    scheduler = Scheduler(llm)
    running = scheduler.submit(request(0, new=60))
    scheduler.close(finish=True, timeout=60)
    assert len(answer(running)) == 60
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(request(1))
    scheduler = Scheduler(llm)
    running = scheduler.submit(request(0, new=90))
    scheduler.close()
    with pytest.raises(Cancelled, match="closed before"):
        list(running)
    Scheduler(llm).close()  # never used: there is no thread


def test_an_idle_scheduler_waits(scheduler: Scheduler) -> None:
    answer(scheduler.submit(request(0)))
    steps, deadline = scheduler.stats.steps, time.monotonic() + 60
    while (scheduler.stats.running, scheduler.stats.waiting) != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert scheduler.stats.steps == steps
    assert scheduler._thread in threading.enumerate()
