"""A hub of tiny repositories under published names, built once a test process."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import tinyhub


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the hub's ``cache`` and a ``model``."""
    root = tmp_path_factory.mktemp("tinyhub")
    tinyhub.build(root / "cache", root / "model")
    return root


@pytest.fixture
def sd15(built: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model of SD 1.5's shape, and what its short names stand for in the hub's cache; 32x32 pixels."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(built / "cache"))
    return str(built / "model")
