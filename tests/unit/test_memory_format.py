"""Channels last: nothing but the order in memory changes, and adapters are merged into it exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, channels_last, nn

from fourstroke import GenerateRequest, StableDiffusionPipeline
from fourstroke.runtime.memory_format import channels_last_
from fourstroke.runtime.offload import Offload
from tests.unit import tiny


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """Those larger than a pixel, whose two orders differ."""
    return [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]


def orders(network: nn.Module) -> set[bool]:
    return {conv.weight.is_contiguous(memory_format=channels_last) for conv in convolutions(network)}


def style(unet: nn.Module, seed: int) -> dict[str, Tensor]:
    """A LoRA of rank two on every convolution and every projection."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            out, *rest = module.weight.shape
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn((2, *rest), generator=generator) / 8
            up = (out, 2, *[1] * (len(rest) - 1))
            tensors[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator) / 8
    return tensors


def bits(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", [tiny.unet, tiny.vae])
def test_there_and_back(make: Callable[[], Any]) -> None:
    network = make()
    before, parameters = bits(network), [*network.parameters()]
    strides = [value.stride() for value in network.parameters()]
    assert orders(network) == {False}
    assert channels_last_(network) == len(convolutions(network))
    assert orders(network) == {True} and equal(bits(network), before)
    assert channels_last_(network) == 0  # nothing left to do
    assert channels_last_(network, on=False) == len(convolutions(network))
    assert [value.stride() for value in network.parameters()] == strides and equal(bits(network), before)
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adapters_there_and_back_are_bit_equal(dtype: torch.dtype) -> None:
    turned, usual = (tiny.sd().to(dtype) for _ in range(2))
    channels_last_(turned.unet)
    start = bits(turned.unet)
    assert equal(start, bits(usual.unet))
    seen = []
    for pipe in (turned, usual):
        for name in ("a", "b"):
            pipe.load_lora_weights(style(pipe.unet, ord(name)), adapter_name=name)
        own = []
        for active in ("a", "b", "a"):
            pipe.set_adapters(active)
            pipe.adapters.apply()
            own.append(bits(pipe.unet))
        seen.append(own)
    (a, b, again), (usual_a, usual_b, _) = seen
    assert equal(a, again) and not equal(a, b) and not equal(a, start)
    assert equal(a, usual_a) and equal(b, usual_b)  # the order changes no bit of a merge
    assert orders(turned.unet) == {True}
    turned.unload_lora_weights()
    turned.adapters.apply()
    assert equal(bits(turned.unet), start) and orders(turned.unet) == {True}


def test_switching_while_an_adapter_acts() -> None:
    pipe = tiny.sd()
    start = bits(pipe.unet)
    pipe.load_lora_weights(style(pipe.unet, 1), adapter_name="a")
    pipe.adapters.apply()
    merged = bits(pipe.unet)
    channels_last_(pipe.unet)
    assert equal(bits(pipe.unet), merged) and not equal(merged, start)
    pipe.unload_lora_weights()
    pipe.adapters.apply()
    assert equal(bits(pipe.unet), start)


def test_pictures_stay_what_they_are() -> None:
    pipe: StableDiffusionPipeline = tiny.sd()
    request = GenerateRequest(prompt="a red fox", seed=3, output_type="np")
    wanted = pipe.generate(request).images
    for network in (pipe.unet, pipe.vae):
        channels_last_(network)
    assert abs(pipe.generate(request).images - wanted).max() < 1e-4
    for network in (pipe.unet, pipe.vae):
        channels_last_(network, on=False)
    assert (pipe.generate(request).images == wanted).all()


def test_the_decoder_keeps_the_order_from_its_first_convolution_to_its_last() -> None:
    vae = tiny.vae()
    channels_last_(vae)
    seen: list[bool] = []
    for conv in convolutions(vae.decoder):
        conv.register_forward_hook(lambda _m, _i, out: seen.append(out.is_contiguous(memory_format=channels_last)))
    vae.decode(torch.randn(1, 4, 4, 4))
    assert len(seen) == len(convolutions(vae.decoder)) and all(seen)


def test_copies_on_the_device_have_the_order_of_those_at_home() -> None:
    unet = tiny.unet()
    channels_last_(unet)
    offload = Offload("cpu", copy=lambda tensor, device: tensor.to(device, copy=True))
    offload.bring(unet)
    assert orders(unet) == {True}
    offload.rest()
    assert orders(unet) == {True}
