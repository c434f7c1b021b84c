"""Training: distil an LCM-LoRA of a model, or train a LoRA on pictures.

The public names are imported when they are first used; `distill` and `train_lora` are the ways in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> module that has it.
_EXPORTS = {
    "DataError": "data",
    "DataOptions": "data",
    "DistillOptions": "options",
    "LoraOptions": "options",
    "distill": "distillation",
    "train_lora": "lora",
}

__all__ = [*_EXPORTS]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .data import DataError as DataError
    from .data import DataOptions as DataOptions
    from .distillation import distill as distill
    from .lora import train_lora as train_lora
    from .options import DistillOptions as DistillOptions
    from .options import LoraOptions as LoraOptions


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
