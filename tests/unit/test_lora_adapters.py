"""`AdapterSet`: exact undo in every dtype and form of model, its notes of what acts, and its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fourstroke.lora import AdapterSet, Lora, LoraError, merge_weight
from fourstroke.models.unet import UNet2DConditionModel

from .lora_toys import TINY_UNET, Toy, lora, pair, same, snapshot, toy, unet

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_is_bit_equal(dtype: torch.dtype) -> None:
    model = toy(dtype)
    start, places = snapshot(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    adapters = AdapterSet({"unet": model})
    states = {}
    for name, seed in (("a", 1), ("b", 2)):
        adapters.add(name, lora(model, name, seed))
        adapters.apply()
        states[name] = snapshot(model)
        assert not same(model, start)
    for name in ("a", "b", "a"):
        adapters.set(name)
        adapters.apply()
        assert same(model, states[name])
    adapters.set(["a", "b"], [1.0, -0.5])
    adapters.apply()
    adapters.set([])
    adapters.apply()
    assert same(model, start)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places, "the storage is the same"


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_the_merged_ones(dtype: torch.dtype) -> None:
    model = toy(dtype)
    start = snapshot(model)
    a, b = lora(model, "a", 1), lora(model, "b", 2)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", a)
    adapters.add("b", b)
    adapters.set(["a", "b"], [0.5, 2.0])
    adapters.scale = 0.1
    adapters.apply()
    for name, parameter in model.named_parameters():
        terms = [(a.components["unet"][name], 0.5 * 0.1), (b.components["unet"][name], 2.0 * 0.1)]
        assert torch.equal(parameter, merge_weight(start[name], terms))
        assert not torch.equal(parameter, start[name])


def test_weight_zero_is_the_base() -> None:
    model = toy(torch.float16)
    start = snapshot(model)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.set("a", 0)
    assert adapters.apply() == 0
    adapters.set("a", 1)
    adapters.apply()
    adapters.scale = 0.0
    adapters.apply()
    assert same(model, start)


def test_a_scale_that_is_no_number() -> None:
    adapters, _, _ = three()
    adapters.scale = float("nan")
    with pytest.raises(LoraError, match="must be a finite number, got nan"):
        adapters.apply()


def test_only_what_changed_is_rewritten() -> None:
    model = toy()
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model, skip="conv"))
    count = len(adapters["a"].components["unet"])
    assert adapters.apply() == count
    assert adapters.apply() == 0
    adapters.set("a", 1.0)
    assert adapters.apply() == 0
    adapters.add("b", Lora("b", {"unet": {"conv.weight": pair(model.conv.weight.shape)}}))
    adapters.set(["a", "b"])
    assert adapters.apply() == 1
    adapters.set(["a", "b"], [0.5, 1.0])
    assert adapters.apply() == count
    adapters.delete("a")
    assert adapters.apply() == count


HALF, FULL = torch.float16, torch.float32


@pytest.mark.parametrize(("stored", "loaded"), [(HALF, HALF), (HALF, FULL), (FULL, FULL), (FULL, torch.bfloat16)])
def test_the_file_serves_as_the_base(stored: torch.dtype, loaded: torch.dtype, tmp_path: Path) -> None:
    """A model from a file keeps no second copy of its weights: the file's own are read again."""
    unet().to(stored).save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=loaded).requires_grad_(False)
    start = snapshot(model)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.apply()
    slots = adapters._bases["unet"].slots
    assert len(slots) == len(start) and all(slot.copy is None for slot in slots.values())
    assert not same(model, start)
    adapters.clear()
    adapters.apply()
    assert same(model, start)
    assert same(UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=loaded), start), "the file is as it was"


def test_a_weight_that_is_not_the_file_s_is_copied(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path).requires_grad_(False)
    model.conv_in.weight.data += 1
    start = snapshot(model)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.apply()
    copied = [name for name, slot in adapters._bases["unet"].slots.items() if slot.copy is not None]
    assert copied == ["conv_in.weight"]
    adapters.clear()
    adapters.apply()
    assert same(model, start)
    assert list(adapters._bases["unet"].slots) and not any(
        s.copy is not None for s in adapters._bases["unet"].slots.values()
    )


def test_a_file_that_is_gone_is_copied_from_memory(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path).requires_grad_(False)
    start = snapshot(model)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.apply()
    assert not same(model, start)
    adapters.clear()
    adapters.apply()
    assert same(model, start)


def test_saving_over_the_file_does_not_touch_the_base(tmp_path: Path) -> None:
    """A picture of the merged weights may replace the very file that serves as the base."""
    unet().save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path).requires_grad_(False)
    start = snapshot(model)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.apply()
    model.save_pretrained(tmp_path)
    assert not same(UNet2DConditionModel.from_pretrained(tmp_path), start)
    adapters.clear()
    adapters.apply()
    assert same(model, start)


def test_a_source_that_shares_memory_is_not_trusted() -> None:
    model = toy()
    start = snapshot(model)

    class Alias:
        def read(self, name: str) -> torch.Tensor:
            return model.state_dict()[name]

    model.source = Alias()  # type: ignore[assignment]
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.apply()
    adapters.clear()
    adapters.apply()
    assert same(model, start)


