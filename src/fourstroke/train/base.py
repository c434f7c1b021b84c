"""The frozen model that is trained on top of, and what a training asks of it."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..conditioning import Components, encode_text
from ..engine import load_pipeline
from ..lora.keys import unwrap
from ..models.unet import UNet2DConditionModel
from ..pipelines.pipeline import DiffusionPipeline
from ..pipelines.stable_diffusion import StableDiffusionPipeline, StableDiffusionXLPipeline
from ..request import GenerateRequest
from ..runtime.device import check_device
from ..schedulers import DDIMScheduler
from .checkpointing import checkpointing_
from .encoding import Batch
from .options import PRECISIONS, DistillOptions, TrainOptions

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Text:
    """What the UNet is told: ``embeds`` (B, L, D) and, for SDXL, ``pooled`` (B, P) and ``time_ids`` (B, 6)."""

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def where(self, chosen: Tensor, other: Text) -> Text:
        """The text of ``other``, one row or B, in the rows that ``chosen`` (B,) bool tells; sizes stay."""
        embeds = torch.where(chosen[:, None, None], other.embeds, self.embeds)
        if self.pooled is None or other.pooled is None:
            return Text(embeds)
        return Text(embeds, torch.where(chosen[:, None], other.pooled, self.pooled), self.time_ids)

    def then(self, other: Text) -> Text:
        """These rows, then those of ``other``."""
        pairs = ((self.embeds, other.embeds), (self.pooled, other.pooled), (self.time_ids, other.time_ids))
        return Text(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))  # pyright: ignore


@dataclass(frozen=True)
class Base:
    """A frozen text-to-image model.

    Attributes:
        name: as it was given.
        pipe: its pipeline.
        alphas: the noise schedule's cumulative product of ``1 - beta``, (T,) float32, on the device.
        prediction_type: of the UNet.
        dtype: of the arithmetic.
    """

    name: str
    pipe: DiffusionPipeline
    alphas: Tensor
    prediction_type: str
    dtype: torch.dtype

    @property
    def unet(self) -> UNet2DConditionModel:
        """The network that is trained."""
        return cast(UNet2DConditionModel, unwrap(self.pipe.unet))

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.device

    @property
    def parts(self) -> Components:
        """The pipeline's networks."""
        return self.pipe._parts()

    def network(self, component: str) -> nn.Module:
        """The network ``unet``, ``text_encoder`` or ``text_encoder_2``."""
        return unwrap(getattr(self.pipe, component))

    def predict(self, sample: Tensor, timesteps: Tensor, text: Text, weights: Mapping[str, Tensor]) -> Tensor:
        """The UNet's output (B, C, h, w) in float32, with ``weights`` in the place of its own.

        Args:
            sample: (B, C, h, w) float32.
            timesteps: (B,).
            text: B rows.
            weights: of `adapted_weights`; none for the model as it is.
        """
        dtype = self.unet.dtype
        more: dict[str, Any] = {}
        if text.pooled is not None:
            more["added_cond_kwargs"] = {"text_embeds": text.pooled.to(dtype), "time_ids": text.time_ids}
        arguments = (sample.to(dtype), timesteps, text.embeds.to(dtype))
        with self.arithmetic():
            if not weights:
                return self.unet(*arguments, **more).float()
            return functional_call(self.unet, dict(weights), arguments, more, tie_weights=False).float()

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Inside, networks compute in `dtype`."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def text_of(self, batch: Batch) -> Text:
        """What is told of ``batch``, on the device."""
        pooled, ids = batch.pooled, batch.time_ids
        found = (None if value is None else value.to(self.device) for value in (batch.prompt_embeds, pooled, ids))
        return Text(*found)  # pyright: ignore[reportArgumentType]

    def encode(self, captions: list[str], clip_skip: int | None, weights: Mapping[str, Mapping[str, Tensor]]) -> Text:
        """Encode ``captions`` by the text encoders with ``weights``, component -> parameter -> tensor."""
        encoders = _Encoders(self.parts, clip_skip)
        names = dict(zip(self.text_encoders, range(len(encoders.encoders)), strict=True))
        given = {f"encoders.{names[c]}.{name}": value for c, found in weights.items() for name, value in found.items()}
        with self.arithmetic(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="CLIP reads at most")  # was said when the data was read
            encoded = functional_call(encoders, given, (captions,), tie_weights=False)
        return Text(encoded.embeds, encoded.pooled if self.parts.xl else None)

    @property
    def text_encoders(self) -> list[str]:
        """The names of the text encoders that there are."""
        return [name for name in TEXT_ENCODERS if getattr(self.pipe, name, None) is not None]

    def fingerprint(self) -> str:
        """Of the weights of UNet and text encoders: the beginning of every parameter, as 16 hexadecimal digits."""
        digest = hashlib.sha256(f"{self.prediction_type} {self.alphas[-1].item()}".encode())
        for component in ("unet", *self.text_encoders):
            for name, value in self.network(component).named_parameters():
                start = value.detach().flatten()[:16].float().cpu()
                digest.update(f"{component}.{name} {tuple(value.shape)}".encode() + start.numpy().tobytes())
        return digest.hexdigest()[:16]


