"""A few steps of finding by example on several processes: what `test_find.py` starts.

``torchrun ... -m tests.things.find_ranks FOLDER`` leaves the weights of every rank.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from nanomolmo2.things.find_model import FindModel
from nanomolmo2.things.find_stage import FindPlan, FindStage
from nanomolmo2.things.train import SCALES
from nanomolmo2.training.distributed import World
from nanomolmo2.training.loop import LoopConfig, run

PLAN: FindPlan = replace(
    SCALES["smoke"][1], kinds="wte", steps=3, pictures=2, emoji=2, warmup_steps=0, scored=0
)
CONFIG = LoopConfig(workers=0, quiet=True)


def stage_of(find: FindModel, world: World) -> FindStage:
    return FindStage(find, 0, PLAN, world)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with World.from_env("cpu") as world:
        find = FindModel(0)
        assert run(find, [stage_of(find, world)], folder / "run", CONFIG, world=world)
        torch.save(find.state_dict(), folder / f"rank-{world.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
