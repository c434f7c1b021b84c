"""T2I-Adapters compute what diffusers' do, alone, several at once, and inside the UNet; files go both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fourstroke.config import UnsupportedConfig
from fourstroke.models.t2i_adapter import MultiAdapter, T2IAdapter
from fourstroke.models.unet import Residuals, UNet2DConditionModel

from .oracles import COMMON, SD_BLOCKS, XL_EXTRAS, assert_close, randomise, unet_inputs

ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"channels": (8, 16, 32, 32), "num_res_blocks": 2},
    "full-grey": {"channels": (8, 8, 16), "in_channels": 1, "num_res_blocks": 1, "downscale_factor": 4},
    "xl": {"channels": (8, 16, 32, 32), "adapter_type": "full_adapter_xl", "downscale_factor": 16},
    "xl-deep": {"channels": (8, 8, 16, 16, 16), "adapter_type": "full_adapter_xl", "num_res_blocks": 1},
    "light": {"channels": (8, 16, 32), "adapter_type": "light_adapter", "num_res_blocks": 4},
    "light-grey": {"channels": (10, 16), "adapter_type": "light_adapter", "in_channels": 1},
}


def pair(kind: str, seed: int = 0) -> tuple[T2IAdapter, nn.Module]:
    torch.manual_seed(seed)
    oracle = randomise(diffusers.T2IAdapter(**ADAPTERS[kind]))
    ours = T2IAdapter.from_config(dict(oracle.config)).eval().requires_grad_(False)
    assert set(ours.state_dict()) == set(oracle.state_dict())
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle


def picture(kind: str, size: tuple[int, int] = (96, 80), batch: int = 2) -> Tensor:
    return torch.rand(batch, ADAPTERS[kind].get("in_channels", 3), *size)


def same_features(ours: tuple[Tensor, ...], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other)


@pytest.mark.parametrize("size", [(64, 64), (96, 80), (112, 16)], ids=str)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_features(kind: str, size: tuple[int, int]) -> None:
    ours, oracle = pair(kind)
    x = picture(kind, size)
    same_features(ours(x), oracle(x))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_scales(kind: str) -> None:
    ours, oracle = pair(kind)
    assert ours.downscale_factor == oracle.downscale_factor
    assert ours.total_downscale_factor == oracle.total_downscale_factor


def test_every_published_default_is_the_same() -> None:
    with torch.device("meta"):
        oracle = diffusers.T2IAdapter()
        ours = T2IAdapter.from_config({})
    shapes = [{name: value.shape for name, value in network.state_dict().items()} for network in (ours, oracle)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "shape", [(1, 3, 64, 60), (1, 3, 12, 64), (1, 1, 64, 64), (3, 64, 64), (1, 4, 64, 64)], ids=str
)
def test_bad_pictures_are_named(shape: tuple[int, ...]) -> None:
    ours, _ = pair("full")
    with pytest.raises(ValueError, match=rf"shape \({shape[0]}, {shape[1]}, .*must be \(N, 3, H, W\).*multiples of 8"):
        ours(torch.zeros(shape))


@pytest.mark.parametrize("weights", [None, [0.75, -0.3], [0.0, 1.0]], ids=str)
def test_several_adapters(weights: list[float] | None) -> None:
    ours, theirs = zip(*(pair("full", seed) for seed in (0, 1)), strict=True)
    xs = [picture("full"), picture("full")]
    several, oracle = MultiAdapter(ours), diffusers.MultiAdapter(list(theirs))
    same_features(several(xs, weights), oracle(xs, weights))
    assert several.downscale_factor == oracle.downscale_factor
    assert several.total_downscale_factor == oracle.total_downscale_factor


def test_adapters_that_do_not_go_together_are_named() -> None:
    full, xl = pair("full")[0], pair("xl")[0]
    with pytest.raises(ValueError, match="8 to 64 and 16 to 32 times smaller"):
        MultiAdapter([full, xl])
    with pytest.raises(ValueError, match="the list is empty"):
        MultiAdapter([])
    with pytest.raises(TypeError, match="holds T2IAdapters, not Conv2d"):
        MultiAdapter([full, nn.Conv2d(3, 3, 1)])
    several = MultiAdapter([full, full])
    with pytest.raises(ValueError, match="1 pictures and 2 weights for 2 adapters"):
        several([picture("full")])
    with pytest.raises(ValueError, match="2 pictures and 3 weights for 2 adapters"):
        several([picture("full")] * 2, [1, 1, 1])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_files_go_both_ways(kind: str, tmp_path: Path) -> None:
    ours, oracle = pair(kind)
    x = picture(kind)
    oracle.save_pretrained(tmp_path / "theirs", variant="fp16")
    with pytest.warns(UserWarning, match="ignored unknown arguments 'varient'"):
        read = T2IAdapter.from_pretrained(tmp_path / "theirs", variant="fp16", varient="fp16")
    same_features(read(x), oracle(x))
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        same_features(ours(x), diffusers.T2IAdapter.from_pretrained(tmp_path / "ours")(x))


def test_several_are_saved_side_by_side(tmp_path: Path) -> None:
    adapters, theirs = zip(*(pair("full", seed) for seed in (0, 1, 2)), strict=True)
    xs = [picture("full")] * 3
    expected = diffusers.MultiAdapter(list(theirs))(xs)
    MultiAdapter(adapters).save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "adapter_1", "adapter_2"]
    same_features(MultiAdapter.from_pretrained(tmp_path / "adapter")(xs), expected)
    with torch.no_grad():
        same_features(expected, diffusers.MultiAdapter.from_pretrained(str(tmp_path / "adapter"))(xs))

    diffusers.MultiAdapter(list(theirs)).save_pretrained(str(tmp_path / "theirs" / "adapter"))
    same_features(MultiAdapter.from_pretrained(tmp_path / "theirs" / "adapter")(xs), expected)
    read = MultiAdapter.from_pretrained(tmp_path / "theirs" / "adapter", torch_dtype=torch.float64)
    assert [adapter.dtype for adapter in read.adapters] == [torch.float64] * 3
    with pytest.raises(FileNotFoundError, match="nowhere is no folder with a T2I-Adapter"):
        MultiAdapter.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="adapter_2 would be read as one more T2I-Adapter"):
        MultiAdapter(adapters[:2]).save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adapter_type": "tiny_adapter"}, "adapter_type 'tiny_adapter' is not supported"),
        ({"adapter_type": "full_adapter_xl", "channels": (8, 8, 8, 16)}, "must be equal from the third on"),
        ({"num_heads": 8}, "unknown config field 'num_heads'"),
    ],
)
def test_configs_that_describe_no_adapter(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedConfig, match=message):
        T2IAdapter.from_config(config)


# UNets with as many levels as the published ones, since an adapter has one feature map a level.
UNETS: dict[str, dict[str, Any]] = {
    "full": {
        **COMMON,
        **SD_BLOCKS,
        "block_out_channels": (8, 16, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 4,
    },
    "xl": {
        **COMMON,
        **XL_EXTRAS,
        "block_out_channels": (8, 16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
    },
}
UNETS["light"] = UNETS["full"]


def unet_with_features(kind: str, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What our UNet and the oracle make of ``features`` from pictures of 64 x 96, and the oracle of none."""
    oracle = randomise(diffusers.UNet2DConditionModel(**UNETS[kind]))
    ours = UNet2DConditionModel.from_config(dict(oracle.config)).eval().requires_grad_(False)
    ours.load_state_dict(oracle.state_dict())
    inputs = unet_inputs(UNETS[kind], (8, 12))
    plain = oracle(**inputs).sample
    # The oracle pops the list empty and adds to its tensors in place.
    theirs = oracle(**inputs, down_intrablock_additional_residuals=[value.clone() for value in features]).sample
    return ours(**inputs, residuals=Residuals(intra=tuple(features))), theirs, plain


@pytest.mark.parametrize("kind", ["full", "light"])
def test_features_in_the_unet(kind: str) -> None:
    _, adapter = pair(kind)
    ours, theirs, plain = unet_with_features(kind, adapter(picture(kind, (64, 96))))
    assert_close(ours, theirs)
    assert (theirs - plain).abs().max() > 1e-3


@pytest.mark.parametrize("levels", [3, 4])
def test_features_in_the_unet_of_sdxl(levels: int) -> None:
    """The published adapters have four feature maps for three levels; the last one belongs to the mid block."""
    _, adapter = pair("xl")
    features = adapter(picture("xl", (64, 96)))
    ours, theirs, plain = unet_with_features("xl", features[:levels])
    assert_close(ours, theirs)
    assert (theirs - plain).abs().max() > 1e-3
