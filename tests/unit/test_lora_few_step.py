"""Few-step adapters that are known by name: what their authors' model cards say, and that our schedulers run it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from fourstroke import schedulers
from fourstroke.lora import Settings, inspect_lora, recommended
from fourstroke.lora.few_step import KNOWN

TRAILING = {"timestep_spacing": "trailing"}
PCM = {**TRAILING, "clip_sample": False, "set_alpha_to_one": False}

# File or repository -> what the model card says; guidance of 0 there is none, and that is 1 here.
CARDS: dict[str, Settings | None] = {
    "latent-consistency/lcm-lora-sdv1-5": Settings("LCM-LoRA", "LCMScheduler", 4),
    "lcm-lora-sdxl": Settings("LCM-LoRA", "LCMScheduler", 4),
    "LCM_LoRA_SDXL_fp16.safetensors": Settings("LCM-LoRA", "LCMScheduler", 4),
    "SimianLuo/LCM_Dreamshaper_v7": Settings("LCM", "LCMScheduler", 4, 8.0),
    "latent-consistency/lcm-sdxl": Settings("LCM", "LCMScheduler", 4, 8.0),
    "ByteDance/Hyper-SD": Settings("Hyper-SD", "DDIMScheduler", 4, scheduler_options=TRAILING),
    "Hyper-SDXL-1step-lora.safetensors": Settings("Hyper-SD", "TCDScheduler", 1, eta=1.0),
    "Hyper-SD15-1step-lora.safetensors": Settings("Hyper-SD", "TCDScheduler", 1, eta=1.0),
    "Hyper-SDXL-1step-Unet.safetensors": Settings("Hyper-SD", "LCMScheduler", 1, timesteps=(800,)),
    "Hyper-SD15-2steps-lora.safetensors": Settings("Hyper-SD", "DDIMScheduler", 2, scheduler_options=TRAILING),
    "Hyper-SDXL-8steps-lora.safetensors": Settings("Hyper-SD", "DDIMScheduler", 8, scheduler_options=TRAILING),
    "Hyper-SDXL-12steps-CFG-lora.safetensors": Settings(
        "Hyper-SD (CFG preserved)", "DDIMScheduler", 12, 5.0, scheduler_options=TRAILING
    ),
    "Hyper-SD3-4steps-CFG-lora.safetensors": None,
    "ByteDance/SDXL-Lightning": Settings("SDXL-Lightning", "EulerDiscreteScheduler", 4, scheduler_options=TRAILING),
    "sdxl_lightning_2step_lora.safetensors": Settings(
        "SDXL-Lightning", "EulerDiscreteScheduler", 2, scheduler_options=TRAILING
    ),
    "sdxl_lightning_1step_unet_x0.safetensors": Settings(
        "SDXL-Lightning", "EulerDiscreteScheduler", 1, scheduler_options={**TRAILING, "prediction_type": "sample"}
    ),
    "dmd2_sdxl_4step_lora_fp16.safetensors": Settings("DMD2", "LCMScheduler", 4, timesteps=(999, 749, 499, 249)),
    "dmd2_sdxl_1step_unet_fp16.safetensors": Settings("DMD2", "LCMScheduler", 1, timesteps=(399,)),
    "tianweiy/DMD2": Settings("DMD2", "LCMScheduler", 4, timesteps=(999, 749, 499, 249)),
    "h1t/TCD-SD15-LoRA": Settings("TCD", "TCDScheduler", 4, eta=0.3),
    "pcm_sd15_smallcfg_2step_converted.safetensors": Settings("PCM", "DDIMScheduler", 2, scheduler_options=PCM),
    "pcm_sdxl_normalcfg_8step_converted.safetensors": Settings(
        "PCM (normal CFG)", "DDIMScheduler", 8, 3.0, scheduler_options=PCM
    ),
    "pcm_sdxl_lcmlike_lora_converted.safetensors": Settings("PCM (like LCM)", "LCMScheduler", 4),
    "wangfuyun/AnimateLCM": Settings("AnimateLCM", "LCMScheduler", 6, 2.0, {"beta_schedule": "linear"}, weight=0.8),
    "AnimateLCM_sd15_t2v_lora.safetensors": Settings(
        "AnimateLCM", "LCMScheduler", 6, 2.0, {"beta_schedule": "linear"}, weight=0.8
    ),
    "stabilityai/sdxl-turbo": Settings("Turbo", "EulerAncestralDiscreteScheduler", 1, scheduler_options=TRAILING),
    "sd_xl_turbo_1.0_fp16.safetensors": Settings(
        "Turbo", "EulerAncestralDiscreteScheduler", 1, scheduler_options=TRAILING
    ),
    # Words that only look like one, and names that say nothing.
    "lightning-storms-style.safetensors": None,
    "turbocharged-cars.safetensors": None,
    "calcmatte.safetensors": None,
    "pytorch_lora_weights.safetensors": None,
    "lcm/style.safetensors": None,
    "": None,
}


@pytest.mark.parametrize("name", CARDS)
def test_settings_are_those_of_the_model_cards(name: str) -> None:
    assert recommended(name) == CARDS[name]


def test_a_file_without_a_name_of_its_own_is_told_by_its_folder() -> None:
    lcm = CARDS["lcm-lora-sdxl"]
    for path in (
        "lcm-lora-sdxl/pytorch_lora_weights.safetensors",
        "/cache/models--latent-consistency--lcm-lora-sdxl/snapshots/0123/pytorch_lora_weights.safetensors",
        "emoji/lcm-lora/pytorch_lora_weights.fp16.safetensors",
    ):
        assert recommended(Path(path)) == lcm, path
    assert recommended("/lcm/models/style/pytorch_lora_weights.safetensors") is None


def test_the_header_counts_when_the_name_says_nothing() -> None:
    assert recommended("a.safetensors", {"modelspec.title": "emoji LCM-LoRA"}) == CARDS["lcm-lora-sdxl"]
    assert recommended("a.safetensors", {"ss_output_name": "tcd lora"}) == CARDS["h1t/TCD-SD15-LoRA"]
    assert recommended("dmd2.safetensors", {"modelspec.title": "LCM"}) == CARDS["tianweiy/DMD2"]
    # What a style's author writes about it is not its name.
    assert recommended("a.safetensors", {"modelspec.description": "works with LCM"}) is None


def test_inspection_recommends_by_file_header_and_repository(tmp_path: Path) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{module}.lora_down.weight": torch.ones(2, 8), f"{module}.lora_up.weight": torch.ones(8, 2)}
    path = tmp_path / "style" / "pytorch_lora_weights.safetensors"
    path.parent.mkdir()
    save_file(tensors, path)
    assert inspect_lora(path).recommended is None
    assert inspect_lora(path, name="h1t/TCD-SD15-LoRA").recommended == CARDS["h1t/TCD-SD15-LoRA"]
    save_file(tensors, path, {"modelspec.title": "emoji LCM-LoRA"})
    assert inspect_lora(path).recommended == CARDS["lcm-lora-sdxl"]
    hyper = path.with_name("Hyper-SD15-1step-lora.safetensors")
    path.rename(hyper)
    assert inspect_lora(hyper).recommended == CARDS["Hyper-SD15-1step-lora.safetensors"]


# SD 1.5's and SDXL's published scheduler configurations, as far as it matters here.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "timestep_spacing": "leading"},
    "sdxl": {"steps_offset": 1, "use_karras_sigmas": False, "timestep_spacing": "leading"},
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("settings", [settings for _, settings in KNOWN], ids=lambda settings: settings.method)
def test_schedules_are_those_of_diffusers(settings: Settings, family: str) -> None:
    """Every scheduler takes its options without a warning and then runs the same timesteps and noise levels."""
    config = {"_class_name": "PNDMScheduler", **BETAS, **CONFIGS[family]}
    ours = getattr(schedulers, settings.scheduler).from_config(config, **settings.scheduler_options)
    theirs = getattr(diffusers, settings.scheduler).from_config(config, **settings.scheduler_options)
    for name, value in settings.scheduler_options.items():
        assert ours.config[name] == value
    for scheduler in (ours, theirs):
        with warnings.catch_warnings():
            if settings.timesteps is None:
                scheduler.set_timesteps(settings.num_inference_steps)
            else:
                warnings.simplefilter("ignore")  # they are off LCM's grid
                scheduler.set_timesteps(timesteps=list(settings.timesteps))
    assert len(ours.timesteps) == settings.num_inference_steps
    torch.testing.assert_close(ours.timesteps.float(), theirs.timesteps.float())
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)


def test_settings_are_plain_values() -> None:
    for _, settings in KNOWN:
        assert json.loads(json.dumps(vars(settings))) is not None
        assert settings.num_inference_steps == len(settings.timesteps or range(settings.num_inference_steps))
