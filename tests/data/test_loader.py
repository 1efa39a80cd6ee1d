"""The loader: the same rows for any number of processes, after a resume, with a worker or not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanomolmo2.batch import IGNORED_LABEL, PACK_SUBSEGMENT, PREFIX_SUBSEGMENT, Batch
from nanomolmo2.data.example import BadExample, Branch, Example
from nanomolmo2.data.loader import PackedLoader, RowPlan, Step, merge_states
from nanomolmo2.data.mixture import Mixture
from nanomolmo2.data.sources import SourceConfig, open_mixture
from nanomolmo2.emoji.source import EmojiConfig, EmojiScenes
from nanomolmo2.processor import Encoded
from nanomolmo2.processor.encode import EncodeTree
from tests.data.sources import Listed, encoder, talk
from tests.small_model import small_processor

# Token ids tell which example of which source a token is of.
SOURCES, STRIDE, ID_OF_PAD = 2, 1000, 999_999
POOL = 6


class Numbered:
    """Examples that are their own number; every ``bad`` of them cannot be learned from."""

    def __init__(self, source: int, size: int, bad: int = 0) -> None:
        self.source, self.size, self.bad, self.name = source, size, bad, f"source {source}"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Example:
        if self.bad and i % self.bad == 0:
            raise BadExample("missing picture", f"{self.name}, example {i}")
        number = self.source * STRIDE + i
        return Example([], [Branch([], f"task {b}", {"number": number}) for b in range(1 + i % 3)])


def encode_number(example: Example) -> Encoded:
    """A prefix, and branches of a length that depends on the number; some have crops."""
    number = example.branches[0].truth["number"]
    lengths = [3 + (number * 7 + b) % 5 for b in range(len(example.branches))]
    crops = number % 4
    prefix = 1 + crops
    T = prefix + sum(lengths)
    subsegments = np.repeat([PREFIX_SUBSEGMENT, *range(len(lengths))], [prefix, *lengths])
    return Encoded(
        input_ids=np.full(T, number),
        position_ids=np.concatenate(
            [np.arange(prefix), *(prefix + np.arange(length) for length in lengths)]
        ),
        labels=np.where(subsegments == PREFIX_SUBSEGMENT, IGNORED_LABEL, number),
        subsegment_ids=subsegments,
        pixel_values=np.full((crops, 2, 3), number, dtype=np.float32) if crops else None,
        image_token_pooling=np.arange(2 * crops).reshape(crops, 2) if crops else None,
    )


def loader(**changes: Any) -> PackedLoader:
    sizes = changes.pop("sizes", (40, 90))
    bad = changes.pop("bad", 0)
    encode: Callable[[Example], Encoded] = changes.pop("encode", encode_number)
    sources = [Numbered(s, size, bad) for s, size in enumerate(sizes)]
    arguments: dict[str, Any] = {
        "pad_token_id": ID_OF_PAD,
        "batch_size": 4,
        "max_tokens": 40,
        "max_crops": 5,
        "packing_buffer": POOL,
    }
    names = {field.name for field in fields(RowPlan)}
    arguments |= {name: changes.pop(name) for name in names & set(changes)}
    return PackedLoader(Mixture(sources, seed=3), encode, RowPlan(**arguments), **changes)


def steps_of(found: PackedLoader, count: int) -> list[Step]:
    return list(islice(found, count))


def rows_of(step: Step) -> list[dict[str, list[Any]]]:
    """What stands in every row, without padding."""
    rows = []
    for batch, branches in zip(step.micro_batches, step.branches, strict=True):
        assert batch.attention_mask is not None
        for row, mask in enumerate(batch.attention_mask):
            tensors = {"branches": branches, **text_of(batch)}
            values = {name: tensor[row][mask].tolist() for name, tensor in tensors.items()}
            values["tasks"] = [step.tasks[b] if b >= 0 else "" for b in values.pop("branches")]
            rows.append(values)
    return rows


def text_of(batch: Batch) -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in batch.tensors().items()
        if value.ndim == 2 and name != "image_token_pooling"
    }


def assert_same(found: Step, expected: Step) -> None:
    """All of it, but for the seconds."""
    for name in ("tasks", "state", "counts", "bad", "drawn"):
        assert getattr(found, name) == getattr(expected, name)
    pairs = zip(found.micro_batches, expected.micro_batches, strict=True)
    for batch, other in pairs:
        tensors, others = batch.tensors(), other.tensors()
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    for branches, other_branches in zip(found.branches, expected.branches, strict=True):
        assert torch.equal(branches, other_branches)


def examples_of(row: dict[str, list[Any]]) -> list[int]:
    """Numbers of the examples of a row, in order."""
    own = [subsegment // PACK_SUBSEGMENT for subsegment in row["subsegment_ids"]]
    return [number for _, number in dict(zip(own, row["input_ids"], strict=True)).items()]


# --- rows ----------------------------------------------------------------------------------------


def test_a_row_holds_whole_examples_as_they_were_encoded() -> None:
    for step in steps_of(loader(), 5):
        for row in rows_of(step):
            at = 0
            numbers = examples_of(row)
            for k, number in enumerate(numbers):
                source, index = divmod(number, STRIDE)
                example = Numbered(source, STRIDE)[index]
                alone = encode_number(example)
                here = slice(at, at + len(alone.input_ids))
                assert alone.labels is not None and alone.subsegment_ids is not None
                assert row["input_ids"][here] == alone.input_ids.tolist()
                assert row["labels"][here] == alone.labels.tolist()
                assert row["position_ids"][here] == alone.position_ids.tolist()
                expected = alone.subsegment_ids + PACK_SUBSEGMENT * k
                assert row["subsegment_ids"][here] == expected.tolist()
                tasks = [
                    "" if s == PREFIX_SUBSEGMENT else f"task {s}" for s in alone.subsegment_ids
                ]
                assert row["tasks"][here] == tasks
                at = here.stop
            assert at == len(row["input_ids"]) <= 40
            assert sum(number % 4 for number in numbers) <= 5


def test_every_branch_of_a_step_has_its_own_number() -> None:
    (step,) = steps_of(loader(micro_batch_size=2), 1)
    numbers = torch.cat([branches.flatten() for branches in step.branches])
    assert numbers.unique().tolist() == [-1, *range(len(step.tasks))]
    numbers = numbers[numbers >= 0]
    assert numbers.tolist() == sorted(numbers.tolist())  # reading order


def test_micro_batches_are_padded_to_their_own_longest_row() -> None:
    for micro, sizes in ((1, [1, 1, 1, 1]), (3, [3, 1]), (4, [4])):
        (step,) = steps_of(loader(micro_batch_size=micro), 1)
        assert [len(batch.input_ids) for batch in step.micro_batches] == sizes
        padding, all_lengths = 0, []
        for batch in step.micro_batches:
            assert batch.attention_mask is not None
            lengths = batch.attention_mask.sum(dim=1)
            all_lengths += lengths.tolist()
            assert batch.input_ids.shape[1] == lengths.max()
            padding += int((batch.input_ids.shape[1] - lengths).sum())
            assert (batch.input_ids[~batch.attention_mask] == ID_OF_PAD).all()
        assert step.counts["padding"] == padding
        assert all_lengths == sorted(all_lengths, reverse=True)  # so that there is little of it
        assert (padding > 0) == (micro > 1)


def test_what_a_step_holds_is_counted() -> None:
    (step,) = steps_of(loader(micro_batch_size=2), 1)
    rows = rows_of(step)
    assert step.counts["rows"] == 4 and step.counts["capacity"] == 160
    assert step.counts["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert step.counts["examples"] == sum(len(examples_of(row)) for row in rows)
    pixels = [b.pixel_values for b in step.micro_batches if b.pixel_values is not None]
    assert step.counts["crops"] == sum(map(len, pixels)) > 0
    assert step.drawn == 4 * POOL
    assert step.bad == {}


def test_no_example_is_lost_or_comes_twice_in_an_epoch() -> None:
    """What was drawn is what was learned from and what still waits."""
    found = steps_of(loader(sizes=(200,)), 12)
    seen = Counter(n for step in found for row in rows_of(step) for n in examples_of(row))
    waiting = [w[1] for slot in found[-1].state["slots"].values() for w in slot["pool"]]
    assert set(seen.values()) == {1}
    assert not set(seen) & set(waiting)
    assert len(seen) + len(waiting) == found[-1].drawn <= 200


# --- processes and resuming ----------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_the_rows_of_all_processes_are_those_of_one(world: int) -> None:
    alone = [rows_of(step) for step in steps_of(loader(micro_batch_size=2, bad=25), 5)]
    ranks = [steps_of(loader(rank=r, world=world, bad=25), 5) for r in range(world)]
    for number, expected in enumerate(alone):
        found = [row for steps in ranks for row in rows_of(steps[number])]
        assert sorted(found, key=str) == sorted(expected, key=str)


def test_a_run_resumed_at_any_step_is_one_never_stopped() -> None:
    expected = steps_of(loader(bad=25), 7)
    for stop in range(7):
        resumed = loader(bad=25)
        # As a checkpoint writes it.
        resumed.load_state_dict(json.loads(json.dumps(expected[stop].state)))
        for found, other in zip(steps_of(resumed, 6 - stop), expected[stop + 1 :], strict=True):
            assert_same(found, other)


def test_a_run_goes_on_with_another_number_of_processes() -> None:
    expected = [rows_of(step) for step in steps_of(loader(), 5)]
    ranks = [loader(rank=r, world=2) for r in range(2)]
    states = [steps_of(rank, 2)[-1].state for rank in ranks]
    alone = loader()
    alone.load_state_dict(merge_states(states))
    assert [rows_of(step) for step in steps_of(alone, 3)] == expected[2:]
    ranks = [loader(rank=r, world=4) for r in range(4)]
    for rank in ranks:
        rank.load_state_dict(merge_states(states[::-1]))
    made = [steps_of(rank, 3) for rank in ranks]
    for number, rows in enumerate(expected[2:]):
        found = [row for steps in made for row in rows_of(steps[number])]
        assert sorted(found, key=str) == sorted(rows, key=str)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loop_left_and_entered_again_goes_on(workers: Any) -> None:
    """What the worker had prepared beyond the last step is not lost."""
    expected = steps_of(loader(), 4)
    found = loader(workers=workers)
    assert_same(steps_of(found, 1)[0], expected[0])
    assert found.state_dict() == expected[0].state
    for step, other in zip(steps_of(found, 3), expected[1:], strict=True):
        assert_same(step, other)


def test_a_worker_makes_the_same_steps() -> None:
    """And takes nothing from the random numbers of this process."""
    options: dict[str, Any] = {"micro_batch_size": 3, "bad": 25}
    expected = steps_of(loader(**options), 6)
    before = torch.get_rng_state()
    found = loader(workers=1, **options)
    for step, other in zip(steps_of(found, 6), expected, strict=True):
        assert_same(step, other)
        assert step.waited > 0
    assert torch.equal(torch.get_rng_state(), before)
    resumed = loader(workers=1, **options)
    resumed.load_state_dict(expected[2].state)
    for step, other in zip(steps_of(resumed, 3), expected[3:], strict=True):
        assert_same(step, other)


def test_errors_of_a_worker_arrive() -> None:
    with pytest.raises(ValueError, match=r"missing picture \d+"):
        steps_of(loader(workers=1, bad=2), 20)


def test_waiting_is_measured() -> None:
    found = loader()
    steps = steps_of(found, 3)
    assert all(step.waited > 0 for step in steps)
    assert found.waited == pytest.approx(sum(step.waited for step in steps))


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept_bytes", [0, 300])
def test_little_memory_costs_time_and_changes_nothing(kept_bytes: int) -> None:
    calls = Counter[str]()

    def counted(name: str) -> Callable[[Example], Encoded]:
        def encode(example: Example) -> Encoded:
            calls[name] += 1
            return encode_number(example)

        return encode

    expected = steps_of(loader(encode=counted("kept")), 6)
    found = steps_of(loader(encode=counted("again"), kept_bytes=kept_bytes), 6)
    for step, other in zip(found, expected, strict=True):
        assert_same(step, other)
    assert calls["kept"] == expected[-1].drawn
    assert calls["kept"] < calls["again"] < 2 * calls["kept"]


# --- what is bad ---------------------------------------------------------------------------------


def test_bad_examples_are_left_out_and_counted_by_cause() -> None:
    step = steps_of(loader(bad=5, max_bad_fraction=0.5, max_tokens=20), 30)[-1]
    assert set(step.bad) == {"missing picture", "too long"}
    assert 0.1 < step.bad["missing picture"] / step.drawn < 0.3
    kept = Counter(number for row in rows_of(step) for number in examples_of(row))
    assert not any(number % STRIDE % 5 == 0 for number in kept)
    assert all(len(row["input_ids"]) <= 20 for row in rows_of(step))


def test_too_many_bad_examples_stop_the_run() -> None:
    """But not before there are enough to judge by, and a resumed run counts on."""
    steps = []
    message = r"bad, more than 5% \(missing picture \d+\); the last is source ., example \d+"
    with pytest.raises(ValueError, match=message):
        for step in loader(bad=8):
            steps.append(step)
    assert 80 <= steps[-1].drawn <= 110
    resumed = loader(bad=8)
    resumed.load_state_dict(steps[-1].state)
    with pytest.raises(ValueError, match=message):
        steps_of(resumed, 2)
    assert steps_of(loader(bad=8, max_bad_fraction=0.2), 100)[-1].drawn > 1000


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_sentence_with_and_without_a_worker(workers: Any) -> None:
    """PyTorch's own message began with the traceback of the worker."""
    with pytest.raises(ValueError) as error:
        steps_of(loader(workers=workers, bad=2, sizes=(40,)), 20)
    with pytest.raises(ValueError) as alone:
        steps_of(loader(bad=2, sizes=(40,)), 20)
    assert str(error.value) == str(alone.value)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [ImportError("pip install 'nanomolmo2[video]'"), NameError("name 'x'"), AssertionError("5")],
)
def test_any_error_of_a_worker_is_the_error_of_the_run(error: Exception) -> None:
    def encode(example: Example) -> Encoded:
        raise error

    for workers in (0, 1):
        with pytest.raises(type(error)) as raised:
            steps_of(loader(workers=workers, encode=encode, bad=9), 1)
        assert str(raised.value) == str(error)


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too large"), RuntimeError("odd")])
def test_whatever_encoding_raises_is_one_bad_example(error: Exception) -> None:
    def encode(example: Example) -> Encoded:
        if example.branches[0].truth["number"] == 3:
            raise error
        return encode_number(example)

    steps = steps_of(loader(encode=encode), 20)
    assert steps[-1].bad.keys() == {"not encodable"}


