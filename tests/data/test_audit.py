"""Each finding of an audit, with data that has it and data that does not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nanomolmo2.data.audit import Finding, Report, audit, cause_of_problem, digest
from nanomolmo2.data.example import BadExample, Example
from nanomolmo2.processor import Processor, parse_points
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
