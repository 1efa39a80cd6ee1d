"""Scorers by name, each on truths and answers whose score is known."""

from __future__ import annotations

import pytest

from nanomolmo2.evaluation import SCORERS
from nanomolmo2.evaluation.measures import named_in, says_nothing
from nanomolmo2.evaluation.scorers import Shown

SHOWN = Shown(((1000, 1000), (500, 1000)))  # thousandths of the first are its pixels
VIDEO = Shown((), (1000, 1000))


def points(*places: tuple[int, int], image: int = 1, label: str = "dog") -> str:
    triples = " ".join(f"{i} {x:03d} {y:03d}" for i, (x, y) in enumerate(places, start=1))
    return f'<points coords="{image} {triples}">{label}</points>'


A, B = [100, 100, 200, 200], [150, 150, 250, 250]
SQUARE = [[100, 100], [200, 100], [200, 200], [100, 200]]


@pytest.mark.parametrize(
    ("truth", "answer", "score"),
    [
        # a greedy match would give the first point box A, and the second none
        ({"boxes": [B, A]}, points((160, 160), (110, 110)), 1),
        ({"boxes": [A]}, points((100, 200)), 1),  # edges count
        ({"boxes": [A]}, points((99, 150)), 0),
        ({"boxes": [A, B]}, points((110, 110)), 2 / 3),
        ({"boxes": [A]}, points((110, 110), (120, 120)), 2 / 3),  # a thing is hit once
        ({"boxes": [A]}, "It is there.", 0),
        ({"boxes": []}, "There are none.", 1),
        ({"boxes": []}, "None", 1),
        ({"boxes": []}, "0", 1),
        ({"boxes": []}, "", 0),  # silence is no answer
        ({"boxes": []}, "A dog.", 0),
        ({"boxes": []}, points((1, 1)), 0),
        ({"boxes": []}, f"There are none. {points((1, 1))}", 0),
        ({"boxes": [A]}, "There are none.", 0),
        ({"masks": [SQUARE]}, points((150, 150)), 1),
        ({"masks": [SQUARE], "boxes": [[0, 0, 999, 999]]}, points((300, 300)), 0),
        ({"boxes": [A], "points": [[900, 900]]}, points((150, 150)), 1),
        ({"points": [[500, 500]], "radius": 10}, points((506, 508)), 1),
        ({"points": [[500, 500]], "radius": 10}, points((507, 508)), 0),
        ({"points": [{"x": 500, "y": 500}]}, points((570, 500)), 1),  # 5 % of 1414 are 70.7
        ({"points": [{"x": 500, "y": 500}]}, points((571, 500)), 0),
        ({"points": [[250, 500, 2]], "radius": 5}, points((500, 500), image=2), 1),
        ({"points": [[250, 500, 2]], "radius": 5}, points((250, 500)), 0),
        ({"boxes": [{"box": A, "image": 2}]}, points((300, 150), image=2), 1),
        (
            {"boxes": [{"box": A, "label": "dog"}, {"box": B, "label": "cat"}]},
            points((120, 120)),
            2 / 3,
        ),
        (
            {"boxes": [{"box": A, "label": "dog"}, {"box": B, "label": "cat"}]},
            points((120, 120), label="cat"),
            0,
        ),
        ({"boxes": [{"box": A, "label": "dog"}]}, points((120, 120), label="cat"), 1),
    ],
)
def test_points(truth, answer, score) -> None:
    assert SCORERS["points"](truth, answer, SHOWN) == pytest.approx(score)


FRAMES = [{"time": 0.0, "boxes": [A, None]}, {"time": 1.0, "boxes": [B, A]}]


@pytest.mark.parametrize(
    ("truth", "answer", "score"),
    [
        ({"frames": FRAMES}, "0.0 1 150 150;1.0 1 210 210 2 120 120", 1),
        ({"frames": FRAMES}, "0.2 1 150 150;1.0 1 210 210 2 120 120", 1),
        ({"frames": FRAMES}, "0.5 1 150 150;1.0 1 210 210 2 120 120", 2 * 2 / 6),
        ({"frames": FRAMES}, "1.0 1 210 210 2 120 120", 2 * 2 / 5),
        ({"tracks": [{"points": [{"x": 150, "y": 150, "time": 0.0}]}]}, "0.0 1 160 150", 1),
        ({"tracks": [[{"x": 150, "y": 150, "time": 0.0}]], "radius": 5}, "0.0 1 160 150", 0),
    ],
)
def test_tracks(truth, answer, score) -> None:
    said = f'<tracks coords="{answer}">dog</tracks>'
    assert SCORERS["tracks"](truth, said, VIDEO) == pytest.approx(score)


