"""``python -m nanomolmo2``, and the command ``nanomolmo2``."""

import os
import sys


def main() -> int:
    """Run the command line; Ctrl-C while it is still being loaded ends it like any other."""
    try:
        from nanomolmo2.cli import main as run
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        os._exit(130)  # an interrupt inside an exec() would make Python end itself by the signal
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
