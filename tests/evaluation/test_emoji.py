"""The evaluation is tested with models that are known to be right, blind or silent."""

from __future__ import annotations

import pytest
import torch

from nanomolmo2.convert.pretrained import load
from nanomolmo2.evaluation import emoji
from nanomolmo2.evaluation.emoji import ROWS, score


def answered(answer, group="seen", scenes=25):
    pictures, asked = emoji._questions(group, scenes, seed=5)
    for one in asked:
        one.answer = answer(one)
    return score(group, pictures, asked)


def truth(one):
    if not one.probe:
        return one.branch.truth["answer"]
    return f'<points coords="1 1 {one.scene:03d} 999">{one.branch.truth["noun"]}</points>'


def test_the_truth_scores_one_and_is_not_blind():
    scores = answered(truth)
    for name in ROWS:
        blind = name in ("same_point", "same_presence", "always_one")
        assert scores.means[name] == (0 if blind else 1), name
        assert scores.counts[name] > 0


def test_a_blind_model_is_found_out():
    """Same point for every noun, always yes, always one: totals alone would look fair."""

    def blind(one):
        return {
            "presence": "Yes.",
            "count": 'Counting the <points coords="1 1 500 500">dog</points> shows a total of 1.',
            "number": "1",
            "point": f'<points coords="1 1 500 500">{one.branch.truth.get("noun")}</points>',
            "caption": "A dog.",
            "spatial": "Nothing.",
        }[one.branch.task]

    scores = answered(blind)
    assert scores.means["same_point"] == 1
    assert scores.means["same_presence"] == 1
    assert scores.means["always_one"] == 1
    assert scores.means["presence"] == 0.5
    assert scores.means["count_many"] == scores.means["count_zero"] == 0
    assert scores.means["point_absent"] == 0


def test_silence_scores_nothing():
    scores = answered(lambda one: "")
    for name in (
        "presence",
        "count",
        "number",
        "point_f1",
        "point_absent",
        "caption_f1",
        "spatial",
    ):
        assert scores.means[name] == 0, name


def test_test_sets_are_fixed_and_apart():
    first, again = (emoji._questions("mild", 3, seed=0) for _ in range(2))
    assert [a.branch for a in first[1]] == [a.branch for a in again[1]]
    assert all((x.image == y.image).all() for x, y in zip(first[0], again[0], strict=True))
    other, _ = emoji._questions("mild", 3, seed=1)
    assert not any((x.image == y.image).all() for x, y in zip(first[0], other, strict=True))


@pytest.mark.parametrize(
    ("options", "message"), [({"group": "oil"}, "art group"), ({"scenes": 0}, "scenes")]
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        emoji.evaluate(None, None, **options)


def test_the_bundled_model_sees():
    """The shipped file on 30 of its test scenes; docs/tiny.md has the scores on all of them."""
    model, processor = load("tiny", dtype=torch.float32)
    scores = emoji.evaluate(model, processor, group="seen", scenes=30).means
    for name, floor in (
        ("presence", 0.85),
        ("count", 0.70),
        ("count_zero", 0.75),
        ("point_f1", 0.60),
        ("point_absent", 0.75),
        ("caption_f1", 0.60),
    ):
        assert scores[name] >= floor, (name, scores[name])
    assert scores["same_point"] < 0.1 and scores["same_presence"] < 0.2
