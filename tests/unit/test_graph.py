"""What a trace makes of networks and of single operations, run by OpenVINO in float32, against torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fourstroke
from fourstroke.models.ip_adapter import attach_ip_adapters_, project, read_ip_adapter
from fourstroke.models.motion import attach_motion_
from fourstroke.models.unet import Residuals
from fourstroke.runtime.calls import tensors_in
from fourstroke.runtime.graph import trace
from fourstroke.runtime.nodes import Unsupported, transposed_kernel
from fourstroke.runtime.openvino import openvino_
from tests.parity.image_prompts import plain_projection
from tests.parity.oracles import UNETS, unet_inputs
from tests.unit import tiny
from tests.unit.test_runtime import layers

NEAR = 2e-5
"""Of the largest value: what float32 may round otherwise in another order."""

ODD = (5, 7)
"""A size that no doubling leads back to."""

SMALL: dict[str, dict[str, Any]] = {
    **UNETS,
    "ssd1b": {
        **UNETS["ssd1b"],
        "transformer_layers_per_block": [0, [1, 1], [1, 2]],
        "reverse_transformer_layers_per_block": [[2, 1, 1], [1, 1, 1], 0],
    },
}


def plain(network: nn.Module, call: dict[str, Any]) -> Any:
    return type(network).forward(network, **call)


def assert_near(got: Any, wanted: Any, near: float = NEAR) -> None:
    """Equal structure, and every tensor within ``near`` of its largest value."""
    pairs = [*zip(tensors_in(got), tensors_in(wanted), strict=True)]
    assert pairs and type(got) is type(wanted)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        scale = float(theirs.abs().max())
        assert scale > 0 and float((ours - theirs).abs().max()) <= near * scale


def assert_same(network: nn.Module, *calls: dict[str, Any]) -> None:
    """OpenVINO answers as torch does, without a warning that torch has run after all."""
    openvino_(network, "f32")
    for call in calls:
        with torch.no_grad():
            assert_near(network(**call), plain(network, call))


# Networks.


@pytest.mark.parametrize("kind", SMALL)
def test_every_kind_of_unet(kind: str) -> None:
    unet = tiny.filled(fourstroke.UNet2DConditionModel.from_config(SMALL[kind]))
    assert_same(unet, unet_inputs(SMALL[kind], ODD, batch=2))


def test_sizes_and_batches() -> None:
    unet = tiny.unet()
    config = {"cross_attention_dim": tiny.WIDTH}
    assert_same(unet, *(unet_inputs(config, size, batch) for size, batch in (((8, 8), 1), ((8, 16), 3), ((3, 1), 1))))


def steered(unet: Any) -> dict[str, Any]:
    net = tiny.filled(fourstroke.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,) * 4))
    call = unet_inputs({"cross_attention_dim": tiny.WIDTH}, ODD)
    residuals = net(**call, condition=torch.randn(1, 16, *ODD))
    return call | {"residuals": Residuals(residuals.down, residuals.mid)}


def adapted(unet: Any) -> dict[str, Any]:
    intra = (torch.randn(2, 16, *ODD), torch.randn(2, 32, 3, 4), torch.randn(2, 32, 3, 4))
    return unet_inputs({"cross_attention_dim": tiny.WIDTH}, ODD) | {"residuals": Residuals(intra=intra)}


def prompted(unet: Any) -> dict[str, Any]:
    adapters = [{"image_proj": plain_projection(tiny.WIDTH), "ip_adapter": layers(unet)} for _ in range(2)]
    attach_ip_adapters_(unet, [read_ip_adapter(adapter) for adapter in adapters])
    tokens = project(unet, [torch.randn(2, 1, 12), torch.randn(2, 1, 12)])
    return unet_inputs({"cross_attention_dim": tiny.WIDTH}, ODD) | {"image_tokens": tokens}


def animated(unet: Any) -> dict[str, Any]:
    config = {"block_out_channels": (16, 32), "motion_layers_per_block": 1, "motion_num_attention_heads": 2}
    attach_motion_(unet, tiny.filled(fourstroke.MotionAdapter.from_config(config | {"motion_norm_num_groups": 4})))
    return unet_inputs({"cross_attention_dim": tiny.WIDTH}, ODD, batch=6) | {"frames": 3}


@pytest.mark.parametrize("condition", [steered, adapted, prompted, animated])
def test_what_is_added_to_a_unet(condition: Callable[[Any], dict[str, Any]]) -> None:
    unet = tiny.unet()
    call = condition(unet)
    assert_same(unet, call)


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_control_networks(guess_mode: bool, pooled: bool) -> None:
    net: Any = fourstroke.ControlNetModel.from_unet(tiny.unet(), conditioning_embedding_out_channels=(8,) * 4)
    tiny.filled(net)
    net.config = copy.copy(net.config)
    object.__setattr__(net.config, "global_pool_conditions", pooled)
    call = unet_inputs({"cross_attention_dim": tiny.WIDTH}, ODD)
    call |= {"condition": torch.randn(1, 16, *ODD), "guess_mode": guess_mode, "conditioning_scale": 0.7}
    assert_same(net, call, call | {"conditioning_scale": 1.3})


def tiny_vae(act: str) -> Any:
    levels = {f"{part}_block_out_channels": (8,) * 4 for part in ("encoder", "decoder")}
    blocks = {f"num_{part}_blocks": (1,) * 4 for part in ("encoder", "decoder")}
    return tiny.filled(fourstroke.AutoencoderTiny.from_config({**levels, **blocks, "act_fn": act}))


@pytest.mark.parametrize("make", [tiny.vae, lambda: tiny_vae("relu"), lambda: tiny_vae("gelu")])
def test_autoencoders(make: Callable[[], Any]) -> None:
    vae = make()
    assert_same(vae.encoder, {"x": torch.rand(2, 3, 24, 40) * 2 - 1})
    assert_same(vae.decoder, {"z": torch.randn(1, 4, *ODD)})


# Single operations.


class Toy(nn.Module):
    """A network that does one thing."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)
        tiny.filled(self)

    def forward(self, sample: Tensor, other: Tensor, timestep: Tensor | None = None) -> Tensor:
        return self.function(self.linear(sample), other, timestep)


