"""The benchmarks run and tell what they measured; not how fast it is."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import harness, int4, llama, lookup, report
from benchmarks.harness import (
    SHORT,
    Row,
    Sizes,
    compare,
    decode_gbyte,
    in_mode,
    language_model,
    llm_gflop,
    read_rows,
    take_turns,
    vision_gflop,
)
from benchmarks.step_profile import PARTS, watched
from nanomolmo2 import cli
from nanomolmo2.cli import bench
from nanomolmo2.generation.engine import Engine, Event
from nanomolmo2.generation.speculative import StepCosts
from nanomolmo2.processor.points import parse_points

GROUPS = (
    "floor",
    "vision",
    "prefill",
    "decode",
    "batch",
    "prefix",
    "lookup",
    "llama",
    "load",
    "train",
    "trees",
    "packing",
    "ask",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the short mode writes."""
    out = tmp_path_factory.mktemp("bench")
    assert cli.main(["bench", "--short", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_short_mode_writes_every_group(results: Path, group: str) -> None:
    found = json.loads((results / f"{group}-1.json").read_text())
    assert (found["group"], found["threads"], found["short"]) == (group, 1, True)
    assert found["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    rows = read_rows(found)
    if found["missing"] is not None:
        assert not rows and "make bench-llama" in found["missing"]
        pytest.skip(found["missing"])
    assert rows
    for row in rows:
        assert row.ours > 0 or row.unit == "x weights"  # a small load hides below the imports
        assert row.target is None
        if row.ratio is not None and row.peer is not None:
            assert row.low is not None and row.high is not None
            assert 0 < row.low <= row.ratio <= row.high


@pytest.mark.slow
def test_short_mode_renders_a_table_and_a_chart(results: Path) -> None:
    table = (results / "performance.md").read_text()
    assert "only show that the benchmarks work" in table
    for words in (
        "vision, one picture, int8",
        "decode at 40 tokens, fp16-weights",
        "reading memory",
    ):
        assert f"| {words} |" in table
    with Image.open(results / "performance.png") as chart:
        chart.load()
        assert chart.width > 1000 and len(set(chart.convert("RGB").get_flattened_data())) > 3
    assert not list(results.glob("*.tmp-*"))


def test_sides_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    times = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == ["a", "b"] * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_a_side_in_another_process_counts_its_own_seconds() -> None:
    times = take_turns({"here": lambda: torch.zeros(1), "there": lambda: 5.0}, 1)
    assert times["there"] == [5.0] and times["here"][0] < 1


def test_a_peer_that_is_not_installed_is_told_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(llama, "PYTHON", tmp_path / "python")
    for name in ("set_num_threads", "set_grad_enabled"):  # of this process, all tests share it
        monkeypatch.setattr(harness.torch, name, lambda value: None)
    out = tmp_path / "llama-1.json"
    monkeypatch.setattr(sys, "argv", ["llama", "--short", "--out", str(out)])
    harness.main("llama", llama.measure)
    (line,) = capsys.readouterr().err.splitlines()
    assert "not measured" in line and "`make bench-llama` builds it" in line
    found = json.loads(out.read_text())
    assert (found["rows"], found["missing"]) == ([], line)
    other = make_report("floor", 1, Row("GEMM, float32", 100.0, "GFLOP/s"))
    lines = report.table([other, found]).splitlines()
    assert line in lines and sum("| GEMM" in text for text in lines) == 1


def test_a_ratio_is_taken_within_a_round() -> None:
    """The machine slowed down by ten in the last round: that must not move the ratio."""
    times = {"ours": [1.0, 2.0, 30.0], "peer": [2.0, 2.0, 40.0]}
    row = compare("name", times, "ours", "peer", unit="ms", scale=1000, target=0.7)
    assert (row.ours, row.peer, row.unit) == (2000, 2000, "ms")
    assert (row.low, row.ratio, row.high) == (0.5, 0.75, 1.0)
    assert row.met is False


@pytest.mark.parametrize(
    ("target", "at_least", "met"), [(3.0, False, True), (2.0, True, True), (3.0, True, False)]
)
def test_targets(target: float, at_least: bool, met: bool) -> None:
    row = Row("name", 9.0, "s", ratio=2.5, low=2.0, high=3.0, target=target, at_least=at_least)
    assert row.met is met
    assert Row("name", 9.0, "s").met is None
    assert Row("name", 9.0, "s", target=8.0).met is False


def make_report(group: str, threads: int, *rows: Row) -> dict[str, object]:
    machine = {
        "cpu": "An Abacus",
        "cores": 2,
        "extensions": ["avx2"],
        "python": "3.12",
        "versions": {"torch": "2.13.0", "transformers": None},
    }
    values = [vars(row) for row in rows]
    report = {"group": group, "threads": threads, "short": False}
    return {**report, "machine": machine, "rows": values}


def test_the_table() -> None:
    times = {"ours": [2.0, 2.0], "peer": [4.0, 4.0]}
    vision = compare("vision", times, "ours", "peer", target=0.4, gflop=100)
    floor = Row("GEMM, float32", 100.0, "GFLOP/s")
    table = report.table([make_report("vision", 2, vision), make_report("floor", 2, floor)])
    lines = table.splitlines()
    assert lines[0] == "2 threads:"
    assert lines[4].startswith("| GEMM, float32 | 100 GFLOP/s | - | - |")
    expected = "| vision | 2 s | 4 (peer) | **0.50** (0.50 to 0.50) | <= 0.4 | **no** | 50% |"
    assert lines[5] == expected
    assert "Machine: An Abacus, 2 cores (avx2); Python 3.12, torch 2.13.0." in table


def test_the_table_is_put_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.put_into(page, "new")
    assert page.read_text() == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="needs the marks"):
        report.put_into(page, "new")
    assert page.read_text() == "no marks"


def test_the_amount_of_work_of_the_full_design() -> None:
    """666 GFLOP a picture, 771 a prefill of 793; a step reads 600 M weights and the cache."""
    sizes = Sizes()
    assert vision_gflop(sizes.vision) == pytest.approx(666, abs=7)
    assert llm_gflop(sizes.llm, 793) == pytest.approx(735, abs=40)
    assert decode_gbyte(sizes.llm, 0, 4, 4) == pytest.approx(4 * 0.596, rel=0.01)
    assert decode_gbyte(sizes.llm, 793, 0, 2) == pytest.approx(793 * 28 * 2 * 1024 * 2 / 1e9)


def test_pointing_answers_are_split_as_by_qwen3() -> None:
    """The ids of Qwen/Qwen3-0.6B-Base for this text, as pieces."""
    tokenizer = lookup.qwen3_like()
    ids = tokenizer.encode_text('<points coords="1 1 210 455 10 012 999">dogs</points>')
    pieces = ["<", "points", " coords", '="', *"1 1 210 455 10 012 999", '">']
    assert [tokenizer.decode([id]) for id in ids] == [*pieces, "dogs", "</", "points", ">"]
    question = tokenizer.encode_text("Point to the dogs.")
    assert [tokenizer.decode([id]) for id in question] == ["Point", " to", " the", " dogs", "."]


def test_scripted_answers_are_points_and_nothing_else_is_allowed() -> None:
    tokenizer = lookup.qwen3_like()
    points = np.random.default_rng(0).integers(0, 1000, (20, 2))
    prompt, answer = lookup.conversation(Sizes(), tokenizer, "dogs", points)
    assert len(prompt) == Sizes().prompt
    found = parse_points(tokenizer.decode(answer[:-1]), [(1000, 1000)])
    assert [[p.x, p.y] for p in found] == sorted(points.tolist())
    assert {p.label for p in found} == {"dogs"}
    state = lookup.Script(answer).start()
    for id in answer:
        assert state.allowed().nonzero().flatten().tolist() == [id]
        state.advance(id)


@torch.no_grad()
def test_drafts_of_a_scripted_answer_are_checked_by_the_engine() -> None:
    """Same answer, fewer steps, where a step costs the same for any number of positions."""
    tokenizer = lookup.qwen3_like()
    points = np.random.default_rng(0).integers(0, 1000, (8, 2))
    prompt, answer = lookup.conversation(SHORT, tokenizer, "dogs", points)
    steps = {}
    for name, (on, guided) in lookup.SIDES.items():
        engine = Engine(language_model(SHORT), lookup=on)  # knows no earlier answer
        engine._costs = StepCosts({1: 1.0, 8: 1.0})
        engine._costs.record = lambda positions, seconds: None  # type: ignore[method-assign]
        count = 0

        def step(engine: Engine = engine) -> list[Event]:
            nonlocal count
            count += 1
            return Engine.step(engine)

        engine.step = step  # type: ignore[method-assign]
        lookup.seconds_behind_the_prompt(engine, prompt, answer, tokenizer, guided)
        steps[name] = count
    assert steps["plain"] == len(answer)
    # Six digits of about ten tokens a point are in nobody's draft.
    assert 0.4 * len(answer) < steps["lookup and grammar"] < 0.7 * len(answer)
    assert steps["lookup"] <= steps["plain"]


def test_int4_layers() -> None:
    """16 levels in a group of normal numbers: about 6 % off."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 256), torch.randn(4, 256)
    wanted = x @ weight.T
    error = (int4.Int4Linear(weight)(x) - wanted).norm() / wanted.norm()
    assert 0.03 < error < 0.1
    with torch.no_grad():
        assert len(int4.measure(SHORT)) == len(int4.POSITIONS)


@pytest.mark.parametrize("mode", ["float32", "int8"])
def test_the_profile_leaves_the_model_as_it_was(mode: str) -> None:
    model = language_model(SHORT)
    if mode != "float32":
        model = in_mode(model, mode)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        before = model(ids)
        with watched(model) as seconds:
            during = model(ids)
        assert torch.equal(before, during)
        assert torch.equal(before, model(ids))
    assert set(seconds) == set(PARTS)
    assert all(value > 0 for value in seconds.values())
    assert "forward" not in vars(model.layers[0].mlp.up_proj)


def test_bench_says_what_it_cannot_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cli.main(["bench", "--rows", "speed"]) == 2
    assert "no benchmark speed" in capsys.readouterr().err
    assert cli.main(["bench", "--threads", "0"]) == 2
    assert "must be 1 or more" in capsys.readouterr().err
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "nanomolmo2" / "cli" / "bench.py"))
    assert cli.main(["bench"]) == 1
    assert "not in the installed package" in capsys.readouterr().err
