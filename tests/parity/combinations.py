"""What the cases of `cases` are made of: pictures, callbacks, ways to a state of the LoRAs, and how a case is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..fakehub import (
    IP_ADAPTER,
    LORA_SD15,
    LORA_SSD1B,
    LORA_XL,
    PAPERCUT,
    REPOSITORIES,
    STEERING,
    ZOOM_IN,
    stable_diffusion,
)
from ..fakenets import controlnet, motion_adapter, t2i_adapter
from .pictures import LIBRARIES, NEGATIVE, OTHER_PROMPT, PROMPT, hole, load, shapes, unheard

# What makes a steering network -> the argument that it is passed as, and its class.
ARGUMENTS = {
    controlnet: ("controlnet", "ControlNetModel"),
    t2i_adapter: ("adapter", "T2IAdapter"),
    motion_adapter: ("motion_adapter", "MotionAdapter"),
}
# A value in `Case.without`: do not pass the argument.
LEFT_OUT: Any = object()


@dataclass(frozen=True)
class Case:
    """One call of a pipeline class that both libraries have.

    Attributes:
        pipeline: the class.
        model: the repository.
        call: arguments beside a prompt, four steps and no guidance; ``seed`` is one, or one a picture.
        without: arguments that leave the condition out which the case is about; None runs without the ``setup``.
        nets: repositories of ControlNets, T2I-Adapters and a motion adapter.
        scheduler: the class that takes the place of the model's own, and its options.
        setup: name of a function in `SETUPS`.
    """

    pipeline: str
    model: str
    call: Mapping[str, Any]
    without: Mapping[str, Any] | None
    nets: tuple[str, ...] = ()
    scheduler: tuple[str, Mapping[str, Any]] = ("LCMScheduler", {})
    setup: str | None = None


# Start pictures, control pictures, frames

START, OTHER, LINES, RELIEF = (shapes(seed) for seed in (11, 12, 13, 14))
WIDE = shapes(15, (88, 72))
LARGE, LARGE_MASK = shapes(16, (112, 96)), hole((112, 96))
MASK = hole()
ARRAY = np.asarray(START)[None].astype(np.float32) / 255
TENSOR = torch.from_numpy(ARRAY).permute(0, 3, 1, 2)
LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
VIDEO, LINE_FRAMES, OTHER_VIDEO = ([shapes(10 * n + i) for i in range(4)] for n in (2, 3, 4))

GUIDED = {"guidance_scale": 1.8, "negative_prompt": NEGATIVE}
NO_NEGATIVE = {"negative_prompt": None}
PROMPTS = {"prompt": [PROMPT, OTHER_PROMPT]}
NO_CONTROL = {"controlnet_conditioning_scale": 0.0}
NO_ADAPTER = {"adapter_conditioning_scale": 0.0}
EDITED = {"prompt": OTHER_PROMPT}
# Schedulers as they are used without few-step adapters.
OWN_STEPS = {"num_inference_steps": 6, "guidance_scale": 3.0}
SAMPLERS: Mapping[str, tuple[tuple[str, Mapping[str, Any]], Mapping[str, Any]]] = {
    "DDIM": (("DDIMScheduler", {}), {**OWN_STEPS, "eta": 0.5}),
    "Euler": (("EulerDiscreteScheduler", {}), OWN_STEPS),
    "Euler a": (("EulerAncestralDiscreteScheduler", {}), OWN_STEPS),
    "DPM++ 2M": (("DPMSolverMultistepScheduler", {}), OWN_STEPS),
    "DPM++ 2M Karras": (("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}), OWN_STEPS),
    "TCD": (("TCDScheduler", {}), {"eta": 0.3}),
}


# Callbacks


def brighten(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Change the latents after the first step."""
    return {"latents": tensors["latents"] * 0.8 + 0.1} if step == 0 else {}


