"""The model on a simulated device: see tests/device/simulated.py.

Torch takes one such device a process and for good, so every file of checks runs in a process of its
own. One check alone:

    python -m pytest tests/device/checks_training.py -k waits
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "checks", sorted(p.stem for p in Path(__file__).parent.glob("device/checks_*.py"))
)
def test_on_the_simulated_device(checks: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-rx",
            f"tests/device/{checks}.py",
        ],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
