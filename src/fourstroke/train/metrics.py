"""The figures of a training, one row a step, as a table or for TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import PIL.Image

from ..loading import write_atomically


class Row(NamedTuple):
    """Of one step: its number (from 1), loss, learning rate, steps a second, and seconds since the start."""

    step: int
    loss: float
    learning_rate: float
    steps_per_second: float
    seconds: float


class Log(Protocol):
    """Where rows and sample pictures go."""

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows; they are on disk when this returns."""

    def picture(self, step: int, image: PIL.Image.Image) -> None:
        """Add sample pictures."""

    def close(self) -> None:
        """No more comes."""


class CsvLog:
    """Rows in the file ``metrics.csv``; those past ``step``, where a resumed run goes on, are cut off."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.csv"
        kept = self._read(step) if step else []
        write_atomically(self.path, lambda path: self._fill(path, kept))

    def _read(self, step: int) -> list[list[str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        return [row for row in rows if len(row) == len(Row._fields) and row[0].isdecimal() and int(row[0]) <= step]

    @staticmethod
    def _fill(path: Path, rows: list[list[str]]) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(Row._fields), *rows])

    def write(self, rows: Sequence[Row]) -> None:
        """See `Log`."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [row.step, f"{row.loss:.6g}", f"{row.learning_rate:.6g}", f"{row.steps_per_second:.4g}",
                 f"{row.seconds:.1f}"] for row in rows
            )  # fmt: skip

    def picture(self, step: int, image: PIL.Image.Image) -> None:
        """Nothing: pictures are files of their own."""

    def close(self) -> None:
        """Nothing is open."""


class BoardLog:
    """Rows and pictures in TensorBoard's event files in ``folder``; those past ``step`` are hidden by a mark."""

    def __init__(self, folder: Path, step: int):
        self._writer: Any = summary_writer()(str(folder), purge_step=step + 1 if step else None)

    def write(self, rows: Sequence[Row]) -> None:
        """See `Log`."""
        for row in rows:
            for name in ("loss", "learning_rate", "steps_per_second"):
                self._writer.add_scalar(name, getattr(row, name), row.step)
        self._writer.flush()

    def picture(self, step: int, image: PIL.Image.Image) -> None:
        """See `Log`."""
        import numpy as np

        self._writer.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """See `Log`."""
        self._writer.close()


def summary_writer() -> Any:
    """TensorBoard's writer.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("log tensorboard needs TensorBoard: pip install 'fourstroke[train]'.") from error
    return SummaryWriter


def open_log(kind: str, folder: Path, step: int) -> Log:
    """The log of a run in ``folder`` that goes on after ``step``; ``kind`` is ``csv`` or ``tensorboard``."""
    return BoardLog(folder, step) if kind == "tensorboard" else CsvLog(folder, step)
