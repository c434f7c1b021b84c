"""Every LoRA dialect does to our models what diffusers and peft make of the same file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fourstroke.lora import AdapterSet, Dora, Lora, LoraPair, read_lora, save_lora
from fourstroke.lora.keys import target_names

from .lora_files import (
    ATTENTION,
    PUBLISHED,
    TEXT,
    Pairs,
    World,
    differs,
    diffusers_names,
    kohya,
    original_names,
    peft,
    processors,
    write,
)
from .oracles import assert_close


def alpha(path: str) -> float:
    """An alpha a module, where diffusers finds it again; in attention and text encoders it applies one to all."""
    return 2.0 if "attn" in path or "encoder" in path else 1.0 + len(path) % 5


# peft's remarks on what it is asked to do; diffusers asks for it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already unmerged"),
    pytest.mark.filterwarnings("ignore:Adapter style was active"),
]
Writer = Callable[[World, Mapping[str, Pairs]], dict[str, Tensor]]

WRITERS: dict[str, Writer] = {
    "kohya": lambda world, parts: kohya(parts, xl=world.xl),
    "kohya without alpha": lambda world, parts: kohya(parts, None, xl=world.xl),
    "kohya, an alpha a module": lambda world, parts: kohya(parts, alpha, xl=world.xl),
    "peft": lambda world, parts: peft(parts),
    "diffusers": lambda world, parts: diffusers_names(parts),
}


def check(world: World, adapters: AdapterSet, base: Mapping[str, Tensor], components: Any, **call: Any) -> None:
    """Apply, and compare all models with the oracle; those adapted must have moved."""
    adapters.apply()
    ours, theirs = world.result(), world.oracle(**call)
    for component, output in theirs.items():
        assert_close(ours[component], output)
    differs(ours, base, components)


def parts_of(world: World, unet: str = PUBLISHED, text: str = TEXT, **options: Any) -> dict[str, Pairs]:
    return {part: world.pairs(part, unet if part == "unet" else text, **options) for part in world.ours}


# diffusers maps original names for SDXL only; test_original_names checks the map for every kind.
DIALECTS = [(kind, dialect) for kind in ("sd15", "xl") for dialect in [*WRITERS, "processors"]]
DIALECTS += [("xl", "original names"), ("ssd1b", "original names"), ("ssd1b", "kohya")]


@pytest.mark.parametrize(("kind", "dialect"), DIALECTS)
def test_dialect(kind: str, dialect: str, tmp_path: Path) -> None:
    world = World(kind)
    base = world.oracle()
    if dialect == "original names":
        parts = parts_of(world)
        tensors = kohya(parts, rename=original_names(world.pipe.unet), xl=True)
        assert any("input_blocks" in key for key in tensors)
    elif dialect == "processors":
        parts = parts_of(world, ATTENTION, r"(q_proj|k_proj|v_proj|out_proj)$")
        tensors = processors(parts)
    else:
        parts = parts_of(world)
        tensors = WRITERS[dialect](world, parts)
    path = write(tmp_path / "lora.safetensors", tensors)
    world.load(path, "a")
    adapters = AdapterSet(world.ours)
    lora = read_lora(path, world.ours)
    adapters.add("a", lora)
    check(world, adapters, base, world.ours)
    assert sum(len(part) for part in lora.components.values()) == sum(len(pairs) for pairs in parts.values())


@pytest.mark.parametrize("kind", ["sd15", "sd21", "xl", "ssd1b"])
def test_original_names(kind: str) -> None:
    """The map of original names is diffusers' checkpoint converter's, for every module it knows."""
    world = World(kind)
    names = original_names(world.pipe.unet)
    weights = {path for path, parameter in world.pipe.unet.named_parameters() if path.endswith(".weight")}
    assert len(names) >= len(weights)
    targets = target_names(world.ours["unet"])
    assert {original: targets[original] for original in names.values()} == {v: k for k, v in names.items()}


def test_outer_layers_of_an_original_file(tmp_path: Path) -> None:
    """Also the layers around the blocks, which kohya's SDXL trainer can adapt."""
    world = World("xl")
    base = world.oracle()
    outer = r"^(conv_in|conv_out|time_embedding\.linear_\d|add_embedding\.linear_\d)$"
    parts = {"unet": world.pairs("unet", outer)}
    path = write(tmp_path / "lora.safetensors", kohya(parts, rename=original_names(world.pipe.unet)))
    world.load(path, "a")
    adapters = AdapterSet(world.ours)
    adapters.add("a", read_lora(path, world.ours))
    check(world, adapters, base, ["unet"])


