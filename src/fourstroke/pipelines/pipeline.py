"""What all pipelines share: components from files and back, devices, LoRA by name, and the run of one request."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import hub
from ..conditioning import Components
from ..denoise import DenoiseState, decode, denoise, prepare
from ..images import postprocess
from ..loading import Model, read_json, warn_unknown, write_json
from ..lora.merge import AdapterSet
from ..lora.reading import read_lora
from ..lora.weights import save_lora
from ..models.clip import CLIPTextModel
from ..models.safety import StableDiffusionSafetyChecker
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from ..models.vae_tiny import AutoencoderTiny
from ..request import GenerateRequest, GenerateResult
from ..schedulers import load_scheduler
from ..single_file import load_single_file
from .components import (
    INDEX_NAME,
    LORA_NAME,
    component_files,
    library_of,
    load_component,
    lora_file,
    published_class,
)

if TYPE_CHECKING:
    from typing_extensions import Self

# Published class name -> module of this package that has the pipeline.
PIPELINES: Mapping[str, str] = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion",
    "LatentConsistencyModelPipeline": "stable_diffusion",
}
LORA_TARGETS = ("unet", "text_encoder", "text_encoder_2")
# Keywords that people pass out of habit and that choose what is done here anyway.
HARMLESS = ("use_safetensors", "low_cpu_mem_usage", "safety_checker_kwargs", "add_watermarker")
CALLBACK_INPUTS = (
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "add_text_embeds",
    "add_time_ids",
    "denoised",
    "timestep_cond",
)

StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]


class PipelineOutput(NamedTuple):
    """What a pipeline returns: ``images`` as ``output_type`` says, and the safety checker's verdicts, if any."""

    images: Any
    nsfw_content_detected: list[bool] | None = None


