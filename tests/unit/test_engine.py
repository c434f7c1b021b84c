"""One engine serves every request, loads what it names, and runs each few-step method as its authors do."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from fourstroke import (
    Control,
    ControlNetModel,
    DDIMScheduler,
    Engine,
    GenerateRequest,
    LCMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    T2IAdapter,
    Windows,
    engine,
    hub,
)
from fourstroke.engine import where_to_run
from fourstroke.families import FAMILIES, Base, available, family_of, look_at
from fourstroke.lora import LoraError
from fourstroke.models.motion import attach_motion_
from fourstroke.plan import split_place, split_weight
from fourstroke.runtime.memory_format import channels_last_

from . import tiny, tinyhub
from .tiny import picture

MASK = PIL.Image.new("L", (32, 32))
MASK.paste(255, (8, 8, 24, 32))
# Every network has an effect of at least this on a picture in [0, 1].
EFFECT = 0.2 / 255


def paint(it: Any, **fields: Any) -> np.ndarray:
    """What an engine or a pipeline makes of a request."""
    request = GenerateRequest(**{"prompt": "a red fox", "seed": 3, "output_type": "np", **fields})
    return it.generate(request).images


def by_hand(model: str, lora: bool = True) -> Any:
    """The pipeline that the engine should come to, put together by the pipelines' own means."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    channels_last_(pipe.vae)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    if lora:
        pipe.load_lora_weights(tinyhub.LCM_LORA)
    return pipe


def apart(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first - second).mean())


# Few steps


def test_a_model_of_a_family_gets_its_lcm_lora_and_the_lcm_scheduler(sd15: str) -> None:
    it = Engine(sd15)
    assert [(file.name, file.weight) for file in it.plan.loras] == [(tinyhub.LCM_LORA, 1.0)]
    assert type(it.pipeline.scheduler) is LCMScheduler
    np.testing.assert_array_equal(paint(it), paint(by_hand(sd15)))
    assert apart(paint(it), paint(by_hand(sd15, lora=False))) > EFFECT


def test_without_few_steps_the_model_is_as_it_was_published(sd15: str) -> None:
    it = Engine(sd15, lcm=False)
    pipe = StableDiffusionPipeline.from_pretrained(sd15)
    channels_last_(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    assert it.plan.loras == () and it.plan.settings is None
    np.testing.assert_array_equal(paint(it, guidance_scale=3.0), paint(pipe, guidance_scale=3.0))
    assert it.request("fox") == GenerateRequest(prompt="fox")


def test_a_style_comes_on_top_and_keeps_its_weight(sd15: str, tmp_path: Path) -> None:
    pipe = by_hand(sd15)
    style = tinyhub.lora(pipe.unet, tmp_path / "style.safetensors", seed=7)
    it = Engine(sd15, loras=[f"{style}:0.5"])
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["default_0", "style"], [1.0, 0.5])
    np.testing.assert_array_equal(paint(it), paint(pipe))


def test_a_missing_lcm_lora_is_named_with_the_way_out(
    sd15: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(engine, "load_pipeline", lambda *args, **options: pytest.fail("the model was loaded"))
    with pytest.raises(FileNotFoundError) as caught:
        Engine(sd15)
    text = str(caught.value)
    assert "\n" not in text and tinyhub.LCM_LORA in text and "SD 1.5" in text and text.endswith("use lcm=False.")


# Published in the cards of the repositories that the names are of.
KNOWN: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (
        "Hyper-SD15-8steps-lora",
        "DDIMScheduler",
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 8, "guidance_scale": 1.0},
    ),
    ("Hyper-SD15-1step-lora", "TCDScheduler", {}, {"num_inference_steps": 1, "eta": 1.0}),
    (
        "sdxl_lightning_4step_lora",
        "EulerDiscreteScheduler",
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 4},
    ),
    ("TCD-SD15-LoRA", "TCDScheduler", {}, {"num_inference_steps": 4, "eta": 0.3}),
    ("pcm_sd15_normalcfg_4step_converted", "DDIMScheduler", {"clip_sample": False}, {"guidance_scale": 3.0}),
    ("dmd2_4step_lora", "LCMScheduler", {}, {"timesteps": (999, 749, 499, 249)}),
    ("AnimateLCM_sd15_t2v_lora", "LCMScheduler", {"beta_schedule": "linear"}, {"num_inference_steps": 6}),
]


