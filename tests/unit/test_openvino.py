"""Networks that OpenVINO runs: what is compiled when, weights that change, what torch runs, and the way back."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fourstroke
from fourstroke import GenerateRequest
from fourstroke.models.ip_adapter import attach_ip_adapters_, project, read_ip_adapter, set_ip_adapter_scales_
from fourstroke.runtime import openvino
from fourstroke.runtime.compile import compile_
from fourstroke.runtime.graph import Program, trace
from fourstroke.runtime.nodes import SHORT_CUTS
from fourstroke.runtime.openvino import Accelerated, accelerated, openvino_, unopenvino_
from fourstroke.runtime.quantize import Range
from tests.parity.image_prompts import plain_projection
from tests.parity.oracles import randomise
from tests.unit import tiny
from tests.unit.test_cudagraph import inputs
from tests.unit.test_graph import Toy, assert_near, plain, tiny_vae
from tests.unit.test_runtime import CASES, layers, lora, painted


@pytest.fixture
def unet() -> Iterator[Any]:
    """Without attention, for it is compiled in half the time."""
    levels = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with torch.no_grad():
        yield tiny.unet(**levels, mid_block_type="UNetMidBlock2D")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """An entry a graph that was compiled: whose."""
    made: list[nn.Module] = []
    compile = Accelerated._compile

    def counted(self: Accelerated, network: nn.Module, arguments: Any) -> Any:
        made.append(network)
        return compile(self, network, arguments)

    monkeypatch.setattr(Accelerated, "_compile", counted)
    return made


@pytest.fixture
def host_runs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """An entry a computation of host values."""
    runs: list[Program] = []
    run = Program.run_host

    def counted(self: Program, tensors: Any) -> Any:
        runs.append(self)
        return run(self, tensors)

    monkeypatch.setattr(Program, "run_host", counted)
    return runs


# When something is compiled.


def test_a_graph_a_shape_and_the_one_that_rested_longest_goes(unet: Any, compiled: list[Any]) -> None:
    openvino_(unet, "f32")
    assert not compiled
    for size, count in ((4, 1), (4, 1), (6, 2), (4, 2), (8, 3), (4, 3), (8, 3), (6, 4)):
        call = inputs(size=size)
        assert_near(unet(**call), plain(unet, call))
        assert len(compiled) == count
    openvino_(unet, "f32", shapes=1)
    for size in (4, 6, 4):
        unet(**inputs(size=size))
    assert len(compiled) == 7


def test_a_strength_is_no_constant(compiled: list[Any]) -> None:
    net: Any = fourstroke.ControlNetModel.from_unet(tiny.unet(), conditioning_embedding_out_channels=(8,) * 4)
    openvino_(tiny.filled(net), "f32")
    with torch.no_grad():
        for strength in (0.5, 1, 0, 0.7):
            call = inputs(condition=torch.randn(1, 16, 4, 4), conditioning_scale=strength)
            assert [float(residual.abs().max()) > 0 for residual in net(**call).down] == [bool(strength)] * 4
            if strength:
                assert_near(net(**call), plain(net, call))
    assert len(compiled) == 1


def test_positions_and_keywords_are_one_call(unet: Any, compiled: list[Any]) -> None:
    openvino_(unet, "f32")
    call = inputs()
    assert torch.equal(unet(*call.values()), unet(**call)) and len(compiled) == 1
    with pytest.raises(TypeError, match="wings"):
        unet(**call, wings=2)


def test_results_and_arguments_are_left_alone(unet: Any) -> None:
    openvino_(unet, "f32")
    call = inputs()
    before = call["sample"].clone()
    first = unet(**call)
    kept = first.clone()
    unet(**inputs())
    assert torch.equal(first, kept) and torch.equal(call["sample"], before)
    first.zero_()
    assert torch.equal(unet(**call), kept)


def test_inputs_that_do_not_lie_in_order(unet: Any) -> None:
    openvino_(unet, "f32")
    call = inputs(sample=torch.randn(1, 8, 8, 4).permute(0, 3, 1, 2)[:, :, ::2, 1::2])
    assert_near(unet(**call), plain(unet, call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision(unet: Any, dtype: torch.dtype) -> None:
    """Computed in float32 of the rounded weights, and rounded once: nearer to the truth than torch's own."""
    unet.to(dtype)
    call = {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in inputs().items()}
    wide = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    wanted = plain(copy.deepcopy(unet).float(), wide)
    openvino_(unet, "f32")
    found = unet(**call)
    assert found.dtype == dtype
    # Of the embedding of time, which torch computes, every layer's rounding counts.
    torch.testing.assert_close(
        found.float(), wanted, rtol=0, atol=8 * torch.finfo(dtype).eps * float(wanted.abs().max())
    )


