"""The classes under diffusers' names take diffusers' arguments, in its order and with its defaults."""

from __future__ import annotations

import inspect

import diffusers
import pytest

import fourstroke
from fourstroke.pipelines import components
from fourstroke.pipelines.pipeline import LORA_TARGETS

PIPELINES = [name for names in components.PIPELINES.values() for name in names]
METHODS = [
    "load_lora_weights",
    "set_adapters",
    "get_active_adapters",
    "get_list_adapters",
    "disable_lora",
    "enable_lora",
    "delete_adapters",
    "fuse_lora",
    "unfuse_lora",
    "unload_lora_weights",
    "set_progress_bar_config",
]


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


@pytest.mark.parametrize("method", METHODS)
def test_the_lora_methods_take_what_the_peers_take(method: str) -> None:
    ours = parameters(getattr(fourstroke.StableDiffusionXLPipeline, method))
    theirs = parameters(getattr(diffusers.StableDiffusionXLPipeline, method))
    shared = {name: default for name, default in ours.items() if name in theirs}
    assert list(theirs) == list(shared)
    # None means every component that a LoRA can change, which the peer spells out class by class.
    if shared.get("components", ...) is None:
        assert set(theirs["components"]) <= set(LORA_TARGETS)  # type: ignore[call-overload]
        theirs["components"] = None
    assert shared == theirs


def test_every_component_is_listed_as_the_peer_lists_it() -> None:
    for name in PIPELINES:
        theirs = {key for key in parameters(getattr(diffusers, name).__init__) if key not in ("self", *SETTINGS)}
        assert set(getattr(fourstroke, name).component_names) == theirs


SETTINGS = ("requires_safety_checker", "force_zeros_for_empty_prompt", "requires_aesthetics_score", "add_watermarker")
