"""What all pipelines share: components from files and back, devices, LoRA by name, and the run of one request."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from ..conditioning import Components
from ..denoise import DenoiseState
from ..left_out import MEMBERS, PAGE
from ..loading import warn_unknown
from ..lora.adapter_set import AdapterSet, adapters_of
from ..lora.keys import unwrap
from ..models.controlnet import MultiControlNetModel
from ..models.motion import attach_motion_
from ..models.t2i_adapter import MultiAdapter
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from ..models.vae_tiny import AutoencoderTiny
from ..request import FreeInit, GenerateRequest, GenerateResult, Windows
from ..runtime.device import check_device
from ..runtime.offload import Offload
from . import long_animation, loras, memory
from .components import HARMLESS, SETTINGS, given_components, several
from .files import fetch_components, load_checkpoint, load_repository, look_up, save
from .ip_adapter import (
    encode_image,
    load_ip_adapter,
    prepare_ip_adapter_image_embeds,
    set_ip_adapter_scale,
    unload_ip_adapter,
)
from .run import call, generate

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
        self._adapters = adapters_of(self.unet, self._lora_targets())
        self._offload: Offload | None = None
        self._request: GenerateRequest | None = None
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
    def download(
        cls, pretrained_model_name: str | os.PathLike[str], *, variant: str | None = None, **options: Any
    ) -> str:
        """Fetch the files that `from_pretrained` would read, load nothing, and return the folder that has them.

        Args:
            pretrained_model_name, variant, options: as for `from_pretrained`.

        Raises:
            FileNotFoundError: no such repository, or a file is missing in it.
            ValueError: a component is not supported.
        """
        return str(fetch_components(look_up(cls, "download", pretrained_model_name, options), variant))

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
        found._offload = self._offload
        return found

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write all components and ``model_index.json``; diffusers and `from_pretrained` read the folder.

        Active LoRAs are part of the weights that are written, as in the pictures that they give. IP-Adapters and motion
        modules are not part of the UNet's: the first have files of their own, the second a folder of their own.

        Args:
            save_directory: made where it is missing.
            safe_serialization: always on: only ``.safetensors`` files are written.
            variant: write ``….{variant}.safetensors``.
            max_shard_size: has no effect, with a warning: every network is written as one file.
            push_to_hub: is not done here.
            options: any other keyword warns and is ignored.

        Raises:
            ValueError: another kind of file or the hub is asked for; or a component has no ``save_pretrained``, such as
                a function in the place of the safety checker. Nothing is written then.
        """
        if not safe_serialization:
            raise ValueError("Only .safetensors files are written; leave safe_serialization out.")
        if push_to_hub:
            raise ValueError("push_to_hub is not done here: save_pretrained, then huggingface_hub.upload_folder(…).")
        shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        warn_unknown(f"{type(self).__name__}.save_pretrained", {**options, **shards})
        save(self, Path(save_directory), variant)

    @property
    def components(self) -> dict[str, Any]:
        """The components by name; ``OtherPipeline(**pipe.components)`` shares them."""
        return {name: getattr(self, name) for name in self.component_names}

    @property
    def networks(self) -> list[nn.Module]:
        """Those of the components that are networks."""
        return [component for component in self.components.values() if isinstance(component, nn.Module)]

    @property
    def device(self) -> torch.device:
        """The device of the UNet."""
        return self.unet.device

    @property
    def _execution_device(self) -> torch.device:
        return self.device if self._offload is None else self._offload.device

    def _bring(self, *networks: nn.Module) -> None:
        if self._offload is not None:
            self._offload.bring(*networks)

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
            check_device(device)
            if self._offload is not None and device.type != "cpu":
                warnings.warn(
                    f".to({str(device)!r}) leaves all networks on the device, which enable_model_cpu_offload() is "
                    "there to avoid; leave one of the two out.",
                    stacklevel=2,
                )
        self.maybe_free_model_hooks()
        for network in self.networks:
            network.to(device=device, dtype=dtype)
        return self

    def merge_adapters(self, scale: float = 1.0) -> None:
        """Bring the networks' weights up to date with the active LoRAs, each times ``scale``."""
        self.maybe_free_model_hooks()  # their weights on the CPU are those that stay
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

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the run is guided at present."""
        return self._parts().guided(self._guidance_scale)

    @property
    def interrupt(self) -> bool:
        """Whether the run stops after this step; callbacks may set ``_interrupt``."""
        return self._interrupt

    @property
    def clip_skip(self) -> int | None:
        """``clip_skip`` of the run, for callbacks."""
        return self._of_run("clip_skip")

    @property
    def guidance_rescale(self) -> float:
        """``guidance_rescale`` of the run, for callbacks."""
        return self._of_run("guidance_rescale")

    @property
    def denoising_start(self) -> float | None:
        """``denoising_start`` of the run, for callbacks."""
        return self._of_run("denoising_start")

    @property
    def denoising_end(self) -> float | None:
        """``denoising_end`` of the run, for callbacks."""
        return self._of_run("denoising_end")

    @property
    def lora_scale(self) -> float:
        """What multiplies the weights of all LoRAs in the run: ``scale`` of its ``cross_attention_kwargs``."""
        return self._of_run("lora_scale")

    @property
    def cross_attention_kwargs(self) -> dict[str, float]:
        """``cross_attention_kwargs`` of the run, for callbacks."""
        return {"scale": self.lora_scale}

    def _of_run(self, name: str) -> Any:
        return getattr(self._request or GenerateRequest(prompt=""), name)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm's progress bars, such as ``disable=True``."""
        self._progress_options = options

    # LoRAs: functions of loras.py.

    @property
    def adapters(self) -> AdapterSet:
        """The LoRAs of this pipeline, and of all others that share its UNet."""
        # A component may have been replaced or compiled since.
        self._adapters.models = self._lora_targets()
        return self._adapters

    def _lora_targets(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LORA_TARGETS if name in self.component_names}

    @property
    def fused_loras(self) -> set[str]:
        """The names of the LoRAs that are fused."""
        return set(self.adapters.fused)

    @property
    def num_fused_loras(self) -> int:
        """How many LoRAs are fused."""
        return len(self.adapters.fused)

    load_lora_weights = loras.load_lora_weights
    set_adapters = loras.set_adapters
    set_lora_device = loras.set_lora_device
    enable_lora_hotswap = loras.enable_lora_hotswap
    get_active_adapters = loras.get_active_adapters
    get_list_adapters = loras.get_list_adapters
    disable_lora = loras.disable_lora
    enable_lora = loras.enable_lora
    delete_adapters = loras.delete_adapters
    fuse_lora = loras.fuse_lora
    unfuse_lora = loras.unfuse_lora
    unload_lora_weights = loras.unload_lora_weights
    save_lora_weights = loras.save_lora_weights

    def __getattr__(self, name: str) -> Any:
        if name in MEMBERS:
            raise AttributeError(f"{name} of diffusers' pipelines is left out: {MEMBERS[name]}. See {PAGE}.")
        return object.__getattribute__(self, name)  # raises what brought us here

    # Memory: functions of memory.py.

    enable_vae_tiling = memory.enable_vae_tiling
    disable_vae_tiling = memory.disable_vae_tiling
    enable_vae_slicing = memory.enable_vae_slicing
    disable_vae_slicing = memory.disable_vae_slicing
    upcast_vae = memory.upcast_vae
    enable_model_cpu_offload = memory.enable_model_cpu_offload
    enable_sequential_cpu_offload = memory.enable_sequential_cpu_offload
    maybe_free_model_hooks = memory.maybe_free_model_hooks
    remove_all_hooks = memory.remove_all_hooks
    reset_device_map = memory.reset_device_map
    enable_attention_slicing = memory.enable_attention_slicing
    disable_attention_slicing = memory.disable_attention_slicing
    set_attention_slice = memory.set_attention_slice
    enable_xformers_memory_efficient_attention = memory.enable_xformers_memory_efficient_attention
    disable_xformers_memory_efficient_attention = memory.disable_xformers_memory_efficient_attention
    set_use_memory_efficient_attention_xformers = memory.set_use_memory_efficient_attention_xformers
    fuse_qkv_projections = memory.fuse_qkv_projections
    unfuse_qkv_projections = memory.unfuse_qkv_projections
    enable_freeu = memory.enable_freeu
    disable_freeu = memory.disable_freeu

    # IP-Adapters: functions of ip_adapter.py.

    load_ip_adapter = load_ip_adapter
    set_ip_adapter_scale = set_ip_adapter_scale
    unload_ip_adapter = unload_ip_adapter
    encode_image = encode_image
    prepare_ip_adapter_image_embeds = prepare_ip_adapter_image_embeds

    # Animation: functions of long_animation.py.

    enable_free_noise = long_animation.enable_free_noise
    enable_free_noise_split_inference = long_animation.enable_free_noise_split_inference
    disable_free_noise = long_animation.disable_free_noise
    enable_free_init = long_animation.enable_free_init
    disable_free_init = long_animation.disable_free_init

    @property
    def free_noise_enabled(self) -> bool:
        """Whether `enable_free_noise` is on."""
        return self._windows is not None

    @property
    def free_init_enabled(self) -> bool:
        """Whether `enable_free_init` is on."""
        return self._free_init is not None

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
            offload=self._offload,
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