@torch.no_grad()
@pytest.mark.parametrize("name", SHORT_CUTS)
def test_each_short_cut_can_be_left_out(name: str) -> None:
    unet, call = tiny.unet(), inputs()
    openvino_(unet, "f32", without=[name])
    assert_near(unet(**call), plain(unet, call))
    kind = {"doubling": "ConvolutionBackpropData", "group_norm": "ReduceL2", "chunk": "VariadicSplit"}[name]
    call["timestep"] = torch.tensor(call["timestep"])
    graphs = [trace(unet, ((), call), host=openvino.HOST, plain=without).graph for without in ([], [name])]
    counts = [sum(node.get_type_name() == kind for node in graph.get_ops()) for graph in graphs]
    assert counts.count(0) == 1  # one way has it and the other has not


# Host values.


def test_each_timestep_is_computed_once(unet: Any, host_runs: list[Any]) -> None:
    openvino_(unet, "f32")
    for timestep, count in ((999, 1), (759, 2), (999, 2), (759, 2), (torch.tensor(999), 2), (499, 3)):
        call = inputs(timestep=timestep)
        assert_near(unet(**call), plain(unet, call))
        assert len(host_runs) == count


def test_the_last_timesteps_are_kept(unet: Any, host_runs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "HOST_RESULTS", 2)
    openvino_(unet, "f32")
    for timestep, count in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        unet(**inputs(timestep=timestep))
        assert len(host_runs) == count


def test_sizes_of_xl_are_host_values_too(compiled: list[Any], host_runs: list[Any]) -> None:
    unet = tiny.xl().unet
    openvino_(unet, "f32")
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    with torch.no_grad():
        for crop in (0, 8, 0):
            added = {"text_embeds": torch.ones(1, tiny.WIDTH), "time_ids": sizes + crop}
            call = inputs(encoder_hidden_states=torch.randn(1, 5, 2 * tiny.WIDTH), added_cond_kwargs=added)
            assert_near(unet(**call), plain(unet, call))
    assert len(compiled) == 1 and len(host_runs) == 2


@pytest.mark.parametrize("layer", ["time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"])
def test_no_host_value_outlives_its_weights(unet: Any, layer: str) -> None:
    openvino_(unet, "f32")
    call = inputs()
    first = unet(**call)
    unet.get_submodule(layer).weight.mul_(3)
    second = unet(**call)
    assert_near(second, plain(unet, call))
    assert not torch.equal(first, second)


# Weights.


def test_loras_switch_and_leave_no_trace() -> None:
    pipe, reference = tiny.sd(), tiny.sd()
    openvino_(pipe.unet, "f32")
    request = GenerateRequest(prompt="a red fox", seed=3, output_type="np")
    bare = pipe.generate(request).images
    pictures = []
    for strength in ("0.2", "0.4"):
        for each in (pipe, reference):
            each.load_lora_weights(lora(each, float(strength)), adapter_name=strength)
            each.set_adapters([strength])
        pictures.append(pipe.generate(request).images)
        assert np.abs(pictures[-1] - reference.generate(request).images).max() <= 1e-4
    assert np.abs(pictures[0] - bare).max() > 3e-3 < np.abs(pictures[0] - pictures[1]).max()
    pipe.set_adapters(["0.2"])
    assert np.array_equal(pipe.generate(request).images, pictures[0])
    pipe.unload_lora_weights()
    assert np.array_equal(pipe.generate(request).images, bare)


def test_a_lora_of_what_depends_on_the_timestep_alone_acts_at_the_next_call() -> None:
    pipe = tiny.sd()
    openvino_(pipe.unet, "f32")
    before = painted(pipe)
    tensors = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith("time_emb_proj"):
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(2, module.in_features)
            tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 2)
    pipe.load_lora_weights(tensors)
    after = painted(pipe)
    pipe.unload_lora_weights()
    assert np.array_equal(painted(pipe), before)
    pipe.load_lora_weights(tensors)
    unopenvino_(pipe.unet)
    assert np.abs(after - painted(pipe)).max() <= 1e-3 < 1e-2 < np.abs(after - before).max()