class _Encoders(nn.Module):
    """A model's text encoders as one module, so that the weights of all of them can be replaced for one call."""

    def __init__(self, parts: Components, clip_skip: int | None):
        super().__init__()
        self.encoders = nn.ModuleList(parts.text_encoders)
        self.parts, self.clip_skip = parts, clip_skip

    def forward(self, captions: list[str]) -> Any:
        return encode_text(self.parts, GenerateRequest(prompt=captions, clip_skip=self.clip_skip), False)[0]


def load_base(
    model: str | os.PathLike[str] | DiffusionPipeline, options: TrainOptions, device: torch.device | None = None
) -> tuple[Base, list[nn.Parameter]]:
    """Load a model, freeze it, and check that it can be trained with ``options``.

    Args:
        model: hub id, shipped name, folder, single file, or a pipeline, which is trained on where and as it is.
        options: of which ``precision``, ``base_precision``, ``device`` and ``gradient_checkpointing`` count here.
        device: instead of the options'.

    Returns:
        the model, and those of its parameters that needed gradients before.

    Raises:
        FileNotFoundError, UnsupportedConfig, WeightError: the model cannot be loaded.
        ValueError: it is not one that a LoRA can be trained for, or the precisions do not fit together.
        RuntimeError: there is no such device.
    """
    if isinstance(model, DiffusionPipeline):
        pipe, name = model, type(model).__name__
        if pipe.adapters.names or pipe.adapters.fused:
            raise ValueError("The pipeline has LoRAs; unload them, or save_pretrained() it with them, and train that.")
        device = device or (torch.device(options.device) if options.device else pipe.device)
        dtype = None
    else:
        name = os.fspath(model)
        device = device or choose_device(options.device)
        dtype = _base_dtype(options, device)
        pipe = load_pipeline(name, torch_dtype=dtype)
    check_device(device)
    unet = cast(UNet2DConditionModel, unwrap(pipe.unet))
    _check_model(name, pipe, unet, options)
    _check_precision(options, unet.dtype, device)
    unet.to(device)
    thawed = [parameter for network in pipe.networks for parameter in network.parameters() if parameter.requires_grad]
    for network in pipe.networks:
        network.eval().requires_grad_(False)
    checkpointing_(unet, options.gradient_checkpointing)
    schedule = DDIMScheduler.from_config(pipe.scheduler.config)
    alphas = torch.as_tensor(schedule.alphas_cumprod, dtype=torch.float32, device=device)
    return Base(name, pipe, alphas, schedule.config.prediction_type, options.dtype), thawed


def choose_device(device: str | None) -> torch.device:
    """The device that is asked for; without, the GPU if there is one, and the CPU otherwise."""
    if device is not None:
        return torch.device(device)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def _base_dtype(options: TrainOptions, device: torch.device) -> torch.dtype:
    if options.base_precision is not None:
        return PRECISIONS[options.base_precision]
    return torch.float32 if device.type == "cpu" else options.dtype


def _check_precision(options: TrainOptions, dtype: torch.dtype, device: torch.device) -> None:
    if dtype not in (torch.float32, options.dtype):
        raise ValueError(
            f"The base's weights are {str(dtype).removeprefix('torch.')}, and precision is {options.precision}; give "
            "both the same (precision, base_precision), or the base fp32."
        )
    if dtype == torch.float16 and device.type == "cpu":
        raise ValueError("base_precision fp16 is for GPUs; on a CPU use bf16 or fp32.")


def _check_model(name: str, pipe: DiffusionPipeline, unet: UNet2DConditionModel, options: TrainOptions) -> None:
    config = unet.config
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise ValueError(f"{name} loads as {type(pipe).__name__}; text-to-image models are trained here.")
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"{name}: its UNet reads {config.in_channels} channels (inpainting?); train on its base model."
        )
    if config.time_cond_proj_dim is not None:
        raise ValueError(f"{name} is a distilled model (an LCM, with guidance as an input); train on its base model.")
    steps = pipe.scheduler.config.num_train_timesteps
    if isinstance(options, DistillOptions) and options.num_ddim_timesteps > steps:
        raise ValueError(f"num_ddim_timesteps is {options.num_ddim_timesteps}; {name} has {steps} timesteps.")


def model_name(model: str | os.PathLike[str] | DiffusionPipeline) -> str:
    """What a LoRA's header calls the model: a hub id as it is, and a file or folder by its own name."""
    if isinstance(model, DiffusionPipeline):
        return type(model).__name__
    path = Path(model)
    return path.resolve().name if path.exists() else os.fspath(model)
