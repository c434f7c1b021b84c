"""What cannot be an IP-Adapter, its scale or its pictures is refused, before any work and with the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fourstroke.loading import WeightError
from fourstroke.models.ip_adapter import (
    IPAdapter,
    attach_ip_adapters_,
    project,
    read_ip_adapter,
    set_ip_adapter_scales_,
)
from fourstroke.pipelines.ip_adapter import image_tokens, load_ip_adapter, set_ip_adapter_scale

from ..parity.image_prompts import (
    CLIP_WIDTHS,
    Nested,
    adapter,
    embeds,
    give_encoder,
    picture,
    repository,
    stand_in,
)
from ..parity.lora_files import World


@pytest.fixture(scope="module")
def nested() -> Nested:
    torch.manual_seed(0)
    return adapter(World("sd15").pipe.unet, "plain")


def without(nested: Nested, part: str, key: str) -> Nested:
    return {**nested, part: {name: tensor for name, tensor in nested[part].items() if name != key}}


def test_wrong_keys_are_named(nested: Nested) -> None:
    with pytest.raises(WeightError, match=r"1 missing: ip_adapter.3.to_v_ip.weight\.$"):
        read_ip_adapter(without(nested, "ip_adapter", "3.to_v_ip.weight"))
    with pytest.raises(WeightError, match=r"1 missing: image_proj.norm.bias\.$"):
        read_ip_adapter(without(nested, "image_proj", "norm.bias"))
    extra = {
        **nested,
        "other": {"x": torch.zeros(1)},
        "ip_adapter": {**nested["ip_adapter"], "1.to_q_ip.weight": torch.zeros(1)},
    }
    with pytest.raises(WeightError, match=r"2 unexpected: ip_adapter.1.to_q_ip.weight, other.x\.$"):
        read_ip_adapter(extra)
    with pytest.raises(WeightError, match=r"unexpected: ip_adapter.2.to_k_ip.weight"):
        read_ip_adapter({**nested, "ip_adapter": {**nested["ip_adapter"], "2.to_k_ip.weight": torch.zeros(1)}})
    plus = adapter(World("sd15").pipe.unet, "plus")
    for key in ("layers.1.0.to_kv.weight", "layers.3.1.0.bias", "proj_in.weight"):
        with pytest.raises(WeightError, match=f"1 missing: image_proj.{key}"):
            read_ip_adapter(without(plus, "image_proj", key))
    gap = {key: tensor for key, tensor in plus["image_proj"].items() if not key.startswith("layers.1.")}
    with pytest.raises(WeightError, match=r"11 missing: image_proj.layers.1.*11 unexpected: image_proj.layers.3"):
        read_ip_adapter({**plus, "image_proj": {**gap}})


@pytest.mark.parametrize("kind", CLIP_WIDTHS)
def test_wrong_shapes_are_named(kind: str) -> None:
    """Any tensor of any kind, one row too long."""
    world = World("sd15")
    unet: Any = world.ours["unet"]
    whole = adapter(world.pipe.unet, kind)
    for part, tensors in whole.items():
        for key, tensor in tensors.items():
            wrong = {**whole, part: {**tensors, key: torch.cat([tensor, tensor[:1]])}}
            with pytest.raises(WeightError, match="of the wrong shape: .* instead of"):
                attach_ip_adapters_(unet, [read_ip_adapter(wrong)])


def test_what_is_no_adapter(nested: Nested, tmp_path: Path) -> None:
    for tensors in (
        {"image_proj": nested["image_proj"]},
        {"ip_adapter": nested["ip_adapter"]},
        {"a.weight": torch.ones(1)},
        {},
    ):
        with pytest.raises(WeightError, match="is no IP-Adapter: its keys must begin with image_proj. and ip_adapter."):
            read_ip_adapter(tensors)
    with pytest.raises(WeightError, match="no known kind .* has a projection of w;"):
        read_ip_adapter({**nested, "image_proj": {"w": torch.ones(1)}})


def test_face_id_is_refused_by_name(nested: Nested) -> None:
    face = {"proj.0.weight": torch.ones(8, 4), "proj.2.weight": torch.ones(8, 8), "norm.weight": torch.ones(4)}
    with pytest.raises(ValueError, match="of the kind FaceID, which needs .* face recogniser"):
        read_ip_adapter({**nested, "image_proj": face})
    plus = {**face, "perceiver_resampler.proj_in.weight": torch.ones(4, 4)}
    with pytest.raises(ValueError, match="of the kind FaceID Plus"):
        read_ip_adapter({**nested, "image_proj": plus})
    lora = {**nested["ip_adapter"], "0.to_k_lora.down.weight": torch.ones(4, 4)}
    with pytest.raises(ValueError, match="of the kind FaceID,"):
        read_ip_adapter({**nested, "ip_adapter": lora})


def test_a_pickle_is_refused_with_its_conversion(
    nested: Nested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message's own code turns the nested pickle into what is read."""
    monkeypatch.chdir(tmp_path)
    torch.save(nested, "ip-adapter_sd15.bin")
    pipe = stand_in(World("sd15"))
    messages = []
    for place in (
        (tmp_path, "", "ip-adapter_sd15.bin"),
        (tmp_path / "ip-adapter_sd15.bin", None, None),
        ("a/b", "", "x.bin"),
    ):
        with pytest.raises(ValueError, match=r"is a pickle.*try weight_name='[\w-]+\.safetensors'") as caught:
            load_ip_adapter(pipe, *place, image_encoder_folder=None)
        messages.append(str(caught.value))
    code = messages[0].split("you trust: ")[1].removesuffix(".")
    exec(code, {"torch": torch, "safetensors": __import__("safetensors.torch"), "path": "ip-adapter_sd15.bin"})
    load_ip_adapter(pipe, tmp_path, "", "ip-adapter_sd15.safetensors", image_encoder_folder=None)
    assert pipe.unet.image_projections is not None


