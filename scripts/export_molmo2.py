"""Write a model in the layout of the released Molmo2 checkpoints.

    python scripts/export_molmo2.py runs/mine/model exported --max-shard-size 5GB

The same as ``nanomolmo2 export``.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanomolmo2.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
