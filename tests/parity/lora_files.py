"""LoRA files as the trainers write them, and what diffusers makes of them: the oracle of `test_lora`.

The names are built from the oracle's own modules, and the original ("ldm") ones from diffusers' checkpoint converter,
so that nothing here depends on the tables under test.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from fourstroke.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from fourstroke.models.unet import UNet2DConditionModel

from .oracles import UNETS, randomise, unet_inputs

ATTENTION = r"attn\d\.to_(q|k|v|out\.0)$"
PUBLISHED = (  # what the published LCM-LoRAs adapt
    r"(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_shortcut"
    r"|downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)$"
)
TEXT = r"(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"
Pairs = dict[str, tuple[Tensor, Tensor]]


class World:
    """The same random models twice: a diffusers pipeline, and ours by component."""

    def __init__(self, kind: str):
        self.config = UNETS[kind]
        self.xl = "addition_embed_type" in self.config
        unet = randomise(diffusers.UNet2DConditionModel(**self.config))
        parts = {"unet": unet, "text_encoder": text_encoder(transformers.CLIPTextModel)}
        if self.xl:
            parts["text_encoder_2"] = text_encoder(transformers.CLIPTextModelWithProjection)
        self.states = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
        self.ours: dict[str, nn.Module] = {}
        for name, part in parts.items():
            cls: Any = {
                "unet": UNet2DConditionModel,
                "text_encoder": CLIPTextModel,
                "text_encoder_2": CLIPTextModelWithProjection,
            }[name]
            raw = part.config.to_dict() if name != "unet" else dict(part.config)
            self.ours[name] = cls.from_config(raw).eval().requires_grad_(False)
            self.ours[name].load_state_dict({cls.published_name(key): v for key, v in self.states[name].items()})
        rest = {"vae": None, "tokenizer": None, "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)}
        if self.xl:
            self.pipe = diffusers.StableDiffusionXLPipeline(**rest, tokenizer_2=None, **parts)
        else:
            self.pipe = diffusers.StableDiffusionPipeline(
                **rest, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
        self.inputs = unet_inputs(self.config, (8, 8))
        self.ids = torch.randint(0, 98, (2, 12))
        self.ids[:, -1] = 99

    def oracle(self, scale: float | None = None) -> dict[str, Tensor]:
        """What each of diffusers' models computes."""
        extra = {} if scale is None else {"cross_attention_kwargs": {"scale": scale}}
        with torch.no_grad():
            found = {"unet": self.pipe.unet(**self.inputs, **extra).sample}
            found["text_encoder"] = self.pipe.text_encoder(self.ids).last_hidden_state
            if self.xl:
                found["text_encoder_2"] = self.pipe.text_encoder_2(self.ids).text_embeds
        return found

    def result(self) -> dict[str, Tensor]:
        """What each of our models computes."""
        with torch.no_grad():
            found = {"unet": self.ours["unet"](**self.inputs)}
            found["text_encoder"] = self.ours["text_encoder"](self.ids).last_hidden_state
            if self.xl:
                found["text_encoder_2"] = self.ours["text_encoder_2"](self.ids).pooled
        return found

    def pairs(self, component: str, pattern: str, rank: int | Callable[[str], int] = 4, seed: int = 0) -> Pairs:
        """Random pairs for the modules of an oracle whose name matches, as their kinds of layers want them."""
        generator = torch.Generator().manual_seed(seed)
        found: Pairs = {}
        for path, module in getattr(self.pipe, component).named_modules():
            layer = getattr(module, "base_layer", module)
            if not re.search(pattern, path) or not isinstance(layer, (nn.Linear, nn.Conv2d)):
                continue
            r = rank if isinstance(rank, int) else rank(path)
            out, *inner = layer.weight.shape
            down = torch.randn(r, *inner, generator=generator) / layer.weight[0].numel() ** 0.5
            up = torch.randn(out, r, *[1] * (len(inner) - 1), generator=generator) * 0.3
            found[path] = (down, up)
        assert found
        return found

    def load(self, path: Path, name: str) -> None:
        """Load a file in the oracle."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, about a second adapter and about what a file leaves out
            self.pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)


def text_encoder(cls: Any) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=20,
        bos_token_id=98,
        eos_token_id=99,
    )
    return randomise(cls(config))


# Writers: component -> pairs by module path, to tensors by key.

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


def text_path(path: str) -> str:
    """transformers 5 dropped ``text_model.``, files have it."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def kohya(
    parts: Mapping[str, Pairs],
    alpha: float | Callable[[str], float] | None = 2.0,
    rename: Mapping[str, str] | None = None,
    xl: bool = False,
) -> dict[str, Tensor]:
    """kohya-ss: underscores, ``lora_down``; ``rename`` gives modules of the UNet other names."""
    tensors = {}
    for component, pairs in parts.items():
        prefix = "lora_te1_" if xl and component == "text_encoder" else KOHYA[component]
        for path, (down, up) in pairs.items():
            module = (rename or {}).get(path, path) if component == "unet" else text_path(path)
            key = prefix + module.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(alpha if isinstance(alpha, float) else alpha(path))
    return tensors


