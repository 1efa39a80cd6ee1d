"""Options and marks common to all tests."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# The same inputs in every run: what passed here passes elsewhere. `make soak` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

ON_REQUEST = {
    "weights": "needs the real checkpoints: run with --weights",
    "network": "needs the Hugging Face hub: run with --network",
}
# `make test` gives whole files to its processes (--dist loadfile). The longest ones start first, so
# that none of them is left to one process at the end. Others follow in their order.
LONGEST = (
    *(
        "test_hostile.py",
        "test_distributed.py",
        "test_benchmarks.py",
        "test_quantization.py",
        "test_ablations.py",
    ),
    *("test_trainer.py", "test_readme.py", "test_tiny.py", "test_engine.py", "test_exam.py"),
    *("test_plan.py", "test_sampling.py", "test_cli.py", "test_constraint.py", "test_loop.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    for mark, reason in ON_REQUEST.items():
        parser.addoption(f"--{mark}", action="store_true", help=f"also run what {reason}")


def pytest_configure() -> None:
    # The tests are of the CPU and of a simulated device: what chooses a device finds no GPU.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    # A shell's background jobs ignore Ctrl-C, and so would those of the tests that try it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark, reason in ON_REQUEST.items():
        if not config.getoption(f"--{mark}"):
            for item in items:
                if item.get_closest_marker(mark):  # keywords would match parameter ids too
                    item.add_marker(pytest.mark.skip(reason=reason))
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))  # stable
