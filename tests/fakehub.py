"""A hub of tiny random repositories under the names of the LCM-LoRA guide, in the layout of huggingface_hub's cache.

Everything is written by diffusers and transformers themselves; only what newer releases of theirs write differently
from what lies on the hub is put back into its older published form. `fakenets` makes the networks.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .fakenets import (
    WIDTH,
    controlnet,
    motion_adapter,
    round_to_half,
    safety_checker,
    t2i_adapter,
    targets,
    text_encoder,
    unet,
    vae,
)
from .parity import image_prompts

START, END = "<|startoftext|>", "<|endoftext|>"
RANK, ALPHA = 4, 8.0
FORMS = ("old", "new")

SD15 = "runwayml/stable-diffusion-v1-5"
SD21 = "stabilityai/stable-diffusion-2-1"
XL = "stabilityai/stable-diffusion-xl-base-1.0"
ANIMAGINE = "Linaqruf/animagine-xl"
SSD1B = "segmind/SSD-1B"
DREAMSHAPER_LCM = "SimianLuo/LCM_Dreamshaper_v7"
DREAMSHAPER = "Lykon/dreamshaper-7"
TOONYOU = "frankjoshua/toonyou_beta6"
INPAINTING = "runwayml/stable-diffusion-inpainting"
XL_INPAINTING = "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"
REFINER = "stabilityai/stable-diffusion-xl-refiner-1.0"
LORA_SD15 = "latent-consistency/lcm-lora-sdv1-5"
LORA_XL = "latent-consistency/lcm-lora-sdxl"
LORA_SSD1B = "latent-consistency/lcm-lora-ssd-1b"
PAPERCUT = "TheLastBen/Papercut_SDXL"
ZOOM_IN = "guoyww/animatediff-motion-lora-zoom-in"
CANNY, DEPTH = "lllyasviel/sd-controlnet-canny", "lllyasviel/sd-controlnet-depth"
CANNY_XL, DEPTH_XL = "diffusers/controlnet-canny-sdxl-1.0", "diffusers/controlnet-depth-sdxl-1.0"
T2I_CANNY, T2I_DEPTH = "TencentARC/t2iadapter_canny_sd15v2", "TencentARC/t2iadapter_depth_sd15v2"
T2I_CANNY_XL, T2I_DEPTH_XL = "TencentARC/t2i-adapter-canny-sdxl-1.0", "TencentARC/t2i-adapter-depth-midas-sdxl-1.0"
MOTION, MOTION_V2 = "diffusers/animatediff-motion-adapter-v1-5", "guoyww/animatediff-motion-adapter-v1-5-2"
MOTION_XL = "guoyww/animatediff-motion-adapter-sdxl-beta"
IP_ADAPTER = "h94/IP-Adapter"
# Frames of the longest animation that a motion adapter is made for.
MOTION_FRAMES: Mapping[str, int] = {MOTION: 24, MOTION_V2: 32, MOTION_XL: 32}
STEERING: Mapping[str, tuple[str, Callable[..., nn.Module], dict[str, Any]]] = {
    **{name: (SD15, controlnet, {}) for name in (CANNY, DEPTH)},
    **{name: (XL, controlnet, {}) for name in (CANNY_XL, DEPTH_XL)},
    **{name: (SD15, t2i_adapter, {}) for name in (T2I_CANNY, T2I_DEPTH)},
    **{name: (XL, t2i_adapter, {}) for name in (T2I_CANNY_XL, T2I_DEPTH_XL)},
    **{
        name: (XL if name == MOTION_XL else SD15, motion_adapter, {"frames": frames, "mid_block": name == MOTION_V2})
        for name, frames in MOTION_FRAMES.items()
    },
}

# The layers that the published LCM-LoRAs adapt.
LCM_TARGETS = (
    r"(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv1|conv2|conv_shortcut"
    r"|downsamplers\.0\.conv|upsamplers\.0\.conv|time_emb_proj)$"
)
STYLE_TARGETS = r"(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)$"
TEXT_TARGETS = r"self_attn\.(q_proj|k_proj|v_proj|out_proj)$"


def byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level BPE (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [symbols[byte] for byte in (*printable, *rest)]


def vocabulary(texts: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A CLIP vocabulary in which the words of ``texts`` are one to a few tokens each."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens += dict.fromkeys(first + second for first, second in merges)
    return {token: i for i, token in enumerate([*tokens, START, END])}, list(merges)


def write_tokenizer(folder: Path, texts: Iterable[str], pad_token: str, form: str) -> None:
    """A tokenizer as published: vocab.json and merges.txt (old), or tokenizer.json alone (new)."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary(texts)
    for path in folder.iterdir():
        path.unlink()
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad_token,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if form == "new":
        fast = transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)
        fast.save_pretrained(folder)
        assert not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists()
        return
    special = {name: settings[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def seed_of(name: str) -> int:
    """The same random weights for a repository every time."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


SD_SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def scheduler(cls: type, **options: Any) -> Any:
    """A scheduler with the published betas."""
    return cls(**SD_SCHEDULE, **options)


def stable_diffusion(name: str, kind: str, texts: list[str]) -> diffusers.DiffusionPipeline:
    """Stable Diffusion 1.5 and its inpainting model (PNDM), 2.1 (v-prediction, DDIM) or a full LCM.

    Fine-tuned models and the one for inpainting have a safety checker.
    """
    torch.manual_seed(seed_of(name))
    vocab, merges = vocabulary(texts)
    pndm = scheduler(diffusers.PNDMScheduler, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    cls, noise_scheduler = {
        "sd15": (diffusers.StableDiffusionPipeline, pndm),
        "inpainting": (diffusers.StableDiffusionInpaintPipeline, pndm),
        "sd21": (
            diffusers.StableDiffusionPipeline,
            scheduler(
                diffusers.DDIMScheduler,
                prediction_type="v_prediction",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
        ),
        "lcm": (diffusers.LatentConsistencyModelPipeline, scheduler(diffusers.LCMScheduler)),
    }[kind]
    checker, extractor = safety_checker() if name in (DREAMSHAPER, TOONYOU, INPAINTING) else (None, None)
    return cls(
        vae=vae(),
        text_encoder=text_encoder(transformers.CLIPTextModel, vocab, "gelu" if kind == "sd21" else "quick_gelu"),
        tokenizer=transformers.CLIPTokenizer(vocab=vocab, merges=merges),
        unet=unet(kind, WIDTH),
        scheduler=noise_scheduler,
        safety_checker=checker,
        feature_extractor=extractor,
        requires_safety_checker=checker is not None,
    )


def stable_diffusion_xl(name: str, kind: str, texts: list[str]) -> diffusers.DiffusionPipeline:
    """SDXL or SSD-1B: two text encoders, sizes as conditions, Euler. The refiner has the second text encoder only."""
    torch.manual_seed(seed_of(name))
    vocab, merges = vocabulary(texts)
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=merges)
    refiner = kind == "refiner"
    cls, options = {
        "refiner": (diffusers.StableDiffusionXLImg2ImgPipeline, {"requires_aesthetics_score": True}),
        "xl inpainting": (diffusers.StableDiffusionXLInpaintPipeline, {}),
    }.get(kind, (diffusers.StableDiffusionXLPipeline, {}))
    return cls(
        vae=vae(),
        text_encoder=None if refiner else text_encoder(transformers.CLIPTextModel, vocab, "quick_gelu"),
        text_encoder_2=text_encoder(transformers.CLIPTextModelWithProjection, vocab, "gelu"),
        tokenizer=None if refiner else tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(kind, WIDTH if refiner else 2 * WIDTH),
        scheduler=scheduler(diffusers.EulerDiscreteScheduler, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=not refiner,
        add_watermarker=False,
        **options,
    )


REPOSITORIES: Mapping[str, tuple[Callable[..., diffusers.DiffusionPipeline], str]] = {
    SD15: (stable_diffusion, "sd15"),
    SD21: (stable_diffusion, "sd21"),
    DREAMSHAPER: (stable_diffusion, "sd15"),
    DREAMSHAPER_LCM: (stable_diffusion, "lcm"),
    TOONYOU: (stable_diffusion, "sd15"),
    INPAINTING: (stable_diffusion, "inpainting"),
    XL: (stable_diffusion_xl, "xl"),
    ANIMAGINE: (stable_diffusion_xl, "xl"),
    SSD1B: (stable_diffusion_xl, "ssd1b"),
    XL_INPAINTING: (stable_diffusion_xl, "xl inpainting"),
    REFINER: (stable_diffusion_xl, "refiner"),
}


def snapshot(cache: Path, name: str) -> Path:
    """The snapshot folder of a repository in the cache, made with its reference."""
    root = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    return folder


def rename_tensors(path: Path, rename: Callable[[str], str], extra: Mapping[str, Tensor] | None = None) -> None:
    """Write a file of weights again under other names."""
    state = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file({**state, **(extra or {})}, path, metadata={"format": "pt"})


VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_vae_name(name: str) -> str:
    """SD 1.5's VAE was published with other names in its attention."""
    for new, old in VAE_NAMES.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def text_model_name(name: str) -> str:
    """The form with ``text_model.`` in front, in which every text encoder was published before transformers 5."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def put_into_form(folder: Path, texts: list[str], form: str) -> None:
    """Turn what today's releases write into one of the two published forms."""
    for path in sorted(folder.glob("text_encoder*/*.safetensors")):
        if form == "old":
            rename_tensors(path, text_model_name, {"text_model.embeddings.position_ids": torch.arange(77)[None]})
        else:
            rename_tensors(path, lambda name: name.removeprefix("text_model."))
    if form == "old":
        for path in sorted(folder.glob("vae/*.safetensors")):
            rename_tensors(path, old_vae_name)
    for tokenizer in sorted(folder.glob("tokenizer*")):
        write_tokenizer(tokenizer, texts, "!" if tokenizer.name == "tokenizer_2" else END, form)


def add_pipeline(cache: Path, name: str, texts: list[str]) -> diffusers.DiffusionPipeline:
    """One model repository: float32 weights and an fp16 variant beside them, which hold the same numbers."""
    make, kind = REPOSITORIES[name]
    pipe = make(name, kind, texts)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            round_to_half(component)
    folder = snapshot(cache, name)
    # The configurations, which name the dtype, are the last ones written.
    pipe.to(dtype=torch.float16).save_pretrained(folder, variant="fp16")
    pipe.to(dtype=torch.float32).save_pretrained(folder)
    return pipe


def add_network(cache: Path, name: str, network: nn.Module) -> None:
    """A repository with one network, float32 and fp16."""
    round_to_half(network)
    network.half().save_pretrained(snapshot(cache, name), variant="fp16")
    network.float().save_pretrained(snapshot(cache, name))


def add_image_prompts(cache: Path, unets: Mapping[str, nn.Module]) -> None:
    """IP-Adapters for SD 1.5 (plain and plus) and SDXL, laid out as they are published."""
    torch.manual_seed(seed_of(IP_ADAPTER))
    files = {
        "models/ip-adapter_sd15.safetensors": image_prompts.adapter(unets[SD15], "plain"),
        "models/ip-adapter-plus_sd15.safetensors": image_prompts.adapter(unets[SD15], "plus"),
        "sdxl_models/ip-adapter_sdxl.safetensors": image_prompts.adapter(unets[XL], "plain"),
    }
    encoders = ("models/image_encoder", "sdxl_models/image_encoder")
    image_prompts.repository(snapshot(cache, IP_ADAPTER), files, encoders)


def pairs(model: nn.Module, pattern: str, strength: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) of rank `RANK` for each target; the product has ``strength`` times the weight's scale."""
    result = {}
    for name, module in targets(model, pattern).items():
        weight = module.weight
        down = torch.randn(RANK, *weight.shape[1:])
        up = torch.randn(weight.shape[0], RANK, *(1,) * (weight.ndim - 2))
        size = float(weight.detach().float().std()) * strength / (ALPHA / RANK * RANK**0.5)
        result[name] = (down, up * size)
    return result


def kohya(prefix: str, lora: Mapping[str, tuple[Tensor, Tensor]], alpha: float = ALPHA) -> dict[str, Tensor]:
    """``lora_unet_down_blocks_0_….lora_down.weight`` and so on, with alphas: how the LCM-LoRAs are published."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in lora.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    return state


def peft(prefix: str, lora: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """``unet.….lora_A.weight``: without alphas, so the scale goes into the weights."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in lora.items():
        state |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up * (ALPHA / RANK)}
    return state


def old_diffusers(prefix: str, lora: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """``unet.….lora.down.weight``, and attention as ``….processor.to_q_lora.down.weight``, without alphas."""
    state: dict[str, Tensor] = {}
    for name, (down, up) in lora.items():
        attention = re.fullmatch(r"(.*\.attn[12])\.(to_q|to_k|to_v|to_out)(\.0)?", name)
        key = f"{prefix}.{attention[1]}.processor.{attention[2]}_lora" if attention else f"{prefix}.{name}.lora"
        state |= {f"{key}.down.weight": down, f"{key}.up.weight": up * (ALPHA / RANK)}
    return state


DIALECTS: Mapping[str, Callable[[Mapping[str, tuple[Tensor, Tensor]]], dict[str, Tensor]]] = {
    "kohya": lambda lora: kohya("lora_unet", lora),
    "peft": lambda lora: peft("unet", lora),
    "old diffusers": lambda lora: old_diffusers("unet", lora),
}


def write_lora(folder: Path, state: Mapping[str, Tensor], name: str = "pytorch_lora_weights.safetensors") -> Path:
    """Write a LoRA's tensors and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name)
    return folder / name


def lcm_lora(cache: Path, base: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs of the LCM-LoRA for the model ``base`` of the cache."""
    torch.manual_seed(seed_of(base) + 1)
    model = diffusers.UNet2DConditionModel.from_pretrained(snapshot(cache, base), subfolder="unet")
    return pairs(model, LCM_TARGETS, 0.5)


def add_loras(cache: Path) -> None:
    """The LCM-LoRAs in kohya's layout, and a style LoRA that adapts SDXL's text encoders too."""
    for name, base in ((LORA_SD15, SD15), (LORA_XL, XL), (LORA_SSD1B, SSD1B)):
        write_lora(snapshot(cache, name), kohya("lora_unet", lcm_lora(cache, base)))
    torch.manual_seed(seed_of(PAPERCUT))
    folder = snapshot(cache, XL)
    style: dict[str, Tensor] = {}
    for prefix, cls, subfolder, pattern in (
        ("lora_unet", diffusers.UNet2DConditionModel, "unet", STYLE_TARGETS),
        ("lora_te1", transformers.CLIPTextModel, "text_encoder", TEXT_TARGETS),
        ("lora_te2", transformers.CLIPTextModelWithProjection, "text_encoder_2", TEXT_TARGETS),
    ):
        lora = pairs(cls.from_pretrained(folder, subfolder=subfolder), pattern, 1.0)
        if prefix != "lora_unet":
            lora = {text_model_name(name): pair for name, pair in lora.items()}
        style |= kohya(prefix, lora, alpha=ALPHA / 2)
    write_lora(snapshot(cache, PAPERCUT), style, "papercut.safetensors")
    torch.manual_seed(seed_of(ZOOM_IN))
    zoom = pairs(diffusers.MotionAdapter.from_pretrained(snapshot(cache, MOTION)), STYLE_TARGETS, 1.0)
    write_lora(snapshot(cache, ZOOM_IN), old_diffusers("unet", zoom), "diffusion_pytorch_model.safetensors")


def build(caches: Mapping[str, Path], texts: list[str]) -> None:
    """Fill one cache a published form; ``caches`` has a folder for each of `FORMS`, and both get the same weights."""
    first, *others = caches.values()
    unets = {name: add_pipeline(first, name, texts).unet for name in REPOSITORIES}
    for name, (base, make, options) in STEERING.items():
        torch.manual_seed(seed_of(name))
        add_network(first, name, make(unets[base], **options))
    add_image_prompts(first, unets)
    add_loras(first)
    for cache in others:
        shutil.copytree(first, cache)
    for form, cache in caches.items():
        for name in REPOSITORIES:
            put_into_form(snapshot(cache, name), texts, form)