def test_another_family_is_named(nested: Nested) -> None:
    def widened(unet: Any, width: int) -> IPAdapter:
        layers = tuple((torch.zeros(8, width), torch.zeros(8, width)) for _ in range(unet))
        return IPAdapter("fox", "plain", {}, layers)

    unet: Any = World("xl").ours["unet"]
    keys = set(unet.state_dict())
    with pytest.raises(
        WeightError,
        match=r"fox was made for SD 1.5 of text width 768 with 16 .* is a model of text width 24 with 8 cross",
    ):
        attach_ip_adapters_(unet, [widened(16, 768)])
    with pytest.raises(WeightError, match=r"text width 24 with 4 cross-attentions, but .* width 24 with 8 cross-att"):
        attach_ip_adapters_(unet, [read_ip_adapter(nested), read_ip_adapter(nested)])
    assert unet.image_projections is None and set(unet.state_dict()) == keys and not list(unet.buffers())
    with pytest.raises(ValueError, match="no IP-Adapters to attach"):
        attach_ip_adapters_(unet, [])


def test_scales_that_cannot_be() -> None:
    world = World("sd15")
    pipe = stand_in(world)
    with pytest.raises(ValueError, match="no IP-Adapter to scale"):
        set_ip_adapter_scale(pipe, 1.0)
    load_ip_adapter(pipe, adapter(world.pipe.unet, "plain"), "", "", None)
    for scale, message in (
        ([0.5, 0.5], "2 scales for 1 IP-Adapters"),
        ("much", "must be a finite number, got 'much'"),
        (float("nan"), "must be a finite number"),
        ([[0.5, 0.5]], "must be a finite number"),
        ({"side": 1}, "unknown block 'side'"),
        ({"down": {"block_1": 1}}, "down.block_1 does not exist or has no attention; there are block_0"),
        ({"up": {"block_1": [1, 2, 3]}}, "up.block_1 has 2 attentions, got 3 weights"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            set_ip_adapter_scale(pipe, scale)
        assert type(caught.value) is ValueError
    with pytest.raises(ValueError, match="2 scales for 1 IP-Adapters"):
        set_ip_adapter_scales_(pipe.unet, [1.0, 1.0])


class Refuses(nn.Module):
    """An image encoder that must not run."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def forward(self, *_: Any) -> None:
        raise AssertionError("the check comes too late")


def test_pictures_that_cannot_be() -> None:
    world = World("sd15")
    pipe = give_encoder(world)
    pipe.image_encoder = Refuses(pipe.image_encoder.config)
    image, given = picture(), embeds("plain", rows=1)
    with pytest.raises(ValueError, match="none is loaded"):
        image_tokens(pipe, image, None, 1, False)
    load_ip_adapter(pipe, adapter(world.pipe.unet, "plain"), "", "", None)
    for images, tensors, guided, kind, message in (
        (None, None, False, ValueError, "1 IP-Adapters, but no pictures.*unload_ip_adapter"),
        (image, [given], False, ValueError, "both are given"),
        ([image, image], None, False, ValueError, r"2 entries for 1 IP-Adapters.*\[\[a, b\]\]"),
        (None, given, False, TypeError, "a list of tensors, one an IP-Adapter, not a Tensor"),
        (None, [None], False, TypeError, "a list of tensors"),
        (None, [given, given], False, ValueError, "2 tensors for 1"),
        (None, [given[0]], False, ValueError, r"\(1, 12\); it takes \('rows', 'images', 12\)"),
        (None, [embeds("full")], False, ValueError, r"\(2, 1, 17, 32\); it takes"),
        (None, [given], True, ValueError, "1 rows; this call needs 2 or 6 rows, unconditional rows first"),
        (None, [embeds("plain", rows=2)], False, ValueError, "2 rows; this call needs 1 or 3 rows, without uncond"),
    ):
        with pytest.raises(kind, match=message):
            image_tokens(pipe, images, tensors, 3, guided)
    for tensors in ([], [given, given]):
        with pytest.raises(ValueError, match=f"image_embeds holds {len(tensors)} tensors, but the UNet has 1"):
            project(pipe.unet, tensors)
    with pytest.raises(ValueError, match="holds 2 tensors, but the UNet has 1 IP-Adapters"):
        pipe.unet(**world.inputs, image_tokens=[given, given])


def test_an_image_encoder_of_another_size() -> None:
    world = World("sd15")
    pipe = give_encoder(world)
    for kind, name in (("plain", "projection_dim"), ("plus", "hidden_size")):
        load_ip_adapter(pipe, adapter(world.pipe.unet, kind), "", "", None)
        config = pipe.image_encoder.config
        other = pipe.image_encoder.from_config({**vars(config), name: 16})
        pipe.image_encoder, kept = Refuses(other.config), pipe.image_encoder
        with pytest.raises(ValueError, match="image_encoder gives 16. Load the one"):
            image_tokens(pipe, picture(), None, 1, False)
        pipe.image_encoder = kept


def test_arguments_of_loading(tmp_path: Path) -> None:
    world = World("sd15")
    pipe = stand_in(world)
    save = adapter(world.pipe.unet, "plain")
    repository(tmp_path, {"a.safetensors": save, "b.safetensors": save, "c/d.safetensors": save}, ())
    with pytest.raises(ValueError, match="1 repositories, 3 subfolders and 2 weight names for 3 IP-Adapters"):
        load_ip_adapter(pipe, tmp_path, ["", "", ""], ["a.safetensors", "b.safetensors"])
    with pytest.raises(ValueError, match=r"needs weight_name=.*: a\.safetensors, b\.safetensors\.$"):
        load_ip_adapter(pipe, tmp_path, "", None)
    with pytest.raises(FileNotFoundError, match="there is no 'c/x.safetensors'"):
        load_ip_adapter(pipe, tmp_path, "c", "x.safetensors")
    with pytest.warns(UserWarning, match="load_ip_adapter: ignored unknown arguments 'varient'"):
        load_ip_adapter(pipe, tmp_path, "c", None, None, varient="fp16", low_cpu_mem_usage=True)
    pipe.component_names = ("unet",)
    with pytest.raises(ValueError, match="has no image_encoder and runs no IP-Adapters"):
        load_ip_adapter(pipe, tmp_path, "c", None, None)