def stop_guidance(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """End guidance after the first step, as diffusers' documentation shows it."""
    if step != 0:
        return {}
    pipe._guidance_scale = 0.0
    return {name: value.chunk(2)[-1] for name, value in tensors.items() if name != "latents"}


def interrupt(pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
    """Leave the loop after the second step."""
    pipe._interrupt = step == 1
    return {}


def exchange_text(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Turn the text into its opposite half-way."""
    return {"prompt_embeds": -tensors["prompt_embeds"]} if step == 1 else {}


# Ways to a state of the LoRAs and image prompts


def style(pipe: Any, weights: Any = (1.0, 0.8)) -> None:
    pipe.load_lora_weights(LORA_XL, adapter_name="lcm")
    pipe.load_lora_weights(PAPERCUT, weight_name="papercut.safetensors", adapter_name="papercut")
    pipe.set_adapters(["lcm", "papercut"], adapter_weights=list(weights))


def fuse(pipe: Any) -> None:
    style(pipe)
    pipe.fuse_lora(lora_scale=0.7)


def fuse_and_unload(pipe: Any) -> None:
    fuse(pipe)
    pipe.unload_lora_weights()


def fuse_one_and_unload(pipe: Any) -> None:
    style(pipe)
    pipe.fuse_lora(adapter_names=["papercut"], lora_scale=0.9)
    pipe.unload_lora_weights()


def fuse_unet_only(pipe: Any) -> None:
    style(pipe)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()


def unfuse_and_choose(pipe: Any) -> None:
    fuse(pipe)
    pipe.unfuse_lora()
    pipe.set_adapters("papercut", 1.1)


def delete_one(pipe: Any) -> None:
    style(pipe)
    pipe.delete_adapters("lcm")
    pipe.set_adapters("papercut", 0.9)


def disable_and_enable(pipe: Any) -> None:
    style(pipe)
    pipe.disable_lora()
    pipe.enable_lora()


def load_again(pipe: Any) -> None:
    style(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(LORA_XL)


def by_block(pipe: Any) -> None:
    blocks = {
        "unet": {"down": 0.7, "mid": 0.4, "up": {"block_0": [0.2, 1.1], "block_1": 0.9}},
        "text_encoder": 0.5,
        "text_encoder_2": 0.8,
    }
    style(pipe, (1.0, blocks))


def motion_lora(pipe: Any) -> None:
    pipe.load_lora_weights(LORA_SD15, adapter_name="lcm")
    pipe.load_lora_weights(ZOOM_IN, weight_name="diffusion_pytorch_model.safetensors", adapter_name="zoom")
    pipe.set_adapters(["lcm", "zoom"], adapter_weights=[0.55, 1.2])


def image_prompt(pipe: Any, name: str = "ip-adapter_sd15", folder: str = "models", scale: Any = 0.7) -> None:
    pipe.load_ip_adapter(IP_ADAPTER, subfolder=folder, weight_name=f"{name}.safetensors")
    pipe.set_ip_adapter_scale(scale)


def image_prompt_and_lora(pipe: Any) -> None:
    pipe.load_lora_weights(LORA_SD15)
    image_prompt(pipe)


def motion_lora_and_image_prompt(pipe: Any) -> None:
    motion_lora(pipe)
    image_prompt(pipe)


SETUPS: Mapping[str, Callable[[Any], None]] = {
    "LCM-LoRA": lambda pipe: pipe.load_lora_weights(LORA_SD15),
    "LCM-LoRA XL": lambda pipe: pipe.load_lora_weights(LORA_XL),
    "LCM-LoRA SSD-1B": lambda pipe: pipe.load_lora_weights(LORA_SSD1B),
    "style": style,
    "fuse": fuse,
    "fuse and unload": fuse_and_unload,
    "fuse one and unload": fuse_one_and_unload,
    "fuse the UNet's": fuse_unet_only,
    "unfuse and choose": unfuse_and_choose,
    "delete one": delete_one,
    "disable and enable": disable_and_enable,
    "load again": load_again,
    "by block": by_block,
    "motion LoRA": motion_lora,
    "image prompt": image_prompt,
    "image prompt plus": partial(image_prompt, name="ip-adapter-plus_sd15", scale=0.5),
    "image prompt XL": partial(image_prompt, name="ip-adapter_sdxl", folder="sdxl_models"),
    "image prompt by block": partial(
        image_prompt, name="ip-adapter_sdxl", folder="sdxl_models", scale={"up": {"block_0": [0.0, 1.0]}}
    ),
    "image prompt and LCM-LoRA": image_prompt_and_lora,
    "image prompt and motion LoRA": motion_lora_and_image_prompt,
}


# Running them


class Pipelines:
    """The cases' pipelines of both libraries, each made once; those without a setup share their model's networks."""

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], Any] = {}
        self.configs: dict[tuple[str, str], Any] = {}

    def __call__(self, library: str, case: Case, setup: bool = True) -> Any:
        name = case.setup if setup else None
        key = library, case.pipeline, case.model, case.nets, name
        if key not in self.made:
            with unheard(library):
                self.made[key] = self.make(library, case)
                if name is not None:
                    SETUPS[name](self.made[key])
        pipe = self.made[key]
        scheduler, options = case.scheduler
        config = self.configs[library, case.model]
        with unheard(library):
            pipe.scheduler = getattr(LIBRARIES[library], scheduler).from_config(config, **options)
        return pipe

    def make(self, library: str, case: Case) -> Any:
        """A pipeline with networks of its own where the case changes them; animations always do."""
        module = LIBRARIES[library]
        steering: dict[str, list[Any]] = {}
        for name in case.nets:
            argument, kind = ARGUMENTS[STEERING[name][1]]
            own = getattr(module, kind).from_pretrained(name)
            steering.setdefault(argument, []).append(own)
        options = {name: nets if len(nets) > 1 else nets[0] for name, nets in steering.items()}
        if "XL" in case.pipeline and isinstance(options.get("adapter"), list):
            options["adapter"] = module.MultiAdapter(options["adapter"])
        shared = case.setup is None and "motion_adapter" not in options
        components = self.components(library, case.model) if shared else self.load(library, case.model).components
        cls = getattr(module, case.pipeline)
        known = inspect.signature(cls.__init__).parameters
        options |= {name: value for name, value in components.items() if name in known}
        pipe = cls.from_pretrained(case.model, torch_dtype=torch.float32, **options)
        pipe.set_progress_bar_config(disable=True)
        if library == "diffusers" and case.pipeline == "AnimateDiffSDXLPipeline":
            # Its UNet with motion is made without SDXL's embedding of pooled text and sizes, which stays random.
            pipe.unet.add_embedding.load_state_dict(components["unet"].add_embedding.state_dict())
        return pipe

    def components(self, library: str, model: str) -> dict[str, Any]:
        if (library, model) not in self.made:
            self.made[library, model] = self.load(library, model).components
        return self.made[library, model]

    def load(self, library: str, model: str) -> Any:
        options = {"safety_checker": None} if REPOSITORIES[model][0] is stable_diffusion else {}
        pipe = load(library, model, lcm=False, **options)
        self.configs[library, model] = pipe.scheduler.config
        return pipe


def paint_case(pipe: Any, case: Case, **changes: Any) -> np.ndarray:
    """(N, H, W, 3) in [0, 1], of animations (N, F, H, W, 3)."""
    call = {"prompt": PROMPT, "seed": 0, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np"}
    call |= {**case.call, **changes}
    seed = call.pop("seed")
    seeds = [seed] if isinstance(seed, int) else seed
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    arguments = {name: value for name, value in call.items() if value is not LEFT_OUT}
    with unheard(pipe):
        output = pipe(**arguments, generator=generators[0] if isinstance(seed, int) else generators)
    pictures = output.frames if hasattr(output, "frames") else output.images
    if isinstance(pictures, list):
        pictures = np.stack([np.asarray(picture) for picture in pictures]) / 255
    return pictures
