"""The shipped family is made of ordinary files: diffusers and transformers read them and paint the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

import fourstroke
from fourstroke.hub import ZOO

EMOJI = ZOO / "emoji"
PROMPTS = ["a red fox", "a pizza"]
MAX_DIFFERENCE, MEAN_DIFFERENCE = 2 / 255, 0.05 / 255
LARGEST = 40e6  # bytes, all weights together

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


@pytest.mark.parametrize("name", ["base", "lcm-lora", "tiny-vae"])
def test_every_part_has_a_card_with_licence_and_data(name: str) -> None:
    card: Path = EMOJI / name / "README.md"
    text = card.read_text()
    assert text.startswith("---\nlicense: apache-2.0\n")
    assert "Noto Emoji" in text and "recipes/emoji" in text
