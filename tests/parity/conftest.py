"""The fake hub, built once a run, and a quiet peer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import filelock
import pytest
from huggingface_hub import constants

from .. import fakehub
from .combinations import Pipelines
from .pictures import TEXTS, load


@pytest.fixture(scope="session")
def hubs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, Path]:
    """One cache a published form, built once for all test processes."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    caches = {form: root / f"fakehub-{form}" for form in fakehub.FORMS}
    with filelock.FileLock(root / "fakehub.lock"):
        if not (root / "fakehub-done").exists():
            fakehub.build(caches, TEXTS)
            (root / "fakehub-done").touch()
    return caches


@pytest.fixture(scope="session")
def pipelines() -> Pipelines:
    """Both libraries' pipelines, each loaded once; tests leave them as they are."""
    return Pipelines()


@pytest.fixture(scope="session")
def loaded() -> Callable[..., Any]:
    """`load`, each pipeline once; tests leave them as they are."""
    return functools.cache(load)


@pytest.fixture
def peer_without_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress bars and log lines; and the peer finds a LoRA's only file offline, as it does online."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()

    def only_file(name: str, file_extension: str = ".safetensors", **_: Any) -> str:
        [path] = fakehub.snapshot(Path(constants.HF_HUB_CACHE), name).glob(f"*{file_extension}")
        return path.name

    monkeypatch.setattr("diffusers.loaders.lora_base._best_guess_weight_name", only_file)


@pytest.fixture(params=fakehub.FORMS)
def form(request: pytest.FixtureRequest, hubs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub in one of the published forms; tests that do not ask for it run in the old one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hubs[request.param]))
    return request.param


@pytest.fixture
def hub(hubs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub in its old form."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hubs["old"]))
    return hubs["old"]
