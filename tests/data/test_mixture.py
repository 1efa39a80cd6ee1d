"""The mixture: every example once an epoch over all slots, and a resumed stream is the same one."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomolmo2.data.mixture import Mixture, SlotStream, shuffled


class Numbers:
    """A source of nothing but a size."""

    def __init__(self, size: int, name: str = "numbers", in_order: bool = False) -> None:
        self.size, self.name, self.in_order = size, name, in_order

    def __len__(self) -> int:
        return self.size


def mix(sizes, weights=None, seed=0) -> Mixture:
    return Mixture([Numbers(size, f"source {k}") for k, size in enumerate(sizes)], weights, seed)


def draw(stream: SlotStream, times: int) -> list[tuple[int, int]]:
    return [stream.next() for _ in range(times)]


@given(size=st.integers(1, 400), key=st.integers(0, 2**64 - 1))
def test_a_shuffled_order_has_every_position_once(size, key):
    assert sorted(shuffled(p, size, key) for p in range(size)) == list(range(size))


def test_every_order_of_three_comes_about_equally_often():
    """Small sets are where a network of two halves could be stuck in a few orders."""
    mixture = mix([3])
    orders = Counter(
        tuple(mixture.example_at(0, 3 * epoch + p) for p in range(3)) for epoch in range(1200)
    )
    assert len(orders) == 6
    assert min(orders.values()) > 140  # 200 on average, of standard deviation 13


def test_a_position_of_a_large_source_goes_anywhere():
    size = 10_000
    places = [shuffled(17, size, key) for key in range(2000)]
    assert abs(sum(places) / len(places) / size - 0.5) < 0.03
    assert len(set(places)) > 1700  # 1813 are expected
    neighbours = [abs(shuffled(18, size, key) - p) / size for key, p in enumerate(places)]
    assert 0.3 < sum(neighbours) / len(neighbours) < 0.37  # a third, if they are independent


@settings(max_examples=40)
@given(
    size=st.integers(1, 30), slots=st.integers(1, 9), epochs=st.integers(1, 3), seed=st.integers(0)
)
def test_an_epoch_visits_every_example_once_over_all_slots(size, slots, epochs, seed):
    """Also where there are fewer examples than slots."""
    mixture = mix([size], seed=seed)
    streams = [mixture.slot(j, slots) for j in range(slots)]
    line = [streams[place % slots].next()[1] for place in range(size * epochs)]
    for epoch in range(epochs):
        assert sorted(line[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_each_epoch_has_an_order_of_its_own():
    stream = mix([50]).slot(0, 1)
    epochs = [draw(stream, 50) for _ in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    slots=st.integers(1, 6),
    before=st.integers(0, 60),
    seed=st.integers(0, 2**70),
    data=st.data(),
)
def test_a_resumed_stream_goes_on_as_if_never_stopped(sizes, slots, before, seed, data):
    j = data.draw(st.integers(0, slots - 1))
    stream = mix(sizes, seed=seed).slot(j, slots)
    draw(stream, before)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = draw(stream, 30)
    resumed = mix(sizes, seed=seed).slot(j, slots)
    resumed.load_state_dict(state)
    assert draw(resumed, 30) == expected


def test_a_state_is_not_changed_by_further_draws():
    stream = mix([5, 7]).slot(0, 2)
    state = stream.state_dict()
    draw(stream, 10)
    assert state["drawn"] == [0, 0]
    stream.load_state_dict(state)
    draw(stream, 10)
    assert state["drawn"] == [0, 0]


@pytest.mark.parametrize(
    "other",
    [
        mix([5, 7], seed=1).slot(0, 2),
        mix([5, 7]).slot(1, 2),
        mix([5, 7]).slot(0, 4),
        mix([5, 8]).slot(0, 2),
        mix([5, 7], [0.5, 0.5]).slot(0, 2),
        Mixture([Numbers(5, "a"), Numbers(7, "b")]).slot(0, 2),
    ],
)
def test_a_state_of_another_stream_is_refused(other):
    with pytest.raises(ValueError, match="resume with the same sources"):
        mix([5, 7]).slot(0, 2).load_state_dict(other.state_dict())


def test_slots_and_seeds_draw_differently():
    seen = {
        tuple(draw(mix([1000, 1000], seed=seed).slot(j, 4), 20))
        for seed in range(3)
        for j in range(4)
    }
    assert len(seen) == 12


def test_streams_are_the_same_everywhere():
    """Resuming on another machine or Python must not change the data: these are fixed for good."""
    expected = [(1, 708), (1, 850), (1, 18), (0, 63), (0, 70), (1, 753)]
    assert draw(mix([100, 900], seed=5).slot(1, 3), 6) == expected


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([100, 900, 3600], None, [0.1, 0.3, 0.6]),
        ([7, 7], [3, 1], [0.75, 0.25]),
        ([100, 900, 5], [None, None, 0.2], [0.2, 0.6, 0.2]),
        ([10, 10], [1, 0], [1, 0]),
    ],
)
def test_sampling_weights(sizes, weights, expected):
    mixture = mix(sizes, weights)
    assert mixture.weights == pytest.approx(expected)
    stream = mixture.slot(2, 3)
    counts = Counter(source for source, _ in draw(stream, 4000))
    for source, weight in enumerate(expected):
        assert abs(counts[source] / 4000 - weight) <= 4 * (weight * (1 - weight) / 4000) ** 0.5
    assert stream.drawn == [counts[source] for source in range(len(sizes))]


def test_a_source_of_rate_zero_never_comes_even_after_the_last_cut(monkeypatch):
    monkeypatch.setattr("nanomolmo2.data.mixture._hash", lambda *_: 2**64 - 1)
    assert mix([10, 10, 10], [0.1, 0.2, 0]).source_of(0, 0) == 1


def test_a_source_that_cannot_jump_is_read_in_order():
    mixture = Mixture([Numbers(4, in_order=True)])
    assert draw(mixture.slot(0, 1), 6) == [(0, i) for i in (0, 1, 2, 3, 0, 1)]
    assert draw(mixture.slot(1, 2), 3) == [(0, 1), (0, 3), (0, 1)]


def test_it_can_be_pickled():
    stream = mix([5, 7]).slot(0, 2)
    draw(stream, 3)
    copy = pickle.loads(pickle.dumps(stream))
    assert draw(copy, 10) == draw(stream, 10)


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([], None, "at least one source"),
        ([3, 0], None, "'source 1' is empty"),
        ([3, 4], [1], "1 weights for 2 sources"),
        ([3, 4], [-0.1, 1], "numbers of 0 or more"),
        ([3, 4], [float("nan"), 1], "numbers of 0 or more"),
        ([3, 4], [0, 0], "all weights are 0"),
        ([3, 4], [1, None], "leave nothing"),
    ],
)
def test_what_cannot_be_mixed(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        mix(sizes, weights)


@pytest.mark.parametrize(("j", "slots"), [(-1, 4), (4, 4), (0, 0)])
def test_slots_that_are_not_there(j, slots):
    with pytest.raises(ValueError, match="expected 0 to"):
        mix([3]).slot(j, slots)
