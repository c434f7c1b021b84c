"""The engine: one pipeline, set up for few steps, that serves every kind of request and loads what a request names."""

from __future__ import annotations

import dataclasses
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from PIL import Image

from . import hub, schedulers
from .denoise import DenoiseState
from .families import IMAGE_ENCODERS, WEIGHTS, Base, family_of, look_at
from .latents import decode
from .loading import Model
from .lora.keys import unwrap
from .models.controlnet import ControlNetModel
from .models.ip_adapter import detach_ip_adapters_
from .models.motion import MotionAdapter, attach_motion_
from .models.t2i_adapter import T2IAdapter
from .models.vae_tiny import AutoencoderTiny
from .pipelines.components import lora_file
from .pipelines.pipeline import DiffusionPipeline
from .plan import make_plan, split_place
from .request import Control, GenerateRequest, GenerateResult
from .runtime.cache import cache_folder
from .runtime.memory_format import channels_last_
from .runtime.openvino import Accelerated, accelerated
from .runtime.options import RuntimeOptions, run_with_
from .runtime.quantize import OBSERVED, Range, fingerprint, in_eight_bits, load_ranges, save_ranges
from .runtime.recall import recall_
from .runtime.spill import Spill
from .runtime.widening import widen_

CALIBRATION = (
    "a red fox in the snow",
    "a photograph of a street at night, many lights",
    "a portrait of an old man",
    "a bowl of fruit on a table",
)
"""What is painted, at the model's own size, to learn the ranges of a UNet's layers."""
TILE_SHAPES = 4
"""Of the tiles of a picture: inside, at the right and the lower rim, in the corner."""
MAX_SEED = 2**32
IMAGE_ENCODER = "image_encoder"

NetworkT = TypeVar("NetworkT", bound=Model)


