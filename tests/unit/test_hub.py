"""From a name to files: shipped models, folders, huggingface_hub's cache; the network is only ever simulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx

from fourstroke import hub

SHA, OLD_SHA = "a" * 40, "b" * 40


def everything(files: list[str]) -> list[str]:
    return files


def add_to_cache(cache: Path, name: str, files: dict[str, str], *, sha: str = SHA, ref: str = "main") -> Path:
    """A repository in the layout of huggingface_hub's cache: refs, and a snapshot of links to blobs."""
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / sha
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(sha)
    (root / "blobs").mkdir(exist_ok=True)
    for i, (path, text) in enumerate(files.items()):
        blob, link = root / "blobs" / f"{sha}{i}", snapshot / path
        blob.write_text(text)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "zoo"
    for name in ("emoji/base", "emoji/lcm-lora"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    (root / "README.md").write_text("not a model")
    monkeypatch.setattr(hub, "ZOO", root)
    return root


# Shipped models and folders


def test_shipped_names(zoo: Path) -> None:
    assert hub.shipped() == ["emoji/base", "emoji/lcm-lora"]
    assert hub.local_folder("emoji/base") == zoo / "emoji" / "base"
    assert hub.fetch("emoji/lcm-lora", everything) == zoo / "emoji" / "lcm-lora"


def test_a_shipped_model_shares_the_folder_of_a_component(zoo: Path) -> None:
    blob, vae = zoo / "emoji" / "blob", zoo / "emoji" / "base" / "vae"
    for folder in (blob / "unet", vae):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (blob / hub.SHARED_NAME).write_text('{"vae": "emoji/base/vae"}')
    assert hub.fetch("emoji/blob", lambda files: hub.required(files, "vae/config.json", "unet/config.json")) == blob
    assert [hub.part(blob, name) for name in ("vae", "vae/", "unet")] == [vae, vae, blob / "unet"]


def test_only_a_shipped_model_shares(tmp_path: Path) -> None:
    (tmp_path / hub.SHARED_NAME).write_text('{"vae": "emoji/base/vae"}')
    assert hub.part(tmp_path, "vae") == tmp_path / "vae"
    assert hub.listing(tmp_path) == [hub.SHARED_NAME]


def test_alias(zoo: Path) -> None:
    assert hub.local_folder("emoji") == zoo / "emoji" / "base"


@pytest.mark.parametrize(
    "name",
    [
        "emoji/wings",
        "other/base",
        "",
        "../zoo/emoji",
        "emoji/../../zoo",
    ],
)
def test_no_shipped_model_of_that_name(zoo: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "deeper")
    assert hub.local_folder(name) is None


def test_a_folder_comes_before_a_shipped_model(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "work" / "emoji" / "base"
    mine.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert hub.local_folder("emoji/base") == Path("emoji/base")
    assert hub.local_folder(mine) == mine


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.local_folder("~/model") == tmp_path / "model"


@pytest.mark.parametrize("name", ["just-a-word", "./missing", "/missing/folder", "a/b/c", "a\\b", Path("a/b")])
def test_what_is_no_name_at_all_is_explained(zoo: Path, name: str | Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        hub.fetch(name, everything)
    message = str(caught.value)
    assert repr(str(name)) in message, "the value"
    assert "neither a folder, nor a shipped model (emoji/base, emoji/lcm-lora), nor a hub id" in message, "the rule"
    assert "Check the spelling" in message, "the mend"


def test_file_missing_in_a_folder_is_named(zoo: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"emoji/base: there is no 'model.safetensors'; it holds: config.json"):
        hub.fetch("emoji/base", lambda files: hub.required(files, "model.safetensors"))


def test_required() -> None:
    assert hub.required(["a", "b"], "b", "a") == ["b", "a"]
    with pytest.raises(FileNotFoundError, match="there is no 'c'; it holds: no files"):
        hub.required([], "c")


# The cache


def test_newest_snapshot_of_the_cache(tmp_path: Path) -> None:
    add_to_cache(tmp_path, "owner/name", {"config.json": "old"}, sha=OLD_SHA, ref="v1")
    snapshot = add_to_cache(tmp_path, "owner/name", {"config.json": "new", "unet/model.safetensors": "x"})
    seen: list[list[str]] = []

    def select(files: list[str]) -> list[str]:
        seen.append(files)
        return files

    for options in ({}, {"local_files_only": True}, {"revision": "main"}, {"revision": SHA}):
        assert hub.fetch("owner/name", select, cache_dir=tmp_path, **options) == snapshot
    assert seen == [["config.json", "unet/model.safetensors"]] * 4
    old = hub.fetch("owner/name", everything, cache_dir=tmp_path, revision="v1")
    assert (old / "config.json").read_text() == "old"


def test_not_in_the_cache_while_offline(tmp_path: Path, zoo: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        hub.fetch("owner/name", everything, cache_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith("'owner/name' is not in the cache and the hub cannot be reached")
    assert "Go online once to download it" in message and "emoji/base" in message


def test_incomplete_cache_names_the_file(tmp_path: Path) -> None:
    add_to_cache(tmp_path, "owner/name", {"config.json": "{}"})
    with pytest.raises(FileNotFoundError, match="owner/name: there is no 'unet/config.json'"):
        hub.fetch("owner/name", lambda files: hub.required(files, "unet/config.json"), cache_dir=tmp_path)


# The network, simulated


class FakeHub:
    """Stands for the hub: lists files, and "downloads" by writing the chosen ones into the cache."""

    def __init__(self, cache: Path, files: list[str]):
        self.cache, self.files = cache, files
        self.downloads: list[dict[str, Any]] = []
        self.tokens: list[Any] = []
        self.error: Exception | None = None

    def list_repo_files(self, _name: str, *, revision: str | None = None) -> list[str]:
        if self.error is not None:
            raise self.error
        return self.files

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.downloads.append({"name": name, **options})
        return str(add_to_cache(self.cache, name, dict.fromkeys(options["allow_patterns"], "")))


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path, ["config.json", "model.safetensors", "huge.ckpt"])

    def api(token: Any = None) -> FakeHub:
        fake.tokens.append(token)
        return fake

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    real = huggingface_hub.snapshot_download

    def download(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return real(name, **options)
        return fake.snapshot_download(name, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fake


def no_ckpt(files: list[str]) -> list[str]:
    return [name for name in files if not name.endswith(".ckpt")]


def test_only_the_chosen_files_are_downloaded(online: FakeHub, tmp_path: Path) -> None:
    folder = hub.fetch("owner/name", no_ckpt, revision="v2", token="secret", cache_dir=tmp_path, force_download=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    [download] = online.downloads
    assert download["allow_patterns"] == ["config.json", "model.safetensors"]
    assert (download["revision"], download["cache_dir"], download["force_download"]) == ("v2", tmp_path, True)
    assert download["token"] == "secret" and online.tokens == ["secret"]


def test_local_files_only_asks_nobody(online: FakeHub, tmp_path: Path) -> None:
    snapshot = add_to_cache(tmp_path, "owner/name", {"config.json": "{}"})
    online.error = AssertionError("the network was used")
    assert hub.fetch("owner/name", everything, cache_dir=tmp_path, local_files_only=True) == snapshot


def response(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/owner/name"))


@pytest.mark.parametrize("error", [RepositoryNotFoundError, RevisionNotFoundError])
def test_unknown_repository(online: FakeHub, tmp_path: Path, error: Callable[..., Exception]) -> None:
    online.error = error("no", response=response(404))
    with pytest.raises(FileNotFoundError) as caught:
        hub.fetch("owner/nmae", everything, revision="v2", cache_dir=tmp_path)
    message = str(caught.value)
    assert "no repository 'owner/nmae' at revision 'v2'" in message
    assert "Check the spelling, or pass token= when it is gated or private" in message


def test_file_missing_on_the_hub(online: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="owner/name: there is no 'unet/config.json'; it holds: config.json"):
        hub.fetch("owner/name", lambda files: hub.required(files, "unet/config.json"), cache_dir=tmp_path)
    assert online.downloads == []


@pytest.mark.parametrize("error", [httpx.ConnectError("no route"), httpx.ReadTimeout("slow"), ConnectionError("reset")])
def test_unreachable_hub_falls_back_to_the_cache(online: FakeHub, tmp_path: Path, error: Exception) -> None:
    online.error = error
    with pytest.raises(FileNotFoundError, match="not in the cache and the hub cannot be reached"):
        hub.fetch("owner/name", everything, cache_dir=tmp_path)
    snapshot = add_to_cache(tmp_path, "owner/name", {"config.json": "{}"})
    assert hub.fetch("owner/name", everything, cache_dir=tmp_path) == snapshot


def test_a_partial_download_is_found_again_offline(tmp_path: Path) -> None:
    """huggingface_hub notes all files of the repository beside a snapshot; we download only those that are needed."""
    snapshot = add_to_cache(tmp_path, "owner/name", {"config.json": "{}", "model.safetensors": ""})
    names = ["config.json", "model.safetensors", "huge.ckpt"]
    write_tree(tmp_path / "models--owner--name", names)
    assert hub.fetch("owner/name", no_ckpt, cache_dir=tmp_path, local_files_only=True) == snapshot


def write_tree(storage: Path, names: list[str]) -> None:
    """The list of all files that huggingface_hub 2 keeps with a snapshot, written by huggingface_hub itself."""
    tree_cache = pytest.importorskip("huggingface_hub._tree_cache")
    entry = tree_cache.TreeCacheEntry
    entries = {name: entry(size=2, blob_id="c" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None) for name in names}
    tree_cache.write_tree_cache(str(storage), SHA, entries)
