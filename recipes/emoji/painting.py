"""How the report paints: the shipped models through fourstroke's own pipelines, as a user would, with fixed seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fourstroke import DDIMScheduler, LCMScheduler

BATCH = 16
GUIDANCE = 4.0  # the base's best
LCM_LORA, XL_LCM_LORA = "emoji/lcm-lora", "emoji/xl-lcm-lora"
SHEET_BYTES = 290_000
SHOWN = ("a red fox", "a cat face", "a red heart", "a pine tree", "a red apple", "a rocket", "a pizza", "an octopus",
         "a guitar", "a snowman", "a house", "a strawberry", "a unicorn", "a lion", "a cactus", "a crown")  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a picture is painted. ``loras`` are (shipped name, weight); ``spacing`` replaces the scheduler's own."""

    scheduler: type
    steps: int
    guidance: float = 1.0
    loras: tuple[tuple[str, float], ...] = ()
    spacing: str | None = None

    @property
    def calls(self) -> int:
        """How often the network looks at a picture."""
        return self.steps * (2 if self.guidance > 1 else 1)

    def plus(self, lora: str, weight: float) -> Way:
        """The same with one more LoRA."""
        return replace(self, loras=(*self.loras, (lora, weight)))


def lcm(steps: int = 4, guidance: float = 1.0, lora: str = LCM_LORA) -> Way:
    """LCM-LoRA at weight 1."""
    return Way(LCMScheduler, steps, guidance, ((lora, 1.0),))


FULL = Way(DDIMScheduler, 50, GUIDANCE)


class Painter:
    """A pipeline, and what it paints."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.pipe.set_progress_bar_config(disable=True)
        self.config = pipe.scheduler.config
        self.loaded: set[str] = set()

    def choose(self, way: Way) -> None:
        """Set scheduler and LoRAs, which are loaded when they are first wanted."""
        self.pipe.scheduler = way.scheduler.from_config(
            self.config, **({"timestep_spacing": way.spacing} if way.spacing else {})
        )
        names = [name.rpartition("/")[2] for name, _ in way.loras]
        for (lora, _), name in zip(way.loras, names, strict=True):
            if name not in self.loaded:
                self.pipe.load_lora_weights(lora, adapter_name=name)
                self.loaded.add(name)
        if names:
            self.pipe.set_adapters(names, [weight for _, weight in way.loras])
            self.pipe.enable_lora()
        else:
            self.pipe.disable_lora()

    def paint(
        self, prompts: Sequence[str], way: Way, seeds: Sequence[int] = (0,), batch: int = BATCH,
        each: dict[str, Sequence[Any]] | None = None, **common: Any,
    ) -> Tensor:  # fmt: skip
        """Pictures (seeds * N, 3, 128, 128) in -1..1, or videos (seeds * N, F, 3, 128, 128).

        Picture i has the generator seed ``1000 seed + i``. ``each`` holds arguments of the pipeline with one entry a
        prompt, ``common`` those for all.
        """
        self.choose(way)
        common = {"output_type": "pt", **common}
        found = []
        for seed in seeds:
            for start in range(0, len(prompts), batch):
                part = list(prompts[start : start + batch])
                own = {name: list(values[start : start + batch]) for name, values in (each or {}).items()}
                if batch == 1:  # some arguments go with a single picture only
                    own = {name: values[0] for name, values in own.items()}
                made = self.pipe(
                    part, num_inference_steps=way.steps, guidance_scale=way.guidance,
                    generator=[torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(part))],
                    **own, **common,
                )[0]  # fmt: skip
                found.append(made * 2 - 1 if isinstance(made, Tensor) else from_pil(made))
        return torch.cat(found).float()

    @torch.no_grad()
    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Pictures through the autoencoder."""
        return torch.cat([self.pipe.vae.decode(self.pipe.vae.encode(part).mean) for part in pictures.split(BATCH)])


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Float pictures (N, 3, H, W) in -1..1 -> RGB pictures."""
    arrays = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def from_pil(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size -> float (N, 3, H, W) in -1..1."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_sheet(rows: Sequence[Tensor], path: Path) -> None:
    """Rows of float pictures (N, 3, H, W) in -1..1 as one PNG with few enough colours to stay below 300 kB."""
    lines = [np.concatenate([np.asarray(picture) for picture in to_pil(row)], axis=1) for row in rows]
    sheet = Image.fromarray(np.concatenate(lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    for colours in (256, 128, 64, 32, 16):
        small = io.BytesIO()
        palette = sheet.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        palette.save(small, "PNG", optimize=True)
        if small.tell() <= SHEET_BYTES:
            break
    path.write_bytes(small.getvalue())
