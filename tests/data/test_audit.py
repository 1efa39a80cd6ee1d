"""Each finding of an audit, with data that has it and data that does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.data.audit import Finding, Report, audit, cause_of_problem, digest
from nanomolmo2.data.example import BadExample, Example
from nanomolmo2.processor import Point, Processor, format_points, parse_points
from nanomolmo2.processor.config import VideoConfig
from nanomolmo2.processor.video import Video
from tests.data.sources import Listed, encoder, picture, talk
from tests.small_model import small_processor


@pytest.fixture(scope="module")
def processor() -> Processor:
    return small_processor()


@pytest.fixture
def found(processor: Processor):
    """``found(example, ...)``: cause -> finding."""

    def run(*examples: Any, max_tokens: int = 400, **options: Any) -> dict[str, Finding]:
        report = run_audit(processor, examples, max_tokens=max_tokens, **options)
        return {finding.cause: finding for finding in report.findings}

    return run


def run_audit(processor: Processor, examples: Sequence[Any], **options: Any) -> Report:
    encode = options.pop("encode", encoder(processor))
    return audit(Listed(*examples), encode, processor, **options)


def good(seed: int, question: str = "How many dogs?", answer: str = "Two.") -> Example:
    return Example([picture(seed)], [talk(question, answer)])


def test_good_data_has_no_finding(processor: Processor) -> None:
    tag = '<points coords="1 1 1000 000">dogs</points>'
    examples = [good(0), good(1, "Where?", tag), Example([], [talk("?", "!"), talk("a", "b")])]
    report = run_audit(processor, examples, max_tokens=400)
    assert (report.findings, report.fatal) == ([], [])
    assert (report.size, report.records, report.good) == (3, 3, 3)
    assert (report.branches, report.pictures) == (4, 2)
    lengths = [len(encoder(processor)(example).input_ids) for example in examples]
    assert (report.tokens, report.longest) == (sum(lengths), max(lengths))


def test_the_labels_are_counted(processor: Processor) -> None:
    report = run_audit(processor, [good(0)], max_tokens=400)
    said = processor.tokenizer.encode_text("Two.")
    assert report.labels == len(said) + 1  # and the end of the answer


def test_no_label_left(found, processor: Processor) -> None:
    encode = encoder(processor, branch_weights=[0.0])
    finding = found(good(0), encode=encode)["no label left"]
    assert (finding.fatal, finding.records) == (True, [0])
    length = len(encoder(processor)(good(0)).input_ids)
    answer = len(processor.tokenizer.encode_text("Two.")) + 1
    assert "no label left" not in found(good(0), max_tokens=length - answer + 1)
    causes = found(good(0), max_tokens=length - answer)
    assert "no label left" in causes
    assert "image tokens cut off" not in causes


def test_image_tokens_cut_off(found, processor: Processor) -> None:
    finding = found(good(0), max_tokens=4)["image tokens cut off"]
    assert finding.fatal
    # <|im_end|>, <low_res_im_start>, and then the 4 of the picture
    assert finding.detail.startswith("2 image tokens are left of the 4")

    def forgets_one(example: Example) -> Any:
        encoded = encoder(processor)(example)
        keep = np.arange(len(encoded.input_ids)) != 3
        for name in ("input_ids", "position_ids", "labels", "loss_weights", "subsegment_ids"):
            setattr(encoded, name, getattr(encoded, name)[keep])
        return encoded

    finding = found(good(0), encode=forgets_one)["image tokens cut off"]
    assert finding.detail.startswith("3 image tokens are left of the 4")


def test_answer_longer_than_the_sequence(found, processor: Processor) -> None:
    length = len(encoder(processor)(good(0)).input_ids)
    assert "answer longer than the sequence" not in found(good(0), max_tokens=length)
    finding = found(good(0), max_tokens=length - 1)["answer longer than the sequence"]
    assert finding.fatal
    assert finding.detail == f"{length} tokens, {length - 1} fit"


def test_a_picture_that_the_model_expands_counts_with_all_its_tokens(
    found, processor: Processor
) -> None:
    length = len(encoder(processor)(good(0)).input_ids)
    expanded = length + 4 * (10 - 1)
    options = {"visual_tokens": 10}
    assert "answer longer than the sequence" not in found(good(0), max_tokens=expanded, **options)
    causes = found(good(0), max_tokens=expanded - 1, **options)
    assert "answer longer than the sequence" in causes


@pytest.mark.parametrize("coords", ["1 1 1001 500", "1 1 500 1200", "2 1 500 500"])
def test_points_outside_the_picture(found, coords: str) -> None:
    example = good(0, "Where?", f'<points coords="{coords}">dogs</points>')
    finding = found(example)["points outside the picture"]
    assert (finding.fatal, finding.count) == (True, 1)
    assert finding.detail.startswith("branch 0: ")


def test_points_that_cannot_be_read_are_a_warning(found) -> None:
    causes = found(good(0, "Where?", '<points coords="1 1 5 5">dogs</points>'))
    assert set(causes) == {"points not readable"}
    assert not causes["points not readable"].fatal


def test_lines_of_the_points_parser_are_told_apart() -> None:
    """The lines are prose; if their wording changes, this says so."""
    for coords, cause in (
        ("1 1 1001 500", "points outside the picture"),
        ("9 1 100 500", "points outside the picture"),
        ("1 1 1 1", "points not readable"),
    ):
        problems: list[str] = []
        parse_points(f'<points coords="{coords}">a</points>', [(9, 9)], problems=problems)
        assert {cause_of_problem(problem) for problem in problems} == {cause}


def test_missing_and_broken_pictures_are_fatal_above_their_share(found, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    bad = [Example([path], [talk("?", "!")]) for path in (tmp_path / "absent.png", broken)]
    examples = [*bad, *(good(seed) for seed in range(8))]
    for share, fatal in ((0.1, True), (0.2, False)):  # two of ten
        causes = found(*examples, max_bad_fraction=share)
        assert set(causes) == {"missing picture", "broken picture"}
        assert [finding.fatal for finding in causes.values()] == [fatal, fatal]
    assert "absent.png" in causes["missing picture"].detail
    assert causes["broken picture"].records == [1]


def test_what_the_source_cannot_read_is_fatal(found) -> None:
    causes = found(
        BadExample("no answer", "nobody answers"),
        BadExample("bad record", "no JSON"),
        good(0),
        BadExample("bad record", "no JSON either"),
    )
    assert {cause: (f.fatal, f.count) for cause, f in causes.items()} == {
        "bad record": (True, 2),
        "no answer": (True, 1),
    }
    assert causes["bad record"].records == [1, 3]
    assert causes["bad record"].detail == "no JSON"


def test_messages_that_the_processor_refuses_are_fatal(found) -> None:
    finding = found(Example([picture()], [talk("only a question")]))["not encodable"]
    assert finding.fatal
    assert "ends with a question" in finding.detail


def test_text_that_is_no_unicode_is_a_finding(found) -> None:
    """JSON can hold half a surrogate pair, which no tokenizer takes."""
    assert found(good(0, "\ud800?"))["not encodable"].fatal


def test_duplicate_pictures_are_found_by_what_they_show(found, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.bmp")
    picture(2).save(tmp_path / "c.png")
    names = ("a.png", "c.png", "b.bmp")
    examples = [Example([tmp_path / name], [talk(name, "!")]) for name in names]
    causes = found(*examples)
    assert set(causes) == {"duplicate picture"}
    finding = causes["duplicate picture"]
    assert (finding.fatal, finding.records) == (False, [2])
    assert finding.detail == "record 2, picture 1 is that of record 0, picture 1"


def test_the_digest_tells_sizes_apart() -> None:
    assert digest(Image.new("RGB", (4, 6))) != digest(Image.new("RGB", (6, 4)))


def test_duplicate_questions_on_one_picture(found) -> None:
    twice = Example([picture(1)], [talk("Dogs?", "Two."), talk("Cats?", "No."), talk("Dogs?", "2")])
    causes = found(twice, good(2, "Dogs?"))
    assert set(causes) == {"duplicate question on a picture"}
    finding = causes["duplicate question on a picture"]
    assert (finding.fatal, finding.count) == (False, 1)
    assert finding.detail == "record 0, branch 2 asks 'Dogs?' as record 0, branch 0 does"
    across = found(good(1), good(1))
    assert set(across) == {"duplicate picture", "duplicate question on a picture"}
    assert found(*(Example([], [talk("Dogs?", "Two.")]) for _ in range(2))) == {}


def test_empty_questions(found) -> None:
    later = Example([picture(1)], [talk("Dogs?", "Two.", " \n", "Three.")])
    causes = found(good(0), later, good(2, ""))
    assert set(causes) == {"empty question"}
    assert (causes["empty question"].fatal, causes["empty question"].records) == (False, [1, 2])


def test_very_long(found, processor: Processor) -> None:
    length = len(encoder(processor)(good(0)).input_ids)
    assert found(good(0), max_tokens=2 * length) == {}
    causes = found(good(0), max_tokens=2 * length - 1)
    assert set(causes) == {"very long"}
    assert not causes["very long"].fatal


def test_a_record_counts_once_for_a_cause_and_the_first_are_kept(found) -> None:
    examples = [good(n, "") for n in range(9)]
    examples[0] = Example([picture(0)], [talk("", "a", "", "b"), talk(" ", "c")])
    finding = found(*examples)["empty question"]
    assert (finding.count, finding.records) == (9, [0, 1, 2, 3, 4])


def test_fatal_findings_come_first_then_the_most_frequent(found) -> None:
    bad = [BadExample("bad record", "no JSON")]
    examples = [*(good(seed, "") for seed in range(3)), *bad, good(0)]
    assert list(found(*examples)) == ["bad record", "empty question", "duplicate picture"]


def test_a_limit_looks_at_the_first_records(processor: Processor) -> None:
    done = []
    report = run_audit(
        processor,
        [good(0), good(1, ""), BadExample("bad record", "")],
        max_tokens=400,
        limit=2,
        on_progress=lambda *numbers: done.append(numbers),
    )
    assert (report.size, report.records, report.fatal) == (3, 2, [])
    assert [finding.cause for finding in report.findings] == ["empty question"]
    assert done == [(1, 2), (2, 2)]


def test_the_report_is_plain_json(processor: Processor) -> None:
    report = run_audit(processor, [good(0, ""), BadExample("bad record", "?")], max_tokens=400)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["fatal"] is True
    assert [finding["cause"] for finding in values["findings"]] == ["bad record", "empty question"]


# ---- what users trip over ----


def test_more_crops_than_a_row_holds(found) -> None:
    nine = Example([picture(seed) for seed in range(9)], [talk("Same?", "No.")])
    assert found(nine) == {}
    assert found(nine, max_crops=9) == {}
    finding = found(nine, max_crops=8)["more crops than a row holds"]
    assert (finding.fatal, finding.detail) == (True, "9 crops, 8 fit")


def test_frames_are_crops_of_a_row(found) -> None:
    frames = tuple(np.asarray(picture(seed)) for seed in range(13))
    video = Example([], [talk("What?", "Noise.")], Video(frames, tuple(range(13))))
    processor = small_processor()
    config = replace(processor.config, video=VideoConfig())
    encode = encoder(Processor(config, processor.tokenizer))
    assert found(video, encode=encode, max_crops=13) == {}
    finding = found(video, encode=encode, max_crops=12)["more crops than a row holds"]
    assert finding.detail == "13 crops, 12 fit"


@pytest.mark.parametrize(("time", "late"), [(0.0, False), (2.9, False), (3.5, True), (500.0, True)])
def test_a_point_behind_the_end_of_its_video_is_outside(found, time: float, late: bool) -> None:
    """Whoever counts frames in place of seconds taught points in frames that are not there."""
    frames = tuple(np.zeros((8, 8, 3), np.uint8) for _ in range(5))
    answer = f'<points coords="{time} 1 500 500">dog</points>'
    video = Example([], [talk("Where?", answer)], Video(frames, (0.0, 0.5, 1.0, 1.5, 2.0)))
    processor = small_processor()
    config = replace(processor.config, video=VideoConfig())
    findings = found(video, encode=encoder(Processor(config, processor.tokenizer)))
    assert list(findings) == ["points outside the picture"] * late
    for finding in findings.values():
        assert f"a point at {time:g} s, the video ends at 2 s" in finding.detail


@pytest.mark.parametrize(
    ("question", "answer", "detail"),
    [
        ("<|image_1|>What?", "Red.", "'<|image_1|>' is left in a question"),
        ("What?", "Red <image>.", "'<image>' is left in an answer"),
        ("<img>What?", "Red.", "'<img>' is left in a question"),
    ],
)
def test_tags_that_are_left_are_told(found, question: str, answer: str, detail: str) -> None:
    finding = found(good(0), good(1, question, answer))["picture tag in the text"]
    assert (finding.fatal, finding.records) == (False, [1])
    assert finding.detail == f"branch 0: {detail}"


def test_what_a_record_notes_is_a_warning(processor: Processor) -> None:
    notes = (("picture field that is not read", "line 1: 'img'"),)
    noted = replace(good(0), notes=notes, unread=("a", "b"), outside=("../a.png", "../b.png"))
    report = run_audit(processor, [noted, replace(good(1), unread=("b",))], max_tokens=400)
    [finding] = report.findings
    assert (finding.cause, finding.fatal) == ("picture field that is not read", False)
    assert finding.detail == "line 1: 'img'"
    assert report.unread == {"a": 1, "b": 2}
    assert (report.outside, report.outside_first) == (2, "record 0: ../a.png")


def pointing(places: list[tuple[float, float]], size: tuple[int, int], seed: int) -> Example:
    text = format_points([Point(*place) for place in places], "dog", [size])
    return Example([picture(seed, *size)], [talk("Where?", text)])


@pytest.mark.parametrize(
    ("scale", "side", "size", "count"),
    [
        ("unit", 1, (64, 48), 1),
        ("unit", 1, (640, 480), 3),
        ("percent", 100, (640, 480), 4),
        ("percent", 100, (1000, 200), 9),
        ("thousandths", 1000, (2400, 1800), 6),
    ],
)
def test_points_in_another_unit_lie_in_a_corner(
    found, scale: str, side: int, size: tuple[int, int], count: int
) -> None:
    rng = np.random.default_rng(0)
    places = [tuple(place) for place in (rng.random((count, 2)) * side).tolist()]
    causes = found(*(pointing([place], size, seed) for seed, place in enumerate(places)))
    finding = causes["points in a corner"]
    assert (finding.fatal, finding.count) == (False, count)
    assert f"{count} of {count} points lie within {side} pixels" in finding.detail
    assert f"'points_scale': {scale!r}" in finding.detail
    honest = (rng.random((count, 2)) * size).tolist()
    spread = [pointing([tuple(place)], size, seed) for seed, place in enumerate(honest)]
    assert "points in a corner" not in found(*spread)


def test_a_few_points_elsewhere_do_not_hide_the_corner(found) -> None:
    rng = np.random.default_rng(0)
    inside = [tuple(place) for place in (rng.random((18, 2)) * 100).tolist()]
    examples = [pointing([place], (640, 480), seed) for seed, place in enumerate(inside)]
    examples += [pointing([(300, 300)], (640, 480), 50), pointing([(5, 400)], (640, 480), 51)]
    finding = found(*examples)["points in a corner"]
    assert finding.detail.startswith("18 of 20 points lie within 100 pixels")
    half = examples[:10] + [pointing([(200 + 40 * n, 200)], (640, 480), 60 + n) for n in range(10)]
    assert "points in a corner" not in found(*half)


def test_a_corner_among_other_points_is_no_other_unit(found) -> None:
    corners = [(0, 0), (640, 0), (0, 480), (640, 480)]
    assert "points in a corner" not in found(pointing(corners, (640, 480), 0))
    both = [pointing([(0.4, 0.7), (0.1, 0.9)], (640, 480), 1), pointing(corners, (640, 480), 2)]
    assert found(*both)["points in a corner"].detail.startswith("2 of 6 points lie within 1 pixel")


@pytest.mark.parametrize(
    ("places", "size"),
    [
        ([(97.0, 63.5)], (192, 192)),  # the shipped example
        ([(5, 5), (90, 90), (50, 20)], (100, 100)),  # nowhere else to lie
        ([(1, 1)], (3, 3)),
        ([(50, 50)], (200, 200)),
        ([(99, 99), (150, 20)], (640, 480)),
    ],
)
def test_points_that_may_lie_where_they_do(found, places: Any, size: tuple[int, int]) -> None:
    assert found(pointing(places, size, 0)) == {}
