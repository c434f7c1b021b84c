"""CUDA graphs, on the CPU: a capture that plays the GPU's part runs the network again into the same output."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fourstroke
from fourstroke import GenerateRequest
from fourstroke.models.ip_adapter import attach_ip_adapters_, project, read_ip_adapter, set_ip_adapter_scales_
from fourstroke.models.unet import Residuals
from fourstroke.runtime import cudagraph
from fourstroke.runtime.calls import describe, map_tensors, replace_forward_, tensors_in, weight_places
from fourstroke.runtime.compile import compile_
from fourstroke.runtime.cudagraph import GraphMemory, Graphs, cudagraph_, uncudagraph_
from fourstroke.runtime.memory_format import channels_last_
from fourstroke.runtime.offload import Offload
from tests.parity.image_prompts import plain_projection
from tests.unit import tiny
from tests.unit.test_runtime import layers, lora


class Replay:
    """What a graph does: the same run on the inputs' present values, written over the output of the last one."""

    def __init__(self, run: Callable[[], Any]):
        self.run = run
        self.output = run()
        self.replays = 0
        self.dropped = False

    def replay(self) -> None:
        assert not self.dropped
        self.replays += 1
        for own, new in zip(tensors_in(self.output), tensors_in(self.run()), strict=True):
            own.copy_(new)

    def drop(self) -> None:
        self.dropped = True


class Captures(list[Replay]):
    """Every capture that was made."""

    def __call__(self, run: Callable[[], Any], device: torch.device) -> Replay:
        assert device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self.append(Replay(run))
        return self[-1]

    @property
    def live(self) -> int:
        return sum(not replay.dropped for replay in self)


def graphed(network: nn.Module, **options: Any) -> Captures:
    captures = Captures()
    replace_forward_(network, Graphs(network, captures, device_type="cpu", **options))
    return captures


def inputs(batch: int = 1, size: int = 4, **more: Any) -> dict[str, Any]:
    sample = torch.randn(batch, 4, size, size)
    return {"sample": sample, "timestep": 500, "encoder_hidden_states": torch.randn(batch, 5, tiny.WIDTH)} | more


@pytest.fixture
def unet() -> Iterator[Any]:
    with torch.no_grad():
        yield tiny.unet()


def plain(network: nn.Module, call: dict[str, Any]) -> Any:
    return type(network).forward(network, **call)


def test_one_capture_a_shape_and_the_eager_result(unet: Any) -> None:
    captures = graphed(unet)
    for call in (inputs(), inputs(), inputs(batch=2), inputs(), inputs(size=8), inputs(batch=2)):
        assert torch.equal(unet(**call), plain(unet, call))
    assert [replay.replays for replay in captures] == [3, 2, 1] and unet.forward.captured == 3


def test_a_result_outlives_the_next_replay(unet: Any) -> None:
    graphed(unet)
    first, second = inputs(), inputs()
    results = [unet(**first), unet(**second)]
    assert torch.equal(results[0], plain(unet, first)) and torch.equal(results[1], plain(unet, second))


def test_arguments_are_left_alone(unet: Any) -> None:
    graphed(unet)
    call = inputs()
    before = call["sample"].clone()
    unet(**inputs())
    unet(**call).zero_()
    assert torch.equal(call["sample"], before)


@pytest.mark.parametrize("timestep", [3, 3.0, torch.tensor(3), torch.tensor([3])])
def test_timesteps_are_no_constants(unet: Any, timestep: Any) -> None:
    captures = graphed(unet)
    unet(**inputs(timestep=timestep * 0 + 900))
    call = inputs(timestep=timestep)
    assert torch.equal(unet(**call), plain(unet, call)) and len(captures) == 1


def test_positions_and_keywords_are_one_call(unet: Any) -> None:
    captures = graphed(unet)
    call = inputs()
    assert torch.equal(unet(*call.values()), unet(**call)) and len(captures) == 1
    with pytest.raises(TypeError, match="wings"):
        unet(**call, wings=2)


