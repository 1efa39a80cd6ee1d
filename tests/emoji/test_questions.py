"""Questions: every answer is recomputed here from the boxes, by other code than the tested one."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from nanomolmo2.emoji import questions
from nanomolmo2.emoji.questions import (
    UNKNOWN_ANSWER,
    BranchMix,
    make_branches,
    spatial_answer,
)
from nanomolmo2.emoji.scenes import Scene, SceneObject, render_scene, train_rng
from nanomolmo2.emoji.sprites import CATEGORIES, PLURALS, Sprites
from nanomolmo2.emoji.wordings import TESTING, TRAINING, UNKNOWN_IN_TRAINING
from nanomolmo2.processor.points import parse_count, parse_points

SINGULAR = dict(zip(PLURALS, CATEGORIES, strict=True)) | {noun: noun for noun in CATEGORIES}
TASKS = {
    *("presence", "count", "number", "point", "caption", "spatial", "points", "size", "at"),
    "unknown",
}
WORDS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng, sprites = train_rng(11), Sprites.load()
    return [render_scene(rng, sprites) for _ in range(150)]


@pytest.fixture(scope="module")
def asked(scenes):
    """(scene, branch) pairs of all tasks."""
    rng = np.random.default_rng(0)
    mix = BranchMix(4, 4, 4, 4, 2, 3, points=4, size=3, at=4, unknown=0.5, absent=0.4)
    return [(scene, branch) for scene in scenes for branch in make_branches(scene, rng, mix)]


def question(branch) -> str:
    return branch.messages[0]["content"]


def answer(branch) -> str:
    return branch.messages[1]["content"]


def noun_in(text: str) -> str:
    """The one noun that a question names, longest word first ("pineapple" is no apple)."""
    words = [w for w in re.findall(r"[a-z]+", text.lower()) if w in SINGULAR]
    (noun,) = {SINGULAR[w] for w in words}
    return noun


def boxes_of(scene: Scene, noun: str) -> list[tuple[float, float, float, float]]:
    return [o.box for o in scene.objects if o.category == noun]


def named_things(text: str) -> dict[str, int]:
    """``"A dog, two cats and an apple."`` -> ``{"dog": 1, "cat": 2, "apple": 1}``."""
    assert text[0].isupper() and text.endswith(".")
    counts: dict[str, int] = {}
    for part in re.split(r", | and ", text[0].lower() + text[1:-1]):
        number, noun = part.split(" ")
        assert SINGULAR[noun] not in counts
        counts[SINGULAR[noun]] = WORDS[number]
        assert (noun == SINGULAR[noun]) == (WORDS[number] == 1) or noun == "fish"
        if number in ("a", "an"):
            assert (number == "an") == (noun[0] in "aeiou")
    return counts


def test_branches_are_one_question_and_one_answer(asked):
    for _, branch in asked:
        assert [m["role"] for m in branch.messages] == ["user", "assistant"]
        assert branch.truth["answer"] == answer(branch)
    assert {branch.task for _, branch in asked} == TASKS


def test_presence_counts_and_numbers_agree_with_the_boxes(asked):
    seen = Counter()
    for scene, branch in asked:
        if branch.task not in ("presence", "count", "number"):
            continue
        noun = noun_in(question(branch))
        count = len(boxes_of(scene, noun))
        assert branch.truth["noun"] == noun and branch.truth["count"] == count
        if branch.task == "presence":
            assert answer(branch) == ("Yes." if count else "No.")
        elif branch.task == "number":
            assert answer(branch) == str(count)
        elif count == 0:
            assert answer(branch) == "There are none."
        else:
            assert re.fullmatch(
                rf'Counting the <points coords="1( \d \d\d\d+ \d\d\d+){{{count}}}">{noun}</points> '
                rf"shows a total of {count}\.",
                answer(branch),
            )
            assert parse_count(answer(branch)) == count
        seen[branch.task, min(count, 2)] += 1
    assert min(seen.values()) > 40 and len(seen) == 9


def test_points_hit_each_object_once(asked):
    num_points = 0
    for scene, branch in asked:
        if branch.task not in ("point", "count"):
            continue
        noun = noun_in(question(branch))
        boxes = boxes_of(scene, noun)
        points = parse_points(answer(branch), [(192, 192)])
        assert len(points) == len(boxes)
        if not boxes:
            assert answer(branch) == "There are none."
        for box in boxes:
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            near = [p for p in points if np.hypot(p.x - middle[0], p.y - middle[1]) < 0.2]
            assert len(near) == 1 and near[0].label == noun
        assert [p.id for p in points] == list(range(1, len(points) + 1))
        assert [(p.x, p.y) for p in points] == sorted((p.x, p.y) for p in points)
        assert sorted(map(tuple, branch.truth["boxes"])) == sorted(boxes)
        num_points += len(points)
    assert num_points > 500


@pytest.mark.parametrize("snap", [50, 20, 10])
def test_snapped_points_are_multiples_and_still_inside(scenes, snap):
    rng = np.random.default_rng(1)
    for scene in scenes[:60]:
        for branch in make_branches(scene, rng, BranchMix(0, 0, 0, 3, *(0,) * 6, absent=0), snap):
            numbers = re.findall(r"\d+", answer(branch))[1:]
            coordinates = [int(n) for i, n in enumerate(numbers) if i % 3]
            assert coordinates and all(c % snap == 0 for c in coordinates)
            boxes = boxes_of(scene, branch.truth["noun"])
            for p in parse_points(answer(branch), [(192, 192)]):
                assert any(b[0] < p.x < b[2] and b[1] < p.y < b[3] for b in boxes)


def test_snapping_never_leaves_the_picture():
    scene = scene_of(("dog", 191.5, 191.5), ("cat", 0.5, 0.5))
    branches = make_branches(
        scene, np.random.default_rng(0), BranchMix(0, 0, 0, 2, *(0,) * 6, absent=0), 50
    )
    assert {answer(b) for b in branches} == {
        '<points coords="1 1 1000 1000">dog</points>',
        '<points coords="1 1 000 000">cat</points>',
    }


def test_captions_list_everything_from_left_to_right(asked):
    for scene, branch in asked:
        if branch.task == "caption":
            expected = Counter(o.category for o in scene.objects)
            found = named_things(answer(branch))
            assert found == expected == branch.truth["counts"]
            leftmost = {
                noun: min((b[0] + b[2]) / 2 for b in boxes_of(scene, noun)) for noun in found
            }
            order = [leftmost[noun] for noun in found]
            assert order == sorted(order)


def test_spatial_answers_hold_for_the_boxes(asked):
    """Recomputed by angles: the answer is in the asked quadrant, no other noun is as near there."""
    towards = {"right": 0, "below": 90, "left": 180, "above": 270}  # degrees, y down
    nothing = 0
    total = 0
    for scene, branch in asked:
        if branch.task != "spatial":
            continue
        total += 1
        (direction,) = [d for d in towards if d in question(branch).split()]
        reference = noun_in(question(branch))
        ((x0, y0, x1, y1),) = boxes_of(scene, reference)
        candidates = []
        for o in scene.objects:
            dx = (o.box[0] + o.box[2] - x0 - x1) / 2
            dy = (o.box[1] + o.box[3] - y0 - y1) / 2
            away = (np.degrees(np.arctan2(dy, dx)) - towards[direction] + 180) % 360 - 180
            if o.category != reference and abs(away) < 45:
                candidates.append((np.hypot(dx, dy), o.category))
        if not candidates:
            assert answer(branch) == "Nothing." and branch.truth["nothing"]
            nothing += 1
        else:
            nearest, noun = min(candidates)
            assert named_things(answer(branch)) == {noun: 1} and branch.truth["found"] == noun
            assert all(d > 1.1 * nearest for d, other in candidates if other != noun)
    assert total > 200 and 0.1 < nothing / total < 0.4


def scene_of(*things: tuple[str, float, float]) -> Scene:
    """A made-up scene with points for objects: (noun, x, y)."""
    objects = tuple(SceneObject(noun, "noto", (x, y, x, y), (x, y)) for noun, x, y in things)
    return Scene(np.zeros((192, 192, 3), np.uint8), objects, np.full((192, 192), -1, np.int8))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([("dog", 40, 100)], "dog"),
        ([("dog", 140, 100)], ""),  # on the other side
        ([("dog", 90, 30)], ""),  # far more above than left
        ([("dog", 40, 45)], None),  # left or above?
        ([("dog", 40, 100), ("cat", 70, 100)], "cat"),  # the nearer one
        ([("dog", 40, 100), ("cat", 43, 103)], None),  # equally near
        ([("dog", 40, 100), ("dog", 43, 103)], "dog"),  # equally near, but the answer is the same
        ([("dog", 40, 100), ("cat", 60, 62)], None),  # a debatable one that is nearer
    ],
)
def test_what_is_left_of_the_apple(others, expected):
    scene = scene_of(("apple", 100, 100), *others)
    assert spatial_answer(scene.objects, scene.objects[0], "left") == expected


def test_spatial_questions_need_one_reference():
    scene = scene_of(("dog", 40, 100), ("dog", 140, 100))
    assert make_branches(scene, np.random.default_rng(0), BranchMix(*(0,) * 5, 3, *(0,) * 4)) == []


def test_the_mix_sets_numbers_and_shares(scenes):
    rng = np.random.default_rng(2)
    mix = BranchMix(12, 3, 2, 3, 1, spatial=0, points=2, size=0, at=4, unknown=0)
    branches = [b for scene in scenes for b in make_branches(scene, rng, mix)]
    tasks = Counter(b.task for b in branches)
    assert tasks == {
        task: n * len(scenes)
        for task, n in mix.to_dict().items()
        if isinstance(n, int) and task in TASKS and n
    }
    absent = {
        task: np.mean([b.truth["count"] == 0 for b in branches if b.task == task])
        for task in ("presence", "count", "number", "point")
    }
    assert absent["presence"] == 0.5
    assert all(0.15 < absent[task] < 0.35 for task in ("count", "number", "point"))


def test_counting_asks_for_repeated_categories_more_often_when_told(scenes):
    def share(repeated_first: float) -> float:
        rng = np.random.default_rng(3)
        mix = BranchMix(0, 1, *(0,) * 8, absent=0, repeated_first=repeated_first)
        branches = [b for scene in scenes for b in make_branches(scene, rng, mix)]
        return float(np.mean([b.truth["count"] > 1 for b in branches]))

    repeated = np.mean([max(Counter(o.category for o in s.objects).values()) > 1 for s in scenes])
    assert share(1) == pytest.approx(repeated)
    assert share(0) < repeated - 0.05


def test_the_wording_varies_and_starts_with_a_capital_unless_casual(scenes):
    rng = np.random.default_rng(4)
    proper = [
        b for s in scenes for b in make_branches(s, rng, BranchMix(casual=0, bare=0, spatial=4))
    ]
    for task in TASKS:
        stems = {" ".join(question(b).split()[:2]) for b in proper if b.task == task}
        assert len(stems) >= 3
    assert all(question(b)[0].isupper() and question(b)[-1] in "?." for b in proper)
    assert all(answer(b)[0].isupper() or answer(b)[0] in "<0123456789" for b in proper)
    casual = [b for s in scenes[:20] for b in make_branches(s, rng, BranchMix(casual=1, bare=0))]
    assert all(question(b)[0].islower() and question(b)[-1] not in "?." for b in casual)


def test_bare_presence_questions_are_the_noun_alone(scenes):
    rng = np.random.default_rng(6)
    for branch in make_branches(scenes[0], rng, BranchMix(presence=6, bare=1)):
        if branch.task == "presence":
            assert question(branch) == f"{branch.truth['noun']}?"


def test_test_questions_are_balanced_and_fixed(scenes):
    for scene in scenes:
        branches = questions.test_questions(scene, np.random.default_rng(5))
        again = questions.test_questions(scene, np.random.default_rng(5))
        assert branches == again
        for task in ("presence", "count", "number", "point"):
            present = [b.truth["count"] > 0 for b in branches if b.task == task]
            assert sorted(present) == [False, True]
        tasks = Counter(b.task for b in branches)
        assert tasks["caption"] == tasks["points"] == tasks["at"] == tasks["unknown"] == 1
        assert max(tasks["spatial"], tasks["size"]) <= 1


def test_test_questions_use_wordings_that_training_does_not(scenes):
    rng = np.random.default_rng(8)
    for task, examples in {"caption": TESTING["caption"], "at": TESTING["at"]}.items():
        asked = {
            question(b) for s in scenes for b in questions.test_questions(s, rng) if b.task == task
        }
        shapes = {re.sub(r"\d+ \d+", "{at}", text) for text in asked}
        assert shapes <= set(examples) and not shapes & set(TRAINING[task])
        assert len(shapes) > 4


def test_several_nouns_get_a_tag_each_and_everything_gets_one(asked):
    kinds = Counter()
    for scene, branch in asked:
        if branch.task != "points":
            continue
        everything = branch.truth["nouns"] == ["everything"]
        found: dict[str, list[tuple[float, float]]] = {}
        for point in parse_points(answer(branch), [(192, 192)]):
            found.setdefault(point.label, []).append((point.x, point.y))
        if everything:
            expected = {"everything": [o.box for o in scene.objects]}
        else:
            words = re.findall(r"[a-z]+", question(branch).lower())
            assert [w for w in words if w in CATEGORIES] == branch.truth["nouns"]
            expected = {n: boxes_of(scene, n) for n in branch.truth["nouns"]}
            expected = {n: boxes for n, boxes in expected.items() if boxes}
            assert list(found) == list(expected)  # in the order of the question
        assert {n: len(points) for n, points in found.items()} == {
            n: len(boxes) for n, boxes in expected.items()
        }
        for noun, points in found.items():
            for x0, y0, x1, y1 in expected[noun]:
                assert any(x0 < x < x1 and y0 < y < y1 for x, y in points)
        if not expected:
            assert answer(branch) == "There are none."
        assert branch.truth["groups"] == [
            {"noun": n, "boxes": [list(b) for b in boxes]} for n, boxes in expected.items()
        ]
        kinds[everything, len(expected)] += 1
    assert kinds[True, 1] > 100 and min(kinds[False, n] for n in range(4)) > 5


def test_sizes_are_compared_only_where_they_differ_clearly(asked):
    kinds = Counter()
    for scene, branch in asked:
        if branch.task != "size":
            continue
        areas = {o.category: (o.box[2] - o.box[0]) * (o.box[3] - o.box[1]) for o in scene.objects}
        chosen = {noun: areas[noun] for noun in branch.truth["nouns"]}
        text = question(branch).lower()
        wants_large = any(word in text for word in ("larg", "big"))
        assert wants_large != ("small" in text)
        best = (max if wants_large else min)(chosen, key=chosen.__getitem__)
        assert answer(branch) == f"The {best}."
        extreme = re.search("largest|biggest|smallest", text) is not None
        if extreme:
            assert chosen == areas
        else:
            assert all(noun in text for noun in chosen) and len(chosen) == 2
        kinds[extreme, wants_large] += 1
    assert len(kinds) == 4 and min(kinds.values()) > 10


def test_places_are_on_a_thing_or_clearly_beside_all(asked):
    nothing = 0
    for scene, branch in asked:
        if branch.task != "at":
            continue
        x, y = (
            int(v) * 192 / 1000 for v in re.search(r"(\d{3}) (\d{3})", question(branch)).groups()
        )
        inside = {
            o.category
            for o in scene.objects
            if o.box[0] - 1 < x < o.box[2] + 1 and o.box[1] - 1 < y < o.box[3] + 1
        }
        if answer(branch) == "Nothing.":
            assert not inside and branch.truth["found"] is None
            nothing += 1
        else:
            (noun,) = named_things(answer(branch))
            assert noun in inside and branch.truth["found"] == noun
    assert nothing > 30


def test_things_without_emoji_are_refused_with_what_is_known(asked):
    refused = [branch for _, branch in asked if branch.task == "unknown"]
    assert len(refused) > 40
    for branch in refused:
        assert answer(branch) == UNKNOWN_ANSWER and branch.truth["noun"] in UNKNOWN_IN_TRAINING
    assert all(noun in UNKNOWN_ANSWER for noun in CATEGORIES)


def test_a_snap_without_meaning_is_refused(scenes):
    with pytest.raises(ValueError, match="snap is 0"):
        make_branches(scenes[0], np.random.default_rng(0), snap=0)


def test_truth_is_plain_json(asked):
    import json

    for _, branch in asked[:200]:
        assert json.loads(json.dumps(branch.truth)) == branch.truth
