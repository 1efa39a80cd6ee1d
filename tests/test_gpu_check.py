"""The script for a real GPU, on a CPU: every section runs, and what fails is told and isolated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import gpu_check

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_section_at_toy_sizes(tmp_path: Path) -> None:
    found, page = tmp_path / "found.json", tmp_path / "page.md"
    arguments = ["--device", "cpu", "--quick", "--json", str(found), "--page", str(page)]
    code = gpu_check.main(arguments)
    result = json.loads(found.read_text())
    assert result["quick"] and result["machine"]["device"] == "cpu"
    sections = {section["name"]: section for section in result["sections"]}
    assert list(sections) == list(gpu_check.SECTIONS)
    for name, section in sections.items():
        assert section["rows"], f"{name}: {section['error']}"
        for row in section["rows"]:
            assert {"what", "found", "limit", "unit", "holds"} == set(row)
            assert row["what"] in page.read_text()
        assert section["status"] == "passed", section["error"]
    assert code == 0
    assert page.read_text().startswith(gpu_check.INTRODUCTION)
    assert "no GPU but a CPU, at toy sizes" in page.read_text()


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no CUDA GPU here") and not done.stdout
    assert done.stderr.count("\n") == 1


def test_a_section_that_fails_or_hangs_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"hangs": (0.0025, "Hangs"), "unknown": (60, "Fails"), "flex": (60, "Works")}
    monkeypatch.setattr(gpu_check, "SECTIONS", known)
    found, page = tmp_path / "found.json", tmp_path / "page.md"
    code = gpu_check.main(["--device", "cpu", "--quick", "--json", str(found), "--page", str(page)])
    assert code == 1
    hangs, fails, works = json.loads(found.read_text())["sections"]
    assert hangs["status"] == fails["status"] == "failed"
    assert "longer than its 0.01 seconds" in hangs["error"]
    assert "invalid choice: 'unknown'" in fails["error"]
    assert works["status"] == "passed" and works["rows"]
    assert page.read_text().count("**Failed**") == 2
    assert "flex: passed" in capsys.readouterr().out


def test_a_number_above_its_limit_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"what": w, "found": f, "limit": 1.0, "unit": ""} for w, f in (("a", 0.5), ("b", 2.0))]

    def write(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[command.index("--rows") + 1]).write_text(json.dumps(rows))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", write)
    found = gpu_check.run_apart("flex", "cpu", True)
    assert (found["status"], found["error"]) == ("failed", "b: 2, above 1")
    assert [row["holds"] for row in found["rows"]] == [True, False]


def test_the_limits_of_time_are_8_minutes_together() -> None:
    assert sum(seconds for seconds, _ in gpu_check.SECTIONS.values()) < 480


def test_the_page_is_the_scripts() -> None:
    """Not run: what the script says then. Else what it wrote, on a GPU."""
    text = gpu_check.PAGE.read_text(encoding="utf-8")
    assert text.startswith(gpu_check.INTRODUCTION)
    assert text == gpu_check.page(None) or "toy sizes" not in text
