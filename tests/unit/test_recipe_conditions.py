"""The recipe's inpainting, ControlNet and T2I-Adapter examples are what they say; the networks start at the base."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fourstroke.models.t2i_adapter import T2IAdapter
from fourstroke.models.unet import UNet2DConditionModel

pytest.importorskip("cv2")
RECIPE = Path(__file__).parents[2] / "recipes" / "emoji"
NAMES = ("conditions", "train_inpainting", "train_controlnet", "train_t2i", "train_unet", "train_xl")


@pytest.fixture(scope="module")
def recipe() -> Iterator[dict[str, ModuleType]]:
    before = set(sys.modules)
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(RECIPE))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == RECIPE:
                del sys.modules[name]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, size: int = 128) -> Tensor:
    """Blots of colour on white."""
    return F.interpolate(noise(count, 3, 8, 8), size=(size, size), mode="bilinear").clamp(-1, 1)


def test_edges_come_back_from_their_bits_beside_their_latents(recipe: dict[str, ModuleType]) -> None:
    conditions = recipe["conditions"]
    maps = torch.rand(3, 5, 128, 128, generator=torch.Generator().manual_seed(0)) < 0.2
    latents = torch.arange(15).view(3, 5, 1, 1, 1).expand(3, 5, 4, 16, 16).half()
    found = conditions.Controlled(latents, torch.stack([conditions.packed(copy) for copy in maps]))
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(8):
        clean, control = found.draw(torch.arange(5), generator)
        for picture, (row, given) in enumerate(zip(clean, control, strict=True)):
            copy = (int(row[0, 0, 0]) - picture) // 5
            seen.add(copy)
            assert torch.equal(given, maps[copy, picture].float().expand(3, -1, -1))
    assert seen == {0, 1, 2}


def test_moved_copies_stand_elsewhere_and_edges_go_with_them(recipe: dict[str, ModuleType]) -> None:
    conditions = recipe["conditions"]
    square = torch.ones(1, 3, 128, 128)
    square[:, :, 40:88, 40:88] = -1
    made = conditions.moved(square.expand(12, -1, -1, -1), torch.Generator().manual_seed(1))
    dark = (made < 0).float().mean((1, 2, 3))
    share = 48 * 48 / 128**2
    assert dark.min() >= 0.9 * share * conditions.SMALLEST**2 and dark.max() <= 1.1 * share * conditions.LARGEST**2
    still = conditions.edges(square.expand(12, -1, -1, -1))
    assert conditions.edge_f1(still, conditions.edges(made), conditions.TOLERANCE).max() < 0.5
    for found, picture in zip(conditions.edges(made), made, strict=True):
        near = F.max_pool2d(found.float()[None, None], 5, stride=1, padding=2)[0, 0]
        change = (picture[0].diff(dim=0).abs() > 1).nonzero()
        assert all(near[row, column] for row, column in change.tolist())


def test_what_a_mask_covers_is_replaced_and_nothing_else(recipe: dict[str, ModuleType]) -> None:
    inpainting = recipe["train_inpainting"]
    rng = random.Random(0)
    picture, other = pictures(2)
    sizes = set()
    for _ in range(40):
        made, mask = inpainting.replaced(picture, other, rng)
        inside = (mask >= 0.5).expand_as(made)
        outside = made[~inside]
        assert torch.equal(outside, other[~inside]) or bool((outside == 1).all())
        large = mask.mean() >= 0.35
        sizes.add(bool(large))
        if large:
            assert torch.equal(made[inside], picture[inside])
        else:
            size = int(mask.sum().sqrt())
            small = F.interpolate(picture[None], size=(size, size), mode="bicubic", antialias=True).clamp(-1, 1)
            assert torch.equal(made[inside], small.flatten())
    assert sizes == {True, False}


def test_masked_pictures_are_those_of_the_pipeline(recipe: dict[str, ModuleType]) -> None:
    inpainting = recipe["train_inpainting"]
    rng = random.Random(1)
    masks = torch.stack([inpainting.free_mask(rng) for _ in range(24)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert masks.mean((1, 2, 3)).min() > 0.02 and masks.mean((1, 2, 3)).max() < 0.75
    shown = inpainting.hidden(pictures(24), masks)
    assert bool((shown[masks.expand_as(shown) == 1] == 0).all())
    assert torch.equal(inpainting.small_masks(masks), masks[:, :, ::8, ::8])


def test_examples_are_drawn_by_their_kinds(recipe: dict[str, ModuleType]) -> None:
    inpainting = recipe["train_inpainting"]
    plain = torch.full((6, 4, 16, 16), 1.0)
    kinds = ((inpainting.CUT, 2.0), (inpainting.MIXED, 3.0))
    cut, mixed = (torch.full((count, 6, 4, 16, 16), value).half() for count, value in kinds)
    cut_masks, mixed_masks = (torch.zeros(count, 6, 1, 16, 16, dtype=torch.bool) for count, _ in kinds)
    grey = torch.full((4, 16, 16), 5.0).half()
    found = inpainting.Examples(cut, cut_masks, mixed, mixed + 1, mixed_masks, grey)
    chosen = torch.zeros(4000, dtype=torch.int64)
    clean, mask, masked = found.draw(chosen, plain, torch.Generator().manual_seed(0))
    drawn = torch.stack([clean[:, 0, 0, 0], mask[:, 0, 0, 0], masked[:, 0, 0, 0]], 1)
    shares = {kind: (drawn == torch.tensor(kind)).all(1).float().mean() for kind in
              ((1.0, 1.0, 5.0), (1.0, 0.0, 2.0), (3.0, 0.0, 4.0))}  # fmt: skip
    wanted = (inpainting.WHOLE, inpainting.OWN, 1 - inpainting.WHOLE - inpainting.OWN)
    assert list(shares.values()) == pytest.approx(list(wanted), abs=0.03)


def test_the_widened_network_is_the_base_where_all_is_masked_and_hears_of_the_rest(
    recipe: dict[str, ModuleType],
) -> None:
    base = UNet2DConditionModel.from_config(recipe["train_unet"].CONFIG).eval()
    grey = noise(4, 16, 16, seed=2)
    wide = recipe["train_inpainting"].widened(base, grey).eval()
    sample, text = noise(2, 4, 16, 16), noise(2, 7, base.config.cross_attention_dim)
    masked = torch.cat([torch.ones(2, 1, 16, 16), grey.mean((1, 2))[:, None, None].expand(2, -1, 16, 16)], 1)
    known = torch.cat([torch.zeros(2, 1, 16, 16), noise(2, 4, 16, 16, seed=1)], 1)
    with torch.no_grad():
        torch.testing.assert_close(wide(torch.cat([sample, masked], 1), 500, text), base(sample, 500, text))
        first = wide.conv_in(torch.cat([sample, known], 1))
        hinted = base.conv_in(sample - recipe["train_inpainting"].HINT * known[:, 1:])
        torch.testing.assert_close(first, hinted)


def test_the_control_network_starts_silent_but_listening(recipe: dict[str, ModuleType]) -> None:
    base = UNet2DConditionModel.from_config(recipe["train_unet"].CONFIG)
    network = recipe["train_controlnet"].untrained(base)
    control = recipe["conditions"].as_picture(torch.rand(4, 128, 128, generator=torch.Generator().manual_seed(0)) < 0.1)
    recipe["train_controlnet"].warm_start(network, base, control)
    condition = network.embed_condition(control)
    assert condition.std().item() == pytest.approx(0.5, rel=0.02)
    own, given = network.state_dict(), base.state_dict()
    shared = [name for name in own if not name.startswith("controlnet_")]
    assert shared and all(torch.equal(own[name], given[name]) for name in shared)
    residuals = network(noise(4, 4, 16, 16), 500, noise(4, 7, base.config.cross_attention_dim), condition=condition)
    assert residuals.mid is not None
    parts = [*residuals.down, residuals.mid]
    assert all(not part.any() for part in parts)
    sum(part.square().mean() + part.mean() for part in parts).backward()
    last = network.controlnet_down_blocks[0].weight.grad
    assert last is not None and last.any()


def test_the_adapter_fits_the_levels_that_it_feeds(recipe: dict[str, ModuleType]) -> None:
    t2i, xl = recipe["train_t2i"], recipe["train_xl"]
    unet = UNet2DConditionModel.from_config(xl.CONFIG).eval().requires_grad_(False)
    adapter = T2IAdapter.from_config(t2i.CONFIG)
    control = recipe["conditions"].as_picture(torch.rand(2, 128, 128, generator=torch.Generator().manual_seed(0)) < 0.1)
    t2i.warm_start(adapter, control)
    features = adapter(control)
    assert features[0].std().item() == pytest.approx(t2i.FIRST_SPREAD, rel=0.02)
    text = noise(2, 8, unet.config.cross_attention_dim)
    sample, steps = noise(2, 4, 16, 16), torch.tensor([300, 900])
    made = t2i.steered(unet, sample, steps, text, features)
    plain = xl.denoise(unet, sample, steps, text, torch.tensor([xl.PLAIN_IDS] * 2).float())
    assert torch.allclose(t2i.steered(unet, sample, steps, text, ()), plain, atol=1e-6)
    assert not torch.allclose(made, plain, atol=1e-4)
    made.square().mean().backward()
    silent = [name for name, weight in adapter.named_parameters() if weight.grad is None]
    assert silent == []