def written(unet: Any) -> None:
    unet.conv_in.weight.mul_(2)


def written_in_inference_mode(unet: Any) -> None:
    with torch.inference_mode():
        unet.conv_out.bias.add_(1)


def moved(unet: Any) -> None:
    for parameter in unet.parameters():
        parameter.data = parameter.data * 1.5


def replaced(unet: Any) -> None:
    unet.conv_in = randomise(nn.Conv2d(4, 16, 3, padding=1))


def loaded(unet: Any) -> None:
    unet.load_state_dict({name: tensor * 1.5 for name, tensor in unet.state_dict().items()})


def assigned(unet: Any) -> None:
    unet.load_state_dict({name: tensor * 1.5 for name, tensor in unet.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [written, written_in_inference_mode, moved, replaced, loaded, assigned])
def test_changed_weights_act_at_the_next_call(unet: Any, change: Callable[[Any], None], compiled: list[Any]) -> None:
    openvino_(unet, "f32")
    call = inputs()
    before = unet(**call)
    change(unet)
    for _ in range(2):
        after = unet(**call)
        assert_near(after, plain(unet, call))
    assert float((after - before).abs().max()) > 0.01 * float(before.abs().max()) and len(compiled) == 2


@torch.no_grad()
def test_image_prompts_come_and_count_as_they_are_told() -> None:
    unet = tiny.unet()
    openvino_(unet, "f32")
    unet(**inputs())
    adapter = read_ip_adapter({"image_proj": plain_projection(tiny.WIDTH), "ip_adapter": layers(unet)})
    attach_ip_adapters_(unet, [adapter])
    call = inputs(image_tokens=project(unet, [torch.randn(1, 1, 12)]))
    seen = []
    for scale in (1.0, 0.25):
        set_ip_adapter_scales_(unet, [scale])
        seen.append(unet(**call))
        assert_near(seen[-1], plain(unet, call))
    assert not torch.equal(*seen)


def test_a_network_is_not_kept_alive() -> None:
    unet = tiny.unet()
    forward = openvino_(unet, "f32")
    with torch.no_grad():
        unet(**inputs())
    gone, weight = weakref.ref(unet), weakref.ref(unet.conv_in)
    gc.disable()
    try:
        del unet
        assert gone() is None is weight()  # at once, not at the next collection
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="is gone; keep it, not its forward"):
        forward(1, 2, 3)


# What torch runs.


def test_gradients_are_torchs(unet: Any, compiled: list[Any]) -> None:
    openvino_(unet, "f32")
    with torch.enable_grad():
        unet.conv_in.weight.requires_grad_()
        unet(**inputs()).sum().backward()
        assert unet.conv_in.weight.grad is not None
        unet.conv_in.weight.requires_grad_(False)
        sample = torch.randn(1, 4, 4, 4, requires_grad=True)
        unet(**inputs(sample=sample)).sum().backward()
        assert sample.grad is not None
    assert not compiled
    unet(**inputs(sample=sample))  # no gradient is wanted here
    assert len(compiled) == 1


def test_another_device_is_torchs(unet: Any, compiled: list[Any]) -> None:
    openvino_(unet, "f32")
    unet.to("meta")
    call = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs().items()}
    assert unet(**call).is_meta and not compiled


def test_weights_whose_changes_go_unnoticed_are_torchs(compiled: list[Any]) -> None:
    with torch.inference_mode():
        unet = tiny.unet()
        openvino_(unet, "f32")
        call = inputs()
        with pytest.warns(UserWarning, match="weights were made in torch.inference_mode.*Load the model outside of it"):
            assert torch.equal(unet(**call), plain(unet, call))
    assert not compiled


def test_each_shape_that_torch_runs_is_told_once(compiled: list[Any]) -> None:
    toy = Toy(lambda x, y, t: torch.erf(x) + y)
    openvino_(toy, "f32")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for rows in (2, 2, 3, 2, 3):
            call = {"sample": torch.randn(rows, 4), "other": torch.randn(rows, 4)}
            assert torch.equal(toy(**call), plain(toy, call))
    assert len(told) == len(compiled) == 2
    assert str(told[0].message) == "Toy runs in torch, without OpenVINO: there is no node for erf."


# On and off.