def peft(parts: Mapping[str, Pairs], infix: str = "") -> dict[str, Tensor]:
    """peft: ``lora_A`` and ``lora_B``, with the adapter's name between if ``infix`` gives it."""
    tensors = {}
    for component, pairs in parts.items():
        for path, (down, up) in pairs.items():
            path = path if component == "unet" else text_path(path)
            tensors[f"{component}.{path}.lora_A{infix}.weight"] = down
            tensors[f"{component}.{path}.lora_B{infix}.weight"] = up
    return tensors


def diffusers_names(parts: Mapping[str, Pairs]) -> dict[str, Tensor]:
    """diffusers 0.17 and on: ``lora.down``, in text encoders ``lora_linear_layer.down``."""
    tensors = {}
    for component, pairs in parts.items():
        infix = "lora" if component == "unet" else "lora_linear_layer"
        for path, (down, up) in pairs.items():
            path = path if component == "unet" else text_path(path)
            tensors[f"{component}.{path}.{infix}.down.weight"] = down
            tensors[f"{component}.{path}.{infix}.up.weight"] = up
    return tensors


def processors(parts: Mapping[str, Pairs]) -> dict[str, Tensor]:
    """The oldest: the attention processors of the UNet, and ``to_q_lora`` in text encoders."""
    tensors = {}
    for component, pairs in parts.items():
        for path, (down, up) in pairs.items():
            head, name = re.fullmatch(r"(.*)\.(to_q|to_k|to_v|to_out\.0|[qkv]_proj|out_proj)", path).groups()  # type: ignore[union-attr]
            short = {"to_out.0": "to_out", "out_proj": "to_out"}.get(name, name if "to_" in name else f"to_{name[0]}")
            head = f"{head}.processor" if component == "unet" else text_path(head)
            tensors[f"{component}.{head}.{short}_lora.down.weight"] = down
            tensors[f"{component}.{head}.{short}_lora.up.weight"] = up
    return tensors


def original_names(unet: nn.Module) -> dict[str, str]:
    """diffusers' module path -> original name, by asking diffusers' converter where each original tensor goes."""
    config = dict(unet.config)  # type: ignore[arg-type]
    candidates = _original_modules(unet)
    checkpoint = {}
    for index, module in enumerate(candidates):
        for kind in ("weight", "bias"):
            checkpoint[f"model.diffusion_model.{module}.{kind}"] = torch.tensor(float(index))
    converted = convert_ldm_unet_checkpoint(checkpoint, config=config)
    paths = {key.rsplit(".", 1)[0] for key in unet.state_dict()}
    where = {key.rsplit(".", 1)[0]: candidates[int(v)] for key, v in converted.items()}
    return {path: where[path] for path in paths if path in where}


def _original_modules(unet: nn.Module) -> list[str]:
    """Every name that the original network could have, for the converter to choose from."""
    inner = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
    tails = {re.sub(r".*attentions\.\d+\.", "", p) for p in unet.state_dict() if ".attentions." in p}
    attention = sorted({tail.rsplit(".", 1)[0] for tail in tails})
    found = ["time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "input_blocks.0.0", "out.0", "out.2"]
    blocks = list(unet.down_blocks)  # type: ignore[arg-type]
    number = 1
    for block in blocks:
        for _ in block.resnets:
            found += [f"input_blocks.{number}.0.{name}" for name in inner]
            if getattr(block, "attentions", None):
                found += [f"input_blocks.{number}.1.{name}" for name in attention]
            number += 1
        if block.downsamplers:
            found.append(f"input_blocks.{number}.0.op")
            number += 1
    for place in (0, 2):
        found += [f"middle_block.{place}.{name}" for name in inner]
    found += [f"middle_block.1.{name}" for name in attention]
    number = 0
    for block in unet.up_blocks:  # type: ignore[union-attr]
        for index, _ in enumerate(block.resnets):
            found += [f"output_blocks.{number}.0.{name}" for name in inner]
            attends = bool(getattr(block, "attentions", None))
            found += [f"output_blocks.{number}.1.{name}" for name in attention if attends]
            if index == len(block.resnets) - 1 and block.upsamplers:
                found.append(f"output_blocks.{number}.{2 if attends else 1}.conv")
            number += 1
    return found


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a LoRA file."""
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, dict(metadata or {}))
    return path


def differs(results: Mapping[str, Tensor], others: Mapping[str, Tensor], components: Iterable[str]) -> None:
    """Assert that each component's result has moved by more than rounding."""
    for component in components:
        change = (results[component] - others[component]).abs().mean()
        assert change > 0.01 * others[component].abs().mean(), component
