"""What all pipelines share: components from files and back, devices, LoRA by name, and the run of one request."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..conditioning import Components
from ..denoise import DenoiseState
from ..loading import warn_unknown
from ..lora.keys import unwrap
from ..lora.merge import AdapterSet
from ..lora.reading import read_lora
from ..lora.weights import save_lora
from ..models.controlnet import MultiControlNetModel
from ..models.motion import attach_motion_
from ..models.t2i_adapter import MultiAdapter
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from ..models.vae_tiny import AutoencoderTiny
from ..request import FreeInit, GenerateRequest, GenerateResult, Windows
from .components import HARMLESS, LORA_NAME, SETTINGS, given_components, lora_file
from .files import load_checkpoint, load_repository, save
from .ip_adapter import (
    encode_image,
    load_ip_adapter,
    prepare_ip_adapter_image_embeds,
    set_ip_adapter_scale,
    unload_ip_adapter,
)
from .run import call, generate, several

if TYPE_CHECKING:
    from typing_extensions import Self

# Component -> what holds several networks in its place.
CONTAINERS: Mapping[str, type[nn.Module]] = {"controlnet": MultiControlNetModel, "adapter": MultiAdapter}
LORA_TARGETS = ("unet", "text_encoder", "text_encoder_2")


class DiffusionPipeline:
    """Base of the pipelines, and the way to load one whose kind the repository itself names.

    Attributes:
        component_names: the components, in the order of the constructor's arguments.
        control_argument: the argument of ``__call__`` that holds the ControlNets' pictures.
        sized_by_model: the size, when none is asked for, is the model's own and not the start picture's.
    """

    component_names: ClassVar[tuple[str, ...]] = ()
    control_argument: ClassVar[str] = "control_image"
    sized_by_model: ClassVar[bool] = False

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    scheduler: Any

    def __init_subclass__(cls) -> None:
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        cls.component_names = tuple(name for name in names if name not in (*SETTINGS, *HARMLESS))

    def _assemble(self, arguments: Mapping[str, Any]) -> None:
        """Take the components and settings out of a constructor's ``arguments``."""
        for name in self.component_names:
            value = arguments.get(name)
            # As one module, several networks are moved, saved and listed like any other component.
            setattr(self, name, CONTAINERS[name](value) if isinstance(value, list | tuple) else value)
        self.settings = {name: arguments[name] for name in SETTINGS if name in arguments}
        if arguments.get("add_watermarker"):
            warn_unknown(f"{type(self).__name__} (no watermark is put into pictures)", {"add_watermarker": True})
        self._progress_options: dict[str, Any] = {}
        self._adapters: AdapterSet | None = None
        self._interrupt = False
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._windows: Windows | None = None
        self._free_init: FreeInit | None = None
        if arguments.get("motion_adapter") is not None:
            attach_motion_(cast(UNet2DConditionModel, unwrap(self.unet)), arguments["motion_adapter"])

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
        target, given = load_repository(cls, pretrained_model_name_or_path, dtype or torch_dtype, variant, options)
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
        target, given = load_checkpoint(
            cls,
            pretrained_model_link_or_path,
            dtype or torch_dtype,
            options,
            config=config,
            prediction_type=prediction_type,
            ignore=ignore,
        )
        return target._complete(given)  # pyright: ignore[reportReturnType]

    @classmethod
    def _complete(cls, given: Mapping[str, Any]) -> Self:
        return cls(**dict.fromkeys(cls.component_names) | dict(given))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> Self:
        """A pipeline of this class that shares the components and the LoRAs of another; ``components`` replace some."""
        return pipeline.as_pipeline(cls, **components)

    def as_pipeline(self, target: type[Any], **components: Any) -> Any:
        """This pipeline's components and LoRAs as a ``target``; see `from_pipe`."""
        shared = self.components | self.settings
        given, known = given_components(f"{target.__name__}.from_pipe", target, components)
        found = target._complete({name: value for name, value in shared.items() if name in known} | given)
        # One set of LoRAs for one set of networks: two would undo each other's merges.
        if all(getattr(found, name, None) is getattr(self, name, None) for name in LORA_TARGETS):
            found._adapters = self.adapters
        return found

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, variant: str | None = None) -> None:
        """Write all components and ``model_index.json``; diffusers and `from_pretrained` read the folder.

        Active LoRAs are part of the weights that are written, as in the pictures that they give. IP-Adapters and motion
        modules are not part of the UNet's: the first have files of their own, the second a folder of their own.

        Raises:
            ValueError: a component has no ``save_pretrained``, such as a function in the place of the safety checker;
                nothing is written then.
        """
        save(self, Path(save_directory), variant)

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

    @property
    def guidance_scale(self) -> float:
        """Guidance of the run, for callbacks; they may set ``_guidance_scale``."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the run, for callbacks."""
        return self._num_timesteps

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

    # IP-Adapters: functions of ip_adapter.py.

    load_ip_adapter = load_ip_adapter
    set_ip_adapter_scale = set_ip_adapter_scale
    unload_ip_adapter = unload_ip_adapter
    encode_image = encode_image
    prepare_ip_adapter_image_embeds = prepare_ip_adapter_image_embeds

    # Animation.

    def enable_free_noise(
        self,
        context_length: int | None = 16,
        context_stride: int = 4,
        weighting_scheme: str = "pyramid",
        noise_type: str = "shuffle_context",
    ) -> None:
        """Paint animations in windows of ``context_length`` frames (default: the adapter's limit); see `Windows`.

        The whole network runs window by window, in one window's memory; diffusers windows temporal attention alone.
        """
        most = self._parts().motion_frames or 16
        self._windows = Windows(context_length or most, context_stride, weighting_scheme, noise_type)

    def disable_free_noise(self) -> None:
        """Undo `enable_free_noise`."""
        self._windows = None

    def enable_free_init(
        self,
        num_iters: int = 3,
        use_fast_sampling: bool = False,
        method: str = "butterworth",
        order: int = 4,
        spatial_stop_frequency: float = 0.25,
        temporal_stop_frequency: float = 0.25,
    ) -> None:
        """Repaint animations from noise that keeps their low frequencies; see `FreeInit`."""
        self._free_init = FreeInit(
            num_iters, use_fast_sampling, method, order, spatial_stop_frequency, temporal_stop_frequency
        )

    def disable_free_init(self) -> None:
        """Undo `enable_free_init`."""
        self._free_init = None

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
            requires_aesthetics_score=bool(self.settings.get("requires_aesthetics_score")),
            controlnets=several(getattr(self, "controlnet", None), "nets"),
            t2i_adapters=several(getattr(self, "adapter", None), "adapters"),
        )

    def generate(
        self,
        request: GenerateRequest,
        *,
        on_step: Callable[[DenoiseState], None] | None = None,
        decode_denoised: bool = False,
    ) -> GenerateResult:
        """Run one request; see `fourstroke.pipelines.run.generate`."""
        return generate(self, request, on_step=on_step, decode_denoised=decode_denoised)

    def _run(self, arguments: Mapping[str, Any], *, decode_denoised: bool = False, **fields: Any) -> Any:
        """What all ``__call__`` methods do with their ``arguments``; see `fourstroke.pipelines.run.call`."""
        return call(self, arguments, decode_denoised=decode_denoised, **fields)


def _check_device(device: torch.device) -> None:
    available = {"cpu": True, "meta": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, True):
        raise RuntimeError(f'There is no {device.type!r} device here; use .to("cpu").')
