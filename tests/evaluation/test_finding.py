"""How well a model finds by example: what it is asked, what an answer is worth, own data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2 import cli
from nanomolmo2.cli import eval_find
from nanomolmo2.data.sources import open_source
from nanomolmo2.evaluation.finding import (
    FindCase,
    OwnCases,
    Place,
    click,
    failure,
    outcomes,
    question_of,
    summarize,
    written,
)
from nanomolmo2.evaluation.finding_report import (
    cells,
    from_json,
    goals_met,
    tables,
    to_json,
    write_page,
)
from nanomolmo2.evaluation.measures import Thing
from nanomolmo2.evaluation.questions import find_questions
from nanomolmo2.evaluation.regions import Box
from nanomolmo2.evaluation.run import opened
from nanomolmo2.generation import finding as model_side
from nanomolmo2.generation.answer import Answer
from nanomolmo2.generation.find import read_examples
from nanomolmo2.generation.finding import Found, Seen
from nanomolmo2.generation.pipeline import Pipeline
from nanomolmo2.processor import load_image
from nanomolmo2.processor.point import Point
from nanomolmo2.things.find_stage import spaced
from nanomolmo2.things.questions import content_of
from nanomolmo2.things.wordings import EVERYDAY, PLACES
from tests.find_model import find_vlm
from tests.small_model import ScriptedModel

WHITE = np.full((100, 200, 3), 255, np.uint8)


class Fake:
    """Answers each click with the next list of places, and remembers what it was asked."""

    def __init__(self, *answers: list[Place]) -> None:
        self.answers, self.asked = list(answers), list[dict[str, Any]]()
        self.prefix_cache = self
        self.cleared = 0

    def clear(self) -> None:
        self.cleared += 1

    def find(self, image: Any, like: Any, unlike: Any = (), **more: Any) -> Answer:
        self.asked.append({"like": like, "unlike": unlike, **more})
        shown = [more["reference"], image] if more.get("reference") is not None else [image]
        points = tuple(
            Point(x, y, len(shown), id=i, label="thing", confidence=0.9)
            for i, (x, y) in enumerate(self.answers.pop(0), start=1)
        )
        sizes = tuple(load_image(picture).size for picture in shown)
        return Answer("", points, len(points), (), sizes, None, (), 0, 0, {})


class Listed(list[FindCase]):
    """Cases in a list."""


def case(name: str, *boxes: tuple[int, int, int, int], **more: Any) -> FindCase:
    things = tuple(Thing(Box(*box)) for box in boxes)
    return FindCase(name, WHITE, things, ((15.0, 15.0),), **more)


TWO = ((10, 10, 20, 20), (50, 50, 90, 80))


def test_outcomes_by_hand() -> None:
    cases = Listed(
        [
            case("all", *TWO),
            case("one twice, one not", *TWO, picture=1),
            case("too many", *TWO, picture=2, reference=WHITE),
            case("none there", picture=3),
        ]
    )
    vlm: Any = Fake(
        [(15, 15), (70, 60)],
        [(15, 15), (16, 16)],  # each thing once
        [(15, 15), (70, 60), (150, 50)],
        [],
    )
    done: list[tuple[int, int]] = []
    found = list(outcomes(vlm, cases, on_progress=lambda *now: done.append(now)))
    assert [one.tally.hits for one in found] == [2, 1, 2, 0]
    assert [one.tally.f1 for one in found] == [1, 0.5, pytest.approx(0.8), 1]
    assert [one.tally.px for one in found] == [25, 25, 25, None]  # the median of 10 and 40
    assert [point.image for point in found[2].points] == [1, 1, 1] and found[2].size == (200, 100)
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)] and vlm.cleared == 4
    assert vlm.asked[0] == {
        "like": ((15.0, 15.0),),
        "unlike": (),
        "reference": None,
        "max_crops": None,
        "min_confidence": 0.5,
    }
    row = summarize("few", "some", found, {"f1": 0.8, "exact": 0.8, "mae": 0.25}, worst=1)
    assert row.figures["f1"] == pytest.approx(3.3 / 4)
    assert row.figures["exact"] == 3 / 4 and row.figures["mae"] == 1 / 4
    assert row.figures["precision"] == 0.71429 and row.figures["recall"] == 0.83333
    assert [one.name for one in row.worst] == ["one twice, one not"]
    assert set(row.by_count) == {"0", "2 to 5"} and set(row.by_size) == {"16 to 31 px"}
    assert goals_met([row]) == (2, 3)
    (line,) = cells([row])[1]
    assert line[:3] == ["few", "some", "4"] and line[3].startswith(".825 [")
    assert line[3].endswith("] ≥ .800") and line[6].endswith("] < .800")
    assert line[7].endswith("] ≤ 0.25") and line[4:6] == [".714", ".833"]
    content = to_json([row], {"model": "none"})
    assert content["model"] == "none"
    assert content["rows"]["few"]["f1"] == 0.825 and content["rows"]["few"]["pictures"] == 4
    again = from_json(json.loads(json.dumps(content)))
    assert tables(again) == tables([row])


def test_what_is_measured_is_what_people_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """`VLM.find` to its end: only what the nets say is made up."""
    vlm = find_vlm()
    asked = []

    def found(model: Any, pictures: list[Seen], like: Any, unlike: Any) -> list[list[Found]]:
        asked.append(len(pictures))
        likely = [Found(15, 15, 10, 0.9), Found(70, 60, 30, 0.6), Found(150, 50, 30, 0.4)]
        return [[], likely] if len(pictures) == 2 else [likely]

    monkeypatch.setattr(model_side, "look_for", found)
    cases = Listed([case("one", *TWO), case("in another", *TWO, reference=WHITE)])
    first, second = outcomes(vlm, cases)
    assert asked == [1, 1, 1, 2, 2, 2]  # three looks each
    assert first.tally.f1 == second.tally.f1 == 1  # what is hardly likely is not listed
    assert first.seconds > 0


def words(examples: Any, **options: bool) -> list[str]:
    """The parts of a question, ``*`` for a point."""
    (message,) = question_of(read_examples(*examples), **options)
    return [part.get("text", "*") for part in message["content"]]  # type: ignore[union-attr]


def test_the_question_is_a_sentence_without_spaces_beside_points() -> None:
    one = [[(1, 2)]]
    assert words(one) == ["Point to everything like", "*", "."]
    three = [[(1, 2), (3, 4), (5, 6)], [(7, 8), (9, 1)]]
    like = ["Point to everything like", "*", ",", "*", "and", "*"]
    assert words(three) == [*like, ", not like", "*", "and", "*", "."]
    assert words(three, in_second=True) == [
        *like,
        *("in the second picture, not like", "*", "and", "*", "."),
    ]
    assert words(one, in_second=True) == ["Point to everything like", "*", "in the second picture."]


@pytest.mark.parametrize("unlike", [[], [(7.0, 8.0)], [(7.0, 8.0), (9.0, 1.0)]])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_it_is_asked_as_training_asks(number: int, unlike: list[tuple[float, float]]) -> None:
    """The same parts as half of the questions about scenes have, and so the same ids."""
    like = [(float(i), 50.0) for i in range(number)]

    def as_dicts(points: Sequence[tuple[float, float]]) -> list[dict[str, float]]:
        return [{"x": x, "y": y, "image": 1} for x, y in points]

    wording = "Point to everything like {like}{place}{but}."
    but = ", not like {unlike}"
    assert {wording, but, *PLACES[:2]} <= EVERYDAY
    for place in PLACES[:2]:
        filled = wording.replace("{but}", but if unlike else "").replace("{place}", place)
        content = content_of(filled, like=as_dicts(like), unlike=as_dicts(unlike))
        (learned,) = spaced([{"role": "user", "content": content}], _WithoutSpaces())
        (message,) = question_of(read_examples(like, unlike), in_second=bool(place))
        assert message == learned


class _WithoutSpaces(np.random.Generator):
    """Draws what leaves the spaces out."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def random(self) -> float:  # type: ignore[override]
        return 0.9


