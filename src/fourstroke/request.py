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
Size: TypeAlias = tuple[int, int]  # height and width (or top and left) in pixels
Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator] | None"


STRENGTH_MODES = ("noise", "trim", "extend")


def option(default: Any, help: str) -> Any:
    """A field that command line and server offer as an option, with its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Control:
    """A picture that steers the painting through a control network or an adapter.

    Attributes:
        image: PIL, array or tensor, or several: one a prompt, or one a frame.
        scale: factor on what the network adds; 0 is none of it.
        start, end: fractions of the schedule, 0 <= start <= end <= 1, between which it acts.
        model: name of the network, where whoever runs the request chooses it by name.

    Raises:
        ValueError: ``start`` and ``end`` are no such fractions, or ``image`` is missing.
    """

    image: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    model: str | None = None

    def __post_init__(self) -> None:
        if self.image is None:
            raise ValueError("A control picture is missing: give one picture a ControlNet or adapter.")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"A control acts from {self.start} to {self.end}; these must be fractions of the schedule with "
                "0 <= start <= end <= 1."
            )


@dataclass(frozen=True)
class Windows:
    """A long animation in overlapping windows of frames, in one window's memory (Qiu et al. 2023, FreeNoise).

    Attributes:
        length: frames the network sees at a time, at most what the motion adapter was trained on.
        stride: frames from one window to the next; the rest overlaps.
        weights: how much frames count where windows overlap: ``pyramid``, ``flat`` or ``delayed_reverse_sawtooth``.
        noise: ``shuffle_context`` repeats the first window's noise in shuffled order, ``repeat_context`` in the same,
            ``random`` draws all frames anew.

    Raises:
        ValueError: not 1 <= stride <= length.
    """

    length: int = 16
    stride: int = 4
    weights: str = "pyramid"
    noise: str = "shuffle_context"

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.length:
            raise ValueError(f"Windows of {self.length} frames cannot be {self.stride} apart: 1 <= stride <= length.")


@dataclass(frozen=True)
class FreeInit:
    """Repaint from noise that keeps the low frequencies of the last round (Wu et al. 2023): steadier animations.

    Attributes:
        iterations: rounds, each a whole schedule.
        fast: fewer steps in the first rounds.
        method: ``butterworth``, ``gaussian`` or ``ideal`` low-pass filter.
        order: of the Butterworth filter.
        spatial_stop, temporal_stop: stop frequencies as fractions of the band, 0 to 1.
    """

    iterations: int = 3
    fast: bool = False
    method: str = "butterworth"
    order: int = 4
    spatial_stop: float = 0.25
    temporal_stop: float = 0.25


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
        aesthetic_score, negative_aesthetic_score: for an SDXL refiner, which was trained on them.
        denoising_start, denoising_end: run this part of the schedule only, fractions in [0, 1]; with a start the
            ``image`` holds latents that are as noisy as the schedule is there.
        strength_mode: what ``strength`` shortens. ``noise``: the noise range, so that all steps run (Luo et al. 2023;
            with schedulers that cannot, as ``extend``). ``trim``: the schedule, of which the last ``strength`` part
            runs, as in diffusers. ``extend``: a schedule of steps / strength steps, of which the last ones run.
        masked_image_latents: (n, 4, h, w) in place of the encoded masked picture, 9-channel inpainting.
        controls: pictures for the ControlNets, in their order.
        adapters: pictures for the T2I-Adapters, in their order.
        guess_mode: let ControlNets steer without a prompt: deeper residuals weigh more, and the unconditional half of
            guidance has none (Zhang et al. 2023, "guess mode").
        ip_adapter_image: picture(s) for the IP-Adapters, one entry an adapter.
        ip_adapter_image_embeds: their embeddings in place of them, unconditional halves first under guidance.
        windows: how an animation longer than the motion adapter's range is painted.
        free_init: repainting rounds for steadier animations.
        decode_chunk_size: frames that the VAE encodes or decodes at a time.
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
    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size = (0, 0)
    negative_target_size: Size | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    denoising_start: float | None = None
    denoising_end: float | None = None
    image: Any = option(None, "Picture to start from.")
    strength: float | None = option(
        None, "How much of the start picture may change, 0 to 1; 0.8 if not given, 1 with a mask."
    )
    strength_mode: str = "noise"
    mask_image: Any = option(None, "Mask of the start picture's size: white is painted anew, black stays.")
    masked_image_latents: Tensor | None = None
    padding_mask_crop: int | None = option(None, "Paint only the mask's surroundings, this many pixels wide, enlarged.")
    controls: Sequence[Control] = ()
    adapters: Sequence[Control] = ()
    guess_mode: bool = False
    ip_adapter_image: Any = None
    ip_adapter_image_embeds: Sequence[Tensor] | None = None
    num_frames: int | None = option(None, "Frames of an animation; needs a motion adapter.")
    windows: Windows | None = None
    free_init: FreeInit | None = None
    decode_chunk_size: int = 16
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
        self._check_pictures()
        for name in ("denoising_start", "denoising_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must be a fraction of the schedule, 0 to 1.")
        if (self.denoising_start or 0.0) >= (1.0 if self.denoising_end is None else self.denoising_end):
            raise ValueError(
                f"denoising_start is {self.denoising_start} and denoising_end {self.denoising_end}: nothing lies "
                "between them."
            )
        if isinstance(self.generator, Sequence) and len(self.generator) != self.batch_size:
            raise ValueError(
                f"{len(self.generator)} generators for a batch of {self.batch_size} pictures: give one a picture."
            )

    def _check_pictures(self) -> None:
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; it must be a number from 0 to 1.")
        if self.strength_mode not in STRENGTH_MODES:
            raise ValueError(
                f"strength_mode is {self.strength_mode!r}; it must be one of {', '.join(map(repr, STRENGTH_MODES))}."
            )
        if self.image is None:
            for name in ("mask_image", "padding_mask_crop", "denoising_start"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is given without a picture; pass image as well.")
        if self.padding_mask_crop is not None and self.mask_image is None:
            raise ValueError("padding_mask_crop is given without a mask; pass mask_image as well.")
        if self.padding_mask_crop is not None and self.output_type != "pil":
            raise ValueError(f"padding_mask_crop gives PIL pictures, but output_type is {self.output_type!r}.")
        if self.ip_adapter_image is not None and self.ip_adapter_image_embeds is not None:
            raise ValueError("Pass either ip_adapter_image or ip_adapter_image_embeds; both are given.")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames is {self.num_frames}; it must be at least 1.")
        if self.decode_chunk_size < 1:
            raise ValueError(f"decode_chunk_size is {self.decode_chunk_size}; it must be at least 1.")

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
    def change(self) -> float:
        """``strength``, or its default: 1 with a mask, 0.8 without."""
        return self.strength if self.strength is not None else 0.8 if self.mask_image is None else 1.0

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
