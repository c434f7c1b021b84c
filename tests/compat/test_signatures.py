"""The classes under diffusers' names take diffusers' arguments, in its order and with its defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import diffusers
import pytest
from diffusers.schedulers import KarrasDiffusionSchedulers

import fourstroke
from fourstroke import schedulers
from fourstroke.left_out import MEMBERS, NAMES
from fourstroke.pipelines import components
from fourstroke.pipelines.pipeline import LORA_TARGETS
from tests.unit import tiny

PIPELINES = [name for names in components.PIPELINES.values() for name in names]
PAGE_TEXT = (Path(__file__).parents[2] / "docs" / "compat.md").read_text(encoding="utf-8")
# What a method's parameters are compared without, and why.
OTHERWISE: Mapping[str, str] = {
    "save_lora_weights": "there a class method that is given layers; here it writes a LoRA that is loaded",
    "encode_prompt": "compared with __call__ below",
}
# Arguments of newer releases, which warn here as any other that is not known.
LATER = ("use_flashpack",)
# None means every component that a LoRA can change, which the peer spells out class by class.
EVERY_TARGET = ("fuse_lora", "unfuse_lora")
# The names that diffusers has for Stable Diffusion, as patterns: what matches none of them is about other models.
STABLE_DIFFUSION = (
    r"(StableDiffusion|AnimateDiff|LatentConsistencyModel)\w*Pipeline",
    r"AutoPipelineFor(Text2Image|Image2Image|Inpainting)",
    r"(?!Flux|SD3|Sana|Qwen|Hunyuan|ZImage|Cosmos).*(ControlNet|Adapter)(Union|XS)?(Model|Adapter)?",
    r"UNet\w*|Autoencoder(KL|Tiny)|AsymmetricAutoencoderKL|MultiAdapter|MotionAdapter|SchedulerMixin",
)


def parameters(function: object) -> dict[str, object]:
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():  # type: ignore[arg-type]
        # The pipeline itself has another name where a function serves as a method.
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) and name not in ("self", "pipe"):
            default = parameter.default
            found[name] = tuple(default) if isinstance(default, list) else default
    return found


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("method", ["__call__", "encode_prompt"])
def test_calls_have_the_peers_arguments_order_and_defaults(name: str, method: str) -> None:
    ours = parameters(getattr(getattr(fourstroke, name), method))
    theirs = parameters(getattr(getattr(diffusers, name), method))
    if method == "encode_prompt":
        # The animated form says videos for images, in an order that its callers spell out.
        theirs = {key.replace("videos", "images"): default for key, default in theirs.items()}
    assert list(ours) == list(theirs)
    assert ours == theirs


@pytest.mark.parametrize("name", PIPELINES)
def test_constructors_have_the_peers_arguments(name: str) -> None:
    assert list(parameters(getattr(fourstroke, name).__init__)) == list(parameters(getattr(diffusers, name).__init__))


def members(cls: type) -> list[str]:
    return [name for name in dir(cls) if not name.startswith("_")]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_member_of_the_peers_is_there_with_its_parameters_or_listed_as_left_out(name: str) -> None:
    theirs, ours = getattr(diffusers, name), getattr(fourstroke, name)
    for member in members(theirs):
        assert hasattr(ours, member) != (member in MEMBERS), member
        if member in MEMBERS or member in OTHERWISE:
            continue
        method, mine = inspect.getattr_static(theirs, member), inspect.getattr_static(ours, member)
        assert isinstance(method, property) == isinstance(mine, property), member
        if isinstance(method, property):
            continue
        wanted, given = parameters(getattr(theirs, member)), parameters(getattr(ours, member))
        shared = {key: default for key, default in given.items() if key in wanted}
        wanted = {key: default for key, default in wanted.items() if key not in LATER}
        assert list(wanted) == list(shared), member
        if member in EVERY_TARGET:
            assert set(wanted.pop("components")) <= set(LORA_TARGETS) and shared.pop("components") is None  # type: ignore[call-overload]
        assert shared == wanted, member


@pytest.mark.parametrize("member", MEMBERS)
def test_members_that_are_left_out_say_so_when_they_are_touched(member: str) -> None:
    assert any(hasattr(getattr(diffusers, name), member) for name in PIPELINES), "diffusers has no such member"
    pipe = tiny.sd()
    with pytest.raises(
        AttributeError, match=rf"^{member} of diffusers' pipelines is left out: .+\. See docs/compat\.md"
    ):
        getattr(pipe, member)
    assert not hasattr(pipe, member) and getattr(pipe, member, None) is None
    assert f"`{member}`" in PAGE_TEXT


def test_other_members_are_missed_as_ever() -> None:
    pipe = tiny.sd()
    with pytest.raises(AttributeError, match="'StableDiffusionPipeline' object has no attribute 'wings'"):
        _ = pipe.wings
    pipe.unet = None
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'device'"):
        _ = pipe.device


def exports() -> list[str]:
    """What diffusers exports for Stable Diffusion."""
    names = (name for name in dir(diffusers) if isinstance(getattr(diffusers, name, None), type))
    return [name for name in names if any(re.fullmatch(pattern, name) for pattern in STABLE_DIFFUSION)]


def test_every_export_for_stable_diffusion_is_there_or_listed_as_left_out() -> None:
    schedulers = [kind.name for kind in KarrasDiffusionSchedulers] + ["LCMScheduler", "TCDScheduler"]
    missing = [name for name in (*exports(), *schedulers) if name not in (*fourstroke.__all__, *NAMES)]
    assert missing == []
    assert len(exports()) > 80


@pytest.mark.parametrize("name", NAMES)
def test_exports_that_are_left_out_say_so_when_they_are_imported(name: str) -> None:
    assert name in dir(diffusers) and name not in fourstroke.__all__
    with pytest.raises(ImportError, match=rf"^fourstroke has no {name}, which diffusers has: .+\. See docs/compat\.md"):
        exec(f"from fourstroke import {name}")
    assert f"`{name}`" in PAGE_TEXT
    for instead in re.findall(r"[A-Z]\w+(?:Pipeline|Scheduler|Model|VAE|KL|Tiny|Adapter)\b", NAMES[name]):
        assert instead in fourstroke.__all__ or instead in ("UNetMotionModel",), instead


KEPT = sorted({kind.name for kind in KarrasDiffusionSchedulers} - set(schedulers._CLASSES))


@pytest.mark.parametrize("name", KEPT)
def test_schedulers_that_are_not_run_hand_their_configuration_on(name: str, tmp_path: Path) -> None:
    kind = getattr(fourstroke, name)
    mine = kind.from_config(fourstroke.LCMScheduler(beta_start=0.001).config, timestep_spacing="trailing")
    assert mine.config._class_name == name and mine.config.timestep_spacing == "trailing"
    assert fourstroke.LCMScheduler.from_config(mine.config).config.beta_start == 0.001
    assert kind(beta_start=0.002).config.beta_start == 0.002
    with pytest.raises(fourstroke.UnsupportedConfig, match=rf"{name} is not run here\. Swap it: pipe\.scheduler = LCM"):
        mine.set_timesteps(4)
    mine.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path).config.beta_start == 0.001
    theirs = diffusers.DDIMScheduler.load_config(tmp_path)
    assert theirs["_class_name"] == name and theirs["timestep_spacing"] == "trailing"


def test_a_scheduler_that_is_not_run_is_refused_before_any_work() -> None:
    pipe = tiny.sd()
    pipe.scheduler = fourstroke.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.text_encoder.forward = pipe.unet.forward = None
    with pytest.raises(fourstroke.UnsupportedConfig, match="UniPCMultistepScheduler is not run here"):
        pipe("a red fox")


def test_every_component_is_listed_as_the_peer_lists_it() -> None:
    for name in PIPELINES:
        theirs = {key for key in parameters(getattr(diffusers, name).__init__) if key not in ("self", *SETTINGS)}
        assert set(getattr(fourstroke, name).component_names) == theirs


SETTINGS = ("requires_safety_checker", "force_zeros_for_empty_prompt", "requires_aesthetics_score", "add_watermarker")
