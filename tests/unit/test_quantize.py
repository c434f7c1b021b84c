"""Eight bits: how numbers are rounded, what layers make of it, and the ranges that are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourstroke.models.layers import GEGLU, Attention, Upsample2D
from fourstroke.runtime.openvino import Accelerated, openvino_
from fourstroke.runtime.quantize import (
    HEADROOM,
    LEVELS,
    RESULT,
    SMOOTHING,
    Range,
    eight_bits,
    fingerprint,
    in_eight_bits,
    load_ranges,
    save_ranges,
)
from tests.unit import tiny
from tests.unit.test_cudagraph import inputs
from tests.unit.test_graph import assert_near, plain


def range_of(x: Tensor, axis: int) -> Range:
    """Of each channel of ``x``."""
    flat = x.transpose(0, axis).flatten(1)
    return Range(flat.amin(dim=1), flat.amax(dim=1))


def outliers(*shape: int, axis: int = -1) -> Tensor:
    """Numbers some channels of which are up to a hundred times larger than the others, and not around zero."""
    x = torch.randn(shape).transpose(axis, -1)
    x *= torch.logspace(-1, 1, x.shape[-1])
    return (x + torch.linspace(-1, 2, x.shape[-1])).transpose(axis, -1).contiguous()


# Numbers.


@pytest.mark.parametrize("shift", [-5.0, -1.0, 0.0, 3.0])
def test_a_smoothed_range_holds_what_was_seen_and_zero(shift: float) -> None:
    x, weight = outliers(200, 12) + shift, torch.randn(7, 12)
    smooth, found = range_of(x, 1).smoothed(weight)
    low, high = found.limits()
    step = (high - low) / (LEVELS - 1)
    smaller = x / smooth
    # Clamping may cost what rounding does.
    assert float(low) - step / 2 <= smaller.min() and smaller.max() <= float(high) + step / 2
    assert low <= 0 <= high
    zero = -low / step
    assert float(zero) == pytest.approx(round(float(zero)), abs=1e-3)
    # Others may reach further, but not much is wasted on them.
    width = smaller.max().clamp(min=0) - smaller.min().clamp(max=0)
    assert 0.99 * HEADROOM * width <= high - low <= 1.01 * HEADROOM * width


def test_smoothing_makes_channels_more_alike_and_keeps_the_product() -> None:
    x, weight = outliers(200, 12), torch.randn(7, 12)
    smooth, _ = range_of(x, 1).smoothed(weight)
    torch.testing.assert_close(F.linear(x / smooth, weight * smooth), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    # SmoothQuant's equation 4, up to one factor for all channels.
    largest = [values.abs().amax(dim=0) for values in (x, weight)]
    ratio = smooth / (largest[0] ** SMOOTHING / largest[1] ** (1 - SMOOTHING))
    torch.testing.assert_close(ratio, ratio.mean().expand(12), rtol=1e-4, atol=1e-4)
    # One of both is made more alike, and neither is made less.
    spread = [float(values.abs().amax(dim=0).log().std()) for values in (x, x / smooth, weight, weight * smooth)]
    assert spread[1] < spread[0]


@pytest.mark.parametrize("dead", ["data", "weight", "both"])
def test_channels_that_are_always_zero(dead: str) -> None:
    x, weight = torch.randn(50, 6), torch.randn(4, 6)
    if dead != "weight":
        x[:, 2] = 0
    if dead != "data":
        weight[:, 2] = 0
    smooth, found = range_of(x, 1).smoothed(weight)
    low, high = found.limits()
    assert all(bool(value.isfinite().all()) for value in (smooth, low, high)) and low < high
    low, high = range_of(torch.zeros(5, 6), 1).smoothed(weight)[1].limits()
    assert low <= 0 < high


@pytest.mark.parametrize("shape", [(7, 12), (7, 12, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_rounded_to_the_nearest_of_255(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = (torch.randn(shape) * torch.logspace(-3, 1, 7).view(-1, *[1] * (len(shape) - 1))).to(dtype)
    before, smooth = weight.clone(), torch.rand(12) + 0.5
    whole, scale = eight_bits(weight, smooth)
    assert whole.dtype == torch.int8 and whole.shape == weight.shape and scale.dtype == torch.float32
    assert torch.equal(weight, before)
    wanted = weight.double() * smooth.double().view(1, -1, *[1] * (len(shape) - 2))
    assert bool(((whole.double() * scale - wanted).abs() <= scale.double() * 0.5001).all())
    # Symmetric, and all of the levels are used: each row's largest is 127.
    assert whole.int().abs().flatten(1).amax(dim=1).tolist() == [127] * 7


def test_a_row_of_zeros_stays_one() -> None:
    whole, scale = eight_bits(torch.zeros(2, 3), torch.ones(3))
    assert not whole.any() and bool(scale.isfinite().all())


def test_ranges_join() -> None:
    one, other = Range(torch.tensor([-1.0, 0]), torch.tensor([2.0, 3])), Range(torch.tensor([0.0, -4]), torch.ones(2))
    low, high = one.joined(other)
    assert low.tolist() == [-1, -4] and high.tolist() == [2, 3]


def test_a_symmetric_range_is_int8() -> None:
    x, weight = outliers(200, 12), torch.randn(7, 12)
    smooth, found = range_of(x, 1).smoothed(weight)
    low, high = found.limits(symmetric=True)
    smaller = x / smooth
    torch.testing.assert_close(low / high, torch.tensor(-128 / 127))
    assert float(low) * 1.0001 <= smaller.min() and smaller.max() <= float(high) * 1.0001
    assert float(torch.maximum(smaller.min() / low, smaller.max() / high)) == pytest.approx(1 / HEADROOM)


# Layers.


class Tokens(nn.Module):
    """A linear layer behind a norm, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