def test_undo_is_exact(unet: Any) -> None:
    before, names = dict(vars(unet)), [*unet.state_dict()]
    call = inputs()
    wanted = unet(**call)
    forward = openvino_(unet)
    unet(**call)
    assert unet.forward is forward and accelerated(unet) == {"": forward}
    assert isinstance(unet, fourstroke.UNet2DConditionModel) and [*unet.state_dict()] == names
    unopenvino_(unet)
    assert vars(unet) == before and torch.equal(unet(**call), wanted) and accelerated(unet) == {}
    unopenvino_(unet)  # nothing to undo
    assert vars(unet) == before


def test_one_backend_at_a_time(unet: Any) -> None:
    first = openvino_(unet, "f32")
    assert openvino_(unet, "bf16") is not first and unet.forward.precision == "bf16"
    with pytest.raises(RuntimeError, match="is a Accelerated already, and a Compiled would replace it.*Undo the other"):
        compile_(unet, backend="eager")
    unopenvino_(unet)
    compile_(unet, backend="eager")
    with pytest.raises(RuntimeError, match="is a Compiled already, and a Accelerated would replace it"):
        openvino_(unet)
    unopenvino_(unet)  # not its own
    assert not accelerated(unet) and "forward" in vars(unet)


def test_copies_compile_for_themselves(unet: Any, compiled: list[Any]) -> None:
    ranges = {"conv_out": Range(torch.zeros(16), torch.ones(16))}
    openvino_(unet, "f32", ranges, shapes=3)
    call = inputs()
    wanted = unet(**call)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        forward = twin.forward
        assert forward is not unet.forward and forward.network is twin
        assert (forward.precision, forward.shapes) == ("f32", 3)
        assert torch.equal(forward.ranges["conv_out"].high, ranges["conv_out"].high)
        assert torch.equal(twin(**call), wanted)
        twin.conv_in.weight.mul_(2)
        assert not torch.equal(twin(**call), wanted) and torch.equal(unet(**call), wanted)
    assert [network is unet for network in compiled] == [True, False, False, False, False]


def test_bad_arguments_are_told(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="precision is 'fp32'; it is one of bf16, f32"):
        openvino_(unet, "fp32")
    with pytest.raises(
        ValueError, match="without names 'chunks'; there are the short cuts doubling, group_norm, chunk"
    ):
        openvino_(unet, without=["chunk", "chunks"])
    monkeypatch.setattr(openvino, "available", lambda: False)
    with pytest.raises(ImportError, match=r"needs OpenVINO: pip install 'fourstroke\[cpu\]'"):
        openvino_(unet)
    assert not accelerated(unet)


def test_available_is_what_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino.available.cache_clear()
    assert openvino.available()
    openvino.available.cache_clear()
    monkeypatch.setattr(openvino.importlib.util, "find_spec", lambda name: None)
    try:
        assert not openvino.available()
    finally:
        openvino.available.cache_clear()


def test_the_best_precision_is_one_that_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities: list[str] = []

    class Core:
        def get_property(self, device: str, name: str) -> list[str]:
            assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
            return capabilities

    monkeypatch.setattr(openvino, "core", Core)
    for has, best in ((["FP32", "INT8", "BIN"], "f32"), (["BF16", "FP32", "INT8"], "bf16")):
        capabilities = has
        assert openvino.best_precision() == best


# Pipelines.


@pytest.mark.parametrize(("make", "call"), CASES.values(), ids=list(CASES))
def test_pipelines_paint_the_eager_picture(make: Callable[[], Any], call: dict[str, Any], compiled: list[Any]) -> None:
    pipe = make()
    wanted = painted(pipe, **call)
    nets = [pipe.unet, pipe.vae.decoder, pipe.vae.encoder]
    nets += [getattr(pipe, "controlnet", None)] if getattr(pipe, "controlnet", None) is not None else []
    for network in nets:
        openvino_(network, "f32")
    for _ in range(2):
        assert np.abs(painted(pipe, **call) - wanted).max() <= 1e-3
    assert len(compiled) == len({*map(id, compiled)}) >= 2  # a graph a network, whatever the step


def test_autoencoders_in_pieces() -> None:
    vae = tiny_vae("relu")
    latents = torch.randn(2, 4, 8, 8)
    vae.enable_slicing()
    with torch.no_grad():
        wanted = vae.decode(latents)
        openvino_(vae.decoder, "f32")
        assert_near(vae.decode(latents), wanted)
