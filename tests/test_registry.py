from __future__ import annotations

import pytest

from nanomolmo2.registry import Registry


def test_entries_are_found_when_they_are_asked_for() -> None:
    known: Registry[object] = Registry(here=len, there="collections:OrderedDict", wrong="no.such:x")
    assert list(known) == ["here", "there", "wrong"]  # nothing is imported for it
    assert "wrong" in known and "none" not in known and len(known) == 3
    from collections import OrderedDict

    assert known["here"] is len and known["there"] is OrderedDict
    with pytest.raises(ModuleNotFoundError):
        known["wrong"]
    with pytest.raises(KeyError):
        known["none"]
    known.register("none", "math:pi")
    assert known["none"] == pytest.approx(3.1416, abs=1e-4)