class DiffusionPipeline:
    """Base of the pipelines, and the way to load one whose kind the repository itself names.

    Attributes:
        component_names: the components in the order in which ``model_index.json`` lists them.
    """

    component_names: ClassVar[tuple[str, ...]] = ()

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    scheduler: Any

    def __init__(self, **components: Any):
        for name in self.component_names:
            setattr(self, name, components.get(name))
        self._progress_options: dict[str, Any] = {}
        self._adapters: AdapterSet | None = None
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        **options: Any,
    ) -> Self:
        """Load a pipeline.

        Args:
            pretrained_model_name_or_path: hub id, shipped name (``emoji/base``) or folder with a ``model_index.json``.
            torch_dtype, dtype: of the networks, two names of one thing (default ``torch.float32``).
            variant: read ``….{variant}.safetensors`` where there is one.
            options: a component by its name, to use in place of the repository's (``vae=…``, ``safety_checker=None``);
                ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` as in huggingface_hub.
                Any other keyword warns and is ignored.

        Raises:
            FileNotFoundError: no such repository, or a file is missing in it.
            UnsupportedConfig, WeightError: a component is not what its configuration says, or is not supported.
        """
        source = pretrained_model_name_or_path
        where = {name: options.pop(name) for name in hub.OPTIONS if name in options}
        index = read_json(hub.fetch(source, lambda files: hub.required(files, INDEX_NAME), **where) / INDEX_NAME)
        target = pipeline_class(index.get("_class_name")) if cls is DiffusionPipeline else cls
        given, known = _given(f"{cls.__name__}.from_pretrained", target, options)
        wanted = {
            name: entry[1]
            for name, entry in index.items()
            if name in known and name not in given and isinstance(entry, list) and entry[1] is not None
        }
        folder = hub.fetch(
            source,
            lambda files: [
                file for name, kind in wanted.items() for file in component_files(files, name, kind, variant)
            ],
            **where,
        )
        given |= {name: value for name, value in index.items() if name in known - given.keys() and _is_setting(value)}
        for name in _counted(list(wanted)):
            given[name] = load_component(folder / name, wanted[name], variant, dtype or torch_dtype)
        return target._complete(given)  # pyright: ignore[reportReturnType]

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        prediction_type: str | None = None,
        ignore: Collection[str] = (),
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Load a checkpoint in the original layout, one ``.safetensors`` file; a local one needs no network.

        Args:
            pretrained_model_link_or_path: the file, or its address on the hub.
            config: the checkpoint's family, or a folder of configurations, when its tensors do not tell.
            prediction_type: ``epsilon`` or ``v_prediction``, when the guess for SD 2.x is wrong.
            ignore: patterns of tensor names that carry nothing and are left out.
            torch_dtype, dtype: of the networks, two names of one thing (default ``torch.float32``).
            options: as in `from_pretrained`.

        Raises:
            FileNotFoundError, ValueError, WeightError: see `fourstroke.single_file.load_single_file`.
        """
        where = {name: options.pop(name) for name in hub.OPTIONS if name in options}
        parts = load_single_file(
            pretrained_model_link_or_path,
            config=config,
            prediction_type=prediction_type,
            ignore=ignore,
            dtype=dtype or torch_dtype,
            skip=tuple(options),
            progress=_counted,
            **where,
        )
        kind = "StableDiffusionXLPipeline" if "text_encoder_2" in parts else "StableDiffusionPipeline"
        target = pipeline_class(kind) if cls is DiffusionPipeline else cls
        given, known = _given(f"{cls.__name__}.from_single_file", target, options)
        given = {name: value for name, value in parts.items() if name in known} | given
        if isinstance(given.get("scheduler"), Mapping):
            given["scheduler"] = load_scheduler(given["scheduler"]["_class_name"], given["scheduler"])
        return target._complete(given)  # pyright: ignore[reportReturnType]

    @classmethod
    def _complete(cls, given: Mapping[str, Any]) -> Self:
        return cls(**dict.fromkeys(cls.component_names) | dict(given))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, variant: str | None = None) -> None:
        """Write all components and ``model_index.json``; diffusers and `from_pretrained` read the folder.

        Active LoRAs are part of the weights that are written, as in the pictures that they give.
        """
        folder = Path(save_directory)
        index: dict[str, Any] = {"_class_name": type(self).__name__}
        for name, component in self.components.items():
            if isinstance(component, nn.Module):
                # Not the wrapper that torch.compile puts around a module.
                component = getattr(component, "_orig_mod", component)
            index[name] = [library_of(component), published_class(component)]
            if isinstance(component, CLIPTextModel | StableDiffusionSafetyChecker):
                component.save_pretrained(folder / name, variant=variant, stem="model")
            elif isinstance(component, Model):
                component.save_pretrained(folder / name, variant=variant)
            elif component is not None and not isinstance(component, nn.Module):
                component.save_pretrained(folder / name)
        write_json(folder / INDEX_NAME, index | self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The entries of ``model_index.json`` that are no components."""
        return {}

    @property
    def components(self) -> dict[str, Any]:
        """The components by name; ``OtherPipeline(**pipe.components)`` shares them."""
        return {name: getattr(self, name) for name in self.component_names}

    @property
    def device(self) -> torch.device:
        """The device of the UNet."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet."""
        return self.unet.dtype

    def to(
        self,
        *args: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Move and convert every network: ``pipe.to("cuda")``, ``pipe.to(torch.float16)``, ``pipe.to("cuda", dtype)``.

        Raises:
            RuntimeError: there is no such device here.
        """
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            else:
                device = value
        dtype = dtype or torch_dtype
        if device is not None:
            device = torch.device(device)
            _check_device(device)
        for component in self.components.values():
            if isinstance(component, nn.Module):
                component.to(device=device, dtype=dtype)
        return self

    def merge_adapters(self, scale: float = 1.0) -> None:
        """Bring the networks' weights up to date with the active LoRAs, each times ``scale``."""
        if self._adapters is not None:
            adapters = self.adapters
            adapters.scale = scale
            adapters.apply()

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm's progress bars, such as ``disable=True``."""
        self._progress_options = options

    # LoRA: names and meanings as in diffusers; the work is AdapterSet's.

    @property
    def adapters(self) -> AdapterSet:
        """The LoRAs of this pipeline."""
        networks = {name: getattr(self, name) for name in LORA_TARGETS if name in self.component_names}
        if self._adapters is None:
            self._adapters = AdapterSet(networks)
        # A component may have been replaced or compiled since.
        self._adapters.models = networks
        return self._adapters

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **where: Any,
    ) -> None:
        """Load a LoRA in any published dialect and activate it.

        Args:
            pretrained_model_name_or_path_or_dict: hub id, shipped name, folder, ``.safetensors`` file, or tensors.
            adapter_name: what `set_adapters` will call it; ``default_0``, ``default_1``, … if not given.
            hotswap: put it in the place of the adapter with this name.
            weight_name: the file in the repository; not needed when there is one only.
            subfolder: folder inside the repository.
            where: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            LoraError: a tensor fits nothing in these networks; all of them are named.
            ValueError: the name is taken (without ``hotswap``).
        """
        source: Any = pretrained_model_name_or_path_or_dict
        if not isinstance(source, Mapping):
            source = lora_file(source, weight_name, subfolder, where)
        name = adapter_name or next(n for i in itertools.count() if (n := f"default_{i}") not in self.adapters.names)
        lora = read_lora(source, self.adapters.models)
        self.adapters.add(name, lora, hotswap=hotswap)

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Mapping[str, Any] | Sequence[Any] | None = None,
    ) -> None:
        """Activate these LoRAs and no others at these weights: 1.0 if not given, a number, or a mapping by block."""
        self.adapters.set(adapter_names, adapter_weights)

    def get_active_adapters(self) -> list[str]:
        """The names of the active LoRAs."""
        return list(self.adapters.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """For each network, the names of the LoRAs that change it."""
        return self.adapters.list()

    def disable_lora(self) -> None:
        """Run without any LoRA until `enable_lora`."""
        self.adapters.disable()

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        self.adapters.enable()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget these LoRAs."""
        self.adapters.delete(adapter_names)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Make the LoRAs part of the base, so that `unload_lora_weights` keeps their effect.

        ``safe_fusing`` is always on here: a weight that is not finite is refused when it is loaded.
        """
        self.adapters.fuse(adapter_names, scale=lora_scale, components=components)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Undo `fuse_lora`, exact to the bit."""
        self.adapters.unfuse(components=components)

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs; what is not fused leaves no trace."""
        self.adapters.clear()

    def save_lora_weights(
        self, save_directory: str | os.PathLike[str], adapter_name: str, *, weight_name: str = LORA_NAME
    ) -> None:
        """Write a loaded LoRA in the layout that diffusers reads."""
        save_lora(Path(save_directory) / weight_name, self.adapters[adapter_name])

    # One request.

    def _parts(self) -> Components:
        pairs = [
            (getattr(self, f"tokenizer{suffix}", None), getattr(self, f"text_encoder{suffix}", None))
            for suffix in ("", "_2")
        ]
        present = [
            (tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None
        ]
        return Components(
            unet=self.unet,
            vae=self.vae,
            scheduler=self.scheduler,
            tokenizers=[tokenizer for tokenizer, _ in present],
            text_encoders=[encoder for _, encoder in present],
            force_zeros_for_empty_prompt=bool(self.settings.get("force_zeros_for_empty_prompt")),
        )

    @torch.no_grad()
    def generate(
        self,
        request: GenerateRequest,
        *,
        on_step: Callable[[DenoiseState], None] | None = None,
        decode_denoised: bool = False,
    ) -> GenerateResult:
        """Run one request.

        Args:
            request: what to paint.
            on_step: called after each step; it may change the state.
            decode_denoised: decode the last estimate of the clean latents instead of the last latents.
        """
        self.merge_adapters(request.lora_scale)
        parts = self._parts()
        state = prepare(parts, request)
        self._interrupt = False
        with _bar(len(state.timesteps), self._progress_options) as bar:
            for _ in denoise(parts, state):
                if on_step is not None:
                    on_step(state)
                bar.update()
                if self._interrupt:
                    break
        latents = state.denoised if decode_denoised and state.denoised is not None else state.latents
        if request.output_type == "latent":
            return self._result(latents, None, request)
        pictures, flags = self._check_safety(decode(parts.vae, latents, upcast=parts.xl))
        return self._result(postprocess(pictures, request.output_type), flags, request)

    def _result(self, images: Any, flags: list[bool] | None, request: GenerateRequest) -> GenerateResult:
        drawn = request.generator is None and request.seed is not None
        seeds = tuple(range(request.seed or 0, (request.seed or 0) + request.batch_size)) if drawn else None
        return GenerateResult(images, seeds, flags, request)

    def _check_safety(self, pictures: Tensor) -> tuple[Tensor, list[bool] | None]:
        checker, extractor = getattr(self, "safety_checker", None), getattr(self, "feature_extractor", None)
        if checker is None:
            return pictures, None
        if extractor is None:
            raise ValueError(
                "A safety_checker needs a feature_extractor; load both, or pass safety_checker=None for none."
            )
        inputs = extractor(postprocess(pictures, "pil"), return_tensors="pt").pixel_values
        # Keywords, so that a user's own function with diffusers' arguments works as well.
        _, flags = checker(images=postprocess(pictures, "np"), clip_input=inputs.to(pictures.device, pictures.dtype))
        keep = torch.tensor([not flag for flag in flags], device=pictures.device)
        return torch.where(keep[:, None, None, None], pictures, -torch.ones_like(pictures)), flags

    def _call(
        self,
        request: GenerateRequest,
        *,
        cross_attention_kwargs: Mapping[str, Any] | None,
        callback: StepCallback | None,
        callback_inputs: Sequence[str],
        return_dict: bool,
        unknown: Mapping[str, Any],
        decode_denoised: bool = False,
    ) -> PipelineOutput | tuple[Any, ...]:
        """The end that all ``__call__`` methods share: diffusers' callbacks and outputs around `generate`."""
        warn_unknown(f"{type(self).__name__}.__call__", unknown)
        options = dict(cross_attention_kwargs or {})
        request = dataclasses.replace(request, lora_scale=float(options.pop("scale", 1.0)))
        warn_unknown("cross_attention_kwargs", options)
        for name in callback_inputs if callback is not None else ():
            if name not in CALLBACK_INPUTS:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs names {name!r}; it may name {', '.join(CALLBACK_INPUTS)}."
                )

        def on_step(state: DenoiseState) -> None:
            assert callback is not None and state.timestep is not None
            tensors = {name: getattr(state, name) for name in callback_inputs}
            for name, value in (callback(self, state.index, state.timestep, tensors) or {}).items():
                if name in CALLBACK_INPUTS:
                    setattr(state, name, value)

        result = self.generate(request, on_step=None if callback is None else on_step, decode_denoised=decode_denoised)
        output = PipelineOutput(result.images, result.nsfw_content_detected)
        return output if return_dict else tuple(output)


def pipeline_class(name: str | None) -> type[DiffusionPipeline]:
    """The pipeline whose published class name is ``name``.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name is None or name not in PIPELINES:
        raise ValueError(
            f"The repository's pipeline is {name!r}, which is not supported. Supported: {', '.join(PIPELINES)}."
        )
    return getattr(importlib.import_module(f"{__package__}.{PIPELINES[name]}"), name)


def _given(where: str, target: type[DiffusionPipeline], options: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The components among ``options``, and the names that ``target`` takes; what is neither warns."""
    known = set(inspect.signature(target.__init__).parameters) - {"self"}
    warn_unknown(where, {name: value for name, value in options.items() if name not in known and name not in HARMLESS})
    return {name: value for name, value in options.items() if name in known}, known


def _is_setting(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _check_device(device: torch.device) -> None:
    available = {"cpu": True, "meta": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, True):
        raise RuntimeError(f'There is no {device.type!r} device here; use .to("cpu").')


def _counted(names: list[str]) -> Iterable[str]:
    """``names``, with a progress bar over them."""
    from tqdm.auto import tqdm

    return tqdm(names, desc="Loading pipeline components")


def _bar(total: int, options: Mapping[str, Any]) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, **options)
