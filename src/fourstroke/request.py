"""What can be asked of the engine, and what comes back: two plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from .images import check_output_type

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Prompt: TypeAlias = str | Sequence[str] | None
Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator] | None"


def option(default: Any, help: str) -> Any:
    """A field that command line and server offer as an option, with its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class GenerateRequest:
    """One request. Its defaults are those of few-step generation; the pipelines fill it with their own.

    Fields that carry a help text are options of the command line. The others:

    Attributes:
        prompt_2, negative_prompt_2: for SDXL's second text encoder, when it is to read something else.
        timesteps: custom descending timesteps in [0, 1000) in place of the scheduler's own.
        sigmas: custom noise levels, for schedulers that take them.
        original_inference_steps: LCM's training grid (Luo et al. 2023, sec. 4.3); None is the scheduler's own, 50.
        guidance_rescale: phi of Lin et al. 2023, sec. 3.4, in [0, 1].
        generator: random numbers for the whole batch, or one generator a picture; wins over ``seed``.
        latents: (N, 4, height / 8, width / 8) start noise instead of drawn noise.
        prompt_embeds, negative_prompt_embeds: (prompts, L, D) in place of the prompts.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: (prompts, P), SDXL, with the two above.
        lora_scale: multiplies every active LoRA's weight.
        original_size, crops_coords_top_left, target_size: SDXL's micro-conditioning, (height, width) or (top, left)
            in pixels; None is the size asked for. The ``negative_`` ones are for the unconditional half.
        denoising_end: stop after this fraction of the schedule, in (0, 1).
        output_type: ``pil``, ``np``, ``pt`` or ``latent``.

    Raises:
        ValueError, TypeError: a value breaks a rule that needs no model to check; the message names value and rule.
    """

    prompt: Prompt = None
    prompt_2: Prompt = None
    negative_prompt: Prompt = option(None, "What the picture should not show; works with guidance above 1 only.")
    negative_prompt_2: Prompt = None
    height: int | None = option(None, "Height in pixels, a multiple of 8; the model's own size if not given.")
    width: int | None = option(None, "Width in pixels, a multiple of 8; the model's own size if not given.")
    num_inference_steps: int = option(4, "Denoising steps; 1 to 8 with an LCM-LoRA.")
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    original_inference_steps: int | None = None
    guidance_scale: float = option(1.0, "Classifier-free guidance; 1 is off, 1 to 2 suits an LCM-LoRA.")
    guidance_rescale: float = 0.0
    num_images_per_prompt: int = option(1, "Pictures; picture i has the seed SEED + i.")
    eta: float = option(0.0, "Stochasticity of DDIM and TCD, 0 to 1.")
    seed: int | None = option(None, "Seed of the first picture; random if not given.")
    generator: Generators = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    clip_skip: int | None = option(None, "Text encoder layers to skip from the end.")
    lora_scale: float = 1.0
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] = (0, 0)
    negative_target_size: tuple[int, int] | None = None
    denoising_end: float | None = None
    output_type: str = "pil"

    def __post_init__(self) -> None:
        self._check_prompts()
        check_output_type(self.output_type)
        if self.timesteps is not None and self.sigmas is not None:
            raise ValueError("Both timesteps and sigmas are given; a schedule is made from one of them.")
        if self.timesteps is None and self.sigmas is None and self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; it must be at least 1.")
        if self.num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {self.num_images_per_prompt}; it must be at least 1.")
        if self.denoising_end is not None and not 0 < self.denoising_end <= 1:
            raise ValueError(f"denoising_end is {self.denoising_end}; it must be a fraction in (0, 1].")
        if isinstance(self.generator, Sequence) and len(self.generator) != self.batch_size:
            raise ValueError(
                f"{len(self.generator)} generators for a batch of {self.batch_size} pictures: give one a picture."
            )

    def _check_prompts(self) -> None:
        if (self.prompt is None) == (self.prompt_embeds is None):
            given = "both are" if self.prompt is not None else "neither is"
            raise ValueError(f"Pass either prompt or prompt_embeds; {given} given.")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ValueError("Pass either negative_prompt or negative_prompt_embeds; both are given.")
        for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                continue
            if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
                raise TypeError(f"{name} must be a string or a list of strings, not {value!r}.")
            if len(value) != self.prompt_count:
                raise ValueError(f"{name} has {len(value)} texts, but there are {self.prompt_count} prompts.")
        positive, negative = self.prompt_embeds, self.negative_prompt_embeds
        if positive is not None and negative is not None and positive.shape != negative.shape:
            raise ValueError(
                f"prompt_embeds {tuple(positive.shape)} and negative_prompt_embeds {tuple(negative.shape)} must have "
                "the same shape."
            )

    @property
    def prompt_count(self) -> int:
        """How many prompts there are."""
        if self.prompt_embeds is not None:
            return self.prompt_embeds.shape[0]
        return 1 if isinstance(self.prompt, str) or self.prompt is None else len(self.prompt)

    @property
    def batch_size(self) -> int:
        """How many pictures there will be: prompts times pictures a prompt, a prompt's pictures side by side."""
        return self.prompt_count * self.num_images_per_prompt

    def texts(self, name: str) -> list[str] | None:
        """The field ``name`` as one text a prompt, or None when it is not given."""
        value = getattr(self, name)
        return [value] * self.prompt_count if isinstance(value, str) else None if value is None else list(value)


@dataclass(frozen=True)
class GenerateResult:
    """What a request gave.

    Attributes:
        images: as ``request.output_type`` says, prompts outermost.
        seeds: the seed of each picture, or None when the caller's own generator or latents were used.
        nsfw_content_detected: the safety checker's verdict a picture; None without a checker.
        request: the request itself.
    """

    images: Any
    seeds: tuple[int, ...] | None
    nsfw_content_detected: list[bool] | None
    request: GenerateRequest