def test_nested_arguments_and_results() -> None:
    base = tiny.unet()
    net: Any = tiny.filled(fourstroke.ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(8,) * 4))
    captures, base_captures = graphed(net), graphed(base)
    with torch.no_grad():
        for strength in (0.5, 0.5, 0.7):
            call = inputs(condition=torch.randn(1, 16, 4, 4), conditioning_scale=strength)
            residuals = net(**call)
            assert isinstance(residuals, Residuals)
            for got, wanted in zip(tensors_in(residuals), tensors_in(plain(net, call)), strict=True):
                assert torch.equal(got, wanted)
            steered = inputs(residuals=residuals)
            assert torch.equal(base(**steered), plain(base, steered))
            assert torch.equal(base(**inputs()), base(**inputs())) is False
    assert len(captures) == 2  # one a strength
    assert len(base_captures) == 2  # with residuals and without


@pytest.mark.parametrize("make", [tiny.sd, tiny.xl])
@pytest.mark.parametrize("guidance_scale", [1.0, 1.7])
def test_pictures_are_those_of_the_plain_pipeline(make: Callable[[], Any], guidance_scale: float) -> None:
    pipe = make()
    request = GenerateRequest(prompt="a red fox", seed=3, guidance_scale=guidance_scale, output_type="np")
    wanted = pipe.generate(request).images
    captures, decodings = graphed(pipe.unet), graphed(pipe.vae.decoder)
    for _ in range(2):
        assert (pipe.generate(request).images == wanted).all()
    assert [replay.replays for replay in captures] == [8] and [replay.replays for replay in decodings] == [2]


def test_adapters_switch_in_place() -> None:
    pipe = tiny.sd()
    request = GenerateRequest(prompt="a red fox", seed=3, output_type="np")
    captures = graphed(pipe.unet)
    plain_picture = pipe.generate(request).images
    pipe.load_lora_weights(lora(pipe), adapter_name="a")
    changed = pipe.generate(request).images
    assert (changed != plain_picture).any()
    pipe.unload_lora_weights()
    assert (pipe.generate(request).images == plain_picture).all()
    assert len(captures) == 1
    reference = tiny.sd()
    reference.load_lora_weights(lora(reference), adapter_name="a")
    assert (reference.generate(request).images == changed).all()


def moved(unet: Any) -> None:
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()


def converted(unet: Any) -> None:
    unet.to(torch.float64)


def replaced(unet: Any) -> None:
    unet.conv_in = copy.deepcopy(unet.conv_in)


def turned(unet: Any) -> None:
    assert channels_last_(unet)


@pytest.mark.parametrize("change", [moved, converted, replaced, turned])
def test_weights_that_moved_are_captured_anew(unet: Any, change: Callable[[Any], None], monkeypatch: Any) -> None:
    monkeypatch.setattr(cudagraph, "PAYS", 1)
    captures = graphed(unet)
    unet(**inputs())
    change(unet)
    call = map_tensors(inputs(), lambda tensor: tensor.to(unet.dtype))
    assert torch.equal(unet(**call), plain(unet, call))
    assert [replay.dropped for replay in captures] == [True, False]


def test_a_changed_scale_of_an_image_prompt_is_noticed(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraph, "PAYS", 1)
    adapter = read_ip_adapter({"image_proj": plain_projection(tiny.WIDTH), "ip_adapter": layers(unet)})
    attach_ip_adapters_(unet, [adapter])
    captures = graphed(unet)
    call = inputs(image_tokens=project(unet, [torch.randn(1, 1, 12)]))
    first = unet(**call)
    set_ip_adapter_scales_(unet, [0.25])
    second = unet(**call)
    assert torch.equal(second, plain(unet, call)) and not torch.equal(first, second) and len(captures) == 2


def test_graphs_that_do_not_pay_are_not_made_again_and_again(unet: Any) -> None:
    """As under offloading: every four runs the weights lie somewhere else."""
    captures = graphed(unet)
    for _ in range(6):
        moved(unet)
        for _ in range(4):
            call = inputs()
            assert torch.equal(unet(**call), plain(unet, call))
    assert len(captures) == 1 and captures.live == 0
    for _ in range(4 + cudagraph.PATIENCE):  # they have come to rest
        unet(**inputs())
    assert len(captures) == 2 and captures.live == 1
    for _ in range(cudagraph.PAYS):
        unet(**inputs())
    moved(unet)
    unet(**inputs())
    assert len(captures) == 3  # that one has paid


def test_patience_grows_with_every_waste(unet: Any) -> None:
    captures = graphed(unet)
    eager = []
    for _ in range(3):
        moved(unet)
        before, runs = len(captures), 0
        while len(captures) == before:
            unet(**inputs())
            runs += 1
        eager.append(runs - 1)
    assert eager == [0, cudagraph.PATIENCE, 2 * cudagraph.PATIENCE]


