"""Hostile inputs by the hundred thousand: ``python -m tests.robustness`` (`make soak`).

python -m tests.robustness                       all of them, in order
python -m tests.robustness --inputs 2000         a share of every kind
python -m tests.robustness --first 73000         go on from a number, as the progress shows it
python -m tests.robustness pictures texts        some kinds
python -m tests.robustness --only records:1:17   one input by its name, with all that is known
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.robustness.judge import KINDS, Outcome
from tests.robustness.workers import run_inputs

COUNTS = {
    "pictures": 60_000,
    "videos": 40_000,
    "checkpoints": 20_000,
    "texts": 60_000,
    "records": 20_000,
    "commands": 2_000,
    "kills": 50,
    "threads": 8,
}


def share(kind: str, inputs: int) -> int:
    """How many of a kind, of so many in all."""
    return max(1, round(COUNTS[kind] * inputs / sum(COUNTS.values())))


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """A row for each kind."""
    rows = [("kind", "inputs", "results", "refusals", "findings", "slowest s", "most MB")]
    for kind, some in outcomes.items():
        found = [outcome for outcome in some if outcome.problems]
        refused = [outcome for outcome in some if outcome.refused and not outcome.problems]
        slowest = max((outcome.seconds for outcome in some), default=0)
        most = max((outcome.megabytes for outcome in some), default=0)
        good = len(some) - len(refused) - len(found)
        numbers = (f"{len(some):,}", f"{good:,}", f"{len(refused):,}", f"{len(found):,}")
        rows.append((kind, *numbers, f"{slowest:.2f}", f"{most:,.0f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def names(kinds: list[str], inputs: int, seed: int, first: int) -> Iterator[str]:
    """Of all inputs behind the first so many."""
    number = 0
    for kind in kinds:
        for i in range(share(kind, inputs)):
            number += 1
            if number > first:
                yield f"{kind}:{seed}:{i}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness")
    parser.add_argument("kinds", nargs="*", help=", ".join(KINDS))
    parser.add_argument("--inputs", type=int, default=sum(COUNTS.values()), help="of all kinds")
    parser.add_argument("--first", type=int, default=0, help="inputs to pass over")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log", type=Path, help="file to add the findings to")
    parser.add_argument("--only", nargs="+", default=[], help="names of inputs")
    options = parser.parse_args()
    kinds = options.kinds or list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"unknown {', '.join(unknown)}: choose from {', '.join(KINDS)}")
    total = sum(share(kind, options.inputs) for kind in kinds)
    todo = iter(options.only) or names(kinds, options.inputs, options.seed, options.first)
    if not options.only:
        todo = names(kinds, options.inputs, options.seed, options.first)
    found: dict[str, list[Outcome]] = {}
    seen: Counter[str] = Counter()
    start = last = time.monotonic()
    done = options.first
    for outcome in run_inputs(todo, 1 if options.only else options.workers):
        found.setdefault(outcome.name.partition(":")[0], []).append(outcome)
        done += 1
        if options.only:
            print(outcome, flush=True)
        for problem in outcome.problems:
            line = f"{outcome.name}  [{outcome.what}]  {problem}"
            if options.log is not None:
                with options.log.open("a", encoding="utf-8") as stream:
                    stream.write(ascii(line)[1:-1] + "\n")
            cause = re.sub(r"\S*[/\d]\S*", "", problem)[:60]
            seen[cause] += 1
            if seen[cause] <= 3:
                print(ascii(line)[1:-1], flush=True)
        if time.monotonic() - last > 60:
            last = time.monotonic()
            print(f"{done:,} of {total:,} inputs, {(last - start) / 60:.0f} min", file=sys.stderr)
    print(table(found))
    print(f"{time.monotonic() - start:.0f} s")
    return int(any(outcome.problems for some in found.values() for outcome in some))


if __name__ == "__main__":
    sys.exit(main())
