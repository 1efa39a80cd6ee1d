"""A process that judges inputs: names in, a line of JSON for each out. It is expected to die."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

SPARE = 4 << 30  # bytes that an input may ask for beyond what the process has


def main() -> None:
    # What libraries print does not mix with what is reported.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.enable()
    import torch

    from tests.robustness.judge import Surroundings, judge

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="soak-") as root:
        around = Surroundings(Path(root).resolve())
        os.chdir(around.root)
        limited = False
        for line in sys.stdin:
            name = json.loads(line)
            if not limited and not name.startswith(("kills", "threads")):
                limited = True
                with open("/proc/self/statm", encoding="ascii") as stream:
                    pages = int(stream.read().split()[0])
                most = pages * resource.getpagesize() + SPARE
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            outcome = judge(name, around)
            answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
