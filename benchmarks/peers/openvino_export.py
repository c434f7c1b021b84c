"""Convert the networks of a repository for OpenVINO, LCM-LoRA merged, once; run as a process for each network.

As optimum-intel does it: diffusers' network is traced by `openvino.convert_model` and kept on disk with float16 weights
under optimum's names, so that openvino-genai reads the same folder.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

MODEL = "openvino_model.xml"
SHARED = ("scheduler", "tokenizer", "tokenizer_2", "model_index.json")


def exported(job: dict[str, Any]) -> Path:
    """The folder of the converted repository of a job; its networks are converted first if need be."""
    folder = Path(job["cache"]) / "openvino"
    networks = ["text_encoder", "unet", "vae_decoder"]
    networks += ["text_encoder_2"] if job["xl"] else []
    networks += ["vae_tiny_decoder"] if job["tiny_vae"] else []
    for name in networks:
        if not (folder / name / MODEL).exists():
            # In a process of its own, so that neither its memory nor its threads are the peer's.
            arguments = {"name": name, "files": job["files"], "folder": str(folder)}
            subprocess.run([sys.executable, "-m", "peers.openvino_export", json.dumps(arguments)], check=True)
    return folder


def main() -> None:
    job = json.loads(sys.argv[1])
    name, repository, folder = job["name"], Path(job["files"]["repository"]), Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    for shared in SHARED:
        source, target = repository / shared, folder / shared
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy(source, target)
    convert(name, job["files"], folder / name)


@torch.no_grad()
def convert(name: str, files: dict[str, Any], target: Path) -> None:
    """Convert one network and save it, its configuration beside it."""
    import openvino

    wrapper, config, example, inputs, outputs = network(name, files)
    model = openvino.convert_model(wrapper.eval(), example_input=example)
    for port, wanted in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({wanted})
    for port, wanted in zip(model.outputs, outputs, strict=False):
        port.get_tensor().set_names({wanted})
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    openvino.save_model(model, partial / MODEL, compress_to_fp16=True)
    shutil.copy(config, partial / "config.json")
    partial.rename(target)


def network(name: str, files: dict[str, Any]) -> tuple[torch.nn.Module, Path, Any, list[str], list[str]]:
    """A network that takes tensors alone, its configuration, example inputs, and the names of inputs and outputs."""
    import transformers

    diffusers: Any = importlib.import_module("diffusers")
    repository = Path(files["repository"])
    if name.startswith("text_encoder"):
        cls = transformers.CLIPTextModelWithProjection if name.endswith("_2") else transformers.CLIPTextModel
        model = cls.from_pretrained(repository / name, torch_dtype=torch.float32, attn_implementation="sdpa")
        states = ["hidden_states." + str(i) for i in range(model.config.num_hidden_layers + 1)]
        first = ["text_embeds", "last_hidden_state"] if name.endswith("_2") else ["last_hidden_state", "pooler_output"]
        ids = torch.ones(1, 77, dtype=torch.int64)
        return TextEncoder(model), repository / name / "config.json", (ids,), ["input_ids"], [*first, *states]
    if name == "unet":
        nothing = dict.fromkeys(("vae", "text_encoder", "text_encoder_2"))
        names = json.loads((repository / "model_index.json").read_text())
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
            repository, torch_dtype=torch.float32, **{name: None for name in nothing if name in names}
        )
        pipe.load_lora_weights(files["lcm-lora"])
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return unet_inputs(pipe.unet, repository)
    tiny = name == "vae_tiny_decoder"
    folder = Path(files["tiny-vae"]) if tiny else repository / "vae"
    cls = diffusers.AutoencoderTiny if tiny else diffusers.AutoencoderKL
    vae = cls.from_pretrained(folder, torch_dtype=torch.float32)
    return Decoder(vae), folder / "config.json", (torch.zeros(1, 4, 8, 8),), ["latent_sample"], ["sample"]


def unet_inputs(unet: Any, repository: Path) -> tuple[torch.nn.Module, Path, Any, list[str], list[str]]:
    """The UNet's part of `network`."""
    size, width = 8, unet.config.cross_attention_dim
    inputs = {"sample": torch.zeros(1, 4, size, size), "timestep": torch.tensor([1])}
    inputs["encoder_hidden_states"] = torch.zeros(1, 77, width)
    if unet.config.addition_embed_type:
        ids = 6 * unet.config.addition_time_embed_dim
        pooled = unet.config.projection_class_embeddings_input_dim - ids
        inputs |= {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
    config = repository / "unet" / "config.json"
    return UNet(unet), config, tuple(inputs.values()), list(inputs), ["out_sample"]


class TextEncoder(torch.nn.Module):
    """CLIP with its hidden states, as a tuple."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> Any:
        """(N, 77) -> the two outputs and the hidden states."""
        output = self.model(input_ids, output_hidden_states=True)
        return (*output[:2], *output.hidden_states)


class UNet(torch.nn.Module):
    """A UNet whose inputs are tensors alone."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latents of a step -> what the network predicts."""
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.unet(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]


class Decoder(torch.nn.Module):
    """The decoder of a VAE."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """Latents -> pictures."""
        return self.vae.decode(latent_sample, return_dict=False)[0]


if __name__ == "__main__":
    main()