def test_offloaded_networks_run_eagerly_and_right(unet: Any) -> None:
    captures = graphed(unet)
    offload = Offload("cpu", copy=lambda tensor, _: tensor.clone())
    for _ in range(3):
        offload.bring(unet)
        call = inputs()
        assert torch.equal(unet(**call), plain(unet, call))
        offload.rest()
    assert len(captures) == 1


def test_the_shapes_used_last_are_kept(unet: Any) -> None:
    captures = graphed(unet, buckets=2)
    for size in (4, 6, 4, 8, 4, 6):
        unet(**inputs(size=size))
    assert [replay.dropped for replay in captures] == [False, True, True, False]
    assert unet.forward.captured == captures.live == 2
    with pytest.raises(ValueError, match="buckets is 0; at least 1"):
        cudagraph_(unet, buckets=0)


def test_inference_mode_and_back(unet: Any) -> None:
    captures = graphed(unet)
    with torch.inference_mode():
        call = inputs()
        assert torch.equal(unet(**call), plain(unet, call))
    call = inputs()
    assert torch.equal(unet(**call), plain(unet, call)) and len(captures) == 1


def test_training_and_autocast_stay_eager(unet: Any) -> None:
    captures = graphed(unet)
    with torch.enable_grad():
        unet.conv_in.weight.requires_grad_()
        unet(**inputs()).sum().backward()
        assert unet.conv_in.weight.grad is not None
        unet.conv_in.weight.requires_grad_(False)
        text = torch.randn(1, 5, tiny.WIDTH, requires_grad=True)
        unet(**inputs(encoder_hidden_states=text)).sum().backward()
        assert text.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        unet(**inputs())
    assert not captures


def test_what_is_on_the_cpu_runs_eagerly(unet: Any) -> None:
    graphs = cudagraph_(unet)
    call = inputs()
    assert torch.equal(unet(**call), plain(unet, call)) and graphs.captured == 0


def test_a_network_that_leaves_gives_its_memory_back(unet: Any) -> None:
    captures = graphed(unet)
    unet(**inputs())
    unet.to("meta")
    unet(**map_tensors(inputs(), lambda tensor: tensor.to("meta")))
    assert captures.live == 0


def test_inputs_elsewhere_get_the_eager_error(unet: Any) -> None:
    graphed(unet)
    call = inputs(sample=torch.empty(1, 4, 4, 4, device="meta"))
    with pytest.raises(RuntimeError) as wanted:
        plain(unet, call)
    with pytest.raises(RuntimeError) as got:
        unet(**call)
    assert str(got.value) == str(wanted.value)


def test_undo_is_exact(unet: Any) -> None:
    before = dict(vars(unet))
    names = [*unet.state_dict()]
    captures = graphed(unet)
    unet(**inputs())
    assert isinstance(unet, fourstroke.UNet2DConditionModel) and [*unet.state_dict()] == names
    uncudagraph_(unet)
    assert vars(unet) == before and captures.live == 0
    uncudagraph_(unet)  # nothing to undo
    assert vars(unet) == before


def test_one_backend_at_a_time(unet: Any) -> None:
    first = cudagraph_(unet)
    assert cudagraph_(unet, buckets=2) is not first and unet.forward.buckets == 2
    with pytest.raises(RuntimeError, match="is a Graphs already, and a Compiled would replace it.*Undo the other"):
        compile_(unet, backend="eager")
    assert isinstance(unet.forward, Graphs)


def test_starting_anew_drops_the_old_graphs(unet: Any) -> None:
    captures = graphed(unet)
    unet(**inputs())
    cudagraph_(unet)
    assert captures.live == 0


def test_copies_capture_for_themselves(unet: Any) -> None:
    cudagraph_(unet, buckets=3)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert twin.forward is not unet.forward and twin.forward.network is twin and twin.forward.buckets == 3
        call = inputs()
        assert torch.equal(twin(**call), unet(**call))


def test_a_network_is_not_kept_alive() -> None:
    unet = tiny.unet()
    graphs = cudagraph_(unet)
    gone = weakref.ref(unet)
    gc.disable()
    try:
        del unet
        assert gone() is None  # at once, not at the next collection
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="is gone; keep it, not its forward"):
        graphs(1, 2, 3)