class Engine:
    """A pipeline set up for few steps, and whatever its requests name: control networks, adapters, motion.

    What a request needs is loaded when it is first needed, and kept. Which scheduler runs, with how many steps, is told
    by what is loaded: a LoRA, motion adapter or model that is known for few steps (Hyper-SD, Lightning, TCD, PCM, DMD2,
    AnimateLCM, Turbo, a full LCM, …) runs as its authors run it; any other gets the LCM scheduler and its family's
    LCM-LoRA.

    Args:
        model: hub id, shipped name, folder or single-file checkpoint, or what `fourstroke.families.look_at` made of it.
        loras: LoRAs as ``name`` or ``name:weight``: hub id, ``owner/name/path/in/it``, folder or file. Without a weight
            it is 1, or what the LoRA's authors recommend.
        lcm: set up for few steps. Otherwise the model's own scheduler runs, and no LoRA is added.
        motion: motion adapter for animations; by default that of the model's family. With AnimateLCM's the scheduler
            gets the linear betas that it was trained with, for pictures too.
        scheduler: class in `fourstroke.schedulers` and its options, in place of the one that would be chosen.
        device: default the GPU if there is one.
        dtype: default float16 on a GPU and float32 on the CPU, where OpenVINO computes in bfloat16 if it can.
        runtime: backend, quantisation, autoencoder, offloading; see `fourstroke.runtime.options.RuntimeOptions`.
        options: further arguments of `DiffusionPipeline.from_pretrained`.

    Attributes:
        pipeline: what runs the requests.
        plan: LoRAs and settings, see `fourstroke.plan.Plan`.
        runtime: how its networks run, with the backend that ``"auto"`` came to.
        scheduler_options: those in which the scheduler differs from the model's configuration.

    Raises:
        FileNotFoundError, ValueError: see `DiffusionPipeline.from_pretrained` and ``load_lora_weights``; or there is no
            such device.

    Warns:
        float16 is asked for on a CPU, where float32 runs instead; or nothing is known that makes the model a few-step
        one.
    """

    def __init__(
        self,
        model: str | Base = "emoji",
        *,
        loras: Sequence[str] = (),
        lcm: bool = True,
        motion: str | None = None,
        scheduler: tuple[str, Mapping[str, Any]] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        runtime: RuntimeOptions | None = None,
        **options: Any,
    ):
        device, found = where_to_run(device, dtype)
        wanted, dtype = None if dtype is None else found, found
        where = {name: options[name] for name in hub.OPTIONS if name in options}
        self.base = model if isinstance(model, Base) else look_at(model, options.get("config"), **where)
        # A revision is the model's, not that of what is added to it.
        self._where = {name: value for name, value in where.items() if name != "revision"}
        self._variant = options.get("variant")
        self.plan = make_plan(self.base, loras, lcm=lcm, motion=motion, where=self._where)
        self.runtime = (runtime or RuntimeOptions()).resolved(device, self.base.width)
        self._precision = None if wanted is None else "f32" if wanted == torch.float32 else "bf16"
        if self.runtime.backend == "openvino" and wanted != torch.float32:
            # The weights alone: OpenVINO makes of them what it computes in, and files in float16 stay mapped.
            dtype = torch.float16
        self.pipeline = load_pipeline(self.base.name, torch_dtype=dtype, **options)
        self.pipeline.set_progress_bar_config(disable=True)
        self._spill: Spill | None = None
        self._set_runtime(device, dtype)
        self._networks: dict[tuple[str, str], Any] = {}
        self._image_prompts: tuple[str, ...] = ()
        self._image_encoder = IMAGE_ENCODER
        self._set_scheduler(scheduler)
        self._load_loras()

    @property
    def _unet(self) -> Any:
        """The UNet, without the wrapper that torch.compile puts around it."""
        return unwrap(self.pipeline.unet)

    def _set_runtime(self, device: torch.device, dtype: torch.dtype) -> None:
        pipe, options = self.pipeline, self.runtime
        encoders = pipe._parts().text_encoders
        for encoder in encoders:
            recall_(encoder)
        if options.vae == "tiny":
            place = self.base.family.tiny_vae
            if place is None:
                raise ValueError(f"There is no tiny autoencoder known for {self.base.family.name}; leave vae='full'.")
            pipe.vae = AutoencoderTiny.from_pretrained(place, dtype=dtype, **self._where)
        if options.vae == "tiled":
            pipe.enable_vae_tiling()
        if options.offload and device.type != "cpu":
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        if options.backend == "openvino":
            # It is small, and what surrounds its encoder and decoder runs in torch.
            pipe.vae.to(torch.float32)
            for encoder in encoders if dtype == torch.float16 else ():
                widen_(encoder)
        if options.offload and device.type == "cpu":
            self._spill = spill = Spill(cache_folder("offload"))
            pipe.adapters.settle = spill.take
            for parameter in (parameter for network in pipe.networks for parameter in network.parameters()):
                parameter.data = spill.take(parameter.data)
        self._accelerate(pipe.unet, pipe.vae)
        if options.backend == "eager" and device.type == "cpu":
            channels_last_(pipe.vae)
        if options.vae == "tiled":
            for forward in accelerated(pipe.vae).values():
                forward.shapes = TILE_SHAPES

    def _accelerate(self, *networks: Any) -> None:
        run_with_(networks, self.runtime.backend, precision=self._precision, spill=self._spill)

    def _quantize(self) -> None:
        """Let UNet and decoder run in 8 bits, by the ranges on disk or, once a model, after a calibration."""
        parts = {"unet": self._unet, "decoder": self.pipeline.vae.decoder}
        forwards: dict[str, Accelerated] = {name: vars(part)["forward"] for name, part in parts.items()}
        if all(forward.ranges is not None for forward in forwards.values()):
            return
        sources = [self._unet.source, self.pipeline.vae.source]
        files = [place[0] for source in sources if source is not None for place in source.places.values()]
        loras = [(str(file.path), file.weight) for file in self.plan.loras]
        files += [file.path for file in self.plan.loras]
        name = fingerprint(files, CALIBRATION, OBSERVED, loras)
        path = cache_folder("ranges") / f"{name}.safetensors"
        ranges = load_ranges(path)
        if ranges is None:
            ranges = self._calibrate(**forwards)
            save_ranges(path, ranges)
        for name, forward in forwards.items():
            own = {key.removeprefix(f"{name}."): found for key, found in ranges.items() if key.startswith(f"{name}.")}
            forward.ranges = in_eight_bits(own)
            forward.clear()

    def _calibrate(self, unet: Accelerated, decoder: Accelerated) -> dict[str, Range]:
        """The ranges of both networks' layers (``unet.….conv1``), seen while the calibration's pictures are painted."""
        seen: dict[str, dict[str, Range]] = {"unet": {}, "decoder": {}}
        unet.observed, decoder.observed = seen["unet"], seen["decoder"]
        requests = [self._plain_request(prompt, seed) for seed, prompt in enumerate(CALIBRATION)]
        painted = [self._paint(self.load(request)).images for request in requests]
        unet.observed = None
        unet.clear()  # before the decoder is compiled: the two need not be in memory together
        with torch.no_grad():
            for latents in painted:
                decode(self.pipeline.vae, latents)
        decoder.observed = None
        return {f"{part}.{name}": found for part, own in seen.items() for name, found in own.items()}

    def _plain_request(self, prompt: str, seed: int) -> GenerateRequest:
        """What any model can do: a picture of its own size, all of it new."""
        height, width = self.base.size
        fields: dict[str, Any] = {"height": height, "width": width, "seed": seed, "output_type": "latent"}
        if self.base.channels == 9:
            fields["image"] = Image.new("RGB", (width, height), "grey")
            fields["mask_image"] = Image.new("L", (width, height), "white")
        return self.request(prompt, **fields)

    def _set_scheduler(self, wanted: tuple[str, Mapping[str, Any]] | None) -> None:
        plan, current = self.plan, self.pipeline.scheduler
        kind, options = type(current), {}
        if wanted is not None:
            kind, options = getattr(schedulers, wanted[0]), dict(wanted[1])
            if plan.settings is not None:
                # Timesteps and eta were recommended for the scheduler that is not used.
                settings = dataclasses.replace(plan.settings, timesteps=None, eta=0.0)
                self.plan = dataclasses.replace(plan, settings=settings)
        elif plan.settings is not None:
            kind, options = getattr(schedulers, plan.settings.scheduler), dict(plan.settings.scheduler_options)
        if plan.betas is not None:
            options["beta_schedule"] = plan.betas
        self.scheduler_options = options
        if kind is not type(current) or options:
            self.pipeline.scheduler = kind.from_config(current.config, **options)

    def _load_loras(self) -> None:
        files = self.plan.loras
        if any(file.moves for file in files):
            self._attach_motion()
        names = [f"lora_{i}" for i in range(len(files))]
        for name, file in zip(names, files, strict=True):
            self.pipeline.load_lora_weights(file.path, adapter_name=name)
        if files:
            self.pipeline.set_adapters(names, [file.weight for file in files])

    def request(self, prompt: Any, **fields: Any) -> GenerateRequest:
        """A request for ``prompt`` with these ``fields``; steps, guidance and such are as what is loaded wants them.

        Raises:
            ValueError, TypeError: see `GenerateRequest`.
        """
        settings, values = self.plan.settings, {}
        if settings is not None:
            for name in ("num_inference_steps", "guidance_scale", "eta"):
                values[name] = getattr(settings, name)
            if settings.timesteps and not fields.keys() & {"num_inference_steps", "timesteps", "sigmas"}:
                values["timesteps"] = settings.timesteps
        return GenerateRequest(**{"prompt": prompt, **values, **fields})

    def generate(
        self,
        request: GenerateRequest | str,
        *,
        on_step: Callable[[DenoiseState], None] | None = None,
        **fields: Any,
    ) -> GenerateResult:
        """Paint one request.

        Networks go by name: ``Control(image, model="canny")``, where the name is a short one of the model's family
        (see `fourstroke.families`), a hub id, a folder or a file. Pictures for IP-Adapters may be such controls too, to
        give them a scale and a model; the others are seen by the family's usual IP-Adapter, at scale 1.

        Args:
            request: a `GenerateRequest`, or a prompt and the request's other fields as keywords; `Engine.request` says
                what those that are left out are.
            on_step: called after each step.

        Returns:
            The pictures; picture i has the seed ``seed + i`` and depends on nothing else of its batch.

        Raises:
            ValueError, TypeError: the request breaks a rule; nothing has run by then.
            FileNotFoundError: a network that it names is not to be found.
        """
        if isinstance(request, GenerateRequest):
            request = dataclasses.replace(request, **fields)
        else:
            request = self.request(request, **fields)
        if request.seed is None and request.generator is None:
            request = dataclasses.replace(request, seed=secrets.randbelow(MAX_SEED))
        if self.runtime.quantize:
            self._quantize()
        return self._paint(self.load(request), on_step)

    def _paint(self, request: GenerateRequest, on_step: Callable[[DenoiseState], None] | None = None) -> GenerateResult:
        settings = self.plan.settings
        with warnings.catch_warnings():
            if settings is not None and settings.timesteps == request.timesteps:
                # They are the ones that the network was distilled on, whatever the scheduler thinks of them.
                warnings.filterwarnings("ignore", message="The custom timesteps")
            return self.pipeline.generate(request, on_step=on_step)

    def load(self, request: GenerateRequest) -> GenerateRequest:
        """Load what ``request`` names and is not there yet, as `generate` does first.

        Returns:
            The request as the pipeline takes it.

        Raises:
            ValueError, FileNotFoundError: see `generate`.
        """
        self.base.check(request)
        if request.num_frames is not None:
            self._attach_motion()
        pipe: Any = self.pipeline
        pipe.controlnet = [self._network(ControlNetModel, "ControlNet", control) for control in request.controls]
        pipe.adapter = [self._network(T2IAdapter, "T2I-Adapter", control) for control in request.adapters]
        return self._show_image_prompts(request)

    def _network(self, cls: type[NetworkT], kind: str, control: Control) -> NetworkT:
        place = self.base.family.find(kind, control.model)
        if (kind, place) not in self._networks:
            network = self._read(cls, kind, place)
            check_fit(kind, place, network, self._unet)
            if isinstance(network, ControlNetModel):
                self._accelerate(network)
            self._networks[kind, place] = network.to(self.pipeline.device)
        return self._networks[kind, place]

    def _read(self, cls: type[NetworkT], kind: str, place: str) -> NetworkT:
        source, inside = split_place(place)
        dtype, where = self.pipeline.dtype, self._where
        try:
            if place.endswith(WEIGHTS):
                return cls.from_single_file(lora_file(source, inside, None, where), dtype=dtype)
            return cls.from_pretrained(source, subfolder=inside, variant=self._variant, dtype=dtype, **where)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{kind} {place}: {error}") from error
        except TypeError as error:  # networks of this kind do not come in one file
            raise ValueError(f"{kind} {place}: {error}") from error

    def _attach_motion(self) -> None:
        """Put the motion adapter into the UNet, once; LoRAs that change it must be loaded after it."""
        if self.pipeline._parts().motion_frames is not None:
            return
        if self.plan.motion is None:
            raise ValueError(f"There is no motion adapter known for {self.base.family.name}; name one: motion=….")
        adapter = self._read(MotionAdapter, "Motion adapter", self.plan.motion)
        attach_motion_(self._unet, adapter)

    def _show_image_prompts(self, request: GenerateRequest) -> GenerateRequest:
        """Attach the IP-Adapters that the request's pictures want, and no others; the request with pictures alone."""
        given = request.ip_adapter_image
        entries = [] if given is None else given if isinstance(given, list | tuple) else [given]
        controls = [entry if isinstance(entry, Control) else Control(entry) for entry in entries]
        models = [control.model for control in controls] or [None] * len(request.ip_adapter_image_embeds or ())
        places = tuple(self.base.family.find("IP-Adapter", model) for model in models)
        if places != self._image_prompts:
            self._attach_image_prompts(places)
        if not places:
            return request
        self.pipeline.set_ip_adapter_scale([control.scale for control in controls] or 1.0)
        images = [control.image for control in controls] or None
        return dataclasses.replace(request, ip_adapter_image=images)

    def _attach_image_prompts(self, places: tuple[str, ...]) -> None:
        pipe: Any = self.pipeline
        detach_ip_adapters_(self._unet)
        self._image_prompts = ()
        if not places:
            return
        encoder = IMAGE_ENCODERS.get(places[0], IMAGE_ENCODER)
        if encoder != self._image_encoder:
            pipe.image_encoder, self._image_encoder = None, encoder
        sources = [split_place(place) for place in places]
        inner = [(inside or "").rpartition("/") for _, inside in sources]
        try:
            pipe.load_ip_adapter(
                [source for source, _ in sources],
                [folder or None for folder, _, _ in inner],
                [file or None for _, _, file in inner],
                encoder,
                **self._where,
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"IP-Adapter {', '.join(places)}: {error}") from error
        self._image_prompts = places