def test_lists_that_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 x 100 pixels: (075, 150) thousandths are pixel (15, 15)."""
    text = '<points coords="1 1 075 150 2 350 600">thing</points>'
    model = ScriptedModel(text, text.replace("1 1", "2 1"))
    vlm = Pipeline(model, model.processor)
    cases = Listed([case("one", *TWO), case("in another", *TWO, reference=WHITE)])
    assert [one.tally.hits for one in outcomes(vlm, cases, written)] == [2, 2]


def test_warnings_to_people_are_not_shown(recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    class Warns(Fake):
        def find(self, *given: Any, **more: Any) -> Answer:
            warnings.warn("nothing seems to be there", stacklevel=2)
            return super().find(*given, **more)

    vlm: Any = Warns([(15, 15)])
    assert click(vlm, case("one", *TWO), max_crops=7).count == 1
    assert vlm.asked[0]["max_crops"] == 7 and not recwarn.list


def test_an_answer_on_the_page() -> None:
    cases = Listed([case("one", *TWO)])
    vlm: Any = Fake([(150, 50)])
    (one,) = outcomes(vlm, cases)
    shown = failure(one, cases[0])
    assert shown.answer == (
        'Counting the <points coords="1 1 750 500">thing</points> shows a total of 1.'
    )
    assert shown.branch.messages[0]["content"] == "Point to everything like (15, 15)."
    assert shown.branch.truth["masks"][0] == [[10, 10], [20, 10], [20, 20], [10, 20]]


# ---- own data ----


def write(folder: Path, *records: dict[str, Any]) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (200, 100), "white" if name == "a.png" else "grey").save(folder / name)
    path = folder / "my.jsonl"
    path.write_text("".join(json.dumps({"image": "a.png", **record}) + "\n" for record in records))
    return path


def own(path: Path) -> OwnCases:
    sources = opened(open_source(str(path)))
    return OwnCases(sources, find_questions(sources).asked)


def test_records_with_examples(tmp_path: Path) -> None:
    boxes = [list(box) for box in TWO]
    path = write(
        tmp_path,
        {"like": [[15, 15]], "unlike": [[150, 50], [160, 60]], "boxes": boxes},
        {"images": ["b.png", "a.png"], "image": None, "like": [[5, 5]], "boxes": boxes},
        {"like": [[0.5, 0.1]], "points_scale": "unit", "points": [{"x": 0.5, "y": 0.1}]},
        {"like": [[15, 15]], "points": [{"x": 15, "y": 15}], "radius": 4},
    )
    cases = own(path)
    assert len(cases) == 4 and cases.left_out == 0
    first, second, third, fourth = (cases[i] for i in range(4))
    assert first.like == ((15, 15),) and first.unlike == ((150, 50), (160, 60))
    assert [thing.region for thing in first.things] == [Box(*box) for box in TWO]
    assert load_image(second.reference).getpixel((0, 0)) == (128, 128, 128)
    assert load_image(second.image).getpixel((0, 0)) == (255, 255, 255)
    assert [thing.image for thing in second.things] == [1, 1] and second.like == ((5, 5),)
    assert third.like == ((100, 10),)
    radius = third.things[0].region
    assert (radius.x, radius.y, radius.radius) == (100, 10, pytest.approx(0.05 * 50000**0.5))
    assert fourth.px == pytest.approx(8, abs=0.1)
    assert first.picture == third.picture != second.picture


def test_any_labelled_picture_is_a_case(tmp_path: Path) -> None:
    """The first thing is the example; questions about the same things are one case."""
    boxes = [list(box) for box in TWO]
    path = write(
        tmp_path,
        {"question": "Point to the nuts.", "boxes": boxes},
        {"question": "Show me the nuts.", "boxes": boxes},
        {"question": "Point to the screws.", "boxes": []},  # nothing to click on
        {"question": "How many nuts are there?", "count": 2},
    )
    cases = own(path)
    assert len(cases) == 1 and cases.left_out == 1
    assert cases[0].like == ((15, 15),) and cases[0].name.endswith("record 0")


def test_own_data_without_places_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"question": "How many nuts are there?", "count": 2})
    with pytest.raises(ValueError, match="no record says where the things of a picture are"):
        own(path)


@pytest.mark.parametrize("like", [[], [5, 5], [[5]], "5,5", [["5", "5"]], {"x": 5}])
def test_examples_that_are_no_places_are_left_out(tmp_path: Path, like: Any) -> None:
    path = write(tmp_path, {"like": like, "boxes": []}, {"like": [[1, 1]], "boxes": [[0, 0, 5, 5]]})
    sources = opened(open_source(str(path)))
    found = find_questions(sources)
    assert len(found.asked) == 1 and sum(found.bad.values()) == 1


def test_examples_are_a_question_that_can_be_learned(tmp_path: Path) -> None:
    """Without a question, `like` is one: "Point to everything like <point>."."""
    path = write(
        tmp_path, {"like": [[15, 15], [70, 60]], "unlike": [[1, 2]], "points": [{"x": 15, "y": 15}]}
    )
    (branch,) = open_source(str(path))[0].branches
    parts = branch.messages[0]["content"]
    said = [part.get("text") or (part["x"], part["y"]) for part in parts]
    assert said == [
        *("Point to everything like ", (15, 15), " and ", (70, 60)),
        *(", not like ", (1, 2), "."),
    ]
    assert branch.messages[1]["content"] == '<points coords="1 1 075 150">thing</points>'


# ---- the command ----


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """Makes every model say some places in turn; what was loaded is remembered."""
    loaded: list[dict[str, Any]] = []

    def prepare(*answers: list[Place]) -> list[dict[str, Any]]:
        vlm = Fake(*answers)

        def load(name: str, *_: Any, **options: Any) -> Fake:
            loaded.append(options)
            return vlm

        monkeypatch.setattr(eval_find, "load_pipeline", load)
        return loaded

    return prepare


def test_own_pictures_by_the_command(tmp_path: Path, fake, capsys) -> None:
    boxes = [list(box) for box in TWO]
    path = write(
        tmp_path, {"like": [[15, 15]], "boxes": boxes}, {"like": [[70, 60]], "boxes": boxes}
    )
    loaded = fake([(15, 15), (70, 60)], [(15, 15)], [], [(15, 15)])
    target, page = tmp_path / "find.json", tmp_path / "page"
    options = ["--also", "int8", "--json", str(target), "--report", str(page)]
    assert cli.main(["eval", "find", "--data", str(path), *options]) == 0
    said = capsys.readouterr().out
    assert "| own pictures, int8 | a click each |      2 |" in said
    assert f"wrote {page / 'index.html'}" in said and "goals" not in said.split("\n\n")[-1]
    found = json.loads(target.read_text())
    assert found["data"] == [str(path)] and found["model"] == "tiny"
    assert found["rows"]["own pictures"]["f1"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-5)
    assert found["rows"]["own pictures, int8"]["recall"] == 0.25
    assert loaded == [{}, {"quantize": "int8"}]
    assert len(list((page / "pictures").glob("*.png"))) == 3
    assert "Point to everything like (70, 60)." in (page / "index.html").read_text()


def test_an_evaluation_that_ended_goes_on(tmp_path: Path, fake, capsys, monkeypatch) -> None:
    monkeypatch.setattr("nanomolmo2.evaluation.store.digest_of", lambda vlm: "the same")
    boxes = [list(box) for box in TWO]
    path = write(tmp_path, *({"like": [[15 + i, 15]], "boxes": boxes} for i in range(3)))
    out, target = tmp_path / "out", tmp_path / "find.json"
    options = ["eval", "find", str(path), "--out", str(out), "--json", str(target)]
    fake([(15, 15)], [(15, 15), (70, 60)])  # then it fails: there is no third answer
    assert cli.main(options) == 1
    kept = out / "own_pictures.jsonl"
    assert kept.read_text().count("\n") == 2
    kept.write_text(kept.read_text() + '{"number": 2, "na')  # it was being written
    fake([(150, 90)])
    assert cli.main(options) == 0
    assert kept.read_text().count("\n") == 3
    row = json.loads(target.read_text())["rows"]["own pictures"]
    assert row["f1"] == pytest.approx((2 / 3 + 1 + 0) / 3, abs=1e-5) and row["questions"] == 3
    fake()  # nothing is left to ask
    before = target.read_text()
    assert cli.main(options) == 0
    assert json.loads(target.read_text()) == json.loads(before)
    capsys.readouterr()
    assert cli.main([*options, "--min-confidence", "0.3"]) == 1
    assert "holds an evaluation that differs in: min confidence" in capsys.readouterr().err
    kept.write_text(kept.read_text().replace('"number": 1', '"number": 7'))
    assert cli.main(options) == 1
    assert "own_pictures.jsonl, line 2 is no answer of this" in capsys.readouterr().err


def test_a_model_that_reads_no_points_is_not_asked_in_words(capsys) -> None:
    assert cli.main(["eval", "find", "--sets", "few", "--limit", "1", "--also", "written"]) == 2
    said = capsys.readouterr().err
    assert "--also written asks in words, with points in the question, and tiny reads none" in said


def test_fixed_sets_by_the_command(tmp_path: Path, fake, capsys) -> None:
    fake(*[[]] * 2)
    assert cli.main(["eval", "find", "--sets", "few", "--limit", "2"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| few")]
    assert len(lines) >= 1 and "held-out drawings, 2 to 10" in lines[0]
    assert ".000 [.000, .000] < .950" in lines[0] and "0 of 3 goals are met" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["find", "--sets", "many"], "--sets has 'many', choose from few, crowded"),
        (["find", "--scorer", "anls"], "--scorer is not of the benchmark find: leave it out"),
        (["find", "--scenes", "3"], "--scenes is not of the benchmark find"),
        (["find", "--radius", "3"], "--radius is of pictures of your own"),
        (["find", "my.jsonl", "--clicks", "3"], "--clicks is of the fixed sets"),
        (["find", "--max-crops", "0"], "--max-crops must be 1 or more"),
        (["emoji", "--clicks", "3"], "--clicks is not of the benchmark emoji"),
        (["my.jsonl", "--sets", "few"], "--sets is of the benchmark find"),
        (["my.jsonl", "--report", "x"], "--report is of the benchmark emoji: leave it out, and"),
    ],
)
def test_options_that_do_not_fit(options: list[str], message: str, capsys) -> None:
    assert cli.main(["eval", *options]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1


def test_tables_are_of_what_differs() -> None:
    cases = Listed([case("one", *TWO)])
    vlm: Any = Fake([(15, 15)])
    row = summarize("few", "some", list(outcomes(vlm, cases)))
    assert tables([row]).count("\n") == 2  # one table, of a line: a second would say the same


def test_a_page_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        write_page(tmp_path / "page", [], {}, {})