def one_bad_of(size: int, **changes: Any) -> PackedLoader:
    return loader(sizes=(size,), bad=size, **changes)  # number 0 of them


def test_a_bad_record_counts_once_however_often_it_is_drawn() -> None:
    """One of 21 is below 5 %, and 6 of 116 draws are not: that run stopped."""
    step = steps_of(one_bad_of(21), 100)[-1]
    assert step.bad["missing picture"] / step.drawn == pytest.approx(1 / 21, abs=0.01)
    assert step.drawn > 20 * 21
    for size, share in ((33, 0.03), (5, 0.2), (101, 0.01)):
        made = one_bad_of(size, max_bad_fraction=share + 0.001)
        assert steps_of(made, 100)[-1].bad["missing picture"] > 1
    for size in (19, 10, 2):
        with pytest.raises(ValueError, match="examples are bad, more than 5%"):
            steps_of(one_bad_of(size), 400)


def test_different_bad_records_are_remembered_by_a_resumed_run() -> None:
    steps = steps_of(one_bad_of(21), 30)
    state = json.loads(json.dumps(steps[-1].state))
    found = [record for slot in state["slots"].values() for record in slot["bad_records"]]
    assert found == [[0, 0]]
    resumed = one_bad_of(21)
    resumed.load_state_dict(state)
    assert_same(steps_of(resumed, 1)[0], steps_of(one_bad_of(21), 31)[-1])
    for slot in state["slots"].values():  # as older runs wrote it
        del slot["bad_records"]
    resumed.load_state_dict(state)
    assert steps_of(resumed, 1)


