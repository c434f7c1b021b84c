"""``python -m fourstroke.cli`` is ``fourstroke``."""

from __future__ import annotations

from . import app

app(prog_name="fourstroke")
