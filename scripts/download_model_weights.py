"""Download the pretrained parts and convert them to ``checkpoints/``.

    python scripts/download_model_weights.py               # both, about 6 GB to download
    python scripts/download_model_weights.py --llm-only

``nanomolmo2 download`` does the same. HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT are
honoured; run it again after an interruption and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout, without install


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, download, and return the exit status."""
    parser = argparse.ArgumentParser(
        description="Download SigLIP 2 So400m/14 (4.5 GB, of which 1.6 GB are kept) and "
        "Qwen3-0.6B-Base (1.2 GB) from the Hugging Face hub and convert them: each to a .pt file "
        "and to a folder of the same size with safetensors."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--vision-only", action="store_true", help="only the vision encoder")
    which.add_argument("--llm-only", action="store_true", help="only the language model")
    parser.add_argument(
        "--force",
        action="store_true",
        help="convert again even where an intact file exists",
    )
    parser.add_argument(
        "--cache-dir",
        default="checkpoints",
        metavar="DIR",
        help="folder of the converted files (default: %(default)s)",
    )
    parser.add_argument(
        "--revision",
        metavar="REV",
        help="branch, tag or commit on the hub; only together with --vision-only or --llm-only "
        "(default: main)",
    )
    options = parser.parse_args(arguments)
    parts = (
        ["vision"] if options.vision_only else ["llm"] if options.llm_only else ["vision", "llm"]
    )

    from nanomolmo2.convert.hub import download  # after --help: it imports torch

    try:
        download(parts, options.cache_dir, force=options.force, revision=options.revision)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run it again and it goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
