"""From a name to files: hub repository, shipped model, or folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ZOO = Path(__file__).parent / "zoo"
ALIASES = {"emoji": "emoji/base"}
# In the folder of a shipped model: folder of a component -> the folder in the zoo whose files it is made of.
SHARED_NAME = "shared.json"
# The keywords that say how a repository is fetched; see `fetch`.
OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def shipped() -> list[str]:
    """The names of the models and adapters inside the package, such as ``emoji/base``."""
    return sorted(f"{path.parent.name}/{path.name}" for path in ZOO.glob("*/*") if path.is_dir())


def local_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder that ``name`` stands for without any network: an existing folder or a shipped model."""
    path = Path(name).expanduser()
    # An empty path would be the working folder, which nobody means.
    if str(name) and path.is_dir():
        return path
    full_name = ALIASES.get(str(name), str(name))
    return ZOO / full_name if full_name in shipped() else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not a JSON object; the message names it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(data).__name__}.")
    return data


def required(files: Iterable[str], *names: str) -> list[str]:
    """``names``, after a check that all of them are among ``files``.

    Raises:
        FileNotFoundError: one is not; the message names it.
    """
    have = set(files)
    for name in names:
        if name not in have:
            raise FileNotFoundError(f"there is no {name!r}; it holds: {', '.join(sorted(have)[:20]) or 'no files'}.")
    return list(names)


def fetch(
    name: str | os.PathLike[str],
    select: Callable[[list[str]], list[str]],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """A local folder that holds the files which ``select`` chooses from the list of all files of ``name``.

    A folder or a shipped model is used where it is. A hub repository is asked for its list of files, and what is not
    yet in huggingface_hub's cache is downloaded, with progress bars; without a network (or with ``local_files_only``
    or ``HF_HUB_OFFLINE=1``) the newest snapshot in the cache is used.

    Raises:
        FileNotFoundError: no such folder or repository, or not in the cache while offline, or ``select`` found a file
            missing. The message names ``name``.
    """
    folder = local_folder(name)
    if folder is None:
        _check_is_repository_id(name)
        options = {"revision": revision, "cache_dir": cache_dir}
        folder = None if local_files_only else _download(str(name), select, token, force_download, **options)
        folder = folder or _cached(str(name), **options)
    try:
        select(listing(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}") from None
    return folder


def listing(folder: Path) -> list[str]:
    """The files of a local folder and its subfolders, and of what it shares (see `part`), relative to it, in order."""
    own = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    shared = [f"{name}/{file}" for name, place in _shared(folder).items() for file in listing(place)]
    return sorted(own + shared)


def part(folder: Path, name: str) -> Path:
    """The folder of the component ``name`` of the model in ``folder``.

    Shipped models that have a component in common, as a fine-tuned model has its autoencoder in common with its base,
    share one copy of it. Everybody else's components lie inside ``folder``.
    """
    return _shared(folder).get(name.strip("/"), folder / name)


def _shared(folder: Path) -> dict[str, Path]:
    if ZOO not in folder.parents or not (folder / SHARED_NAME).is_file():
        return {}
    return {name: ZOO / place for name, place in read_json(folder / SHARED_NAME).items()}


def _check_is_repository_id(name: str | os.PathLike[str]) -> None:
    text = str(name)
    if isinstance(name, os.PathLike) or text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text:
        raise FileNotFoundError(
            f"{text!r} is neither a folder, nor a shipped model ({', '.join(shipped())}), nor a hub id of the form "
            "'owner/name'. Check the spelling."
        )


def _download(
    name: str, select: Callable[[list[str]], list[str]], token: str | bool | None, force: bool, **options
) -> Path | None:
    """The snapshot folder after downloading what is missing, or None when the hub cannot be reached."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        files = HfApi(token=token).list_repo_files(name, revision=options["revision"])
        wanted = select(files)
        return Path(snapshot_download(name, allow_patterns=wanted, token=token, force_download=force, **options))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"The hub has no repository {name!r} at revision {options['revision'] or 'main'!r} that you may read. "
            "Check the spelling, or pass token= when it is gated or private."
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}") from None
    except Exception as error:
        # huggingface_hub has changed its HTTP library more than once; only the names of these classes have stayed.
        if {"TransportError", "ConnectionError", "Timeout"} & {base.__name__ for base in type(error).__mro__}:
            return None
        raise


def _cached(name: str, *, revision: str | None, cache_dir: str | os.PathLike[str] | None) -> Path:
    """The snapshot of ``revision`` in huggingface_hub's cache, complete or not: `fetch` checks for what it needs.

    Its own lookup refuses a snapshot of which only some files were downloaded, and that is the usual kind.
    """
    from huggingface_hub import constants

    repository = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    if commit and (repository / "snapshots" / commit).is_dir():
        return repository / "snapshots" / commit
    raise FileNotFoundError(
        f"{name!r} is not in the cache and the hub cannot be reached. Go online once to download it, or give a "
        f"folder. Shipped models need no network: {', '.join(shipped())}."
    )
