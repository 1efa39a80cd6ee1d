from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.data.example import Branch, Example
from nanomolmo2.emoji.exam import EMOJI, ROWS, make_exam
from nanomolmo2.evaluation import report
from nanomolmo2.evaluation.exam import Failure, Scores, score
from nanomolmo2.evaluation.report import (
    PAGE,
    TRUE_COLOUR,
    draw_failure,
    format_score,
    goals_met,
    score_table,
    scores_to_json,
    write_report,
)

GREEN = tuple(bytes.fromhex(TRUE_COLOUR[1:]))


def some_scores(group="mild", presence=0.9123):
    interval = (presence - 0.009, presence + 0.009)
    return Scores(
        group,
        {"presence": presence, "number": 1.0},
        {"presence": 20, "number": 2},
        {"presence": interval, "number": (1.0, 1.0)},
    )


@pytest.mark.parametrize(("value", "text"), [(0.9123, ".912"), (1.0, "1.000"), (0.0, ".000")])
def test_scores_are_written_with_three_digits(value, text):
    assert format_score(value) == text


def test_the_table_says_score_interval_goal_and_whether_it_is_met():
    lines = score_table([some_scores(), some_scores("openmoji", 0.8)], ROWS).splitlines()
    assert len(lines) == len(ROWS) + 2
    assert len({len(line) for line in lines}) == 1
    cells = {line.split("|")[1].strip(): line.split("|")[2:4] for line in lines}
    mild, openmoji = cells["presence (balanced)"]
    assert mild.strip() == ".912 [.903, .921] < .93"
    assert openmoji.strip() == ".800 [.791, .809] ≥ .80"
    assert cells["number alone, all"][0].strip() == "1.000 [1.000, 1.000]"
    assert cells["spatial question"][0].strip() == "-"


def test_goals_that_are_met_are_counted_where_something_was_measured():
    assert goals_met([some_scores(), some_scores("openmoji", 0.8)], ROWS) == (1, 2)
    assert goals_met([Scores("seen")], ROWS) == (0, 0)


def test_json_has_all_numbers():
    (mild,) = scores_to_json([some_scores()], ROWS).values()
    assert mild["scores"]["presence"] == 0.9123
    assert mild["answers"] == {"presence": 20, "number": 2}
    assert mild["intervals"]["number"] == [1.0, 1.0]
    assert mild["goals"] == {"presence": 0.93}


@pytest.fixture(scope="module")
def failed():
    """Scores of a model that points at the middle of everything."""
    exam = make_exam("openmoji", 6, 2, 2)
    middle = '<points coords="1 1 500 500">dog</points>'
    tracks = '<tracks coords="0.0 1 500 500;0.5 1 600 600">dog</tracks>'
    for one in exam.asked:
        one.answer = tracks if one.branch.task in ("track", "video_point") else middle
    return score(exam, failures=20)


def test_the_page_shows_the_worst_answers(tmp_path, failed):
    folder = tmp_path / "new" / "report"
    write_report(folder, [failed, Scores("seen")], {"model": "<mine>", "scenes": 6}, EMOJI)
    page = (folder / PAGE).read_text(encoding="utf-8")
    assert "&lt;mine&gt;" in page and "<mine>" not in page
    shown = re.findall(r'src="([^"]+)"', page)
    assert len(shown) == len(failed.failures) == 20
    assert sorted(shown) == sorted(str(p.relative_to(folder)) for p in folder.glob("*/*"))
    for failure, name in zip(failed.failures, shown, strict=True):
        assert failure.branch.task in name
        assert Image.open(folder / name).size == draw_failure(failure).size
    assert '<td class="missed">' in page
    assert [p.name for p in folder.parent.iterdir()] == ["report"]


def test_a_report_replaces_nothing_and_is_complete_or_not_there(tmp_path, failed, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(ValueError, match="is not empty"):
        write_report(tmp_path / "full", [failed], {}, EMOJI)
    with pytest.raises(ValueError, match="is a file"):
        write_report(tmp_path / "full" / "mine.txt", [failed], {}, EMOJI)

    def broken(failure):
        raise RuntimeError

    monkeypatch.setattr(report, "draw_failure", broken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError):
        write_report(tmp_path / "empty", [failed], {}, EMOJI)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "full", "mine.txt"]


def test_a_place_that_cannot_be_written_to_is_found_out_before(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(report.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=f"nothing can be written to {tmp_path}: Permission"):
        report.check_report_folder(tmp_path / "a" / "b")


# ---- pictures ----

BLANK = np.zeros((100, 100, 3), dtype=np.uint8)


def failure(task, truth, answer, example=None):
    question = [{"role": "user", "content": "?"}]
    example = example or Example([BLANK], [])
    return Failure("scene 0", example, Branch(question, task, truth), answer, 0.0)


def test_true_boxes_and_points_are_drawn_in_place():
    answer = '<points coords="1 1 800 800">dog</points>'
    drawn = draw_failure(failure("point", {"boxes": [[10, 20, 40, 50]]}, answer))
    assert drawn.size == (200, 200)
    assert drawn.getpixel((20, 70)) == drawn.getpixel((50, 100)) == GREEN
    assert drawn.getpixel((50, 70)) == (0, 0, 0)
    assert drawn.getpixel((160, 167)) != (0, 0, 0)  # the disc, beside its number


def test_the_asked_place_is_marked():
    drawn = draw_failure(failure("at", {"x": 500, "y": 300}, "A dog."))
    assert drawn.getpixel((94, 60)) == GREEN


def test_boxes_of_several_nouns_are_drawn():
    groups = [{"noun": noun, "boxes": [[x, 20, x + 20, 50]]} for noun, x in (("a", 10), ("b", 60))]
    drawn = draw_failure(failure("points", {"nouns": ["a", "b"], "groups": groups}, ""))
    assert drawn.getpixel((20, 70)) == drawn.getpixel((120, 70)) == GREEN


def test_two_pictures_stand_side_by_side():
    example = Example([BLANK, BLANK + 255], [])
    drawn = draw_failure(failure("more", {"noun": "dog", "counts": [1, 2]}, "", example))
    assert drawn.size == (406, 200)
    assert drawn.getpixel((100, 100)) == (0, 0, 0)
    assert drawn.getpixel((300, 100)) == (255, 255, 255)


def test_frames_stand_in_lines_with_their_boxes():
    (example,) = make_exam("seen", 0, 0, 1).examples
    (track,) = (b for b in example.branches if b.task == "track")
    frames = [{"time": t, "boxes": []} for t in example.video.times]
    frames[5]["boxes"] = [[50, 60, 90, 100], None]
    truth = {**track.truth, "frames": frames}
    drawn = draw_failure(failure("track", truth, "", example))
    assert drawn.size == (4 * 192 + 3 * 6, 2 * 192 + 6)
    assert drawn.getpixel((198 + 50, 198 + 80)) == GREEN
    assert drawn.getpixel((50, 80)) != GREEN
