"""``python -m nanomolmo2``, and the command ``nanomolmo2``."""

import atexit
import contextlib
import gc
import os
import sys

# What a person waits for again and again: these start and end without what only costs time.
QUICK = ("ask", "chat", "demo")


def main() -> int:
    """Run the command line; Ctrl-C while it is still being loaded ends it like any other."""
    codes: list[int] = []
    if sys.argv[1:2] and sys.argv[1] in QUICK:
        # What is imported stays: to look for garbage in it costs a tenth of the start.
        # cli/loading.py ends this when the model is there.
        gc.disable()
        atexit.register(end_at_once, codes)  # the first to be registered is the last to run
    try:
        from nanomolmo2.cli import main as run
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        os._exit(130)  # an interrupt inside an exec() would make Python end itself by the signal
    codes.append(run())
    return codes[0]


def end_at_once(codes: list[int]) -> None:
    """End the process with the code that `main` returned, if it did.

    Threads and whatever else runs at the end are through by then. Python would go on to take
    torch's modules apart one by one, which takes as long as an answer of `tiny`.
    """
    with contextlib.suppress(OSError, ValueError):  # Python says what is wrong with its streams
        sys.stdout.flush()
        sys.stderr.flush()
        if codes:
            os._exit(codes[0])


if __name__ == "__main__":
    raise SystemExit(main())
