"""`AdapterSet` keeps account of what is loaded, acts and is fused, at which weight, and refuses what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fourstroke.lora import AdapterSet, Lora, LoraError
from fourstroke.models.unet import UNet2DConditionModel

from .lora_toys import TINY_UNET, Toy, lora, pair, toy, unet


def three() -> tuple[AdapterSet, Toy, Toy]:
    unet, text = toy(seed=1), toy(seed=2)
    adapters = AdapterSet({"unet": unet, "text_encoder": text, "text_encoder_2": None})
    adapters.add("a", lora(unet, "a", 1))
    adapters.add("b", Lora("b", {**lora(unet, "b", 2).components, **lora(text, "b", 3, "text_encoder").components}))
    adapters.add("c", lora(text, "c", 4, "text_encoder"))
    return adapters, unet, text


def test_names_and_places() -> None:
    adapters, _, _ = three()
    assert adapters.names == ("a", "b", "c")
    assert adapters.list() == {"unet": ["a", "b"], "text_encoder": ["b", "c"]}
    assert adapters.active == ("b", "c"), "a new adapter replaces those that acted where it acts, and no others"
    adapters.set(["c", "a"], [0.5, 2])
    assert adapters.active == ("c", "a")
    assert adapters.fused == ()
    adapters.fuse("b", components="text_encoder")
    assert adapters.fused == ("b",)
    adapters.clear()
    assert (adapters.names, adapters.active, adapters.list(), adapters.fused) == ((), (), {}, ("b",))


def factors(adapters: AdapterSet, component: str) -> list[float]:
    return [factor for _, factor in adapters.terms(component).get("conv.weight", ())]


def test_a_fused_adapter_acts_once_and_keeps_its_weight() -> None:
    adapters, _, _ = three()
    adapters.set(["a", "b"], [0.5, 0.25])
    adapters.fuse("a", scale=2.0)
    adapters.fuse("a", scale=7.0)
    assert factors(adapters, "unet") == [1.0, 0.25]
    adapters.set(["a"], 9.0)
    adapters.scale = 0.1
    assert factors(adapters, "unet") == [1.0], "neither a new weight nor the call's scale reaches what is fused"
    adapters.unfuse()
    assert factors(adapters, "unet") == [pytest.approx(0.9)]


def test_disabling_hides_what_is_loaded_and_spares_what_is_baked() -> None:
    adapters, _, _ = three()
    adapters.set(["a", "b"])
    adapters.fuse(["a"], scale=3.0)
    adapters.disable()
    assert factors(adapters, "unet") == []
    adapters.enable()
    assert factors(adapters, "unet") == [3.0, 1.0]
    adapters.delete("a")
    adapters.disable()
    assert factors(adapters, "unet") == [3.0], "what was fused before it was deleted is part of the weights"
    adapters.clear()
    assert adapters.enabled


def test_weights_survive_a_pause() -> None:
    """As in diffusers: a deleted adapter makes room for the oldest one at the weight that it was last set to."""
    adapters, _, _ = three()
    adapters.set("a", 0.3)
    adapters.set("b", 0.6)
    adapters.delete("b")
    assert factors(adapters, "unet") == [0.3]
    assert factors(adapters, "text_encoder") == [1.0], "in the text encoder that is c"
    assert adapters.active == ("a", "c")


def test_hotswap_keeps_the_weight() -> None:
    adapters, unet, _ = three()
    adapters.set(["a", "b"], [0.5, 0.25])
    new = lora(unet, "new", 9)
    adapters.add("a", new, hotswap=True)
    assert adapters.terms("unet")["conv.weight"][0] == (new.components["unet"]["conv.weight"], 0.5)
    adapters.add("b", new, hotswap=True)
    assert factors(adapters, "text_encoder") == [1.0], "b is gone from the text encoder, c is left"
    assert adapters.names == ("a", "b", "c")
    both = Lora("both", {**new.components, "text_encoder": lora(unet).components["unet"]})
    adapters.add("a", both, hotswap=True)
    assert factors(adapters, "text_encoder") == [1.0, 1.0], "what acts also acts where it is new"


def test_weights_by_component() -> None:
    adapters, _, _ = three()
    adapters.set(["b"], {"unet": 0.5, "text_encoder": None})
    assert (factors(adapters, "unet"), factors(adapters, "text_encoder")) == ([0.5], [1.0])
    with pytest.warns(UserWarning, match="weights for vae are ignored; there are unet, text_encoder"):
        adapters.set("b", {"vae": 2.0})
    with pytest.warns(UserWarning, match="adapter a has nothing in text_encoder"):
        adapters.set("a", {"text_encoder": 2.0})


def test_weights_of_a_model_with_one_deep_mid_block() -> None:
    """A block without attention is left out, and naming it is an error."""
    model = unet()
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.set("a", {"down": {"block_0": 0.25}, "mid": 0.5})
    terms = {name: found[0][1] for name, found in adapters.terms("unet").items()}
    assert terms["down_blocks.0.attentions.0.proj_in.weight"] == 0.25
    assert terms["down_blocks.0.resnets.0.conv1.weight"] == 0.25
    assert terms["mid_block.attentions.0.proj_in.weight"] == 0.5
    assert terms["mid_block.resnets.0.conv1.weight"] == 1.0
    assert terms["up_blocks.1.attentions.0.proj_in.weight"] == 1.0
    assert terms["conv_in.weight"] == terms["time_embedding.linear_1.weight"] == 1.0


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"unet": {"middle": 1}}, "unknown block 'middle'; use 'down', 'mid', 'up'"),
        ({"down": {"block_1": 1}}, "down.block_1 does not exist or has no attention; there are block_0"),
        ({"up": {"block_x": 1}}, "up.block_x does not exist or has no attention; there are block_1"),
        ({"up": [1, 2, 3]}, "up.block_1 has 2 attentions, got 3 weights"),
        ("strong", "an adapter's weight must be a finite number, got 'strong'"),
        (float("nan"), "an adapter's weight must be a finite number, got nan"),
        ({"mid": True}, "an adapter's weight must be a finite number, got True"),
    ],
    ids=str,
)
def test_wrong_weights(weight: Any, message: str) -> None:
    model = unet()
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    with pytest.raises(LoraError, match=message):
        adapters.set("a", weight)
    assert adapters.terms("unet")["conv_in.weight"][0][1] == 1.0, "a refused call changes nothing"


def test_blocks_of_a_model_without_blocks() -> None:
    adapters, _, _ = three()
    with pytest.raises(LoraError, match="Toy has no blocks; give it one number"):
        adapters.set("b", {"text_encoder": {"down": 1.0}})


def test_a_middle_block_without_attention() -> None:
    model = UNet2DConditionModel.from_config({**TINY_UNET, "mid_block_type": "UNetMidBlock2D"})
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.set("a", {"down": 0.5})
    with pytest.raises(LoraError, match="mid has no attention in this model; leave it out"):
        adapters.set("a", {"mid": 0.5})


def of_unet(name: str, shape: tuple[int, int]) -> Lora:
    return Lora("z", {"unet": {name: pair(torch.Size(shape))}})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.add("a", s["a"]), "adapter name 'a' is already in use"),
        (lambda s: s.add("z", s["a"], hotswap=True), "there is no adapter 'z' to hotswap; loaded: a, b, c"),
        (lambda s: s.set("z"), "unknown adapter 'z'; loaded: a, b, c"),
        (lambda s: s.set(["a", "a"]), "named twice"),
        (lambda s: s.set(["a", "b"], [1.0]), "2 adapter names, but 1 weights"),
        (lambda s: s.delete(["a", "z"]), "unknown adapter 'z'"),
        (lambda s: s.fuse("z"), "unknown adapter 'z'"),
        (lambda s: s.fuse(components=["vae"]), "unknown component 'vae'; there are unet, text_encoder"),
        (lambda s: s.fuse(scale=float("inf")), "must be a finite number, got inf"),
        (lambda s: s.unfuse(["vae"]), "unknown component 'vae'"),
        (lambda s: s["z"], "unknown adapter 'z'"),
        (lambda s: s.add("z", Lora("z", {"vae": {}})), "LoRA z changes vae, which is not among unet, text_encoder"),
        (lambda s: s.add("z", of_unet("x.weight", (1, 2))), "LoRA z: unet has no parameter x.weight"),
        (
            lambda s: s.add("z", of_unet("conv.weight", (2, 2))),
            r"does not fit unet: conv\.weight \(makes a change of shape \(2, 2\), the parameter has \(6, 4, 3, 3\)\)",
        ),
    ],
)
def test_wrong_calls_change_nothing(call: Any, message: str) -> None:
    adapters, _, _ = three()
    before = {part: adapters.terms(part) for part in ("unet", "text_encoder")}
    with pytest.raises(LoraError, match=message):
        call(adapters)
    assert adapters.names == ("a", "b", "c") and before == {part: adapters.terms(part) for part in before}


def test_a_scale_that_is_no_number() -> None:
    adapters, _, _ = three()
    adapters.scale = float("nan")
    with pytest.raises(LoraError, match="must be a finite number, got nan"):
        adapters.apply()
