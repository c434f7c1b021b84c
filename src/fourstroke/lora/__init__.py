"""LoRA and its relatives: read, inspect, merge exactly, undo exactly, train, write."""

from __future__ import annotations

from .adapter_set import AdapterSet
from .few_step import Settings, recommended
from .info import LoraInfo, inspect_lora
from .merge import merge_weight
from .pairs import AdapterWeights, Diff, Dora, LoHa, LoKr, LoraError, LoraPair
from .reading import read_lora
from .weights import Lora, save_lora

__all__ = [
    "AdapterSet",
    "AdapterWeights",
    "Diff",
    "Dora",
    "LoHa",
    "LoKr",
    "Lora",
    "LoraError",
    "LoraInfo",
    "LoraPair",
    "Settings",
    "inspect_lora",
    "merge_weight",
    "read_lora",
    "recommended",
    "save_lora",
]
