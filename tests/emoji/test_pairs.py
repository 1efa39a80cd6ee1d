from __future__ import annotations

import re
from collections import Counter

import numpy as np

from nanomolmo2.emoji.pairs import ask_about_pair, render_pair
from nanomolmo2.emoji.pairs import test_pair as draw_test_pair
from nanomolmo2.emoji.scenes import train_rng
from nanomolmo2.emoji.sprites import CATEGORIES, PLURALS, Sprites

SINGULAR = dict(zip(PLURALS, CATEGORIES, strict=True)) | {noun: noun for noun in CATEGORIES}


def pairs(count=150):
    rng, sprites = train_rng(21), Sprites.load()
    for _ in range(count):
        pair = render_pair(rng, sprites)
        yield pair, ask_about_pair(pair, rng)


def counts(scene):
    return Counter(o.category for o in scene.objects)


def test_more_and_fewer_agree_with_the_pictures():
    answers = Counter()
    for (first, second), branches in pairs():
        for branch in (b for b in branches if b.task == "more"):
            text, answer = (m["content"] for m in branch.messages)
            (noun,) = {SINGULAR[w] for w in re.findall("[a-z]+", text.lower()) if w in SINGULAR}
            one, two = counts(first)[noun], counts(second)[noun]
            assert one + two > 0
            assert branch.truth["noun"] == noun and branch.truth["counts"] == [one, two]
            wins = one > two if "more" in text else one < two
            expected = "The first picture." if wins else "The second picture."
            assert answer == ("Both have the same." if one == two else expected)
            answers[answer] += 1
    assert min(answers.values()) > 60 and len(answers) == 3


def test_differences_are_what_only_one_picture_has():
    nothing = 0
    for pair, branches in pairs():
        for branch in (b for b in branches if b.task == "difference"):
            text, answer = (m["content"] for m in branch.messages)
            mine, other = pair if "first" in text else pair[::-1]
            only = {n: c for n, c in counts(mine).items() if n not in counts(other)}
            assert branch.truth["counts"] == only
            nothing += not only
            if only:
                words = {SINGULAR[w] for w in re.findall("[a-z]+", answer.lower()) if w in SINGULAR}
                assert words == set(only)
            else:
                assert answer == "Nothing."
    assert 10 < nothing < 150


def test_pictures_of_a_pair_share_things():
    shared = [bool(set(counts(a)) & set(counts(b))) for (a, b), _ in pairs(60)]
    assert 0.6 < np.mean(shared) < 1


def test_test_pairs_are_fixed_and_of_their_group():
    one, again, other = (draw_test_pair(i, "mild") for i in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(one.images, again.images, strict=True))
    assert one.branches == again.branches
    assert not (one.images[0] == other.images[0]).all()
    assert Counter(b.task for b in one.branches) == {"more": 2, "difference": 2}
