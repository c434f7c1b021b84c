"""A training's state on disk: one file, from which it goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..loading import WeightError, open_tensors, save_tensors, write_json
from .student import Student

CHECKPOINT = "checkpoint.safetensors"
RECORD = "training.json"


@dataclass
class State:
    """All that changes in a training. Random numbers are drawn anew from seed and step, so none are kept.

    Attributes:
        step: steps done.
        seconds: time spent in them.
    """

    student: Student
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write the state and the ``settings`` it belongs to, atomically."""
        tensors, numbers = self.student.tensors(), {}
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{key}"] = value
                else:
                    numbers[f"{index}/{key}"] = value
        told = {"step": self.step, "seconds": self.seconds, "scaler": self.scaler.state_dict(), "optimizer": numbers}
        save_tensors(path, tensors, {"state": json.dumps(told), "settings": json.dumps(settings)})

    @torch.no_grad()
    def load(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Become the state in the file, which must have been written with the same ``settings``.

        Raises:
            ValueError: it was written with others; the message names them. Or it cannot be read.
        """
        check_settings(path, settings)
        file, header = _open(path)
        told = json.loads(header["state"])
        for name, tensor in self.student.tensors().items():
            tensor.copy_(file.get_tensor(name))
        state: dict[int, dict[str, Any]] = {}
        for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                index, key = rest.split("/")
                state.setdefault(int(index), {})[key] = file.get_tensor(name).clone()
        for place, value in told["optimizer"].items():
            index, key = place.split("/")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.scaler.load_state_dict(told["scaler"])
        self.step, self.seconds = told["step"], told["seconds"]


def check_settings(path: Path, settings: Mapping[str, Any], *, whole: bool = True) -> None:
    """Check that the checkpoint at ``path`` was written with these ``settings``, or, unless ``whole``, with more.

    Raises:
        ValueError: it was not; the message names what differs. Or it cannot be read.
    """
    _, header = _open(path)
    then, now = json.loads(header["settings"]), json.loads(json.dumps(settings))
    names = {**then, **now} if whole else now
    changed = [f"{n} was {then.get(n)!r} and is {now.get(n)!r}" for n in names if then.get(n) != now.get(n)]
    if changed:
        raise ValueError(
            f"{path} is of another training: {'; '.join(changed)}. Give the same to go on with it, or another output."
        )


def _open(path: Path) -> tuple[Any, Mapping[str, str]]:
    """The checkpoint and its header."""
    try:
        file = open_tensors(path)
    except WeightError as error:
        raise ValueError(f"{path} cannot be read; remove it to start anew, or choose another output.") from error
    header = file.metadata() or {}
    if "settings" not in header:
        raise ValueError(f"{path} is not a checkpoint of a training; choose another output.")
    return file, header


def claim(output: Path, record: Mapping[str, Any]) -> None:
    """Make the folder ``output`` this training's: write ``training.json``, which says what it does.

    Raises:
        ValueError: see `check_output`.
    """
    check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    for path in output.glob(f".{CHECKPOINT}.*"):  # of a run that was killed while it wrote
        path.unlink(missing_ok=True)
    write_json(output / RECORD, record)


def check_output(output: Path) -> None:
    """Check that a training may write into ``output``.

    Raises:
        ValueError: it is a file, or a folder with something else in it.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; give a folder.")
    if output.is_dir() and any(output.iterdir()) and not (output / RECORD).exists():
        raise ValueError(f"output {output} holds something else than a training ({RECORD}); give an empty folder.")
