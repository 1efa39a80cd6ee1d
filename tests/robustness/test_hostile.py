"""A minute of the hostile inputs of `make soak`, and all that were ever found to break a rule.

An input is named ``kind:seed:number``; ``python -m tests.robustness --only NAME`` tries one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from importlib import import_module

import pytest

from tests.robustness import workers
from tests.robustness.__main__ import COUNTS, names, share, table
from tests.robustness.judge import KINDS, Outcome
from tests.robustness.mutate import (
    flip,
    read_chunks,
    some_bytes,
    some_chunks,
    some_json,
    write_chunks,
)
from tests.robustness.workers import Worker, run_inputs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")

# About a minute on one core.
QUICK = {
    "pictures": 1200,
    "videos": 500,
    "checkpoints": 400,
    "texts": 2000,
    "records": 400,
    "commands": 60,
    "kills": 16,
    "threads": 1,
}
SEED = 0  # `make soak` begins at 1

FOUND = [
    f"{kind}:{which}" for kind in KINDS for which in import_module(f"tests.robustness.{kind}").FOUND
]
# What the judge must say of inputs that break a rule on purpose.
PLANTED = {
    "nothing": "",
    "refused": "",
    "several lines": "a message of several lines",
    "a long message": "a message of 501 characters",
    "an empty message": "an empty message",
    "a secret": "quotes a file",
    "another kind of error": "raised TypeError",
    "an error of another make": "raised UnicodeDecodeError",
    "no memory": "raised MemoryError",
    "a wrong result": "is not 2",
    "memory": "MB",
    "a crash": "died by SIGABRT",
    "a wait": "waits for ever",
    "a loop": "did not come back",
    "code": "planted code was run",
    "a file outside": "opened for writing",
    "a file outside, deleted": "os.remove",
    "a program": "os.system",
    "a file outside, read": "was read",
    "a link to outside, read": "was read",
}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.fixture(scope="module")
def planted() -> Iterator[Worker]:
    """One that nothing else has filled: what is left to it is what the planted faults count on."""
    with Worker() as worker:
        yield worker


def findings(outcomes: list[Outcome]) -> list[str]:
    return [f"{o.name} [{o.what}] {problem}" for o in outcomes for problem in o.problems]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs_end_as_a_result_or_in_one_sentence(kind: str, worker: Worker) -> None:
    outcomes = list(worker.run(f"{kind}:{SEED}:{i}" for i in range(QUICK[kind])))
    assert not findings(outcomes)
    # Both must occur, or the generator no longer makes what it is for.
    refused = sum(bool(outcome.refused) for outcome in outcomes)
    assert refused < len(outcomes)
    assert refused or kind in ("texts", "kills", "threads", "commands")  # they say it themselves


@pytest.mark.parametrize("name", FOUND)
def test_what_was_once_found_stays_mended(name: str, worker: Worker) -> None:
    (outcome,) = worker.run([name])
    assert not findings([outcome])


@pytest.mark.parametrize("name", PLANTED)
def test_the_judge_sees(name: str, planted: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(workers, "CPU_SECONDS", 2.0)
    # A worker's first input may take longer: it imports.
    _, outcome = planted.run(["planted:nothing", f"planted:{name}"])
    assert PLANTED[name] in " ".join(outcome.problems)
    assert bool(outcome.problems) == bool(PLANTED[name])


def test_a_worker_goes_on_behind_an_input_that_ends_it(worker: Worker) -> None:
    outcomes = list(worker.run(["planted:a crash", "planted:1:0", "planted:1:1"]))
    assert [bool(outcome.problems) for outcome in outcomes] == [True, False, False]


def test_a_name_is_always_the_same_input(worker: Worker) -> None:
    """Whichever worker makes it, and in whatever order."""
    some = [f"planted:1:{i}" for i in range(6)]
    alone = {outcome.name: outcome.what for outcome in worker.run(some)}
    shared = {outcome.name: outcome.what for outcome in run_inputs(reversed(some), 2, batch=2)}
    assert alone == shared and len(set(alone.values())) == 6


def test_changes_are_drawn_from_the_seed_alone() -> None:
    data, others = bytes(range(256)) * 4, [b"other" * 50]
    record = {"image": "a.png", "points": [{"x": 1, "y": 2}], "answer": "a"}
    for change in (some_bytes, some_chunks):
        assert change(random.Random(3), data, others) == change(random.Random(3), data, others)
    assert len({some_bytes(random.Random(seed), data, others) for seed in range(50)}) > 30
    assert str(some_json(random.Random(3), record)) == str(some_json(random.Random(3), record))
    assert record == {"image": "a.png", "points": [{"x": 1, "y": 2}], "answer": "a"}
    assert flip(random.Random(0), b"") == b""


@pytest.mark.parametrize("kind", ["pictures", "videos"])
def test_files_of_chunks_are_put_together_again(kind: str) -> None:
    """With their lengths and checksums; else every change would be refused for that alone."""
    module = import_module(f"tests.robustness.{kind}")
    files = module.known_files() if kind == "pictures" else module.valid_files()
    whole = 0
    for data in files:
        if found := read_chunks(data):
            whole += write_chunks(*found) == data
    assert whole > 5


def test_a_share_holds_all_kinds_and_can_be_gone_on_with() -> None:
    assert sum(COUNTS.values()) >= 200_000
    kinds = list(KINDS)
    assert all(share(kind, 10) >= 1 for kind in kinds)
    every = list(names(kinds, 2000, 1, 0))
    assert list(names(kinds, 2000, 1, 700)) == every[700:]
    rows = table({"texts": [Outcome("texts:1:0"), Outcome("texts:1:1", problems=["a", "b"])]})
    assert rows.splitlines()[1].split() == ["texts", "2", "1", "0", "1", "0.00", "0"]