@pytest.mark.parametrize(("name", "scheduler", "config", "fields"), KNOWN, ids=lambda value: str(value)[:24])
def test_a_known_few_step_lora_runs_as_its_authors_run_it(
    sd15: str, tmp_path: Path, name: str, scheduler: str, config: dict[str, Any], fields: dict[str, Any]
) -> None:
    path = tinyhub.lora(by_hand(sd15).unet, tmp_path / f"{name}.safetensors", scale=0.02)
    it = Engine(sd15, loras=[str(path)])
    weight = 0.8 if "Animate" in name else 1.0
    assert [(file.name, file.weight) for file in it.plan.loras] == [(str(path), weight)]
    assert type(it.pipeline.scheduler).__name__ == scheduler
    assert {key: it.pipeline.scheduler.config[key] for key in config} == config
    request = it.request("a red fox")
    assert {key: getattr(request, key) for key in fields} == fields
    steps: list[int] = []
    it.generate("a red fox", seed=1, on_step=lambda state: steps.append(int(state.timestep)))
    assert len(steps) == len(request.timesteps or range(request.num_inference_steps))
    assert request.timesteps is None or tuple(steps) == request.timesteps


def test_what_the_request_says_wins_over_what_is_known(sd15: str, tmp_path: Path) -> None:
    path = tinyhub.lora(by_hand(sd15).unet, tmp_path / "dmd2_4step_lora.safetensors")
    it = Engine(sd15, loras=[f"{path}:0.7"])
    assert it.plan.loras[0].weight == 0.7
    assert it.request("x", guidance_scale=1.5).guidance_scale == 1.5
    assert it.request("x", num_inference_steps=6).timesteps is None
    assert it.request("x", timesteps=(999, 499)).timesteps == (999, 499)
    other = Engine(sd15, loras=[str(path)], scheduler=("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}))
    assert type(other.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert other.pipeline.scheduler.config["timestep_spacing"] == "linspace"
    assert other.request("x").timesteps is None and other.request("x").num_inference_steps == 4


def test_a_known_few_step_model_gets_no_lora(sd15: str, tmp_path: Path) -> None:
    shutil.copytree(sd15, tmp_path / "sd-turbo")
    it = Engine(str(tmp_path / "sd-turbo"))
    assert it.plan.loras == () and it.request("x").num_inference_steps == 1
    assert type(it.pipeline.scheduler).__name__ == "EulerAncestralDiscreteScheduler"


def test_a_model_that_embeds_guidance_is_a_full_lcm(tmp_path: Path, sd15: str) -> None:
    tinyhub.model(time_cond_proj_dim=16).save_pretrained(tmp_path / "some-model")
    it = Engine(str(tmp_path / "some-model"))
    assert it.plan.loras == () and it.request("x").guidance_scale == 8.0
    assert apart(paint(it, guidance_scale=8.0), paint(it, guidance_scale=1.0)) > EFFECT


def test_a_family_without_an_lcm_lora_warns(tmp_path: Path) -> None:
    tinyhub.model(1024).save_pretrained(tmp_path / "v2")
    with pytest.warns(UserWarning, match=r"No LCM-LoRA is known for SD 2\.x.*use lcm=False"):
        it = Engine(str(tmp_path / "v2"))
    assert it.plan.loras == () and type(it.pipeline.scheduler) is LCMScheduler


def test_the_lora_of_another_family_is_refused_before_the_model_is_loaded(
    sd15: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "load_pipeline", lambda *args, **options: pytest.fail("the model was loaded"))
    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    rank = {"lora_down.weight": torch.ones(4, 2048), "lora_up.weight": torch.ones(640, 4)}
    save_file({f"{module}.{role}": tensor for role, tensor in rank.items()}, tmp_path / "xl.safetensors")
    with pytest.raises(LoraError, match=r"xl\.safetensors: it was made for SDXL.*the model is SD 1\.5"):
        Engine(sd15, loras=[str(tmp_path / "xl.safetensors")])


# Networks by name


def test_controls_by_name_in_the_order_of_the_request(sd15: str) -> None:
    it, pipe = Engine(sd15), by_hand(sd15)
    nets = {name: ControlNetModel.from_pretrained(name) for name in (tinyhub.CANNY, tinyhub.DEPTH)}
    first, second = Control(picture(1), 1.0, model="canny"), Control(picture(2), 0.7, 0.0, 0.75, model="depth")
    pipe.controlnet = [nets[tinyhub.CANNY], nets[tinyhub.DEPTH]]
    expected = paint(pipe, controls=(first, second))
    np.testing.assert_array_equal(paint(it, controls=(first, second)), expected)
    pipe.controlnet = [nets[tinyhub.DEPTH], nets[tinyhub.CANNY]]
    np.testing.assert_array_equal(paint(it, controls=(second, first)), paint(pipe, controls=(second, first)))
    swapped = (dataclasses.replace(first, model="depth"), dataclasses.replace(second, model="canny"))
    assert apart(paint(it, controls=swapped), expected) > EFFECT
    np.testing.assert_array_equal(paint(it), paint(by_hand(sd15)))


def test_adapters_by_name_in_the_order_of_the_request(sd15: str) -> None:
    it, pipe = Engine(sd15), by_hand(sd15)
    pipe.adapter = [T2IAdapter.from_pretrained(name) for name in (tinyhub.T2I_DEPTH, tinyhub.T2I_CANNY)]
    adapters = (Control(picture(1), model="depth"), Control(picture(2), 0.5, model="canny"))
    expected = paint(pipe, adapters=adapters)
    np.testing.assert_array_equal(paint(it, adapters=adapters), expected)
    assert apart(paint(it, adapters=adapters[:1]), expected) > EFFECT
    np.testing.assert_array_equal(paint(it), paint(by_hand(sd15)))


def test_a_network_is_loaded_once(sd15: str, monkeypatch: pytest.MonkeyPatch) -> None:
    it, loads = Engine(sd15), []
    original = ControlNetModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def spy(cls: Any, name: str, **options: Any) -> Any:
        loads.append(name)
        return original(cls, name, **options)

    monkeypatch.setattr(ControlNetModel, "from_pretrained", classmethod(spy))
    for model in ("canny", tinyhub.CANNY, "canny", "depth", "canny"):
        paint(it, num_inference_steps=1, controls=(Control(picture(1), model=model),))
    paint(it, num_inference_steps=1, controls=(Control(picture(1), model="canny"), Control(picture(2), model="canny")))
    assert loads == [tinyhub.CANNY, tinyhub.DEPTH]


def test_networks_from_a_folder_and_from_a_repository_s_folder(sd15: str, built: Path, tmp_path: Path) -> None:
    it = Engine(sd15)
    ControlNetModel.from_pretrained(tinyhub.CANNY).save_pretrained(tmp_path / "net")
    expected = paint(it, controls=(Control(picture(1), model="canny"),))
    np.testing.assert_array_equal(paint(it, controls=(Control(picture(1), model=str(tmp_path / "net")),)), expected)
    ControlNetModel.from_pretrained(tinyhub.CANNY).save_pretrained(tinyhub.publish(tmp_path, "some/nets") / "a" / "b")
    inside = Engine(sd15, cache_dir=str(built / "cache"))
    shutil.copytree(tmp_path / "models--some--nets", built / "cache" / "models--some--nets")
    np.testing.assert_array_equal(paint(inside, controls=(Control(picture(1), model="some/nets/a/b"),)), expected)


@pytest.mark.parametrize(
    ("fields", "error", "fragments"),
    [
        (
            {"controls": [Control(picture(1), model="cany")]},
            ValueError,
            ("no ControlNet 'cany' for SD 1.5", "canny, depth, pose, lineart"),
        ),
        ({"adapters": [Control(picture(1), model="nothing")]}, ValueError, ("no T2I-Adapter 'nothing'", "sketch")),
        ({"controls": [Control(picture(1))]}, ValueError, ("A picture for a ControlNet names none", "canny")),
        (
            {"ip_adapter_image": Control(picture(1), model="minus")},
            ValueError,
            ("no IP-Adapter 'minus' for SD 1.5", "base, plus, plus-face, full-face"),
        ),
        (
            {"controls": [Control(picture(1), model="pose")]},
            FileNotFoundError,
            ("ControlNet lllyasviel/control_v11p_sd15_openpose", "not in the cache", "Go online"),
        ),
        (
            {"controls": [Control(picture(1), model="./nowhere")]},
            FileNotFoundError,
            ("ControlNet ./nowhere", "neither a folder"),
        ),
        (
            {"adapters": [Control(picture(1), model="x/adapter.safetensors")]},
            FileNotFoundError,
            ("T2I-Adapter x/adapter.safetensors",),
        ),
        (
            {"ip_adapter_image": Control(picture(1), model="plus")},
            FileNotFoundError,
            ("IP-Adapter h94/IP-Adapter/models/ip-adapter-plus_sd15.safetensors",),
        ),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_a_network_that_is_not_to_be_found(
    sd15: str, fields: dict[str, Any], error: type[Exception], fragments: tuple[str, ...]
) -> None:
    it = Engine(sd15)
    before = paint(it)
    with pytest.raises(error) as caught:
        paint(it, **fields)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)
    np.testing.assert_array_equal(paint(it), before)


def test_networks_of_another_family_are_refused(sd15: str, tmp_path: Path) -> None:
    it = Engine(sd15)
    tinyhub.controlnet(tiny.unet(cross_attention_dim=2048)).save_pretrained(tmp_path / "net")
    with pytest.raises(ValueError, match=r"ControlNet .*net was made for SDXL, the model is SD 1\.5"):
        paint(it, controls=(Control(picture(1), model=str(tmp_path / "net")),))
    adapter = {"in_channels": 3, "channels": [16, 48], "num_res_blocks": 1, "adapter_type": "full_adapter"}
    tiny.filled(T2IAdapter.from_config(adapter)).save_pretrained(tmp_path / "t2i")
    with pytest.raises(ValueError, match=r"T2I-Adapter .*t2i was made for SD of 16-48 channels"):
        paint(it, adapters=(Control(picture(1), model=str(tmp_path / "t2i")),))
    (tmp_path / "t2i.safetensors").write_bytes((tmp_path / "t2i" / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"t2i\.safetensors: T2IAdapter is not read from single files"):
        paint(it, adapters=(Control(picture(1), model=str(tmp_path / "t2i.safetensors")),))


def test_image_prompts_come_and_go(sd15: str) -> None:
    it, pipe = Engine(sd15), by_hand(sd15)
    plain = paint(it)
    pipe.load_ip_adapter(tinyhub.IP_ADAPTER, "models", "ip-adapter_sd15.safetensors")
    whole = paint(pipe, ip_adapter_image=[picture(1)])
    pipe.set_ip_adapter_scale(0.5)
    half = paint(pipe, ip_adapter_image=[picture(1)])
    assert apart(whole, plain) > EFFECT and apart(half, whole) > EFFECT
    np.testing.assert_array_equal(paint(it, ip_adapter_image=picture(1)), whole)
    np.testing.assert_array_equal(paint(it, ip_adapter_image=Control(picture(1), 0.5)), half)
    np.testing.assert_array_equal(paint(it, ip_adapter_image=[picture(1)]), whole)
    np.testing.assert_array_equal(paint(it), plain)
    files = ["ip-adapter_sd15.safetensors", "ip-adapter-plus-face_sd15.safetensors"]
    pipe.load_ip_adapter(tinyhub.IP_ADAPTER, "models", files)
    pipe.set_ip_adapter_scale([0.3, 0.6])
    two = [Control(picture(1), 0.3), Control(picture(2), 0.6, model="plus-face")]
    expected = paint(pipe, ip_adapter_image=[picture(1), picture(2)])
    np.testing.assert_array_equal(paint(it, ip_adapter_image=two), expected)
    np.testing.assert_array_equal(paint(it, ip_adapter_image=picture(1)), whole)


def test_everything_at_once(sd15: str, tmp_path: Path) -> None:
    """Start picture, mask, two controls, an adapter, an image prompt, two LoRAs: each counts."""
    style = tinyhub.lora(by_hand(sd15).unet, tmp_path / "style.safetensors", seed=7)
    it = Engine(sd15, loras=[f"{style}:0.5"])
    fields: dict[str, Any] = {
        "image": picture(0),
        "strength": 0.9,
        "mask_image": MASK,
        "controls": [Control(picture(1), model="canny"), Control(picture(2), 0.8, model="depth")],
        "adapters": [Control(picture(3), model="canny")],
        "ip_adapter_image": Control(picture(4), 0.7),
        "guidance_scale": 1.5,
    }
    whole = paint(it, **fields)
    for name in ("image", "controls", "adapters", "ip_adapter_image", "mask_image"):
        less = {key: value for key, value in fields.items() if key != name and (name != "image" or key != "mask_image")}
        assert apart(paint(it, **less), whole) > EFFECT, name
    assert apart(paint(Engine(sd15), **fields), whole) > EFFECT
    np.testing.assert_array_equal(paint(it, **fields), whole)


# Animation


def moving(model: str, motion: str = tinyhub.MOTION) -> Any:
    pipe = by_hand(model)
    attach_motion_(pipe.unet, MotionAdapter.from_pretrained(motion))
    return pipe


def test_frames_attach_the_motion_adapter(sd15: str) -> None:
    it = Engine(sd15)
    before = paint(it)
    frames = paint(it, num_frames=4)
    assert frames.shape == (1, 4, 32, 32, 3)
    np.testing.assert_array_equal(frames, paint(moving(sd15), num_frames=4))
    np.testing.assert_array_equal(paint(it), before)
    np.testing.assert_array_equal(paint(it, num_frames=4), frames)
    controls = [Control([picture(i) for i in range(4)], model="canny")]
    assert apart(paint(it, num_frames=4, controls=controls), frames) > EFFECT


def test_more_frames_than_the_adapter_can_take_need_windows(sd15: str) -> None:
    it = Engine(sd15)
    with pytest.raises(ValueError, match=r"12 frames at a time.*at most 8.*windows=Windows\(length=8\)"):
        paint(it, num_frames=12)
    frames = paint(it, num_frames=12, windows=Windows(8, 4))
    assert frames.shape == (1, 12, 32, 32, 3) and np.isfinite(frames).all()


def test_motion_loras_find_the_motion_modules(sd15: str, tmp_path: Path) -> None:
    zoom = tinyhub.motion_lora(tmp_path / "zoom.safetensors")
    it, pipe = Engine(sd15, loras=[f"{zoom}:0.8"]), moving(sd15)
    pipe.load_lora_weights(zoom, adapter_name="zoom")
    pipe.set_adapters(["default_0", "zoom"], [1.0, 0.8])
    expected = paint(pipe, num_frames=4)
    np.testing.assert_array_equal(paint(it, num_frames=4), expected)
    assert apart(paint(Engine(sd15), num_frames=4), expected) > EFFECT


def test_animatelcm_brings_its_lora_its_weight_and_linear_betas(sd15: str) -> None:
    it = Engine(sd15, motion=tinyhub.ANIMATELCM)
    place = f"{tinyhub.ANIMATELCM}/{tinyhub.ANIMATELCM_LORA}"
    assert [(file.name, file.weight) for file in it.plan.loras] == [(place, 0.8)]
    assert it.request("x").num_inference_steps == 6 and it.request("x").guidance_scale == 2.0
    assert it.pipeline.scheduler.config["beta_schedule"] == "linear"
    pipe = moving(sd15, tinyhub.ANIMATELCM)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tinyhub.ANIMATELCM, weight_name=tinyhub.ANIMATELCM_LORA, adapter_name="lcm")
    pipe.set_adapters(["lcm"], [0.8])
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, beta_schedule="linear")
    fields = {"num_frames": 4, "guidance_scale": 2.0, "num_inference_steps": 6}
    np.testing.assert_array_equal(paint(it, **fields), paint(pipe, **fields))
    own = Engine(sd15, motion=tinyhub.ANIMATELCM, lcm=False)
    assert type(own.pipeline.scheduler) is DDIMScheduler
    assert own.pipeline.scheduler.config["beta_schedule"] == "linear"


def test_a_family_without_a_motion_adapter_says_so(tmp_path: Path) -> None:
    tinyhub.model(40).save_pretrained(tmp_path / "model")
    it = Engine(str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"no motion adapter known for a model of text width 40; name one: motion="):
        paint(it, num_frames=4)
    tinyhub.motion_adapter().save_pretrained(tmp_path / "motion")
    assert paint(Engine(str(tmp_path / "model"), motion=str(tmp_path / "motion")), num_frames=2).shape[1] == 2


# Strength and seeds


@pytest.mark.parametrize("strength", [0.0, 0.01, 0.02, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_no_strength_leaves_an_empty_schedule(sd15: str, strength: float, steps: int) -> None:
    it, ran = Engine(sd15), []
    start = {"image": picture(0), "strength": strength, "num_inference_steps": steps, "seed": 1}
    it.generate("a red fox", **start, on_step=lambda state: ran.append(int(state.timestep)))
    # Luo et al. 2023: the training grid of 50 timesteps, 20 apart, is cut at the strength; all steps run that fit.
    assert len(ran) == max(1, min(steps, int(50 * strength)))
    if strength > 0:
        assert ran[0] == max(1, int(50 * strength)) * 20 - 1


@pytest.mark.parametrize(
    "fields", [{}, {"image": picture(0)}, {"image": picture(0), "mask_image": MASK}, {"num_frames": 3}], ids=list
)
def test_picture_i_is_that_of_its_seed_alone(sd15: str, fields: dict[str, Any]) -> None:
    it = Engine(sd15)
    controls = [Control(picture(1), model="canny")]
    batch = it.generate("a red fox", seed=5, num_images_per_prompt=3, output_type="np", controls=controls, **fields)
    assert batch.seeds == (5, 6, 7)
    for i in range(3):
        alone = it.generate("a red fox", seed=5 + i, output_type="np", controls=controls, **fields)
        assert np.abs(batch.images[i] - alone.images[0]).max() <= 1 / 255
    assert apart(batch.images[0], batch.images[1]) > EFFECT


def test_without_a_seed_one_is_drawn_and_told(sd15: str) -> None:
    it = Engine(sd15)
    first, second = (it.generate("fox", num_inference_steps=1, output_type="np") for _ in range(2))
    assert first.seeds is not None and first.seeds != second.seeds
    again = it.generate("fox", num_inference_steps=1, output_type="np", seed=first.seeds[0])
    np.testing.assert_array_equal(again.images, first.images)


# Names, places, sizes, devices


def test_where_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert where_to_run(None, None) == (torch.device("cpu"), torch.float32)
    for device in ("cuda", "cuda:1", "mps", "cpu:1"):
        with pytest.raises(ValueError, match=f"device is '{device}', but there is no such device here; use 'cpu'"):
            where_to_run(device, None)
    for device in ("gpu", "cuda:x", "meta"):
        with pytest.raises(ValueError, match=f"device is '{device}'; it is one of cpu, cuda, mps"):
            where_to_run(device, None)
    with pytest.warns(UserWarning, match="float32 runs on the CPU instead"):
        assert where_to_run(torch.device("cpu"), torch.float16) == (torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert where_to_run(None, None) == (torch.device("cuda"), torch.float16)
    assert where_to_run("cuda:1", torch.bfloat16) == (torch.device("cuda:1"), torch.bfloat16)
    with pytest.raises(ValueError, match="device is 'cuda:2', but there is no such"):
        where_to_run("cuda:2", None)


def test_a_missing_device_is_told_before_the_model_is_looked_for() -> None:
    with pytest.raises(ValueError, match="device is 'cpu:7'"):
        Engine("no/where", device="cpu:7")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors:0.8", ("style.safetensors", 0.8)),
        ("owner/name:-1", ("owner/name", -1.0)),
        ("owner/name", ("owner/name", None)),
        (r"C:\loras\style.safetensors", (r"C:\loras\style.safetensors", None)),
        (r"C:\loras\style.safetensors:.5", (r"C:\loras\style.safetensors", 0.5)),
        ("https://host:80/a.png", ("https://host:80/a.png", None)),
        ("https://host:80/a.png:2", ("https://host:80/a.png", 2.0)),
    ],
)
def test_weights_behind_names(text: str, expected: tuple[str, float | None]) -> None:
    assert split_weight(text) == expected


@pytest.mark.parametrize("text", ["a:b", "a:nan", "a:inf", "a:"])
def test_weights_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=rf"Thing '{text}': .* is not a number; write NAME:WEIGHT, such as a:0\.8"):
        split_weight(text, "Thing")


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert split_place("owner/name/a/b.safetensors") == ("owner/name", "a/b.safetensors")
    for whole in ("owner/name", "name", "./a/b/c", "/a/b/c", "../a/b", "here/a/b.safetensors"):
        assert split_place(whole) == (whole, None)
    assert split_place("~/a/b") == (str(Path.home() / "a" / "b"), None)


def test_the_families_of_published_models() -> None:
    from fourstroke.single_file import config_folder

    expected = {"sd15": "SD 1.5", "sd15-inpainting": "SD 1.5", "sd2-base": "SD 2.x", "sdxl": "SDXL", "ssd-1b": "SSD-1B"}
    for config, name in expected.items():
        assert family_of(hub.read_json(config_folder(config) / "unet" / "config.json")) is FAMILIES[name]
    found = look_at("emoji")
    assert found.family is FAMILIES["emoji"] and found.size == (128, 128) and found.channels == 4
    assert available("emoji/lcm-lora") and available("emoji/nothing") is None and available("a/b") == "a/b"


def test_short_names_of_shipped_networks_are_offered_only_where_they_are_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emoji = FAMILIES["emoji"]
    monkeypatch.setattr(hub, "ZOO", tmp_path)
    with pytest.raises(ValueError, match="no ControlNet 'canny' for emoji; there are none by a short name"):
        emoji.find("ControlNet", "canny")
    (tmp_path / "emoji" / "controlnet-canny").mkdir(parents=True)
    assert emoji.find("ControlNet", "canny") == "emoji/controlnet-canny"
    assert FAMILIES["SD 1.5"].find("ControlNet", "openpose") == "lllyasviel/control_v11p_sd15_openpose"


def test_an_inpainting_model_wants_a_mask(tmp_path: Path, sd15: str) -> None:
    tinyhub.model(in_channels=9).save_pretrained(tmp_path / "inpainting")
    base = look_at(str(tmp_path / "inpainting"))
    with pytest.raises(ValueError, match="inpainting is an inpainting model: pass image and mask_image"):
        base.check(GenerateRequest(prompt="x"))
    assert paint(Engine(base), image=picture(0), mask_image=MASK).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [
        ((512, 512), (None, None), (512, 512)),
        ((519, 613), (None, None), (512, 608)),
        ((3000, 4000), (None, None), (440, 584)),
        ((100, 100), (None, None), (512, 512)),
        ((3000, 4000), (None, 512), (384, 512)),
        ((3000, 4000), (600, None), (600, 800)),
        ((3000, 4000), (64, 72), (64, 72)),
        ((3, 4000), (None, 512), (8, 512)),
    ],
)
def test_the_size_that_fits_a_picture(size: Any, given: Any, expected: Any) -> None:
    found = Base("x", FAMILIES["SD 1.5"], (512, 512)).fitting_size(size, *given)
    assert found == expected
    assert all(side % 8 == 0 for side in found)
