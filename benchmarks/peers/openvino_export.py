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
from collections.abc import Callable
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

    find = text_encoder if name.startswith("text_encoder") else unet if name == "unet" else decoder
    traced, config, inputs, outputs = find(name, files)
    model = openvino.convert_model(traced.eval(), example_input=tuple(inputs.values()))
    for ports, names in ((model.inputs, inputs), (model.outputs, outputs)):
        for port, wanted in zip(ports, names, strict=True):
            port.get_tensor().set_names({wanted})
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    openvino.save_model(model, partial / MODEL, compress_to_fp16=True)
    shutil.copy(config, partial / "config.json")
    partial.rename(target)


class Traced(torch.nn.Module):
    """A network, called by a function of tensors alone."""

    def __init__(self, network: Any, call: Callable[..., Any]):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the function makes of the network and its inputs."""
        return self.call(self.network, *inputs)


# Network, configuration, example inputs by name, names of the outputs.
Found = tuple[Traced, Path, dict[str, torch.Tensor], list[str]]


def text_encoder(name: str, files: dict[str, Any]) -> Found:
    """CLIP, with its hidden states."""
    import transformers

    projects = name.endswith("_2")
    cls = transformers.CLIPTextModelWithProjection if projects else transformers.CLIPTextModel
    folder = Path(files["repository"]) / name
    model = cls.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="sdpa")

    def call(model: Any, ids: torch.Tensor) -> Any:
        output = model(ids, output_hidden_states=True)
        return (*output[:2], *output.hidden_states)

    states = [f"hidden_states.{i}" for i in range(model.config.num_hidden_layers + 1)]
    first = ["text_embeds", "last_hidden_state"] if projects else ["last_hidden_state", "pooler_output"]
    inputs = {"input_ids": torch.ones(1, 77, dtype=torch.int64)}
    return Traced(model, call), folder / "config.json", inputs, [*first, *states]


def unet(name: str, files: dict[str, Any]) -> Found:
    """The UNet with the LCM-LoRA merged."""
    diffusers: Any = importlib.import_module("diffusers")
    repository = Path(files["repository"])
    components = json.loads((repository / "model_index.json").read_text())
    without = {part: None for part in ("vae", "text_encoder", "text_encoder_2") if part in components}
    pipe = diffusers.DiffusionPipeline.from_pretrained(repository, torch_dtype=torch.float32, **without)
    pipe.load_lora_weights(files["lcm-lora"])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    config = pipe.unet.config
    inputs = {"sample": torch.zeros(1, 4, 8, 8), "timestep": torch.tensor([1])}
    inputs["encoder_hidden_states"] = torch.zeros(1, 77, config.cross_attention_dim)
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs |= {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}

    def call(unet: Any, sample: Any, timestep: Any, text: Any, *added: Any) -> Any:
        more = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
        return unet(sample, timestep, text, added_cond_kwargs=more, return_dict=False)[0]

    return Traced(pipe.unet, call), repository / name / "config.json", inputs, ["out_sample"]


def decoder(name: str, files: dict[str, Any]) -> Found:
    """The decoder of the VAE, full or tiny."""
    diffusers: Any = importlib.import_module("diffusers")
    tiny = name == "vae_tiny_decoder"
    folder = Path(files["tiny-vae"]) if tiny else Path(files["repository"]) / "vae"
    vae = (diffusers.AutoencoderTiny if tiny else diffusers.AutoencoderKL).from_pretrained(folder)
    traced = Traced(vae, lambda vae, latents: vae.decode(latents, return_dict=False)[0])
    return traced, folder / "config.json", {"latent_sample": torch.zeros(1, 4, 8, 8)}, ["sample"]


if __name__ == "__main__":
    main()
