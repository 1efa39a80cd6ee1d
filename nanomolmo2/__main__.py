"""``python -m nanomolmo2``: the same as the command ``nanomolmo2``."""

from nanomolmo2.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
