"""Loading a converted checkpoint that the system has just read: seconds, and the peak of memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Row, Sizes, main, random_weights
from nanomolmo2.convert.parts import build_on_meta
from nanomolmo2.models import NanoMolmo2, NanoMolmo2Config

# A process of its own, whose peak is that of the load. Mapped pages count when they are read.
PROGRAM = """
import json, sys, time
from nanomolmo2.models import NanoMolmo2

def peak():  # getrusage would tell the peak of the process that started this one
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before, start = peak(), time.perf_counter()
model = NanoMolmo2.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - start
for parameter in model.parameters():
    parameter.detach().view(-1)[::512].sum()
size = sum(p.nbytes for p in model.parameters())
print(json.dumps([seconds, (peak() - before) / size]))
"""


def measure(sizes: Sizes) -> list[Row]:
    config = NanoMolmo2Config(
        vision_config=sizes.vision,
        llm_config=sizes.llm,
        image_token_id=min(151655, sizes.llm.vocab_size - 1),
    )
    with tempfile.TemporaryDirectory() as folder:
        model = random_weights(build_on_meta(NanoMolmo2, config))
        assert isinstance(model, NanoMolmo2)
        size = sum(p.nbytes for p in model.parameters()) / 1e9
        model.save_pretrained(Path(folder) / "model")
        del model
        command = [sys.executable, "-c", PROGRAM, str(Path(folder) / "model")]
        found = []
        for _ in range(sizes.rounds + 1):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout))
    seconds = sorted(s for s, _ in found[1:])
    peak = sorted(p for _, p in found[1:])
    middle = len(seconds) // 2
    name = f"load of a float32 checkpoint ({size:.1f} GB)"
    return [
        Row(name, seconds[middle], "s", low=seconds[0], high=seconds[-1], target=3.0),
        Row(
            f"{name}: peak",
            peak[middle],
            "x weights",
            low=peak[0],
            high=peak[-1],
            target=1.2,
        ),
    ]


if __name__ == "__main__":
    main("load", measure)