def where_to_run(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """The device and number format to run in: those asked for, or the GPU in float16, or the CPU in float32.

    Raises:
        ValueError: there is no such device here.

    Warns:
        float16 is asked for on a CPU; float32 runs instead.
    """
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    wanted = str(device or ("cuda" if here["cuda"] else "cpu"))
    kind, _, index = wanted.partition(":")
    if kind not in here or not (index or "0").isdecimal():
        raise ValueError(f"device is {wanted!r}; it is one of {', '.join(here)}, or such as cuda:1.")
    if int(index or 0) >= here[kind]:
        raise ValueError(f"device is {wanted!r}, but there is no such device here; use 'cpu'.")
    if kind == "cpu" and dtype == torch.float16:
        warnings.warn("float16 is for GPUs: float32 runs on the CPU instead.", stacklevel=3)
        dtype = torch.float32
    return torch.device(wanted), dtype or (torch.float16 if kind == "cuda" else torch.float32)


def check_fit(kind: str, place: str, network: Model, unet: Model) -> None:
    """Refuse a control network that was made for another family.

    Raises:
        ValueError: it was; the message names what it was made for.
    """
    theirs, ours = network.config, unet.config
    levels = ours["block_out_channels"]
    if isinstance(network, T2IAdapter):
        # A light adapter has one level more than it has entries.
        widths = (*theirs["channels"], theirs["channels"][-1])[: len(levels)]
        xl = theirs["adapter_type"].endswith("_xl")
        fits = widths == levels and xl == (ours["addition_embed_type"] is not None)
        made_for = f"{'SDXL' if xl else 'SD'} of {'-'.join(map(str, widths))} channels"
    else:
        fits = all(theirs[name] == ours[name] for name in ("cross_attention_dim", "block_out_channels"))
        made_for = family_of(theirs).name
    if not fits:
        raise ValueError(
            f"{kind} {place} was made for {made_for}, the model is {family_of(ours).name}; use one of its family."
        )


def load_pipeline(model: str, **options: Any) -> DiffusionPipeline:
    """Load ``model``: a single file by its suffix, anything else as `DiffusionPipeline.from_pretrained` does."""
    if model.endswith(WEIGHTS):
        return DiffusionPipeline.from_single_file(model, **options)
    return DiffusionPipeline.from_pretrained(model, **options)