def test_a_disk_that_is_gone_stops_a_run_of_many_epochs() -> None:
    state = steps_of(loader(sizes=(21,)), 40)[-1].state
    resumed = loader(sizes=(21,), bad=1)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"examples are bad, more than 5% \(missing picture"):
        steps_of(resumed, 100)


def test_what_fits_into_no_row_is_bad_before_it_is_decoded(tmp_path: Path) -> None:
    """Six large pictures took 4 GB before they were found to be too many."""
    path = tmp_path / "a.jsonl"
    values = [{"images": ["none.png"] * 6, "question": "?", "answer": "!"}] * 9
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    processor = small_processor()
    found = PackedLoader(
        open_mixture([SourceConfig(str(path))]),
        EncodeTree(processor),
        RowPlan(batch_size=1, max_tokens=100, max_crops=5, pad_token_id=0),
    )
    [sentence] = found.warnings()
    assert "6 pictures are at least 6 crops, and a row holds 5" in sentence
    with pytest.raises(ValueError, match=r"\(too long 100\).*6 pictures are at least 6 crops"):
        steps_of(found, 1)


def test_rows_too_short_for_everything_stop_the_run() -> None:
    with pytest.raises(ValueError, match=r"100 of 100 examples are bad.*too long 100.*hold"):
        steps_of(loader(max_tokens=3), 1)


