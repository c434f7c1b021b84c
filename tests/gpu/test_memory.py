"""What fits into how much of a GPU's memory, with networks of real size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fourstroke import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from fourstroke.hub import read_json
from fourstroke.single_file.assets import CONFIGS, clip_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

GIB = 1 << 30


@contextmanager
def limited_to(size: int) -> Iterator[None]:
    """Let torch allocate no more than ``size`` bytes of the GPU, as on a card that has no more."""
    total = torch.cuda.get_device_properties(0).total_memory
    if size > total:
        pytest.skip(f"the GPU has less than {size / GIB:.0f} GiB")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(size / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def of_shape(kind: Any, folder: str, model: str = "sdxl") -> Any:
    """A network of a published model's shape, float16, with small numbers in it; memory does not depend on them."""
    with torch.device("meta"):
        network = kind.from_config(read_json(CONFIGS / model / folder / "config.json"))
    network = network.to(torch.float16).to_empty(device="cpu").eval().requires_grad_(False)
    for value in network.state_dict().values():
        value.fill_(1e-3)
    return network


def test_sdxl_paints_a_large_picture_on_a_card_of_six_gigabytes() -> None:
    """Its networks take 6.9 GB together in float16, the UNet alone 5.1 GB."""
    tokenizer = clip_tokenizer()
    pipe = StableDiffusionXLPipeline(
        vae=of_shape(AutoencoderKL, "vae"),
        text_encoder=of_shape(CLIPTextModel, "text_encoder"),
        text_encoder_2=of_shape(CLIPTextModelWithProjection, "text_encoder_2"),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=of_shape(UNet2DConditionModel, "unet"),
        scheduler=LCMScheduler(beta_schedule="scaled_linear"),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload()
    pipe.enable_vae_tiling()
    with limited_to(6 * GIB):
        result = pipe("a red fox", height=1024, width=1024, num_inference_steps=2, guidance_scale=1.0, output_type="np")
        assert torch.cuda.max_memory_allocated() < 6 * GIB
    assert result.images.shape == (1, 1024, 1024, 3)
