"""Nothing in the loop waits for the device: no step reads a tensor's value back, nor sends one there from Python.

On a GPU each such read stops until everything queued is done. On the CPU it costs nothing, so it is caught where it is
asked for: as an operation of torch's, or as a method that leaves torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fourstroke import Control, GenerateRequest, Windows
from fourstroke.denoise import denoise, prepare
from fourstroke.latents import decode
from fourstroke.pipelines.pipeline import DiffusionPipeline
from fourstroke.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    TCDScheduler,
)
from tests.unit import tiny
from tests.unit.test_runtime import CASES, STEERED

aten = torch.ops.aten
WAITING_OPERATIONS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_consecutive,
    aten.repeat_interleave,
}
"""What has a result, or a shape, that depends on values."""
WAITING_METHODS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "cpu", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__")
}
SENDING_FUNCTIONS = {torch.tensor, torch.from_numpy}
"""What brings numbers from Python, which on a GPU are copied from memory that is not page-locked."""


class Waited(AssertionError):
    """Something in the loop waits for the device."""


class NoWaitingOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        indexed = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        sized = func is aten.repeat_interleave.self_int  # which is a view and a copy
        if indexed or func.overloadpacket in WAITING_OPERATIONS and not sized:
            raise Waited(f"{func} waits for the device")
        return func(*args, **kwargs)


class NoWaitingMethods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING_METHODS:
            raise Waited(f"Tensor.{func.__name__} waits for the device")
        if func in SENDING_FUNCTIONS:
            raise Waited(f"torch.{func.__name__} sends numbers to the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    with NoWaitingOperations(), NoWaitingMethods():
        yield


def run_without_waiting(pipe: DiffusionPipeline, request: GenerateRequest) -> Tensor:
    """Prepare as it comes, then run the steps under guard."""
    parts: Any = pipe._parts()
    state = prepare(parts, request)
    with no_waiting():
        for _ in denoise(parts, state):
            pass
    assert state.index == len(state.timesteps) - 1
    return state.latents


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.item(),
        lambda x: float(x),
        lambda x: bool(x > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x[None][x[None] > 0],
        lambda x: torch.nonzero(x),
        lambda x: torch.tensor(1.0),
        lambda x: [0, 1][x.long()],
    ],
)
def test_the_guard_sees(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises(Waited), no_waiting():
        wait(torch.tensor([1.0])[0])


@pytest.mark.parametrize("make", [tiny.sd, tiny.xl])
@pytest.mark.parametrize(("guidance_scale", "rescale"), [(1.0, 0.0), (1.7, 0.0), (1.7, 0.5)])
def test_pictures(make: Callable[[], Any], guidance_scale: float, rescale: float) -> None:
    options: Any = {"guidance_scale": guidance_scale, "guidance_rescale": rescale}
    run_without_waiting(make(), GenerateRequest(prompt="a red fox", seed=1, num_images_per_prompt=2, **options))


# Euler's reads its sigmas, which stay on the CPU wherever it runs; test_schedulers runs it where there are no values.
@pytest.mark.parametrize("kind", [LCMScheduler, TCDScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_schedulers(kind: Any, eta: float) -> None:
    pipe = tiny.sd()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    run_without_waiting(pipe, GenerateRequest(prompt="a red fox", seed=1, eta=eta, num_inference_steps=6))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("guess", [False, True])
def test_inpainting_with_a_control_network(mask: bool, guess: bool) -> None:
    make, _ = CASES["controlnet inpainting"]
    picture = {"image": STEERED["image"], "strength": 0.9}
    if mask:
        picture["mask_image"] = STEERED["mask_image"]
    steered: dict[str, Any] = {"controls": (Control(STEERED["control_image"]),), "guess_mode": guess}
    run_without_waiting(make(), GenerateRequest(prompt="fox", seed=1, guidance_scale=1.7, **steered, **picture))


def test_an_adapter() -> None:
    make, call = CASES["T2I-Adapter"]
    run_without_waiting(make(), GenerateRequest(prompt="fox", seed=1, adapters=(Control(call["image"]),)))


def test_windows_of_an_animation() -> None:
    make, _ = CASES["animation"]
    windows = Windows(length=2, stride=1)
    run_without_waiting(make(), GenerateRequest(prompt="a red fox", seed=1, num_frames=4, windows=windows))


def test_a_full_lcm() -> None:
    pipe = tiny.sd(time_cond_proj_dim=8)
    run_without_waiting(pipe, GenerateRequest(prompt="a red fox", seed=1, guidance_scale=8.0))


def test_decoding() -> None:
    vae: Any = tiny.vae()
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad(), no_waiting():
        decode(vae, latents)