def test_text_projection_of_the_second_encoder(tmp_path: Path) -> None:
    world = World("xl")
    base = world.oracle()
    parts = {part: world.pairs(part, rf"{ATTENTION}|text_projection$") for part in ("unet", "text_encoder_2")}
    path = write(tmp_path / "lora.safetensors", kohya(parts, xl=True))
    assert "lora_te2_text_projection.lora_down.weight" in kohya(parts, xl=True)
    lora = read_lora(path, world.ours)
    adapters = AdapterSet(world.ours)
    adapters.add("a", lora)
    adapters.apply()
    down, up = parts["text_encoder_2"]["text_projection"]
    weight = world.states["text_encoder_2"]["text_projection.weight"].double() + 0.5 * up.double() @ down.double()
    torch.testing.assert_close(world.ours["text_encoder_2"].get_parameter("text_projection.weight"), weight.float())
    differs(world.result(), base, ["unet", "text_encoder_2"])


def test_ranks_and_alphas_of_a_peft_file(tmp_path: Path) -> None:
    """Different ranks a module, and alphas that stand in the header, as diffusers' own trainer writes them."""
    world = World("sd15")
    base = world.oracle()
    parts = {"unet": world.pairs("unet", PUBLISHED, rank=lambda path: 2 + len(path) % 3)}
    modules = sorted(parts["unet"])
    special = {path: 5.0 for path in modules if path.endswith("to_q")}
    settings = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": modules,
        "rank_pattern": {path: down.shape[0] for path, (down, _) in parts["unet"].items()},
        "alpha_pattern": special,
    }
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers={key.removeprefix("unet."): t for key, t in peft(parts).items()},
        unet_lora_adapter_metadata=settings,
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    world.load(path, "a")
    lora = read_lora(path, world.ours)
    adapters = AdapterSet(world.ours)
    adapters.add("a", lora)
    check(world, adapters, base, ["unet"])
    assert len(lora.ranks) == 3
    alphas = {name: pair.alpha for name, pair in lora.components["unet"].items() if isinstance(pair, LoraPair)}
    assert {alphas[f"{path}.weight"] for path in special} == {5.0}


def test_peft_names_with_an_adapter_and_a_wrapper(tmp_path: Path) -> None:
    """peft's own files: ``base_model.model.`` in front, the adapter's name inside, no component, settings beside."""
    world = World("sd15")
    pairs = world.pairs("unet", ATTENTION)
    plain = read_lora(peft({"unet": pairs}), world.ours)
    wrapped = {f"base_model.model.{k.removeprefix('unet.')}": t for k, t in peft({"unet": pairs}, ".default").items()}
    path = write(tmp_path / "adapter_model.safetensors", wrapped)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True}))
    lora = read_lora(path, world.ours)
    assert lora.components["unet"].keys() == plain.components["unet"].keys()
    assert all(isinstance(pair, LoraPair) and pair.scale == 8 / 4**0.5 for pair in lora.components["unet"].values())


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_dora_of_a_peft_file(weight: float, tmp_path: Path) -> None:
    """DoRA as peft trains it, linear and convolution, at other weights than 1 too."""
    world = World("sd15")
    base = world.oracle()
    parts = {"unet": world.pairs("unet", r"(to_q|to_out\.0|conv1|conv_shortcut|proj_in)$")}
    tensors = peft(parts)
    for path in parts["unet"]:
        shape = world.pipe.unet.get_submodule(path).weight.shape
        size = (shape[0],) if len(shape) == 2 else (1, shape[0], 1, 1)
        tensors[f"unet.{path}.lora_magnitude_vector"] = torch.rand(size) + 0.5
    path = write(tmp_path / "lora.safetensors", tensors)
    world.load(path, "a")
    world.pipe.set_adapters("a", [weight])
    lora = read_lora(path, world.ours)
    assert all(isinstance(value, Dora) for value in lora.components["unet"].values())
    adapters = AdapterSet(world.ours)
    adapters.add("a", lora)
    adapters.set("a", weight)
    check(world, adapters, base, ["unet"])


