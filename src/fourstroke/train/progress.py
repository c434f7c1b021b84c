"""Progress bars for whoever trains from Python, as the pipelines have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Bars:
    """One of tqdm's bars for each thing that is done, with its rate and the time left; see `options.Progress`."""

    def __init__(self, **options: Any):
        self._options = options
        self._bar: Any = None
        self._what = ""

    def __call__(self, what: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        """Show that ``done`` of ``total`` is done."""
        if self._bar is None or self._what != what or self._bar.total != total:
            from tqdm.auto import tqdm

            self.close()
            self._bar = tqdm(total=total, initial=done, desc=what, **self._options)
            self._what = what
        if figures and "loss" in figures:
            self._bar.set_postfix(loss=f"{figures['loss']:.4g}", refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