def test_compiled_models() -> None:
    """Both ways of compiling, the whole model and a submodule; the compiled code sees the new weights."""
    model = toy()
    start = snapshot(model)
    layer, norm = model.inner
    plain = lora(model)
    model.inner = torch.compile(model.inner, backend="eager")
    models: dict[str, Any] = {"unet": torch.compile(model, backend="eager")}
    x = torch.randn(2, 6)
    before = models["unet"](x)
    adapters = AdapterSet(models)
    adapters.add("a", plain)
    assert adapters.apply() == len(start)
    with torch.compiler.set_stance("fail_on_recompile"):
        merged = models["unet"](x)
        torch.testing.assert_close(merged, norm(layer(x)))
        assert not torch.allclose(merged, before, atol=0.1)
        adapters.clear()
        adapters.apply()
        assert torch.equal(models["unet"](x), before)
    assert all(torch.equal(t, start[name.replace("_orig_mod.", "")]) for name, t in model.state_dict().items())


def test_a_replaced_model_starts_from_its_own_weights() -> None:
    models: dict[str, nn.Module | None] = {"unet": toy(seed=1)}
    adapters = AdapterSet(models)
    adapters.add("a", lora(toy()))
    adapters.apply()
    models["unet"] = other = toy(seed=2)
    start = snapshot(other)
    assert adapters.apply() == len(start)
    adapters.clear()
    adapters.apply()
    assert same(other, start)
    models["unet"] = nn.Linear(2, 2)
    adapters.add("b", Lora("b", {"unet": {"weight": pair(torch.Size((2, 2)))}}))
    models["unet"] = toy()
    with pytest.raises(LoraError, match=r"unet\.weight holds no floating-point weight"):
        adapters.apply()


def test_a_changed_dtype_is_followed() -> None:
    """As if the model had been converted without adapters: the base is rounded as it was, then as the model was."""
    reference = toy().half()
    model = toy()
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.apply()
    model.half()
    assert adapters.apply() > 0
    name = "conv.weight"
    assert torch.equal(
        model.conv.weight, merge_weight(reference.conv.weight, [(adapters["a"].components["unet"][name], 1.0)])
    )
    adapters.clear()
    adapters.apply()
    assert same(model, snapshot(reference))


def test_a_base_that_was_rounded_stays_rounded(tmp_path: Path) -> None:
    """Loaded in half precision from a float32 file and widened later: without adapters it would hold rounded values."""
    unet().save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16).requires_grad_(False)
    expected = snapshot(UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float16).float())
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.apply()
    model.float()
    adapters.apply()
    adapters.clear()
    adapters.apply()
    assert same(model, expected)


def test_an_overwritten_weight_is_a_new_base() -> None:
    model, other = toy(seed=1), toy(seed=2)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", Lora("a", {"unet": {"conv.weight": pair(model.conv.weight.shape)}}))
    adapters.apply()
    model.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match=r"unet\.conv\.weight was overwritten while adapters acted on it"):
        adapters.apply()
    adapters.clear()
    adapters.apply()
    assert same(model, snapshot(other))
    model.conv.weight = nn.Parameter(torch.ones_like(model.conv.weight), requires_grad=False)
    adapters.add("a", Lora("a", {"unet": {"conv.weight": pair(model.conv.weight.shape)}}))
    adapters.apply()
    adapters.clear()
    adapters.apply()
    assert bool((model.conv.weight == 1).all()), "changing a weight on which nothing acts needs no warning"


def test_a_shared_parameter_gets_the_terms_of_all_its_names() -> None:
    model = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)}).requires_grad_(False)
    model["two"].weight = model["one"].weight
    start = snapshot(model)
    first, second = pair(torch.Size((3, 3)), seed=1), pair(torch.Size((3, 3)), seed=2)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", Lora("a", {"unet": {"one.weight": first, "two.weight": second}}))
    assert adapters.apply() == 1
    assert torch.equal(model["two"].weight, merge_weight(start["one.weight"], [(first, 1.0), (second, 1.0)]))
    adapters.clear()
    adapters.apply()
    assert same(model, start)


def test_memory_format_is_kept() -> None:
    model = toy().to(memory_format=torch.channels_last)
    start = snapshot(model)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.apply()
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    adapters.clear()
    adapters.apply()
    assert same(model, start)


def test_move_changes_nothing_but_the_place() -> None:
    model = toy()
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.fuse()
    adapters.apply()
    merged = snapshot(model)
    adapters.move("a", "meta")
    assert adapters["a"].components["unet"]["conv.weight"].tensors()["lora_up.weight"].is_meta
    adapters = AdapterSet({"unet": toy()})
    adapters.add("a", lora(model))
    adapters.move(["a"], "cpu")
    adapters.apply()
    assert same(adapters.models["unet"], merged)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_models_on_a_gpu_with_adapters_on_the_cpu(dtype: torch.dtype) -> None:
    model = toy(dtype).cuda()
    start = snapshot(model)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(toy(dtype)))
    adapters.apply()
    assert not same(model, start)
    merged = snapshot(model)
    adapters.disable()
    adapters.apply()
    assert same(model, start)
    adapters.enable()
    adapters.apply()
    assert same(model, merged)


class Quantised(nn.Module):
    """What quantising leaves: integers in the place of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(6, 4, 3, 3, dtype=torch.int8))


@pytest.mark.parametrize("kind", ["buffer", "int8", "meta"])
def test_weights_that_cannot_be_merged(kind: str) -> None:
    model = toy()
    start = snapshot(model.inner)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    if kind == "buffer":
        model.conv = Quantised()  # type: ignore[assignment]
    elif kind == "int8":
        model.conv.weight = nn.Parameter(model.conv.weight.to(torch.int8), requires_grad=False)
    else:
        model.conv.to("meta")
    with pytest.raises(LoraError, match=r"unet\.conv\.(weight|bias) (holds no floating-point weight|is not in memory)"):
        adapters.apply()
    assert same(model.inner, start), "nothing is changed when one weight refuses"


# What it notes


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