class Point(nn.Module):
    """A linear layer on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def cases() -> dict[str, tuple[nn.Module, str, Tensor, int]]:
    """Network, the layer's name, an input, and the axis of its channels."""
    torch.manual_seed(0)
    pictures, tokens = outliers(2, 12, 9, 7, axis=1), outliers(2, 30, 24)
    return {
        "linear": (Point(), "layer", tokens, -1),
        "linear behind a norm": (Tokens(), "layer", tokens, -1),
        "gated linear": (GEGLU(24, 16), "proj", tokens, -1),
        "convolution": (nn.Sequential(nn.Conv2d(12, 8, 3, padding=1)), "0", pictures, 1),
        "strided convolution": (nn.Sequential(nn.Conv2d(12, 8, 3, stride=2)), "0", pictures, 1),
        "pixel by pixel": (nn.Sequential(nn.Conv2d(12, 8, 1)), "0", pictures, 1),
        "behind a doubling": (Upsample2D(12), "conv", pictures, 1),
    }


def seen_by(network: nn.Module, name: str, x: Tensor) -> Tensor:
    """What the layer ``name`` gets."""
    got: list[Tensor] = []
    layer = network.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: got.append(args[0]))
    network(x)
    hook.remove()
    return got[0]


def runtime_kinds(forward: Accelerated) -> list[str]:
    """What OpenVINO's products and convolutions run in."""
    (compiled,) = forward._kept.values()
    assert compiled is not None
    nodes = compiled.request.get_compiled_model().get_runtime_model().get_ops()
    facts = [{key: node.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision")} for node in nodes]
    products = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
    return [fact["runtimePrecision"] for fact in facts if fact["layerType"] in products]


@torch.no_grad()
@pytest.mark.parametrize("name", [*cases()])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_a_layer_in_eight_bits(name: str, precision: str) -> None:
    network, layer, x, axis = cases()[name]
    tiny.filled(network)
    wanted = network(x)
    openvino_(network, precision, {layer: range_of(seen_by(network, layer, x), axis)})
    found = network(x)
    error = float((found - wanted).square().mean().sqrt() / wanted.std())
    # Two roundings, of data and of weights; of the data's 255 levels half are kept for others.
    assert 1e-4 < error < 0.04
    assert runtime_kinds(network.forward)[0] in ("u8", "i8")


@torch.no_grad()
def test_smoothing_keeps_small_channels_beside_large_ones() -> None:
    network, x = tiny.filled(Point()), torch.randn(2, 50, 24)
    x[..., 0] *= 300  # as in text encoders and late layers of UNets
    network.layer.weight[:, 0] /= 300
    wanted = network(x)

    def rounded(values: Tensor, bits: float = 255) -> Tensor:
        step = (values.max() - values.min()) / bits
        return (values / step).round() * step

    naive = F.linear(rounded(x), network.layer.weight)
    openvino_(network, "f32", {"layer": range_of(x, -1)})
    errors = [float((found - wanted).square().mean()) for found in (network(x), naive)]
    assert errors[0] < errors[1] / 20


@torch.no_grad()
@pytest.mark.parametrize("upcast", [False, True])
def test_attention_multiplies_eight_bits_unless_it_asks_for_float32(upcast: bool) -> None:
    network, x = tiny.filled(Attention(24, heads=2, head_dim=12, upcast=upcast)), torch.randn(2, 64, 24)
    wanted = network(x)
    forward = openvino_(network, "f32")
    forward.observed = ranges = {}
    network(x)
    factors = {f"to_{name}{RESULT}" for name in "qk"}
    assert factors & ranges.keys() == (set() if upcast else factors)
    openvino_(network, "f32", {name: found for name, found in ranges.items() if name in factors})
    error = float((network(x) - wanted).square().mean().sqrt() / wanted.std())
    assert error < 1e-5 if upcast else 1e-5 < error < 0.02
    # A text's keys, some of them far larger than others, stay as they are.
    context = torch.randn(2, 7, 24)
    forward = openvino_(network, "f32")
    forward.observed = ranges = {}
    network(x, context)
    assert not factors & ranges.keys()


@torch.no_grad()
def test_runs_tell_the_ranges_of_all_inputs() -> None:
    unet = tiny.unet()
    forward = openvino_(unet, "f32")
    forward.observed = {}
    calls = [inputs(), inputs(), inputs(size=8, batch=2)]
    names = {id(part): name for name, part in unet.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))}
    seen: dict[str, list[Tensor]] = {}
    for call in calls:
        assert_near(unet(**call), plain(unet, call))
    hooks = [
        part.register_forward_pre_hook(lambda part, args: seen.setdefault(names[id(part)], []).append(args[0]))
        for part in unet.modules()
        if id(part) in names
    ]
    hooks += [
        unet.get_submodule(name).register_forward_hook(
            lambda part, _, out: seen.setdefault(names[id(part)] + RESULT, []).append(out)
        )
        for name in names.values()
        if name.endswith(("attn1.to_q", "attn1.to_k"))
    ]
    for call in calls:
        plain(unet, call)
    for hook in hooks:
        hook.remove()
    # All but those whose input depends on the timestep alone.
    assert forward.observed.keys() == {name for name in seen if "time_emb" not in name}
    for name, found in forward.observed.items():
        axis = 1 if isinstance(unet.get_submodule(name.removesuffix(RESULT)), nn.Conv2d) else -1
        wanted = [range_of(x.reshape(-1, 1) if name.endswith(RESULT) else x, axis) for x in seen[name]]
        low = torch.stack([each.low for each in wanted]).amin(dim=0).view(found.low.shape)
        high = torch.stack([each.high for each in wanted]).amax(dim=0).view(found.high.shape)
        torch.testing.assert_close(found.low, low, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.high, high, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_unet_in_eight_bits_and_a_merge_into_it() -> None:
    unet = tiny.unet()
    forward = openvino_(unet, "f32")
    forward.observed = ranges = {}
    call = inputs()
    unet(**call)
    forward = openvino_(unet, "f32", in_eight_bits(ranges))
    for change in (1.0, 0.5):
        unet.conv_in.weight.mul_(change)
        unet.mid_block.resnets[0].conv1.weight.mul_(change)
        found, wanted = unet(**call), plain(unet, call)
        # So many layers in turn; the random network has nothing of the calm of a trained one.
        assert float((found - wanted).square().mean().sqrt() / wanted.std()) < 0.1
    kinds = runtime_kinds(forward)
    layers = [name for name in in_eight_bits(ranges) if not name.endswith(RESULT)]
    assert sum(kind in ("u8", "i8") for kind in kinds) >= len(layers) - 2


def test_what_stays_as_it_is() -> None:
    one = Range(torch.zeros(1), torch.ones(1))
    left = [
        "conv_in",
        "conv_out",
        "layers.12",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        "down_blocks.1.resnets.0.conv_shortcut",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv",
    ]
    taken = ["down_blocks.0.resnets.0.conv1", "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"]
    assert [*in_eight_bits(dict.fromkeys([*left, *taken], one))] == taken


# Files.


def test_ranges_are_kept(tmp_path: Path) -> None:
    ranges = {name: Range(torch.randn(3), torch.randn(3)) for name in ("a", "down_blocks.0.conv")}
    path = tmp_path / "new" / "folder" / "ranges.safetensors"
    assert load_ranges(path) is None
    save_ranges(path, ranges)
    found = load_ranges(path)
    assert found is not None and found.keys() == ranges.keys()
    for name, (low, high) in ranges.items():
        assert torch.equal(found[name].low, low) and torch.equal(found[name].high, high)
    assert [*path.parent.iterdir()] == [path]


def test_a_fingerprint_is_that_of_files_and_of_what_comes_with_them(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    name = fingerprint([first, second], [("lora", 1.0)])
    assert len(name) == 32 and int(name, 16) and name == fingerprint([second, first, first], [("lora", 1.0)])
    others: list[Any] = [([first], [("lora", 1.0)]), ([first, second], [("lora", 0.5)]), ([first, second], [])]
    names = {fingerprint(*other) for other in others}
    stat = first.stat()
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    names.add(fingerprint([first, second], [("lora", 1.0)]))
    first.write_bytes(b"11")
    names.add(fingerprint([first, second], [("lora", 1.0)]))
    assert len(names | {name}) == 6
