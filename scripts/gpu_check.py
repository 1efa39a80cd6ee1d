"""Prove on a real GPU what the tests prove on CPUs: one command, at most 8 minutes, one GPU.

    python scripts/gpu_check.py                         # all sections; writes docs/gpu.md
    python scripts/gpu_check.py --device cpu --quick    # the same code at toy sizes on a CPU

Each section of benchmarks/gpu.py is a process of its own with a limit of time: one that fails,
hangs or takes the driver down is reported as failed, and the others go on. It needs the checkout
and the extra `dev`: the models it compares with are in transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "gpu.md"
# Name: seconds after which it is stopped on a GPU, and its heading.
SECTIONS: dict[str, tuple[float, str]] = {
    "parity": (80, "Parity with transformers"),
    "training": (60, "Training steps beside the CPU"),
    "sharding": (60, "Sharded training on one rank"),
    "generation": (90, "Generation beside transformers"),
    "memory": (75, "The memory plan beside the measured peak"),
    "flex": (65, "Block masks beside dense masks"),
    "waits": (45, "How often the host waits"),
}
assert sum(seconds for seconds, _ in SECTIONS.values()) <= 8 * 60 - 5


# ---- a section ----


def run_here(name: str, device: str, quick: bool, target: Path) -> None:
    """A section in this process; ``target`` gets its rows."""
    import importlib

    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    sections = importlib.import_module("benchmarks.gpu")
    rows = getattr(sections, name)(sections.Setting(device, quick))
    target.write_text(json.dumps([dataclasses.asdict(row) for row in rows]), encoding="utf-8")


def run_apart(name: str, device: str, quick: bool) -> dict[str, Any]:
    """A section in a process of its own: status, seconds, rows, error."""
    limit, title = SECTIONS[name]
    limit *= 1 if device == "cuda" else 4  # a CPU may have other work, and no 8 minutes to keep
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--only", name, "--device", device]
        command += ["--rows", str(target), *(["--quick"] * quick)]
        error = ""
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
            if done.returncode:
                error = _last_line(done.stderr) or f"the process ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            error = f"it took longer than its {limit:g} seconds and was stopped"
        rows = json.loads(target.read_text(encoding="utf-8")) if target.exists() else []
    for row in rows:  # a number that is none never holds
        row["holds"] = row["limit"] is None or row["found"] <= row["limit"]
    broken = [row for row in rows if not row["holds"]]
    if not error:
        error = "; ".join(f"{r['what']}: {r['found']:.3g}, above {r['limit']:g}" for r in broken)
    return {
        "name": name,
        "title": title,
        "status": "failed" if error else "passed",
        "error": error,
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
    }


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def describe_machine(device: str) -> dict[str, str]:
    import torch

    found = {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        found["cuda"] = str(torch.version.cuda)
    return found


# ---- the page ----

INTRODUCTION = """\
# On a GPU

The tests run on CPUs. One command proves on a real GPU what they prove there, in at most 8 minutes:

```bash no-run
python scripts/gpu_check.py
```

- **Parity**: decoder and vision encoder at full size beside transformers, in float32 (without TF32)
  and bfloat16; both designs beside the CPU.
- **Training**: the recipe `smoke` here and on the CPU; sharded with FSDP2 on one rank, stopped and
  resumed.
- **Generation**: greedy answers and their speed beside transformers, with random weights of
  Qwen3-0.6B's size.
- **Memory**: peaks of training steps beside what `nanomolmo2 plan` predicts.
- **Block masks**: compiled FlexAttention beside dense masks.
- **Waits**: how often the host waits for the GPU, as `torch.cuda.set_sync_debug_mode` tells it.

Each section runs in a process of its own within a time limit. The command writes this page and one
JSON, and its exit code is not 0 if a section fails.

Every command that loads a model takes a GPU by itself where there is one, and `--device` names
another place: [cli.md](cli.md#where-it-computes).

`--device cpu --quick` runs the same code at toy sizes on a CPU, and so does a test. The tests also
run the model on a simulated device, which refuses to mix devices as CUDA does and counts host
synchronisations (`tests/device/simulated.py`).
"""
NOT_RUN = """
**It was not run on a GPU yet: none was at hand.** So this page has no results.
"""


def page(result: dict[str, Any] | None) -> str:
    """The page of a result; None = it was not run."""
    if result is None:
        return INTRODUCTION + NOT_RUN
    machine = result["machine"]
    where = machine.get("gpu", "no GPU but a CPU")
    sizes = ", at toy sizes, which show that the script works and nothing more"
    lines = [
        INTRODUCTION,
        f"Run on {where}{sizes if result['quick'] else ''}: PyTorch {machine['torch']}, CUDA "
        f"{machine.get('cuda', 'none')}, Python {machine['python']}, {result['seconds']:.0f} s.",
    ]
    for section in result["sections"]:
        lines += ["", f"## {section['title']}", ""]
        if section["error"]:
            lines += [f"**Failed**: {section['error']}", ""]
        if section["rows"]:
            lines += ["| what | found | at most |", "|---|---|---|"]
        for row in section["rows"]:
            limit = "" if row["limit"] is None else f"{row['limit']:g}"
            mark = "" if row["holds"] else " **too much**"
            lines.append(f"| {row['what']} | {row['found']:.4g} {row['unit']}{mark} | {limit} |")
    return "\n".join(lines) + "\n"


# ---- the command ----


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prove on a real GPU what the tests prove on CPUs, in at most 8 minutes."
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="by default cuda, which must be there"
    )
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes: shows that the script works"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        metavar="SECTION",
        help=f"sections to run, of {', '.join(SECTIONS)}; by default all",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("gpu_check.json"), help="where to (default: %(default)s)"
    )
    parser.add_argument(
        "--page", type=Path, help="where to; by default docs/gpu.md, but only after a whole run"
    )
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # one section, right here
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            "error: there is no CUDA GPU here: run this on a machine with one, or with "
            "--device cpu --quick to try the script",
            file=sys.stderr,
        )
        return 2
    device, names = options.device or "cuda", options.only or list(SECTIONS)
    if options.rows is not None:
        run_here(names[0], device, options.quick, options.rows)
        return 0
    start, sections = time.monotonic(), []
    for name in names:
        section = run_apart(name, device, options.quick)
        sections.append(section)
        what = f"{name}: {section['status']} in {section['seconds']:.0f} s"
        print(f"{what}: {section['error']}" if section["error"] else what, flush=True)
    result = {
        "machine": describe_machine(device),
        "quick": options.quick,
        "seconds": round(time.monotonic() - start, 1),
        "sections": sections,
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    is_whole = device == "cuda" and not options.quick and not options.only
    target = options.page or (PAGE if is_whole else None)
    if target is not None:
        target.write_text(page(result), encoding="utf-8")
    print(f"written: {', '.join(str(path) for path in (options.json, target) if path)}")
    return int(any(section["error"] for section in sections))


if __name__ == "__main__":
    sys.exit(main())
