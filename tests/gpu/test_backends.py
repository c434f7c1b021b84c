"""CUDA graphs, torch.compile and channels last on a real GPU, against eager runs there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from fourstroke import GenerateRequest
from fourstroke.denoise import denoise, prepare
from fourstroke.runtime.compile import compile_, uncompile_
from fourstroke.runtime.cudagraph import GraphMemory, Graphs, cudagraph_, uncudagraph_
from fourstroke.runtime.memory_format import channels_last_
from tests.unit import tiny
from tests.unit.test_cudagraph import inputs
from tests.unit.test_memory_format import bits, equal, style
from tests.unit.test_runtime import CASES, lora, painted

pytestmark = pytest.mark.gpu

REQUEST = GenerateRequest(prompt="a red fox", seed=3, output_type="np")


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry a capture."""
    made: list[None] = []
    capture = GraphMemory.capture

    def counted(memory: GraphMemory, run: Callable[[], Any], device: torch.device) -> Any:
        made.append(None)
        return capture(memory, run, device)

    monkeypatch.setattr(GraphMemory, "capture", counted)
    return made


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(value: Any) -> Any:
    return {name: v.to("cuda") if isinstance(v, torch.Tensor) else v for name, v in value.items()}


def graphed(pipe: Any) -> Graphs:
    """All networks that the loop and the decoding run, in one memory."""
    graphs = cudagraph_(pipe.unet)
    cudagraph_(pipe.vae.decoder, memory=graphs.memory)
    for net in getattr(getattr(pipe, "controlnet", None), "nets", [getattr(pipe, "controlnet", None)]):
        if net is not None:
            cudagraph_(net, memory=graphs.memory)
    return graphs


@pytest.mark.parametrize(("make", "call"), CASES.values(), ids=list(CASES))
def test_graphs_paint_the_eager_picture(make: Callable[[], Any], call: dict[str, Any], captures: list[None]) -> None:
    pipe = make().to("cuda")
    wanted = painted(pipe, **call)
    graphed(pipe)
    first = painted(pipe, **call)
    count = len(captures)
    assert count >= 2 and np.abs(first - wanted).max() <= 1 / 255
    for _ in range(2):
        assert np.array_equal(painted(pipe, **call), first)
    assert len(captures) == count


def test_buckets_in_one_memory_do_not_disturb_each_other() -> None:
    unet = tiny.unet().to("cuda")
    calls = [on_gpu(inputs(batch=batch, size=size)) for batch in (1, 2, 3) for size in (4, 8)]
    with torch.no_grad():
        wanted = [unet(**call) for call in calls]
        cudagraph_(unet)
        for _ in range(3):
            results = [unet(**call) for call in calls]
            for result, expected in zip(results, wanted, strict=True):
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_timesteps_from_the_cpu(captures: list[None]) -> None:
    unet = tiny.unet().to("cuda")
    call = on_gpu(inputs())
    with torch.no_grad():
        wanted = [unet(**call | {"timestep": t}) for t in (999, 259)]
        cudagraph_(unet)
        got = [unet(**call | {"timestep": t}) for t in (999, torch.tensor(259))]
    assert len(captures) == 1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_adapters_switch_without_a_new_capture(captures: list[None]) -> None:
    pipe, reference = (tiny.sd().to("cuda") for _ in range(2))
    graphed(pipe)
    plain = pipe.generate(REQUEST).images
    count = len(captures)
    for strength in (0.5, -0.5):
        for each in (pipe, reference):
            each.load_lora_weights(lora(each, strength), adapter_name=str(strength))
        changed = pipe.generate(REQUEST).images
        assert np.abs(changed - plain).max() > 1 / 255
        assert np.abs(changed - reference.generate(REQUEST).images).max() <= 1 / 255
    pipe.unload_lora_weights()
    assert np.array_equal(pipe.generate(REQUEST).images, plain)
    assert len(captures) == count


