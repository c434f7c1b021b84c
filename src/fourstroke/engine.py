"""The engine: one pipeline, ready for few-step requests."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import hub
from .denoise import DenoiseState
from .pipelines.pipeline import DiffusionPipeline
from .request import GenerateRequest, GenerateResult
from .schedulers import LCMScheduler

# Shipped models and the LCM-LoRA that was distilled for them.
LCM_LORAS = {"emoji": "emoji/lcm-lora", "emoji/base": "emoji/lcm-lora"}
MAX_SEED = 2**32


def parse_lora(text: str) -> tuple[str, float]:
    """Split ``name:weight`` (``style.safetensors:0.8``); the weight is 1 when there is none.

    Raises:
        ValueError: what stands behind the colon is not a number.
    """
    name, colon, weight = text.rpartition(":")
    # A colon in a Windows path or a URL is followed by a slash, not by a weight.
    if not colon or weight[:1] in ("/", "\\"):
        return text, 1.0
    try:
        return name, float(weight)
    except ValueError:
        raise ValueError(f"LoRA {text!r}: {weight!r} is not a number; write NAME:WEIGHT, such as {name}:0.8.") from None


class Engine:
    """A pipeline set up for few steps: LCM scheduler, the LCM-LoRA that fits, and style LoRAs.

    Args:
        model: hub id, shipped name, folder or single-file checkpoint.
        loras: LoRAs as ``name`` or ``name:weight``; for a shipped model its LCM-LoRA is added in front of them unless
            ``lcm`` is False.
        lcm: use the LCM scheduler (and, where it is known, the LCM-LoRA).
        device: default the GPU if there is one.
        dtype: default float16 on a GPU and float32 on the CPU.
        options: further arguments of `DiffusionPipeline.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: see `DiffusionPipeline.from_pretrained` and ``load_lora_weights``.
    """

    def __init__(
        self,
        model: str = "emoji",
        *,
        loras: Sequence[str] = (),
        lcm: bool = True,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        wanted = [parse_lora(text) for text in loras]
        if lcm and model in LCM_LORAS and LCM_LORAS[model] not in [name for name, _ in wanted]:
            wanted.insert(0, (LCM_LORAS[model], 1.0))
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        self.model = model
        self.pipeline = load_pipeline(model, torch_dtype=dtype, **options).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        if lcm:
            self.pipeline.scheduler = LCMScheduler.from_config(self.pipeline.scheduler.config)
        self.loras = wanted
        where = {name: options[name] for name in hub.OPTIONS if name in options}
        for i, (name, _) in enumerate(wanted):
            self.pipeline.load_lora_weights(name, adapter_name=f"lora_{i}", **where)
        if wanted:
            self.pipeline.set_adapters([f"lora_{i}" for i in range(len(wanted))], [weight for _, weight in wanted])

    def generate(
        self,
        request: GenerateRequest | str,
        *,
        on_step: Callable[[DenoiseState], None] | None = None,
        **fields: Any,
    ) -> GenerateResult:
        """Paint one request.

        Args:
            request: a `GenerateRequest`, or a prompt and the request's other fields as keywords.
            on_step: called after each step.

        Returns:
            The pictures; picture i has the seed ``seed + i`` and depends on nothing else of its batch.

        Raises:
            ValueError, TypeError: the request breaks a rule; nothing has run by then.
        """
        if isinstance(request, GenerateRequest):
            request = dataclasses.replace(request, **fields)
        else:
            request = GenerateRequest(prompt=request, **fields)
        if request.seed is None and request.generator is None:
            request = dataclasses.replace(request, seed=secrets.randbelow(MAX_SEED))
        return self.pipeline.generate(request, on_step=on_step)


def load_pipeline(model: str, **options: Any) -> DiffusionPipeline:
    """Load ``model``: a single file by its suffix, anything else as `DiffusionPipeline.from_pretrained` does."""
    if model.endswith(".safetensors"):
        return DiffusionPipeline.from_single_file(model, **options)
    return DiffusionPipeline.from_pretrained(model, **options)
