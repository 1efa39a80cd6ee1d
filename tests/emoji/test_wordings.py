from __future__ import annotations

import re

import numpy as np
import pytest

from nanomolmo2.emoji.sprites import CATEGORIES, PLURALS
from nanomolmo2.emoji.wordings import (
    EVERYDAY,
    QUESTIONS,
    TESTING,
    TRAINING,
    UNKNOWN_IN_TESTS,
    UNKNOWN_IN_TRAINING,
    Wordings,
)


@pytest.mark.parametrize("task", QUESTIONS)
def test_every_task_has_dozens_of_wordings_and_some_for_tests_alone(task):
    assert len(TRAINING[task]) >= 22 and len(TESTING[task]) >= 3
    assert not set(TRAINING[task]) & set(TESTING[task])
    assert {*TRAINING[task], *TESTING[task]} == set(QUESTIONS[task])
    assert len(set(QUESTIONS[task])) == len(QUESTIONS[task])


def test_words_of_the_tests_are_learned_words():
    """Unseen wordings are new sentences, not new words."""
    for task in QUESTIONS:
        learned = {word for w in TRAINING[task] for word in re.findall(r"\w+", w.lower())}
        learned |= {word for w in QUESTIONS["point"] for word in re.findall(r"\w+", w.lower())}
        for wording in TESTING[task]:
            assert set(re.findall(r"\w+", wording.lower())) <= learned, wording


def test_everyday_questions_are_learned():
    assert {wording for wordings in TRAINING.values() for wording in wordings} >= EVERYDAY


def test_unknown_words_are_unknown():
    known = {*CATEGORIES, *PLURALS}
    assert not known & {*UNKNOWN_IN_TRAINING, *UNKNOWN_IN_TESTS}
    assert not set(UNKNOWN_IN_TRAINING) & set(UNKNOWN_IN_TESTS)
    assert len(UNKNOWN_IN_TRAINING) > 150 and len(UNKNOWN_IN_TESTS) > 30


def test_wordings_keep_to_their_slot_and_their_half():
    ask = Wordings(np.random.default_rng(0), for_tests=True)
    for _ in range(50):
        assert "{most}" in ask("size", "{most}")
        assert "{list}" not in ask("points", "{list}", False)
        assert ask("presence") in TESTING["presence"]
    casual = Wordings(np.random.default_rng(0), casual=1.0)("caption")
    assert casual[0].islower() and casual[-1] not in ".?"