def test_what_is_learned_from_nothing_is_no_answer() -> None:
    processor = small_processor()
    source = Listed(Example([], [talk("hello", "yes")]), Example([], [talk("hello")]))

    def encode(example: Example) -> Encoded:
        return processor.encode(example.branches[0].messages)

    found = PackedLoader(
        Mixture([source]),
        encode,
        RowPlan(batch_size=1, max_tokens=100, max_crops=0, pad_token_id=0),
        max_bad_fraction=0.9,
    )
    step = steps_of(found, 3)[-1]
    assert step.bad.keys() == {"no answer"}
    assert abs(step.bad["no answer"] - step.drawn / 2) <= 1


def test_an_example_that_cannot_be_encoded_is_bad() -> None:
    source = Listed(Example([], [talk("hello", "yes")]), Example([], [talk("no answer yet")]))
    processor = small_processor()
    found = PackedLoader(
        Mixture([source]),
        encoder(processor),
        RowPlan(batch_size=1, max_tokens=100, max_crops=0, pad_token_id=0),
        max_bad_fraction=0.9,
    )
    assert steps_of(found, 1)[0].bad.keys() == {"not encodable"}


def test_an_example_that_changes_while_it_waits_stops_the_run() -> None:
    state = steps_of(loader(), 1)[0].state

    def longer(example: Example) -> Encoded:
        found = encode_number(example)
        return Encoded(
            np.append(found.input_ids, 1),
            np.append(found.position_ids, 0),
            np.append(found.labels, 1),
            subsegment_ids=np.append(found.subsegment_ids, 0),
        )

    resumed = loader(encode=longer)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"had \d+ tokens and . crops and now has"):
        steps_of(resumed, 1)


