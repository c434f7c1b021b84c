"""A LoRA on a model of another family: one line that names both, for the families' real shapes."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fourstroke
from fourstroke.lora import LoraError, read_lora
from fourstroke.lora.keys import guess_family, ldm_names, model_modules
from fourstroke.models.unet import UNet2DConditionModel

CONFIGS = Path(fourstroke.__file__).parent / "configs"
FOLDERS = {"SD 1.5": "sd15", "SD 2.x": "sd2-768", "SDXL": "sdxl", "SSD-1B": "ssd-1b"}
PAIRS = [(theirs, ours) for theirs in FOLDERS for ours in FOLDERS]
# What style LoRAs adapt at least; LCM-LoRAs adapt more.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@functools.cache
def unet(family: str) -> UNet2DConditionModel:
    """The family's UNet in its published shape, without memory behind it."""
    config = json.loads((CONFIGS / FOLDERS[family] / "unet" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def lora_of(family: str, *, original: bool = False, within: str = "") -> dict[str, Tensor]:
    """A LoRA of rank 1 for the family's attention layers, in our names or in the original ones."""
    model = unet(family)
    names = dict(ldm_names([name for name, _ in model.named_modules()])) if original else {}
    tensors = {}
    for path, layer in model.named_modules():
        if path.endswith(ATTENTION) and within in path:
            key = "lora_unet_" + names.get(path, path).replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.ones(1, layer.in_features)
            tensors[f"{key}.lora_up.weight"] = torch.ones(layer.out_features, 1)
    return tensors


def outcome(tensors: dict[str, Tensor], family: str) -> str:
    """The error's or warning's text; empty when there is none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read_lora(tensors, {"unet": unet(family)}, name="cat")
        except LoraError as error:
            return f"error: {error}"
    return " ".join(f"warning: {warning.message}" for warning in caught)


@pytest.mark.parametrize("family", FOLDERS)
def test_the_family_of_a_model(family: str) -> None:
    assert guess_family(model_modules({"unet": unet(family)})) == family


@pytest.mark.parametrize("original", [False, True], ids=["ours", "original"])
@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_one_line_names_both_families(theirs: str, ours: str, original: bool) -> None:
    found = outcome(lora_of(theirs, original=original), ours)
    if theirs == ours:
        assert found == ""
        return
    # All of SSD-1B is in SDXL too: such a LoRA fits, and does something that nobody wants.
    kind = "warning" if (theirs, ours) == ("SSD-1B", "SDXL") else "error"
    start = f"{kind}: LoRA cat: it was made for {theirs}, the model is {ours}; use a LoRA of the model's family"
    assert found.startswith(start)
    assert "\n" not in found and len(found) < 600


def test_layers_that_ssd_1b_lacks_are_named() -> None:
    found = outcome(lora_of("SDXL"), "SSD-1B")
    has = {name for name, _ in unet("SSD-1B").named_modules()}
    lacking = [name for name, _ in unet("SDXL").named_modules() if name.endswith(ATTENTION) and name not in has]
    assert any(".mid_block." in f".{name}" for name in lacking)
    first = "lora_unet_" + lacking[0].replace(".", "_")
    assert f"keys that name no module of unet ({2 * len(lacking)}): such as {first}.lora_down.weight" in found


def test_a_lora_that_may_be_of_either_is_taken_by_both() -> None:
    """SDXL and SSD-1B share these blocks, so that the file does not tell whose it is."""
    tensors = lora_of("SSD-1B", within="up_blocks.1")
    for family in ("SDXL", "SSD-1B"):
        assert outcome(tensors, family) == ""
    assert "it was made for SDXL or SSD-1B, the model is SD 1.5" in outcome(tensors, "SD 1.5")


def test_the_refiner_s_loras_are_not_sdxl_s() -> None:
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{key}.lora_down.weight": torch.ones(1, 1280), f"{key}.lora_up.weight": torch.ones(640, 1)}
    assert "it was made for SDXL refiner, the model is SDXL;" in outcome(tensors, "SDXL")


def test_layers_without_text_do_not_tell_the_family() -> None:
    """The widths of self-attention are the same in SD 1.5 and 2.x: nothing is said, and they fit."""
    for family in ("SD 1.5", "SD 2.x"):
        assert outcome(lora_of("SD 1.5", within="attn1"), family) == ""
