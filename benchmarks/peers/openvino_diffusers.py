"""diffusers' pipeline over OpenVINO networks, the way of optimum-intel and fastsdcpu: static shapes, precision hint."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from .openvino_export import MODEL, exported
from .protocol import Clock, Job, Paint, serve
from .torch_diffusers import request


def load(job: Job, clock: Clock) -> Paint:
    import openvino

    diffusers: Any = importlib.import_module("diffusers")
    folder, repository = exported(job), Path(job["files"]["repository"])
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": job["precision"], "INFERENCE_NUM_THREADS": job["threads"]}
    settings["PERFORMANCE_HINT"] = "LATENCY"  # and no CACHE_DIR: what it reads back in bfloat16 computes something else
    rows, side = job["batch"], job["size"] // 8

    def compiled(name: str, part: str) -> Any:
        model = core.read_model(folder / name / MODEL)
        known = {"input_ids": [rows, 77], "sample": [rows, 4, side, side], "latent_sample": [rows, 4, side, side]}
        known |= {"timestep": [1], "time_ids": [rows, 6]}
        shapes = {}
        for port in model.inputs:
            width = port.partial_shape[-1]
            more = {"encoder_hidden_states": [rows, 77, width], "text_embeds": [rows, width]}
            shapes[port] = (known | more)[port.any_name]
        model.reshape(shapes)
        network = core.compile_model(model, "CPU", settings)
        infer = network.create_infer_request()

        def run(*inputs: Any) -> list[torch.Tensor]:
            arrays = [np.asarray(value) for value in inputs]
            infer.infer(arrays, share_inputs=True)
            return [torch.from_numpy(infer.get_output_tensor(i).data.copy()) for i in range(len(network.outputs))]

        return clock.timed(run, part)

    xl = job["xl"]
    cls = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    parts: dict[str, Any] = {}
    for name in ("text_encoder", "text_encoder_2") if xl else ("text_encoder",):
        config = json.loads((repository / name / "config.json").read_text())
        parts[name] = TextEncoder(compiled(name, "text"), SimpleNamespace(config=SimpleNamespace(**config)))
    parts["unet"] = UNet(compiled("unet", "unet"), skeleton(diffusers.UNet2DConditionModel, repository / "unet"))
    tiny = job["tiny_vae"]
    folder_of_vae = job["files"]["tiny-vae"] if tiny else repository / "vae"
    vae = skeleton(diffusers.AutoencoderTiny if tiny else diffusers.AutoencoderKL, folder_of_vae)
    parts["vae"] = VAE(compiled("vae_tiny_decoder" if tiny else "vae_decoder", "vae"), vae)
    pipe = cls.from_pretrained(repository, **dict.fromkeys(parts))
    for name, part in parts.items():
        setattr(pipe, name, part)
    pipe.vae_scale_factor = 8
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return lambda job: pipe(**request(job)).images


def skeleton(cls: Any, folder: Any) -> Any:
    """The network without weights: pipelines read its configuration."""
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder))


class Network(torch.nn.Module):
    """What a pipeline asks of a network beside calling it."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, run: Any, skeleton: Any):
        super().__init__()
        self.run, self.config = run, skeleton.config
        self.add_embedding = getattr(skeleton, "add_embedding", None)


class TextEncoder(Network):
    """CLIP's states as the pipelines read them: by number and by name."""

    def forward(self, input_ids: torch.Tensor, **unused: Any) -> Any:
        """Encode (N, 77) ids."""
        first, second, *states = self.run(input_ids)
        return Output([first, second], states)


class Output(list[torch.Tensor]):
    """A list of outputs that has the hidden states too."""

    def __init__(self, values: list[torch.Tensor], hidden_states: list[torch.Tensor]):
        super().__init__(values)
        self.hidden_states = hidden_states


class UNet(Network):
    """The UNet's call as the pipelines make it."""

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, **options: Any) -> Any:
        """One step."""
        added = options.get("added_cond_kwargs") or {}
        more = [added[name] for name in ("text_embeds", "time_ids") if name in added]
        return self.run(sample, timestep.reshape(1), encoder_hidden_states, *more)


class VAE(Network):
    """The decoder."""

    def decode(self, latents: torch.Tensor, **unused: Any) -> Any:
        """Latents -> pictures."""
        return self.run(latents)


if __name__ == "__main__":
    serve(load)
