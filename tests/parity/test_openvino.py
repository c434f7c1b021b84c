"""Pictures of the shipped models with OpenVINO: diffusers' in float32, near them in bfloat16 and in 8 bits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

from fourstroke import Engine, engine
from fourstroke.engine import CALIBRATION
from fourstroke.hub import ZOO
from fourstroke.runtime.openvino import Accelerated, accelerated
from fourstroke.runtime.options import RuntimeOptions

EMOJI = ZOO / "emoji"
PROMPTS = ("a pizza", "a smiling cat", "a rocket", "rain")
"""None of them was seen in the calibration."""
MASKED = {"image": PIL.Image.new("RGB", (128, 128), "orange"), "mask_image": PIL.Image.new("L", (128, 128), "white")}
FIELDS: dict[str, dict[str, Any]] = {"emoji": {}, "emoji/inpainting": MASKED, "emoji/xl": {}}
STEPS = 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:peft"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fourstroke" / "ranges"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """An entry a call of a UNet: whether ranges were looked for."""
    calls: list[bool] = []
    call = Accelerated.__call__

    def counted(self: Accelerated, *args: Any, **kwargs: Any) -> Any:
        if "timestep" in self.__signature__.parameters:
            calls.append(self.observed is not None)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Accelerated, "__call__", counted)
    return calls


def paint(it: Engine, **fields: Any) -> np.ndarray:
    """A picture a prompt, (4, 128, 128, 3) in 0..1."""
    results = [it.generate(prompt, seed=seed, output_type="np", **fields) for seed, prompt in enumerate(PROMPTS)]
    return np.concatenate([result.images for result in results])


@pytest.fixture(scope="module")
def eager() -> Any:
    """Pictures in float32 by torch, made once a model."""
    made: dict[str, np.ndarray] = {}

    def pictures(model: str) -> np.ndarray:
        if model not in made:
            made[model] = paint(Engine(model, runtime=RuntimeOptions("eager")), **FIELDS[model])
        return made[model]

    return pictures


def psnr(found: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Of each picture, in dB."""
    errors = np.square(found.astype(np.float64) - wanted).mean(axis=(1, 2, 3))
    return list(-10 * np.log10(errors))


def test_diffusers_pictures_in_float32() -> None:
    it = Engine("emoji", runtime=RuntimeOptions("openvino"), dtype=torch.float32)
    ours = paint(it)
    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(str(EMOJI / "base"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(EMOJI / "lcm-lora"), weight_name="pytorch_lora_weights.safetensors")
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    made = pipe(
        [*PROMPTS], num_inference_steps=STEPS, guidance_scale=1.0, generator=generators, output_type="np"
    ).images
    assert np.abs(ours - made).max() <= 2 / 255


@pytest.mark.parametrize("model", FIELDS)
def test_float32_is_the_eager_picture(model: str, eager: Any) -> None:
    it = Engine(model, runtime=RuntimeOptions("openvino"), dtype=torch.float32)
    assert np.abs(paint(it, **FIELDS[model]) - eager(model)).max() <= 1 / 255


@pytest.mark.parametrize("model", FIELDS)
def test_bfloat16_is_near_it(model: str, eager: Any) -> None:
    it = Engine(model, runtime=RuntimeOptions("openvino"), dtype=torch.bfloat16)
    assert min(psnr(paint(it, **FIELDS[model]), eager(model))) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("model", FIELDS)
def test_eight_bits_are_not_far(model: str, eager: Any, steps: list[bool], cache: Path) -> None:
    it = Engine(model, runtime=RuntimeOptions(quantize="int8"))
    errors = psnr(paint(it, **FIELDS[model]), eager(model))
    assert min(errors) >= 30, errors
    # The calibration comes first, and once.
    assert steps == [True] * STEPS * len(CALIBRATION) + [False] * STEPS * len(PROMPTS)
    assert len([*cache.iterdir()]) == 1


def test_ranges_are_read_back(steps: list[bool], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CALIBRATION", CALIBRATION[:1])
    runtime = RuntimeOptions(quantize="int8")
    first, second = (Engine("emoji", runtime=runtime) for _ in range(2))
    pictures = [it.generate("a pizza", seed=1, output_type="np").images for it in (first, second)]
    assert steps == [True] * STEPS + [False] * STEPS * 2
    assert np.array_equal(*pictures)
    ranges = [accelerated(it.pipeline.unet)[""].ranges for it in (first, second)]
    assert ranges[0] is not None and ranges[1] is not None and ranges[0].keys() == ranges[1].keys()
    assert all(torch.equal(found.low, ranges[1][name].low) for name, found in ranges[0].items())
    other = Engine("emoji", loras=["emoji/flat-lora"], runtime=runtime)
    other.generate("a pizza", seed=1, output_type="latent")
    assert steps.count(True) == 2 * STEPS and len([*cache.iterdir()]) == 2


def test_ranges_belong_to_what_a_lora_file_holds(
    steps: list[bool], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CALIBRATION", CALIBRATION[:1])
    file = tmp_path / "style.safetensors"
    for times, style in enumerate(("flat-lora", "line-lora"), start=1):
        shutil.copy(EMOJI / style / "pytorch_lora_weights.safetensors", file)
        it = Engine("emoji", loras=[str(file)], runtime=RuntimeOptions(quantize="int8"))
        it.generate("a pizza", seed=1, output_type="latent")
        assert steps.count(True) == times * STEPS and len([*cache.iterdir()]) == times
