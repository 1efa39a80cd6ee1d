"""A saved model for tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_model import small_model, small_processor


@pytest.fixture(scope="session")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights, which never comes to an end."""
    folder = tmp_path_factory.mktemp("babbler") / "model"
    small_model().save_pretrained(folder, processor=small_processor())
    return folder