def test_a_failed_capture_is_explained(unet: Any) -> None:
    def refuse(run: Callable[[], Any], device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = Graphs(unet, refuse, device_type="cpu")
    replace_forward_(unet, graphs)
    with pytest.raises(
        RuntimeError, match=r"UNet2DConditionModel cannot be captured.*not permitted(.|\n)*uncudagraph_"
    ):
        unet(**inputs())
    assert graphs.captured == 0


def test_running_out_of_memory_stays_what_it_is(unet: Any) -> None:
    def refuse(run: Callable[[], Any], device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    replace_forward_(unet, Graphs(unet, refuse, device_type="cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        unet(**inputs())


def test_what_cannot_be_compared_is_named() -> None:
    with pytest.raises(TypeError, match="called with a object; a graph takes tensors, numbers"):
        describe({"wings": [object()]})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        ([1], (1,)),
        ({"a": 1}, {"b": 1}),
        (None, 0),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (Residuals(), ((), None, ())),
        ((torch.ones(2), ()), ((), torch.ones(2))),
    ],
)
def test_keys_tell_calls_apart(one: Any, other: Any) -> None:
    assert describe(one) != describe(other) and hash(describe(one)) is not None


def test_keys_without_shapes() -> None:
    assert describe([torch.ones(2)], shapes=False) == describe([torch.zeros(3)], shapes=False)
    assert describe([torch.ones(2)], shapes=False) != describe([torch.ones(2, 1)], shapes=False)


def test_places_are_those_of_every_weight(unet: Any) -> None:
    places = weight_places(unet)
    pointers = {tensor.data_ptr() for tensor in unet.state_dict().values()}
    assert pointers <= {*places} and weight_places(unet) == places
    for parameter in unet.parameters():
        parameter.mul_(2)
    assert weight_places(unet) == places


class FakeCuda:
    """torch.cuda's part in a capture: what is called, in which order, and on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.log: list[str] = []
        self.pools = 0
        self.stream_now = "default"
        for name in ("device", "Stream", "stream", "current_stream", "graph_pool_handle", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.log.append("synchronize"))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    class _Stream:
        def __init__(self, name: str, log: list[str]):
            self.name, self.log = name, log

        def wait_stream(self, other: Any) -> None:
            self.log.append(f"{self.name} waits for {other.name}")

    def Stream(self) -> Any:
        return self._Stream("side", self.log)

    def current_stream(self) -> Any:
        return self._Stream(self.stream_now, self.log)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.stream_now, before = stream.name, self.stream_now
        yield
        self.stream_now = before

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def graph(self, graph: Any, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"capture in pool {pool}, {capture_error_mode}")
        with self.stream(stream):
            yield
        self.log.append("captured")

    def CUDAGraph(self) -> Any:
        log = self.log

        class Graph:
            def replay(self) -> None:
                log.append("replay")

            def reset(self) -> None:
                log.append("reset")

        return Graph()


def test_the_order_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, memory = FakeCuda(monkeypatch), GraphMemory()

    def run() -> Tensor:
        cuda.log.append(f"run on {cuda.stream_now}")
        return torch.ones(1)

    recording = memory.capture(run, torch.device("cuda", 0))
    recording.replay()
    warm_up = ["side waits for default", *["run on side"] * cudagraph.WARMUPS]
    capture = ["capture in pool 1, thread_local", "run on side", "captured"]
    assert cuda.log == [*warm_up, *capture, "default waits for side", "replay"]
    recording.drop()
    assert cuda.log[-2:] == ["synchronize", "reset"]


def test_a_pool_is_shared_while_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, memory = FakeCuda(monkeypatch), GraphMemory()
    device = torch.device("cuda", 0)
    first, second = (memory.capture(lambda: torch.ones(1), device) for _ in range(2))
    assert cuda.pools == 1
    first.drop()
    third = memory.capture(lambda: torch.ones(1), device)
    assert cuda.pools == 1
    second.drop()
    third.drop()
    memory.capture(lambda: torch.ones(1), device)
    assert cuda.pools == 2
    memory.capture(lambda: torch.ones(1), torch.device("cuda", 1))
    assert cuda.pools == 3


def test_two_networks_share_a_memory() -> None:
    pipe = tiny.sd()
    graphs = cudagraph_(pipe.unet)
    assert cudagraph_(pipe.vae.decoder, memory=graphs.memory).memory is graphs.memory
