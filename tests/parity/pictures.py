"""Whole pictures by both libraries: the pipelines, the runs, what is painted from, and what counts as the same."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

import fourstroke

from .. import fakehub
from .guide import SNIPPETS

PROMPT, OTHER_PROMPT, NEGATIVE = "a red fox in the snow", "a beautiful cyborg, cute painting", "low quality, night"
TEXTS = [*SNIPPETS.values(), PROMPT, OTHER_PROMPT, NEGATIVE]
LIBRARIES = {"fourstroke": fourstroke, "diffusers": diffusers}
LORAS = {
    fakehub.SD15: fakehub.LORA_SD15,
    fakehub.XL: fakehub.LORA_XL,
    fakehub.SSD1B: fakehub.LORA_SSD1B,
}
MAX_DIFFERENCE, MEAN_DIFFERENCE, EFFECT = 2 / 255, 0.05 / 255, 1 / 255


@contextlib.contextmanager
def unheard(pipe_or_library: Any) -> Iterator[None]:
    """Whatever the peer warns of is let go; what we warn of stays an error."""
    name = pipe_or_library if isinstance(pipe_or_library, str) else type(pipe_or_library).__module__
    with warnings.catch_warnings():
        if name.startswith("diffusers"):
            warnings.simplefilter("ignore")
        yield


def assert_same_pictures(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    difference = np.abs(ours - theirs)
    assert difference.max() <= MAX_DIFFERENCE and difference.mean() <= MEAN_DIFFERENCE, (
        f"largest {255 * difference.max():.3f}, mean {255 * difference.mean():.4f} (of 255)"
    )
    for picture in theirs:
        assert picture.std() > 0.05, "a flat picture would be compared with nothing"


def load(library: str, name: str, *, lora: Any = None, lcm: bool = True, **options: Any) -> Any:
    """A pipeline of one of the libraries, as the guide sets it up."""
    module = LIBRARIES[library]
    pipe = module.DiffusionPipeline.from_pretrained(name, **{"torch_dtype": torch.float32, **options}).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    if lcm:
        pipe.scheduler = module.LCMScheduler.from_config(pipe.scheduler.config)
    if lora is not None:
        pipe.load_lora_weights(lora)
    return pipe


def paint(pipe: Any, prompt: Any = PROMPT, *, seed: int | list[int] = 0, **call: Any) -> np.ndarray:
    """(N, 64, 64, 3) in [0, 1]; four steps without guidance unless ``call`` says otherwise."""
    generator = torch.manual_seed(seed) if isinstance(seed, int) else [torch.Generator().manual_seed(s) for s in seed]
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np", **call}
    return pipe(prompt, generator=generator, **call).images


def both(
    name: str, *, setup: dict[str, Any] | None = None, loader: Callable[..., Any] = load, **call: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The same pictures by Fourstroke and by diffusers."""
    ours, theirs = (paint(loader(library, name, **(setup or {})), **call) for library in LIBRARIES)
    return ours, theirs


def shapes(seed: int, size: tuple[int, int] = (64, 64)) -> PIL.Image.Image:
    """An RGB picture of ``size`` (width, height): coloured ellipses and rectangles, with edges for Canny to find."""
    random = np.random.default_rng(seed)
    picture = PIL.Image.new("RGB", size, tuple(random.integers(0, 256, 3).tolist()))
    draw = PIL.ImageDraw.Draw(picture)
    for i in range(8):
        corners = np.sort(random.random((2, 2)), axis=0) * size
        paint_shape = draw.ellipse if i % 2 else draw.rectangle
        paint_shape([*corners[0].tolist(), *corners[1].tolist()], fill=tuple(random.integers(0, 256, 3).tolist()))
    return picture


def hole(size: tuple[int, int] = (64, 64)) -> PIL.Image.Image:
    """A mask of ``size`` (width, height), white in a box off its middle."""
    mask = PIL.Image.new("L", size, 0)
    mask.paste(255, (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 7 // 8))
    return mask
