"""Where what was computed once is kept on disk."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Folder for one ``kind`` of things (``compile``, ``ranges``) in the user's cache: ``~/.cache/fourstroke/{kind}``.

    ``$XDG_CACHE_HOME`` takes the place of ``~/.cache``. The folder may be deleted at any time, and need not be there.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fourstroke" / kind