def two_loras(world: World, tmp_path: Path) -> AdapterSet:
    """An LCM-LoRA-like and a style-like adapter, loaded in both libraries, the second after the first."""
    first = write(tmp_path / "lcm.safetensors", kohya({"unet": world.pairs("unet", PUBLISHED)}, xl=world.xl))
    style = parts_of(world, ATTENTION, rank=2, seed=1)
    second = write(tmp_path / "style.safetensors", kohya(style, 1.0, xl=world.xl))
    adapters = AdapterSet(world.ours)
    for name, path in (("lcm", first), ("style", second)):
        world.load(path, name)
        adapters.add(name, read_lora(path, world.ours))
    return adapters


def test_the_newest_lora_acts_alone(tmp_path: Path) -> None:
    world = World("sd15")
    base = world.oracle()
    adapters = two_loras(world, tmp_path)
    check(world, adapters, base, world.ours)
    assert list(adapters.active) == world.pipe.get_active_adapters() == ["style"]
    assert adapters.list() == world.pipe.get_list_adapters()


BY_COMPONENT = [{"text_encoder": 0.3, "unet": 0.6}, 1.0]


@pytest.mark.parametrize("weights", [[1.0, 0.8], [0.0, 1.5], 0.5, None, BY_COMPONENT], ids=str)
def test_mix(weights: Any, tmp_path: Path) -> None:
    world = World("xl")
    base = world.oracle()
    adapters = two_loras(world, tmp_path)
    world.pipe.set_adapters(["lcm", "style"], weights)
    if isinstance(weights, list) and isinstance(weights[0], dict):
        with pytest.warns(UserWarning, match="adapter lcm has nothing in text_encoder"):
            adapters.set(["lcm", "style"], weights)
    else:
        adapters.set(["lcm", "style"], weights)
    check(world, adapters, base, world.ours)


@pytest.mark.parametrize(
    "blocks",
    [
        {"down": 0.3, "mid": 0.5, "up": 1.4},
        {"down": 0.3},
        {"mid": [0.2]},
        {"up": {"block_0": [0.1, 0.9]}},
        {"down": {"block_1": 0.4}, "up": {"block_0": [0.6]}},
    ],
    ids=str,
)
def test_weights_a_block(blocks: dict[str, Any], tmp_path: Path) -> None:
    """Attention, residual blocks and samplers follow diffusers' rule, also where a part is left out."""
    world = World("xl")
    base = world.oracle()
    adapters = two_loras(world, tmp_path)
    weights = {"unet": blocks, "text_encoder": 0.5}
    world.pipe.set_adapters("style", [weights])
    adapters.set("style", weights)
    check(world, adapters, base, world.ours)
    short = {"text_encoder": 0.5, **blocks}
    adapters.set("style", short)
    assert adapters.apply() == 0, "the short form means the same"


def test_weights_a_block_of_layers_without_attention(tmp_path: Path) -> None:
    world = World("xl")
    base = world.oracle()
    pairs = world.pairs("unet", r"blocks.*(conv1|conv2|conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv)$")
    path = write(tmp_path / "lora.safetensors", kohya({"unet": pairs}))
    world.load(path, "a")
    adapters = AdapterSet(world.ours)
    adapters.add("a", read_lora(path, world.ours))
    weights = {"unet": {"down": 0.2, "mid": 0.5, "up": {"block_0": [0.3, 1.7]}}}
    world.pipe.set_adapters("a", [weights])
    adapters.set("a", weights)
    check(world, adapters, base, ["unet"])


def test_scale_of_a_call(tmp_path: Path) -> None:
    world = World("sd15")
    base = world.oracle()
    adapters = two_loras(world, tmp_path)
    world.pipe.set_adapters(["lcm", "style"], [1.0, 0.8])
    adapters.set(["lcm", "style"], [1.0, 0.8])
    adapters.scale = 0.4
    adapters.apply()
    assert_close(world.result()["unet"], world.oracle(0.4)["unet"])
    adapters.scale = 1.0
    check(world, adapters, base, ["unet"])