@pytest.mark.parametrize("make", [tiny.sd, tiny.xl])
@pytest.mark.parametrize("with_graphs", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.7])
def test_no_step_waits_for_the_gpu(make: Callable[[], Any], with_graphs: bool, guidance_scale: float) -> None:
    pipe = make().to("cuda")
    if with_graphs:
        graphed(pipe)
    request = GenerateRequest(prompt="a red fox", seed=3, guidance_scale=guidance_scale, num_images_per_prompt=2)
    for guard in (False, True):  # in the first round graphs are captured
        parts = pipe._parts()
        state = prepare(parts, request)
        if guard:
            with waiting_is_an_error():
                for _ in denoise(parts, state):
                    pass
        else:
            for _ in denoise(parts, state):
                pass
    assert torch.isfinite(state.latents).all()


def test_moved_weights_are_captured_anew(captures: list[None]) -> None:
    pipe = tiny.sd().to("cuda")
    wanted = pipe.generate(REQUEST).images
    graphs = cudagraph_(pipe.unet, buckets=2)
    for _ in range(6):
        pipe.generate(REQUEST)
    pipe.to("cpu")
    pipe.generate(REQUEST)
    assert graphs.captured == 0
    pipe.to("cuda")
    occupied = torch.empty(1 << 20, device="cuda")  # so that not all of them come to lie where they were
    assert np.abs(pipe.generate(REQUEST).images - wanted).max() <= 1 / 255
    assert occupied.is_cuda and len(captures) >= 1


def test_offloading_gives_the_same_picture() -> None:
    pipe = tiny.sd().to("cuda")
    wanted = painted(pipe)
    pipe.enable_model_cpu_offload()
    graphed(pipe)
    for _ in range(4):
        assert np.abs(painted(pipe) - wanted).max() <= 1 / 255


def test_undoing_gives_the_memory_back() -> None:
    unet = tiny.unet(block_out_channels=(128, 256)).to("cuda")
    call = on_gpu(inputs(batch=2, size=32))
    with torch.no_grad():
        unet(**call)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        cudagraph_(unet)
        for _ in range(2):
            unet(**call)
        assert torch.cuda.memory_allocated() > before[0]
        uncudagraph_(unet)
        torch.cuda.empty_cache()
    # Libraries keep a workspace for the stream of the capture.
    assert torch.cuda.memory_allocated() - before[0] <= 1 << 26
    assert torch.cuda.memory_reserved() - before[1] <= 1 << 27


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on the first import of its compiler
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_compiled_pictures_and_adapters(mode: str | None, tmp_path: Any) -> None:
    pipe, reference = (tiny.sd().to("cuda") for _ in range(2))
    plain = pipe.generate(REQUEST).images
    compile_(pipe.unet, mode=mode, cache=tmp_path)
    compile_(pipe.vae.decoder, mode=mode, cache=tmp_path)
    compiled = pipe.generate(REQUEST).images
    assert np.abs(compiled - plain).max() <= 2 / 255
    with torch.compiler.set_stance("fail_on_recompile"):
        for each in (pipe, reference):
            each.load_lora_weights(lora(each), adapter_name="a")
        assert np.abs(pipe.generate(REQUEST).images - reference.generate(REQUEST).images).max() <= 2 / 255
        pipe.unload_lora_weights()
        assert np.array_equal(pipe.generate(REQUEST).images, compiled)
    assert len([*tmp_path.iterdir()]) == 2
    for network in (pipe.unet, pipe.vae.decoder):
        uncompile_(network)
    assert np.array_equal(pipe.generate(REQUEST).images, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_channels_last_paints_the_same_and_merges_exactly(dtype: torch.dtype) -> None:
    pipe = tiny.sd().to("cuda", dtype)
    plain, start = pipe.generate(REQUEST).images, bits(pipe.unet)
    for network in (pipe.unet, pipe.vae):
        assert channels_last_(network)
    # Another algorithm of cuDNN's rounds otherwise, and may use TensorFloat-32.
    assert np.abs(pipe.generate(REQUEST).images - plain).mean() <= 2 / 255
    merged = []
    for name in "ab":
        pipe.load_lora_weights(style(pipe.unet, ord(name)), adapter_name=name)
    for active in "aba":
        pipe.set_adapters(active)
        pipe.adapters.apply()
        merged.append(bits(pipe.unet))
    assert equal(merged[0], merged[2]) and not equal(merged[0], merged[1])
    pipe.unload_lora_weights()
    pipe.adapters.apply()
    assert equal(bits(pipe.unet), start)
