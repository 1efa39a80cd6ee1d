"""Train the bundled model from nothing: the same as ``nanomolmo2 train tiny``.

    python scripts/train_tiny_model.py --out runs/tiny

Works from a checkout. ``--resume`` goes on where a run was stopped; the same seed on the same kind
of machine gives the same model.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nanomolmo2.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", "tiny", *sys.argv[1:]]))
