"""`AdapterSet` writes weights: exactly, undone to the bit, in every dtype and form of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fourstroke import parts
from fourstroke.lora import AdapterSet, Lora, LoraError, merge_weight
from fourstroke.models.unet import UNet2DConditionModel

from .lora_toys import lora, pair, same, snapshot, toy, unet

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
    assert len(slots) == len(start)
    assert all(slot.mapped if stored == loaded else slot.copy is None for slot in slots.values())
    assert not same(model, start)
    adapters.clear()
    adapters.apply()
    assert same(model, start)
    assert same(UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=loaded), start), "the file is as it was"


@pytest.mark.parametrize("loaded", [FULL, torch.bfloat16])
def test_a_weight_that_is_not_the_file_s_is_the_base_all_the_same(loaded: torch.dtype, tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=loaded).requires_grad_(False)
    model.conv_in.weight.data += 1
    start = snapshot(model)
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.apply()
    slots = adapters._bases["unet"].slots
    copied = [name for name, slot in slots.items() if slot.copy is not None and not slot.mapped]
    assert copied == ([] if loaded == FULL else ["conv_in.weight"])
    adapters.clear()
    adapters.apply()
    assert same(model, start) and all(slot.copy is None for slot in slots.values())


def test_mapped_weights_are_given_back(tmp_path: Path) -> None:
    """The very memory, so that a picture is the same to the bit, too: kernels round by how memory is aligned."""
    unet().save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path).requires_grad_(False)
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    adapters = AdapterSet({"unet": model})
    adapters.add("a", lora(model))
    adapters.apply()
    assert not places.items() & {name: value.data_ptr() for name, value in model.named_parameters()}.items()
    adapters.clear()
    adapters.apply()
    assert places == {name: value.data_ptr() for name, value in model.named_parameters()}


def test_sums_lie_where_it_is_told(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path).requires_grad_(False)
    adapters = AdapterSet({"unet": model})
    made: list[torch.Tensor] = []
    adapters.settle = lambda weight: made.append(weight.clone()) or made[-1]
    adapters.add("a", lora(model))
    written = adapters.apply()
    places = {value.data_ptr() for value in model.parameters()}
    assert len(made) == written and all(memory.data_ptr() in places for memory in made)


def test_blocks_of_rows_are_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [toy(), toy()]
    a, b = lora(models[0], "a", 1), lora(models[0], "b", 2)
    for model, block in zip(models, (parts.BLOCK, 7), strict=True):
        monkeypatch.setattr(parts, "BLOCK", block)
        adapters = AdapterSet({"unet": model})
        adapters.add("a", a)
        adapters.add("b", b)
        adapters.set(["a", "b"], [0.5, 0.7])
        adapters.apply()
    for value, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(value, other)


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