def test_fuse_unload_and_load_again(tmp_path: Path) -> None:
    world = World("sd15")
    base = world.oracle()
    adapters = two_loras(world, tmp_path)
    world.pipe.set_adapters(["lcm", "style"], [1.0, 0.8])
    adapters.set(["lcm", "style"], [1.0, 0.8])
    world.pipe.fuse_lora(lora_scale=0.5)
    adapters.fuse(scale=0.5)
    check(world, adapters, base, world.ours)
    world.pipe.unload_lora_weights()
    adapters.clear()
    assert adapters.apply() == 0
    check(world, adapters, base, world.ours)
    world.load(tmp_path / "style.safetensors", "again")
    adapters.add("again", read_lora(tmp_path / "style.safetensors", world.ours))
    check(world, adapters, base, world.ours)
    world.pipe.unload_lora_weights()
    adapters.clear()
    adapters.unfuse()
    adapters.apply()
    for component, model in world.ours.items():
        state = {type(model).published_name(k): v for k, v in world.states[component].items()}  # type: ignore[attr-defined]
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_fuse_one_component_and_unfuse(tmp_path: Path) -> None:
    """With another ``lora_scale`` than 1 diffusers leaves the scale behind when it unfuses; ours is undone with it."""
    world = World("sd15")
    base = world.oracle()
    adapters = two_loras(world, tmp_path)
    world.pipe.set_adapters(["lcm", "style"], [0.5, 0.8])
    adapters.set(["lcm", "style"], [0.5, 0.8])
    world.pipe.fuse_lora(components=["unet"])
    adapters.fuse(components=["unet"])
    check(world, adapters, base, world.ours)
    world.pipe.unfuse_lora(components=["unet"])
    adapters.unfuse(["unet"])
    check(world, adapters, base, world.ours)


def test_delete_and_disable(tmp_path: Path) -> None:
    world = World("sd15")
    base = world.oracle()
    adapters = two_loras(world, tmp_path)
    world.pipe.set_adapters(["lcm", "style"], [0.5, 0.8])
    adapters.set(["lcm", "style"], [0.5, 0.8])
    world.pipe.disable_lora()
    adapters.disable()
    check(world, adapters, base, [])
    world.pipe.enable_lora()
    adapters.enable()
    check(world, adapters, base, world.ours)
    world.pipe.delete_adapters("style")
    adapters.delete("style")
    check(world, adapters, base, ["unet"])
    assert adapters.list() == world.pipe.get_list_adapters() == {"unet": ["lcm"]}


def test_deleting_what_acts_falls_back_to_the_oldest(tmp_path: Path) -> None:
    world = World("sd15")
    base = world.oracle()
    adapters = two_loras(world, tmp_path)
    world.pipe.delete_adapters("style")
    adapters.delete("style")
    check(world, adapters, base, ["unet"])
    assert adapters.active == ("lcm",)


@pytest.mark.parametrize("layout", ["kohya", "peft", "diffusers"])
@pytest.mark.parametrize("kind", ["sd15", "xl"])
def test_diffusers_reads_what_we_write(kind: str, layout: Any, tmp_path: Path) -> None:
    world = World(kind)
    base = world.oracle()
    parts = parts_of(world, rank=lambda path: 2 + len(path) % 2)
    lora = read_lora(kohya(parts, alpha, xl=world.xl), world.ours)
    path = tmp_path / "lora.safetensors"
    save_lora(path, lora, layout)
    world.load(path, "a")
    for reread in (lora, read_lora(path, world.ours)):
        adapters = AdapterSet(world.ours)
        adapters.add("a", reread)
        check(world, adapters, base, world.ours)
        adapters.clear()
        adapters.apply()


def test_diffusers_reads_the_dora_that_we_write(tmp_path: Path) -> None:
    world = World("sd15")
    base = world.oracle()
    pairs = world.pairs("unet", r"(to_q|conv1)$")
    weights = {
        f"{path}.weight": Dora(LoraPair(down, up, 2.0), torch.rand(up.shape[0], *[1] * (down.ndim - 1)) + 0.5)
        for path, (down, up) in pairs.items()
    }
    save_lora(tmp_path / "lora.safetensors", Lora("dora", {"unet": weights}), "peft")
    world.load(tmp_path / "lora.safetensors", "a")
    adapters = AdapterSet(world.ours)
    adapters.add("a", read_lora(tmp_path / "lora.safetensors", world.ours))
    check(world, adapters, base, ["unet"])
