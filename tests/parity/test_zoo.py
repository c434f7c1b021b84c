"""The shipped family is made of ordinary files: diffusers and transformers read them and paint the same pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors import safe_open

import fourstroke
from fourstroke.controls import canny
from fourstroke.hub import ZOO, shipped

EMOJI = ZOO / "emoji"
PROMPTS = ["a red fox", "a pizza"]
MAX_DIFFERENCE, MEAN_DIFFERENCE = 2 / 255, 0.05 / 255
LARGEST = 95e6  # bytes, all weights together

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:peft"),
]


def pictures(library: Any, lora: bool, guidance: float) -> np.ndarray:
    """Two pictures (2, 128, 128, 3) in 0..1, four steps, from the shipped folders."""
    pipe = library.StableDiffusionPipeline.from_pretrained(str(EMOJI / "base"))
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.scheduler = library.LCMScheduler.from_config(pipe.scheduler.config)
        pipe.load_lora_weights(str(EMOJI / "lcm-lora"), weight_name="pytorch_lora_weights.safetensors")
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    made = pipe(PROMPTS, num_inference_steps=4, guidance_scale=guidance, generator=generators, output_type="np")
    return made.images


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "guidance"), [(True, 1.0), (False, 4.0)])
def test_diffusers_paints_the_same_pictures(lora: bool, guidance: float) -> None:
    difference = np.abs(pictures(fourstroke, lora, guidance) - pictures(diffusers, lora, guidance))
    assert difference.max() <= MAX_DIFFERENCE and difference.mean() <= MEAN_DIFFERENCE


def test_transformers_reads_the_tokenizer() -> None:
    ours = fourstroke.StableDiffusionPipeline.from_pretrained("emoji/base").tokenizer
    theirs = transformers.CLIPTokenizer.from_pretrained(str(EMOJI / "base" / "tokenizer"))
    texts = ["a red fox", "A  Man: Beard!", "café № 5", "", "don't stop"]
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
    assert [list(row) for row in ours(texts).tolist()] == expected


def test_transformers_pools_at_our_end_token() -> None:
    encoder = fourstroke.CLIPTextModel.from_pretrained("emoji/base", subfolder="text_encoder")
    peer = transformers.CLIPTextModel.from_pretrained(str(EMOJI / "base" / "text_encoder"), dtype=torch.float32)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(EMOJI / "base" / "tokenizer"))
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        found, expected = encoder(ids), peer(ids)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooled, expected.pooler_output, rtol=1e-4, atol=1e-5)


def test_diffusers_decodes_with_the_tiny_autoencoder() -> None:
    tiny = fourstroke.AutoencoderTiny.from_pretrained("emoji/tiny-vae")
    peer = diffusers.AutoencoderTiny.from_pretrained(str(EMOJI / "tiny-vae"))
    latents = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(tiny.decode(latents), peer.decode(latents).sample, rtol=1e-4, atol=1e-5)


def test_the_lora_is_laid_out_as_the_published_ones() -> None:
    with safe_open(EMOJI / "lcm-lora" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        keys, about = set(file.keys()), file.metadata()
    modules = {key.rsplit(".", 1)[0] for key in keys if key.endswith(".alpha")}
    suffixes = (".alpha", ".lora_down.weight", ".lora_up.weight")
    assert keys == {module + suffix for module in modules for suffix in suffixes}
    assert all(module.startswith("lora_unet_") for module in modules)
    assert about["base_model"] == "emoji/base" and float(about["alpha"]) > 0 and int(about["rank"]) > 0


def test_all_weights_are_half_precision_safetensors_and_small() -> None:
    files = sorted(path for path in EMOJI.rglob("*") if path.suffix in {".safetensors", ".bin", ".ckpt", ".pt"})
    assert files and {path.suffix for path in files} == {".safetensors"}
    for path in files:
        with safe_open(path, framework="pt") as file:
            kinds = {str(file.get_slice(key).get_dtype()) for key in file.keys() if not key.endswith(".alpha")}  # noqa: SIM118
        assert kinds == {"F16"}, path
    assert sum(path.stat().st_size for path in files) <= LARGEST


@pytest.mark.parametrize("name", shipped())
def test_every_part_has_a_card_with_licence_and_data(name: str) -> None:
    text = (ZOO / name / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\n")
    assert "Noto Emoji" in text and "recipes/emoji" in text


# The whole family: each row of the guide, by both libraries, from the shipped weights


def saved(name: str, folder: Path) -> str:
    """The folder of a shipped model, written whole: diffusers does not know of components that models share."""
    fourstroke.DiffusionPipeline.from_pretrained(name).save_pretrained(folder)
    return str(folder)


def few_steps(library: Any, pipe: Any, lora: str = "lcm-lora") -> Any:
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = library.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(EMOJI / lora), weight_name="pytorch_lora_weights.safetensors", adapter_name="lcm")
    return pipe


def paint(pipe: Any, prompt: str = PROMPTS[0], **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": generator, "output_type": "np"}
    made = pipe(prompt, **{**settings, **options})
    return np.asarray(made.frames[0] if hasattr(made, "frames") else made.images)


def emoji_picture() -> PIL.Image.Image:
    with PIL.Image.open(Path(__file__).parents[2] / "docs" / "images" / "demo.png") as sheet:
        return sheet.convert("RGB").crop((0, 0, sheet.height, sheet.height)).resize((128, 128))


def xl(library: Any, folder: Path) -> np.ndarray:
    pipe = library.StableDiffusionXLPipeline.from_pretrained(saved("emoji/xl", folder))
    return paint(few_steps(library, pipe, "xl-lcm-lora"))


def fine_tuned(library: Any, folder: Path) -> np.ndarray:
    return paint(few_steps(library, library.StableDiffusionPipeline.from_pretrained(saved("emoji/blob", folder))))


def styles(library: Any, folder: Path) -> np.ndarray:
    pipe = few_steps(library, library.StableDiffusionPipeline.from_pretrained(str(EMOJI / "base")))
    for name in ("flat", "line"):
        place = str(EMOJI / f"{name}-lora")
        pipe.load_lora_weights(place, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    pipe.set_adapters(["lcm", "flat", "line"], [1.0, 0.6, 0.3])
    return paint(pipe)


def controlled(library: Any, folder: Path) -> np.ndarray:
    network = library.ControlNetModel.from_pretrained(str(EMOJI / "controlnet-canny"))
    kind = library.StableDiffusionControlNetPipeline
    pipe = kind.from_pretrained(str(EMOJI / "base"), controlnet=network)
    return paint(few_steps(library, pipe), image=canny(emoji_picture()))


def adapted(library: Any, folder: Path) -> np.ndarray:
    adapter = library.T2IAdapter.from_pretrained(str(EMOJI / "t2i-canny"))
    kind = library.StableDiffusionXLAdapterPipeline
    pipe = kind.from_pretrained(saved("emoji/xl", folder), adapter=adapter)
    return paint(few_steps(library, pipe, "xl-lcm-lora"), image=canny(emoji_picture()))


def inpainted(library: Any, folder: Path) -> np.ndarray:
    pipe = library.StableDiffusionInpaintPipeline.from_pretrained(saved("emoji/inpainting", folder))
    mask = PIL.Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 128))
    pictures = {"image": emoji_picture(), "mask_image": mask, "height": 128, "width": 128}
    return paint(few_steps(library, pipe), PROMPTS[1], **pictures)


def animated(library: Any, folder: Path) -> np.ndarray:
    adapter = library.MotionAdapter.from_pretrained(str(EMOJI / "motion-adapter"))
    pipe = library.AnimateDiffPipeline.from_pretrained(str(EMOJI / "base"), motion_adapter=adapter)
    few_steps(library, pipe)
    for name in ("zoom-in", "pan-left"):
        place = str(EMOJI / f"{name}-lora")
        pipe.load_lora_weights(place, weight_name="diffusion_pytorch_model.safetensors", adapter_name=name)
    pipe.set_adapters(["lcm", "zoom-in", "pan-left"], [1.0, 0.8, 0.5])
    return paint(pipe, num_frames=4)


@pytest.mark.slow
@pytest.mark.parametrize("task", [xl, fine_tuned, styles, controlled, adapted, inpainted, animated])
def test_diffusers_runs_the_family_alike(task: Callable[[Any, Path], np.ndarray], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever the peer warns of
        theirs = task(diffusers, tmp_path)
    ours = task(fourstroke, tmp_path)
    difference = np.abs(ours - theirs)
    assert ours.std() > 0.05, "a flat picture would be compared with nothing"
    assert difference.max() <= MAX_DIFFERENCE and difference.mean() <= MEAN_DIFFERENCE