def inputs() -> dict[str, Tensor]:
    return {"sample": torch.randn(6, 4), "other": torch.randn(6, 4), "timestep": torch.tensor([4, 6])}


def assigned(x: Tensor) -> Tensor:
    x[:2] = 0
    return x * 1.0


def assigned_to_a_constant(x: Tensor) -> Tensor:
    y = torch.zeros(6, 4)
    y[1:] = x[1:]
    return y * 1.0


def increased(x: Tensor) -> Tensor:
    x += 1
    return x * 2


def rectified_in_place(x: Tensor) -> Tensor:
    F.relu(x, inplace=True)
    return x * 1.0


def doubled(timestep: Tensor) -> Tensor:
    timestep = timestep.float()
    timestep *= 2
    return timestep[0]


SUPPORTED: dict[str, Callable[..., Tensor]] = {
    "numbers on both sides": lambda x, y, t: (1 - (2 * x + 1) / 3) * True,
    "difference": lambda x, y, t: torch.sub(x, y) - torch.mul(x, y) + torch.div(x, 2.0),
    "whole numbers as constants": lambda x, y, t: x + torch.arange(4),
    "booleans as constants": lambda x, y, t: x * torch.tensor([True, False, True, True]),
    "half precision constants": lambda x, y, t: x + torch.arange(4).half() + torch.arange(4).bfloat16(),
    "tanh of gelu": lambda x, y, t: F.gelu(x, approximate="tanh") + F.gelu(x),
    "activations": lambda x, y, t: F.silu(x) + F.relu(x) + torch.tanh(x) + torch.sigmoid(y),
    "slices": lambda x, y, t: x[1:-1, None, :3] + y[:1, 1:],
    "nothing but a host value": lambda x, y, t: t.float().cos() * 2,
    "host values": lambda x, y, t: x[:2] * (t.float() / 7).sin()[:, None].expand(-1, 4) + t[0],
    "parts of a product": lambda x, y, t: (lambda a, b: a * b - y[:, :2])(*x.chunk(2, dim=-1)),
    "parts of anything": lambda x, y, t: (lambda a, b: a * b)(*y.chunk(2)),
    "uneven parts": lambda x, y, t: torch.cat([part * i for i, part in enumerate(x.chunk(3, dim=1))], dim=-1),
    "padding": lambda x, y, t: F.pad(x, (0, 1, 2, 0)) - 1,
    "mirrored padding": lambda x, y, t: F.pad(x[None], (1, 2), mode="reflect"),
    "repeated padding": lambda x, y, t: F.pad(x[None], (1, 2), mode="replicate"),
    "cropping by padding": lambda x, y, t: F.pad(x, (-1, 1)),
    "means": lambda x, y, t: x.mean(dim=1, keepdim=True) + y.mean(-1)[:, None] + x.mean() + y.mean((0, 1)),
    "shapes": lambda x, y, t: x.view(2, 3, 4).permute(2, 0, 1).transpose(0, -1).flatten(1).unsqueeze(0).squeeze(),
    "causal attention": lambda x, y, t: F.scaled_dot_product_attention(x[None], y[None], x[None], is_causal=True),
    "layer norm without weights": lambda x, y, t: F.layer_norm(x, (4,)),
    "layer norm over two": lambda x, y, t: F.layer_norm(x, (6, 4)),
    "enlargement to a size": lambda x, y, t: F.interpolate(x[None, None], size=(9, 11)),
    "branches on shapes": lambda x, y, t: x if x.shape[0] > 3 and x.dim() == 2 and len(x) == 6 else y,
    "an argument itself": lambda x, y, t: y,
    "a constant": lambda x, y, t: torch.arange(4.0),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_an_operation(name: str) -> None:
    assert_same(Toy(SUPPORTED[name]), inputs(), inputs())


UNSUPPORTED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "no node": (lambda x, y, t: torch.erf(x), "there is no node for erf"),
    "added in place": (lambda x, y, t: x.add_(1) * 2, "add_ writes into a tensor"),
    "increased": (lambda x, y, t: increased(x), "writes into a tensor"),
    "rectified in place": (lambda x, y, t: rectified_in_place(x), "relu writes into a tensor"),
    "assigned": (lambda x, y, t: assigned(x), "__setitem__ writes into a tensor"),
    "assigned to a constant": (lambda x, y, t: assigned_to_a_constant(x), "__setitem__ writes into a tensor"),
    "host value in place": (lambda x, y, t: x * doubled(t), "writes into a tensor"),
    "branch on values": (lambda x, y, t: x if x.mean() > 0 else y, "there is no node for __gt__|gt"),
    "branch on the timestep": (lambda x, y, t: x if (t > 3).any() else y, "__bool__ reads values"),
    "number of a value": (lambda x, y, t: x * y.mean().item(), "item reads values"),
    "unknown shape": (lambda x, y, t: x.nonzero().float(), "nonzero does not run on shapes alone"),
    "alpha": (lambda x, y, t: torch.add(x, y, alpha=3), "this call of add: got an unexpected keyword argument 'alpha'"),
    "rounded division": (lambda x, y, t: torch.div(x, y, rounding_mode="floor"), "this call of div"),
    "arguments by name": (lambda x, y, t: torch.add(input=x, other=y), "this call of add: missing"),
    "whole numbers": (lambda x, y, t: x.to(torch.int64).float(), "a conversion to torch.int64"),
    "a property": (lambda x, y, t: x.T * 1.0, r"a tensor of the shape \(4, 6\) comes from something that has no node"),
    "a property alone": (lambda x, y, t: x.T, "comes from something that has no node"),
    "parts of a host value": (lambda x, y, t: x * t.float().chunk(2)[0], "chunk makes several tensors"),
    "group norm without weights": (lambda x, y, t: F.group_norm(x, 2), "None stands where only a tensor has a node"),
    "circular padding": (lambda x, y, t: F.pad(x[None], (1, 1), mode="circular"), "padding of the mode 'circular'"),
    "scaled attention": (
        lambda x, y, t: F.scaled_dot_product_attention(x[None], y[None], x[None], scale=3.0),
        "attention with a mask, shared heads, dropout or a scale",
    ),
    "masked attention": (
        lambda x, y, t: F.scaled_dot_product_attention(x[None], y[None], x[None], attn_mask=torch.ones(6, 6)),
        "attention with a mask",
    ),
    "smooth enlargement": (
        lambda x, y, t: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
        "interpolation of the mode 'bilinear'",
    ),
    "an index": (lambda x, y, t: x[0], "the index 0"),
    "a step": (lambda x, y, t: x[::2], "the index slice"),
    "grouped convolution": (
        lambda x, y, t: F.conv2d(x.view(1, 4, 2, 3), torch.ones(4, 1, 1, 1), groups=4),
        "a convolution in groups",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_has_no_node_runs_in_torch(name: str) -> None:
    function, reason = UNSUPPORTED[name]
    toy, call = Toy(function), inputs()
    wanted = plain(toy, call)
    openvino_(toy, "f32")
    with pytest.warns(UserWarning, match=rf"^Toy runs in torch, without OpenVINO: .*{reason}"):
        assert torch.equal(toy(**call), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(toy(**call), wanted)  # told once
    with pytest.raises(Unsupported, match=reason):
        trace(toy, ((), call), host=("timestep",))


def test_an_error_of_the_network_stays_its_own() -> None:
    unet = tiny.filled(fourstroke.UNet2DConditionModel.from_config(SMALL["xl"]))
    openvino_(unet, "f32")
    call = unet_inputs(SMALL["xl"])
    with pytest.raises(ValueError, match="added_cond_kwargs must hold text_embeds"):
        unet(**call | {"added_cond_kwargs": {}})
    with pytest.raises(RuntimeError):
        unet(**call | {"sample": torch.randn(2, 3, 16, 16)})


def test_one_tensor_for_two_arguments_is_two_in_the_next_call() -> None:
    toy = Toy(lambda x, y, t: x - 2 * y)
    once = torch.randn(6, 4)
    assert_same(toy, {"sample": once, "other": once}, {"sample": torch.randn(6, 4), "other": torch.randn(6, 4)})


def test_what_depends_on_the_timestep_alone_stays_outside() -> None:
    unet = tiny.unet()
    program = trace(unet, ((), unet_inputs({"cross_attention_dim": tiny.WIDTH})), host=("timestep",))
    projections = sum(name.endswith("time_emb_proj") for name, _ in unet.named_modules())
    assert not {node.get_type_name() for node in program.graph.get_ops()} & {"Sin", "Cos", "Exp"}
    # The latents, the text, and each resnet's share of the time.
    assert len(program.inputs) == 2 + projections == len(program.graph.inputs)


def test_weights_are_shared_with_the_network() -> None:
    unet = tiny.unet()
    program = trace(unet, ((), unet_inputs({"cross_attention_dim": tiny.WIDTH})), host=("timestep",))
    places = {tensor.data_ptr() for tensor in program.memory}
    assert unet.conv_in.weight.data_ptr() in places and unet.conv_out.bias.data_ptr() in places


# The faster ways.


def test_a_doubling_before_a_convolution_is_a_transposed_convolution() -> None:
    x, weight = torch.randn(2, 3, 5, 7).double(), torch.randn(4, 3, 3, 3)
    kernel = transposed_kernel(weight)
    assert kernel.shape == (4, 3, 4, 4) and kernel.dtype == torch.float32
    wanted = F.conv2d(F.interpolate(x, scale_factor=2), weight.double(), padding=1)
    found = F.conv_transpose2d(x, kernel.double().transpose(0, 1), stride=2, padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("ratio", [0, 10, 30])
def test_group_norm_in_bfloat16_loses_what_rounding_its_input_loses(groups: int, ratio: int) -> None:
    """With a mean many times the deviation, E[x^2] - E[x]^2 in bfloat16 would be noise, or zero."""
    norm = nn.GroupNorm(groups, 16)
    around = [nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)]  # what OpenVINO runs in bfloat16, unlike a norm alone
    network = nn.Sequential(around[0], norm, around[1]).requires_grad_(False)
    for conv in around:
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 16, 24, 24).bfloat16().float()
    around[0].bias.fill_(ratio)

    def exact(values: Tensor) -> Tensor:
        affine = norm.weight.double(), norm.bias.double()
        return F.group_norm(values.double(), groups, *affine, eps=norm.eps)

    wanted = exact(x + ratio)
    openvino_(network, "bf16")
    error = (network(x) - wanted).abs().mean()
    # What comes out is rounded too.
    rounding = (exact((x + ratio).bfloat16()) - wanted).abs().mean() + (wanted.bfloat16() - wanted).abs().mean()
    assert error <= 2.5 * rounding
