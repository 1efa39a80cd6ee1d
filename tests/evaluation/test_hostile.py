"""Truths of any content: a record is asked about, or left out with a cause."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanomolmo2.data.example import Branch, Example
from nanomolmo2.evaluation.questions import find_questions
from nanomolmo2.evaluation.summary import BASELINES, judge, summarize

NAMES = (
    *("points", "boxes", "masks", "groups", "radius", "count", "answers", "answer", "choices"),
    *("categories", "counts", "tracks", "frames", "scorer", "pair", "boxes_scale", "time", "image"),
)
INNER = ("x", "y", "image", "time", "label", "box", "mask", "boxes", "points", "size", "counts")
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.just(10**30),
    st.floats(),
    st.sampled_from(
        ["", "3", "points", "count", "exact", "percent", "B", "a dog", "There are none."]
    ),
)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(INNER), inner, max_size=3)
    ),
    max_leaves=8,
)
ANSWERS = (
    "",
    "3",
    "There are none.",
    '<points coords="1 1 500 500">dog</points>',
    '<points coords="1.0 1 500 500">dog</points>',
)


class One:
    """A source of one example."""

    name = "one"

    def __init__(self, truth: dict[str, Any], said: str | None) -> None:
        messages = [{"role": "user", "content": "How many?"}]
        if said:
            messages.append({"role": "assistant", "content": said})
        other = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]
        self.example = Example(
            [np.zeros((10, 20, 3), np.uint8)], [Branch(messages, "task", truth), Branch(other)]
        )

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Example:
        return self.example


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(NAMES), values, max_size=4),
    st.sampled_from([None, *ANSWERS[1:]]),
    st.sampled_from(ANSWERS),
)
# Fields of another kind of question stand beside those that are asked for.
@example({"choices": None}, '<points coords="1 1 500 500">dog</points>', "")
@example({"choices": ["a", "b"], "scorer": "points"}, ANSWERS[3], "")
@example({"answer": 3, "scorer": "count", "count": 2}, "3", "3")
def test_any_truth(truth: dict[str, Any], said: str | None, answer: str) -> None:
    try:
        found = find_questions([One(truth, said)])
    except ValueError as error:
        assert "none of 1 records can be asked about" in str(error)
        return
    predictions = [judge(question, answer) for question in found.asked]
    assert all(0 <= one.score <= 1 for one in predictions)
    others = {name: baseline(found.asked) for name, baseline in BASELINES.items()}
    report = summarize(found, predictions, {name: a for name, a in others.items() if a})
    assert report.table() and report.to_dict()
