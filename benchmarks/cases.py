"""What is measured, and who takes part: the cases and the peers as data, and the job that one makes of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import weights


@dataclass(frozen=True)
class Case:
    """One picture or batch to paint. ``task`` is ``text``, ``img2img``, ``controlnet`` or ``animation``."""

    name: str
    model: str = "sd15"
    task: str = "text"
    size: int = 512
    steps: int = 4
    batch: int = 1
    tiny_vae: bool = False
    strength: float = 0.5
    frames: int = 16
    loras: int = 1
    styles: bool = False

    def shrunk(self) -> Case:
        """The same with a tiny model, for a trial of the benchmark itself."""
        if self.model == "emoji":
            return self
        model = "tiny-xl" if self.model == "sdxl" else "tiny"
        size, frames = max(64, self.size // 8), min(self.frames, 4)
        return dataclasses.replace(self, model=model, size=size, batch=min(self.batch, 2), frames=frames)

    def job(self, options: Mapping[str, Any], cache: Path, device: str) -> dict[str, Any]:
        """What a peer's process is told: the case, where its files are, and the peer's own ``options``."""
        parts = ["repository", "lcm-lora"]
        parts += ["tiny-vae"] if self.tiny_vae else []
        parts += {"controlnet": ["controlnet"], "animation": ["motion-adapter"]}.get(self.task, [])
        files: dict[str, Any] = {part: str(weights.find(self.model, part, cache)) for part in parts}
        if self.styles:
            count = 2 if self.model == "emoji" else 3
            files["styles"] = [str(weights.find(self.model, f"style-{i + 1}", cache)) for i in range(count)]
        job = dataclasses.asdict(self) | {"files": files, "device": device, "warm_up": True}
        job |= {"xl": self.model in ("sdxl", "tiny-xl"), "dtype": "float32", "runtime": {}}
        return job | {"cache": str(cache / self.model)} | dict(options)


CASES: dict[str, tuple[Case, ...]] = {
    "sd15-4": (Case("sd15-4"),),
    "sd15-1": (Case("sd15-1", steps=1),),
    "sd15-tiny-vae": (Case("sd15-tiny-vae", tiny_vae=True),),
    "sdxl-4": (Case("sdxl-4", "sdxl", size=1024),),
    "img2img": (Case("img2img", task="img2img"),),
    "controlnet": (Case("controlnet", task="controlnet"),),
    "animation": (Case("animation", task="animation"),),
    "batch": tuple(Case(f"batch-{count}", batch=count) for count in (1, 4, 8)),
    "resolution": tuple(Case(f"resolution-{size}", size=size) for size in (256, 512, 768, 1024)),
    "emoji": (Case("emoji", "emoji", size=128),),
}
EVERYTHING = frozenset({"text", "img2img", "controlnet", "animation"})


@dataclass(frozen=True)
class Peer:
    """A way to paint: the module in ``peers/`` that does, its options, and the tasks and VAEs that it can.

    ``own_noise``: it draws its noise otherwise, so that its pictures cannot be compared.
    """

    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tasks: frozenset[str] = EVERYTHING
    tiny_vae: bool = True
    own_noise: bool = False

    def can(self, case: Case) -> bool:
        """Whether it can paint the case at all."""
        return case.task in self.tasks and (self.tiny_vae or not case.tiny_vae)


def ours(dtype: str, **runtime: Any) -> Peer:
    """Fourstroke in this dtype with these `RuntimeOptions`."""
    return Peer("ours", {"dtype": dtype, "runtime": runtime})


TEXT = frozenset({"text"})
PEERS: dict[str, Peer] = {
    "diffusers": Peer("torch_diffusers"),
    "diffusers-bf16": Peer("torch_diffusers", {"dtype": "bfloat16"}),
    "diffusers-compile": Peer("torch_diffusers", {"dtype": "bfloat16", "compile": True}),
    "openvino-fp32": Peer("openvino_diffusers", {"precision": "f32"}, TEXT),
    "openvino-bf16": Peer("openvino_diffusers", {"precision": "bf16"}, TEXT),
    "openvino-genai": Peer("openvino_genai_pipeline", {"precision": "bf16"}, TEXT, tiny_vae=False),
    "sdcpp-q8_0": Peer("sdcpp", {"wtype": "q8_0", "conv_direct": False}, TEXT, own_noise=True),
    "sdcpp-q8_0-direct": Peer("sdcpp", {"wtype": "q8_0", "conv_direct": True}, TEXT, own_noise=True),
    "sdcpp-q4_0": Peer("sdcpp", {"wtype": "q4_0", "conv_direct": False}, TEXT, own_noise=True),
    "fourstroke": Peer("ours", {"dtype": None}),
    "fourstroke-fp32": ours("float32", backend="eager"),
    "fourstroke-bf16": ours("bfloat16", backend="eager"),
    "fourstroke-compile": ours("bfloat16", backend="compile"),
    "fourstroke-openvino": ours("bfloat16", backend="openvino"),
    "fourstroke-int8": ours("bfloat16", backend="openvino", quantize="int8"),
    # Where there is little memory; it takes part only where it is named.
    "fourstroke-int8-offload": ours("bfloat16", backend="openvino", quantize="int8", offload=True),
    # For GPUs.
    "diffusers-fp16": Peer("torch_diffusers", {"dtype": "float16"}),
    "diffusers-fp16-compile": Peer("torch_diffusers", {"dtype": "float16", "compile": True}),
    "streamdiffusion": Peer("stream_diffusion", {"dtype": "float16"}, TEXT, own_noise=True),
    "fourstroke-fp16": ours("float16", backend="eager"),
    "fourstroke-cudagraph": ours("float16", backend="cudagraph"),
}
REFERENCE = "fourstroke-fp32"  # what pictures are compared with
ON_GPU = ("diffusers-fp16", "diffusers-fp16-compile", "streamdiffusion", "fourstroke-fp16", "fourstroke-cudagraph")
ON_CPU = tuple(name for name in PEERS if name not in (*ON_GPU, "fourstroke-int8-offload"))