def test_an_example_that_breaks_while_it_waits_is_left_out() -> None:
    """Its file may be gone at a resume: the row is shorter, and the run goes on."""
    state = steps_of(loader(), 1)[0].state
    resumed = loader(bad=2, max_bad_fraction=0.9)
    resumed.load_state_dict(state)
    step = steps_of(resumed, 1)[0]
    waited = [w[1] for slot in state["slots"].values() for w in slot["pool"]]
    assert any(index % 2 == 0 for index in waited)
    assert step.bad["missing picture"] > 0
    assert all(n % STRIDE % 2 for row in rows_of(step) for n in examples_of(row))


def test_more_branches_than_the_example_has_are_a_mistake() -> None:
    def encode(example: Example) -> Encoded:
        found = encode_number(example)
        assert found.subsegment_ids is not None
        found.subsegment_ids[-1] = 7
        return found

    with pytest.raises(ValueError, match=r"was encoded with 8: encode must give branch k"):
        steps_of(loader(encode=encode), 1)


# --- states and arguments ------------------------------------------------------------------------


def test_a_state_of_other_rows_is_refused() -> None:
    state = steps_of(loader(), 1)[0].state
    for changes, message in (
        ({"max_tokens": 41}, "max_tokens 40, this run 41"),
        ({"packing_buffer": 7}, "packing_buffer 6, this run 7"),
        ({"sizes": (40, 91)}, "sizes"),
        ({"batch_size": 8}, "batch size"),
    ):
        with pytest.raises(ValueError, match=message):
            loader(**changes).load_state_dict(state)
    half = steps_of(loader(rank=1, world=2), 1)[0].state
    with pytest.raises(ValueError, match=r"lacks slot 0 and knows 1, 3: merge"):
        loader().load_state_dict(half)


def test_states_of_different_runs_are_not_merged() -> None:
    with pytest.raises(ValueError, match="different runs"):
        merge_states([loader().state_dict(), loader(max_crops=9).state_dict()])
    with pytest.raises(ValueError, match="no states"):
        merge_states([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world": 3}, r"batch_size 4 for rank 0 of 3 processes"),
        ({"rank": 1}, r"rank 1 of 1 processes"),
        ({"batch_size": 0}, r"found batch_size 0"),
        ({"micro_batch_size": 0}, r"micro_batch_size is 0"),
        ({"workers": 2}, r"workers is 2, expected 0 or 1"),
        ({"max_bad_fraction": 1.0}, r"max_bad_fraction is 1.0"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(**arguments)


def test_emoji_scenes_through_the_real_processor() -> None:
    """Pictures arrive, one for every four image tokens, and labels are answers with their tasks."""
    processor = small_processor()
    mixture = Mixture([EmojiScenes(EmojiConfig(length=50))])
    found = PackedLoader(
        mixture,
        encoder(processor),
        RowPlan(
            batch_size=2,
            micro_batch_size=2,
            max_tokens=1024,
            max_crops=16,
            packing_buffer=4,
            pad_token_id=processor.pad_token_id,
        ),
        workers=1,
    )
    for step in steps_of(found, 2):
        (batch,) = step.micro_batches
        assert batch.pixel_values is not None and batch.labels is not None
        assert (batch.input_ids == processor.image_token_id).sum() == 4 * len(batch.pixel_values)
        assert "count" in step.tasks
        learned = batch.labels != IGNORED_LABEL
        assert (step.branches[0][learned] >= 0).all()
        assert step.branches[0][learned].unique().tolist() == list(range(len(step.tasks)))