def test_no_tracks() -> None:
    truth = {"frames": [{"time": 0.0, "boxes": [None]}]}
    assert SCORERS["tracks"](truth, "No tracks available.", VIDEO) == 1
    assert SCORERS["tracks"](truth, "", VIDEO) == 0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("3", 1),
        ("Three.", 1),
        ("There are 3 dogs.", 1),
        (f"Counting the {points((1, 1), (2, 2), (3, 3))} shows a total of 3.", 1),
        (points((1, 1), (2, 2), (3, 3)), 1),
        ("4", 0),
        ("many", 0),
        ("3.7", 0),
    ],
)
def test_counts(answer: str, score: float) -> None:
    assert SCORERS["count"]({"count": 3}, answer, SHOWN) == score


@pytest.mark.parametrize(
    ("text", "names", "found"),
    [
        ("Two dogs and a cat.", ["dog", "cat", "bird"], {"dog", "cat"}),
        ("A hot dog.", ["dog", "hot dog"], {"hot dog"}),
        ("A hot dog and a dog.", ["dog", "hot dog"], {"hot dog", "dog"}),
        ("Cherries, boxes, a bus.", ["cherry", "box", "bus"], {"cherry", "box", "bus"}),
        ("A dogma in the catalogue.", ["dog", "cat"], set()),
        ("BUSES", ["bus"], {"bus"}),
        ("people", ["person"], set()),  # only regular plurals
    ],
)
def test_names_in_a_text(text, names, found) -> None:
    assert named_in(text, names) == found


def test_categories_are_compared_with_those_of_the_task() -> None:
    truth = {"categories": ["dog", "cat"], "vocabulary": ["dog", "cat", "bird"]}
    score = SCORERS["categories"]
    assert score(truth, "A dog and a bird.", SHOWN) == pytest.approx(0.5)
    assert score(truth, "Cats and dogs.", SHOWN) == 1
    assert score({"categories": []}, "Nothing.", SHOWN) == 1
    assert score({"categories": []}, "", SHOWN) == 0


def test_choices() -> None:
    score = SCORERS["choice"]
    for answer in ("B", "blue", "b"):
        truth = {"choices": ["red", "blue"], "answer": answer}
        assert score(truth, "(B)", SHOWN) == score(truth, "It is blue.", SHOWN) == 1
        assert score(truth, "A", SHOWN) == score(truth, "green", SHOWN) == 0
        assert not SCORERS["choice"].is_readable(truth, "green", SHOWN)


def test_what_can_be_read_of_an_answer() -> None:
    readable = SCORERS["points"].is_readable
    assert readable({"boxes": [A]}, points((1, 1)), SHOWN)
    assert readable({"boxes": [A]}, "There are none.", SHOWN)
    assert not readable({"boxes": [A]}, "On the left.", SHOWN)
    assert not SCORERS["count"].is_readable({"count": 3}, "Many.", SHOWN)
    assert not SCORERS["exact"].is_readable({"answers": ["a"]}, "", SHOWN)


@pytest.mark.parametrize(
    ("answer", "is_so"),
    [
        ("There are none.", True),
        ("none", True),
        ("Nothing.", True),
        ("No dogs.", True),
        ("There are no dogs.", True),
        ("No.", False),
        ("No, there are two dogs in it, and a cat as well, I think.", False),
        ("There is no doubt.", False),
    ],
)
def test_saying_that_there_is_nothing(answer: str, is_so: bool) -> None:
    assert says_nothing(answer, SHOWN) is is_so


@pytest.mark.parametrize(
    ("name", "truth"),
    [
        ("points", {}),
        ("points", {"boxes": 3}),
        ("points", {"points": [[1]]}),
        ("points", {"points": [[1, 1, 3]]}),  # there are two pictures
        ("points", {"points": [[1, 1]], "radius": -1}),
        ("count", {"count": "3"}),
        ("count", {"count": 2.5}),
        ("exact", {"answers": []}),
        ("vqa", {"answers": [None]}),
        ("choice", {"choices": ["a"], "answer": "a"}),
        ("choice", {"choices": ["a", "b"]}),
        ("categories", {"categories": "dog"}),
        ("tracks", {"frames": 1}),
    ],
)
def test_truths_that_do_not_fit(name, truth) -> None:
    with pytest.raises(ValueError, match=r"found|expected|picture"):
        SCORERS[name].check(truth, SHOWN)
