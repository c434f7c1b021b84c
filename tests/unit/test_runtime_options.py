"""How networks run: the one value that says it, on a pipeline, in an engine, and on the command line."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fourstroke
from fourstroke import Control, Engine
from fourstroke.families import Base, look_at
from fourstroke.lora import Settings
from fourstroke.runtime import openvino, options, spill
from fourstroke.runtime.compile import Compiled, compile_
from fourstroke.runtime.cudagraph import Graphs
from fourstroke.runtime.openvino import Accelerated, accelerated
from fourstroke.runtime.options import RuntimeOptions, run_with_
from tests.unit import tiny, tinyhub
from tests.unit.test_cli_generate import assert_one_line, complete, here, run  # noqa: F401 - a fixture
from tests.unit.test_engine import by_hand, paint
from tests.unit.test_graph import tiny_vae
from tests.unit.tiny import picture

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "available", lambda: False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An entry a run of a network by OpenVINO: whose."""
    made: list[Any] = []
    call = Accelerated.__call__

    def counted(self: Accelerated, *args: Any, **kwargs: Any) -> Any:
        made.append(self.network)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Accelerated, "__call__", counted)
    return made


# The value.


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"backend": "onnx"}, "backend is 'onnx'; it is one of 'auto', 'eager', 'compile', 'cudagraph', 'openvino'."),
        ({"quantize": "int4"}, "quantize is 'int4'; it is one of None, 'int8'."),
        ({"quantize": ""}, "quantize is ''; it is one of None, 'int8'."),
        ({"vae": None}, "vae is None; it is one of 'full', 'tiny', 'tiled'."),
        (
            {"backend": "eager", "quantize": "int8"},
            "quantize='int8' needs backend='openvino'; backend is 'eager'.",
        ),
    ],
)
def test_what_is_no_option_is_told(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:
        RuntimeOptions(**fields)
    assert str(error.value) == text


def test_options_are_a_value() -> None:
    assert RuntimeOptions() == RuntimeOptions("auto", None, "full", False) and len({RuntimeOptions()}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        RuntimeOptions().backend = "eager"  # type: ignore[misc]


AUTO = [
    (CPU, 320, {}, True, "openvino"),
    (CPU, 255, {}, True, "eager"),
    (CPU, 64, {"quantize": "int8"}, True, "openvino"),
    (CPU, 320, {}, False, "eager"),
    (CUDA, 320, {}, True, "cudagraph"),
    (CUDA, 64, {}, False, "cudagraph"),
    (CUDA, 320, {"offload": True}, True, "eager"),
    (CPU, 64, {"offload": True}, True, "openvino"),
    (MPS, 320, {}, True, "eager"),
]


@pytest.mark.parametrize(("device", "channels", "fields", "installed", "backend"), AUTO)
def test_what_auto_comes_to(
    device: torch.device,
    channels: int,
    fields: dict[str, Any],
    installed: bool,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino, "available", lambda: installed)
    found = RuntimeOptions(vae="tiled", **fields).resolved(device, channels)
    assert found == RuntimeOptions(vae="tiled", **fields | {"backend": backend})
    assert found.resolved(device, channels) == found


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_what_runs_everywhere_stays(device: torch.device, backend: str, no_openvino: None) -> None:
    assert RuntimeOptions(backend).resolved(device, 320) == RuntimeOptions(backend)


@pytest.mark.parametrize(
    ("fields", "device", "text"),
    [
        ({"backend": "openvino"}, CUDA, r"backend 'openvino' \(and quantize\) run on the CPU; the device is 'cuda'\."),
        ({"quantize": "int8"}, CUDA, r"backend 'openvino' \(and quantize\) run on the CPU; the device is 'cuda'\."),
        ({"quantize": "int8"}, MPS, r"run on the CPU; the device is 'mps'\."),
        ({"backend": "cudagraph"}, CPU, r"backend 'cudagraph' needs an NVIDIA GPU; the device is 'cpu'\."),
        ({"backend": "cudagraph"}, MPS, r"needs an NVIDIA GPU; the device is 'mps'\."),
        ({"offload": True, "backend": "eager"}, CPU, "offload .* the device is 'cpu' and the backend 'eager'"),
    ],
)
def test_what_does_not_run_here_is_told(fields: dict[str, Any], device: torch.device, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RuntimeOptions(**fields).resolved(device, 320)


@pytest.mark.parametrize("fields", [{"backend": "openvino"}, {"quantize": "int8"}])
def test_a_missing_openvino_is_told(fields: dict[str, Any], no_openvino: None) -> None:
    with pytest.raises(ImportError, match=r"needs OpenVINO: pip install 'fourstroke\[cpu\]'\.$"):
        RuntimeOptions(**fields).resolved(CPU, 320)


# On networks.

quick_compile = functools.partial(compile_, backend="eager", cache=False)


@pytest.mark.parametrize(("backend", "kind"), [("openvino", Accelerated), ("compile", Compiled), ("cudagraph", Graphs)])
def test_backends_come_and_go(backend: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "best_precision", lambda: "f32")
    monkeypatch.setattr(options, "compile_", quick_compile)
    pipe: Any = tiny.sd()
    nets = fourstroke.MultiControlNetModel([fourstroke.ControlNetModel.from_unet(pipe.unet) for _ in range(2)])
    parts = [pipe.unet, pipe.vae.encoder, pipe.vae.decoder, *nets.nets]
    before = [dict(vars(part)) for part in parts]
    strides = [[tensor.stride() for tensor in part.parameters()] for part in parts]
    for _ in range(2):
        run_with_([pipe.unet, pipe.vae, nets], backend)
        assert [type(vars(part).get("forward")) for part in parts] == [kind] * 5
        assert not {"forward"} & {*vars(pipe.vae), *vars(nets)}
    run_with_([pipe.unet, pipe.vae, nets], "eager")
    assert [vars(part) for part in parts] == before
    assert [[tensor.stride() for tensor in part.parameters()] for part in parts] == strides


def test_one_backend_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "compile_", quick_compile)
    unet = tiny.unet()
    for backend, kind in (
        ("compile", Compiled),
        ("openvino", Accelerated),
        ("cudagraph", Graphs),
        ("compile", Compiled),
    ):
        run_with_([unet], backend, precision="f32")
        assert type(unet.forward) is kind


def test_what_openvino_is_told() -> None:
    vae = tiny_vae("relu")
    run_with_([vae], "openvino", precision="f32", ranges={})
    assert [forward.precision for forward in accelerated(vae).values()] == ["f32", "f32"]
    assert {*accelerated(vae)} == {"encoder", "decoder"} and vae.decoder.forward.ranges == {}
    run_with_([vae], "openvino")
    assert vae.decoder.forward.precision == openvino.best_precision()


@pytest.mark.parametrize("backend", ["auto", "onnx", ""])
def test_a_backend_that_is_none(backend: str) -> None:
    with pytest.raises(ValueError, match=f"backend is '{backend}'; it is one of eager, compile, cudagraph, openvino"):
        run_with_([tiny.unet()], backend)


# In an engine.


def test_an_engine_with_openvino_paints_the_eager_picture(sd15: str, calls: list[Any]) -> None:
    wanted = paint(by_hand(sd15))
    it = Engine(sd15, runtime=RuntimeOptions("openvino"), dtype=torch.float32)
    assert it.runtime.backend == "openvino" and it.pipeline.dtype == torch.float32
    assert np.abs(paint(it) - wanted).max() <= 1 / 255
    assert calls == [it.pipeline.unet] * 4 + [it.pipeline.vae.decoder]
    assert {
        forward.precision for part in (it.pipeline.unet, it.pipeline.vae) for forward in accelerated(part).values()
    } == {"f32"}


def test_small_models_run_eagerly(sd15: str, calls: list[Any]) -> None:
    it = Engine(sd15)
    assert it.runtime == RuntimeOptions("eager") and it.pipeline.dtype == torch.float32
    paint(it)
    assert not calls and not accelerated(it.pipeline.unet)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_openvino_keeps_weights_in_half_precision_and_the_autoencoder_in_single(sd15: str, dtype: Any) -> None:
    it = Engine(sd15, runtime=RuntimeOptions("openvino"), dtype=dtype)
    assert it.pipeline.unet.dtype == torch.float16 and it.pipeline.vae.dtype == torch.float32
    precision = openvino.best_precision() if dtype is None else "bf16"
    assert accelerated(it.pipeline.unet)[""].precision == precision


def test_float16_is_float32_on_a_cpu_with_openvino_too(sd15: str) -> None:
    with pytest.warns(UserWarning, match="float32 runs on the CPU instead"):
        it = Engine(sd15, runtime=RuntimeOptions("openvino"), dtype=torch.float16)
    assert it.pipeline.dtype == torch.float32 and accelerated(it.pipeline.unet)[""].precision == "f32"


def test_control_networks_run_there_too(sd15: str, calls: list[Any]) -> None:
    fields = {"controls": [Control(picture(1), model="canny", scale=0.7)], "num_inference_steps": 2}
    wanted = paint(Engine(sd15), **fields)
    it = Engine(sd15, runtime=RuntimeOptions("openvino"), dtype=torch.float32)
    assert np.abs(paint(it, **fields) - wanted).max() <= 1 / 255
    net = it.pipeline.controlnet.nets[0] if hasattr(it.pipeline.controlnet, "nets") else it.pipeline.controlnet[0]
    assert sum(network is net for network in calls) == 2


def with_tiny_vae(model: str, place: str | None) -> Base:
    base = look_at(model)
    return dataclasses.replace(base, family=dataclasses.replace(base.family, tiny_vae=place))


def test_the_tiny_autoencoder_is_the_familys(sd15: str, tmp_path: Path) -> None:
    vae = tiny_vae("relu")
    vae.save_pretrained(tmp_path / "tiny")
    pipe = by_hand(sd15)
    pipe.vae = vae
    it = Engine(
        with_tiny_vae(sd15, str(tmp_path / "tiny")), runtime=RuntimeOptions("openvino", vae="tiny"), dtype=torch.float32
    )
    assert {*accelerated(it.pipeline.vae)} == {"encoder", "decoder"}
    assert np.abs(paint(it) - paint(pipe)).max() <= 1 / 255


def test_a_family_without_a_tiny_autoencoder(sd15: str) -> None:
    with pytest.raises(ValueError, match="There is no tiny autoencoder known for SD 1.5; leave vae='full'"):
        Engine(with_tiny_vae(sd15, None), runtime=RuntimeOptions(vae="tiny"))


def test_tiles_are_compiled_once_a_shape(sd15: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    compile = Accelerated._compile
    monkeypatch.setattr(
        Accelerated, "_compile", lambda self, *args: compiled.append(self.network) or compile(self, *args)
    )
    pipes = [
        Engine(sd15, runtime=RuntimeOptions(backend, vae="tiled"), dtype=torch.float32)
        for backend in ("eager", "openvino")
    ]
    pictures = []
    for it in pipes:
        vae: Any = it.pipeline.vae
        vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 4
        pictures.append(paint(it, height=80, width=72, num_inference_steps=1))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 / 255
    paint(pipes[1], height=80, width=72, num_inference_steps=1)
    assert [type(network).__name__ for network in compiled].count("Decoder") == 4


def test_offloading_wants_a_gpu_or_openvino(sd15: str) -> None:
    with pytest.raises(ValueError, match="offload moves networks to a GPU"):
        Engine(sd15, runtime=RuntimeOptions("eager", offload=True))


def test_what_is_offloaded_on_a_cpu_waits_on_the_disk_and_paints_the_same(
    sd15: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(spill, "SMALL", 1000)
    lora = tinyhub.lora(by_hand(sd15).unet, tmp_path / "lora.safetensors", scale=0.02)
    taken: list[torch.Tensor] = []
    take = spill.Spill.take
    monkeypatch.setattr(spill.Spill, "take", lambda self, tensor: taken.append(take(self, tensor)) or taken[-1])
    pictures = []
    for offload in (False, True):
        it = Engine(sd15, loras=[str(lora)], runtime=RuntimeOptions(quantize="int8", offload=offload))
        pictures.append(paint(it, num_inference_steps=1))
        assert bool(taken) == offload
    assert np.array_equal(*pictures)
    large = [tensor for tensor in taken if tensor.nbytes >= 1000]
    assert any(tensor.dtype == torch.int8 for tensor in large)
    assert not any(tensor.untyped_storage().resizable() for tensor in large)
    merged = it.pipeline.unet.mid_block.attentions[0].proj_in.weight
    assert merged.nbytes >= 1000 and merged.is_shared()


def test_calibration_warns_of_no_timesteps_that_the_network_was_distilled_on(
    sd15: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of DMD2, which are none of the LCM scheduler's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lora = tinyhub.lora(by_hand(sd15).unet, tmp_path / "dmd2_4step_lora.safetensors", scale=0.02)
    it = Engine(sd15, loras=[str(lora)], runtime=RuntimeOptions(quantize="int8"))
    assert isinstance(it.plan.settings, Settings) and it.plan.settings.timesteps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paint(it)


# On the command line.


@pytest.fixture
def model(sd15: str) -> str:
    return sd15


def generate(model: str, *arguments: str, code: int = 0) -> Any:
    return run("generate", "a red fox", "--model", model, "--steps", "1", "--no-preview", *arguments, code=code)


def test_flags_become_the_runtime(model: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    made: list[RuntimeOptions] = []
    init = Engine.__init__

    def kept(self: Engine, *args: Any, runtime: RuntimeOptions, **more: Any) -> None:
        made.append(runtime)
        init(self, *args, runtime=RuntimeOptions("eager"), **more)

    monkeypatch.setattr(Engine, "__init__", kept)
    generate(model)
    generate(model, "--backend", "openvino", "--quantize", "int8", "--vae", "tiled", "--offload")
    assert made == [RuntimeOptions(), RuntimeOptions("openvino", "int8", "tiled", True)]


def test_openvino_from_the_command_line(model: str, here: Path, calls: list[Any]) -> None:  # noqa: F811
    generate(model, "--backend", "openvino", "--dtype", "float32", "-o", "fox.png")
    assert len(calls) == 2 and (here / "fox.png").is_file()


BAD: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (
        ("--backend", "opnvino"),
        (
            "--backend is 'opnvino'; it is one of auto, eager, compile, cudagraph, openvino.",
            "Did you mean 'openvino'?",
        ),
    ),
    (("--quantize", "int4"), ("--quantize is 'int4'; it is one of int8. Did you mean 'int8'?",)),
    (("--vae", "tinny"), ("--vae is 'tinny'; it is one of full, tiny, tiled. Did you mean 'tiny'?",)),
    (
        ("--quantize", "int8", "--backend", "eager"),
        ("--quantize int8 needs --backend openvino; --backend is 'eager'.",),
    ),
    (("--backend", "cudagraph", "--device", "cpu"), ("--backend cudagraph needs an NVIDIA GPU",)),
    (
        ("--offload", "--device", "cpu", "--backend", "eager"),
        ("--offload moves networks to a GPU while they work, or on a CPU", "with --backend openvino; the device is"),
    ),
    (("--bakend", "eager"), ("There is no option --bakend. Did you mean '--backend'?",)),
    (("--lowvram",), ("Did you mean '--offload'?",)),
]


@pytest.mark.parametrize(("arguments", "fragments"), BAD, ids=lambda value: " ".join(value)[:40])
def test_bad_flags_are_told_in_one_line(
    model: str,
    here: Path,  # noqa: F811
    arguments: tuple[str, ...],
    fragments: tuple[str, ...],
) -> None:
    assert_one_line(generate(model, *arguments, code=2), *fragments)


@pytest.mark.parametrize("flags", [("--quantize", "int8"), ("--backend", "openvino")])
def test_eight_bits_without_openvino_are_told(
    model: str,
    here: Path,  # noqa: F811
    flags: tuple[str, ...],
    no_openvino: None,
) -> None:
    result = generate(model, *flags, "--device", "cpu", code=1)
    assert_one_line(result, "The backend 'openvino' needs OpenVINO: pip install 'fourstroke[cpu]'.\n")


def test_choices_are_completed() -> None:
    assert complete("fourstroke generate --backend c") == ["compile", "cudagraph"]
    assert complete("fourstroke generate --quantize i") == ["int8"]
    assert complete("fourstroke generate --vae t") == ["tiny", "tiled"]
