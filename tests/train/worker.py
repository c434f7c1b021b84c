"""A training in a process of its own: ``python -m tests.train.worker DATA OUTPUT OPTIONS [killed]``."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fourstroke.train import DistillOptions, distill

from ..unit import tiny


def killed_in_the_second_checkpoint() -> None:
    """Let the process end by signal 9 when half of the second checkpoint is written."""
    import safetensors.torch

    original, calls = safetensors.torch.save_file, []

    def save_file(tensors: Any, path: Any, metadata: Any = None) -> None:
        if "checkpoint" in Path(path).name:
            calls.append(path)
        if len(calls) < 2:
            original(tensors, path, metadata)
            return
        Path(path).write_bytes(b"\0" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = save_file


def main(data: str, output: str, options: str, *kill: str) -> None:
    torch.set_num_threads(1)
    if kill:
        killed_in_the_second_checkpoint()
    distill(tiny.sd(), data, output, DistillOptions(**json.loads(options)), lambda *_: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
