"""Work on shared state by several threads that change places all the time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


def run_together(work: Callable[[int], None], count: int) -> list[BaseException]:
    """Call ``work`` with 0, 1, ... in a thread each; returns what they raised."""
    problems: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            problems.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    return problems
