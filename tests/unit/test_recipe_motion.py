"""The recipe's moving pictures go where their poses say, and its measures see what was put there."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

RECIPE = Path(__file__).parents[2] / "recipes" / "emoji"


@pytest.fixture(scope="module")
def recipe() -> Iterator[dict[str, ModuleType]]:
    before = set(sys.modules)
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: importlib.import_module(name) for name in ("clips", "train_motion", "train_motion_lora")}
    finally:
        sys.path.remove(str(RECIPE))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == RECIPE:
                del sys.modules[name]


def dot(size: int = 64, x: float = 0.0, y: float = 0.0, radius: float = 0.1) -> Tensor:
    """A black disc on white, (3, size, size) in -1..1; lengths in half pictures."""
    places = (torch.arange(size) + 0.5) / size * 2 - 1
    inside = (places[None] - x) ** 2 + (places[:, None] - y) ** 2 < radius**2
    return torch.where(inside, -1.0, 1.0).expand(3, -1, -1)


def middle(frame: Tensor) -> tuple[float, float]:
    """Centre of gravity of what is drawn in (3, H, W), x and y in half pictures."""
    dark = 1 - frame.mean(0)
    places = (torch.arange(len(dark)) + 0.5) / len(dark) * 2 - 1
    return ((dark.sum(0) * places).sum() / dark.sum()).item(), ((dark.sum(1) * places).sum() / dark.sum()).item()


def test_a_pose_moves_each_point_by_the_forward_map(recipe: dict[str, ModuleType]) -> None:
    clips = recipe["clips"]
    generator = torch.Generator().manual_seed(0)
    poses = clips.Poses(
        size=0.6 + 0.3 * torch.rand(16, 2, generator=generator),
        angle=torch.linspace(-3, 3, 16),
        shift=0.2 * torch.rand(16, 2, generator=generator),
        pivot=torch.tensor([0.1, 0.3]),
    )
    point = (0.2, -0.1)
    frames = clips.drawn(dot(128, *point, radius=0.08), poses)
    for index, frame in enumerate(frames):
        angle = poses.angle[index].item()
        x, y = ((p - c) * s for p, c, s in zip(point, poses.pivot.tolist(), poses.size[index].tolist(), strict=True))
        turned = (x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle))
        expected = [
            a + c + d for a, c, d in zip(turned, poses.pivot.tolist(), poses.shift[index].tolist(), strict=True)
        ]
        assert middle(frame) == pytest.approx(expected, abs=0.01)


def test_every_motion_moves_and_stays_in_the_picture(recipe: dict[str, ModuleType]) -> None:
    clips = recipe["clips"]
    picture = torch.minimum(dot(x=0.0, radius=0.5), dot(x=0.5, y=-0.3, radius=0.2))
    for motion in {clips.bounce, clips.sway, *clips.CAMERA.values()}:
        frames = clips.drawn(picture, motion())
        assert frames.shape == (16, 3, 64, 64) and frames.abs().max() <= 1
        assert frames.diff(dim=0).abs().amax((1, 2, 3)).max() > 0.1
        assert (frames < 0.75).flatten(1).any(1).all()


def test_the_cameras_motions_are_measured_as_what_they_are(recipe: dict[str, ModuleType]) -> None:
    clips, measures = recipe["clips"], recipe["train_motion_lora"]
    zoomed = clips.drawn(dot(128, radius=0.4), clips.zoom_in())[None, :8]
    assert measures.growth(zoomed) == pytest.approx(math.exp(7 * clips.ZOOM_RATE), rel=0.03)
    assert measures.pan(zoomed) == pytest.approx(0, abs=0.005)
    panned = clips.drawn(dot(128, radius=0.4), clips.pan_left())[None, :8]
    assert measures.pan(panned) == pytest.approx(7 * clips.PAN_RATE / 2, abs=0.005)  # to the right: the camera's left
    assert measures.growth(panned) == pytest.approx(1, rel=0.01)


def test_jerk_tells_flicker_from_motion(recipe: dict[str, ModuleType]) -> None:
    jerk = recipe["train_motion"].jerk
    noise = torch.randn(4, 64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert jerk(noise) == pytest.approx(math.sqrt(3), rel=0.01)
    assert jerk(torch.arange(8.0)[None, :, None, None, None].expand(1, 8, 3, 4, 4)) == 0


def test_the_velocitys_error_follows_from_the_noises(recipe: dict[str, ModuleType]) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise, predicted = (torch.randn(3, 2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    alphas = torch.tensor([0.99, 0.5, 0.01], dtype=torch.float64)
    a = alphas[:, None, None, None, None]
    sample = a.sqrt() * clean + (1 - a).sqrt() * noise
    told = (sample - (1 - a).sqrt() * predicted) / a.sqrt()  # the picture that the predicted noise leaves
    velocity, other = (a.sqrt() * e - (1 - a).sqrt() * x for e, x in ((noise, clean), (predicted, told)))
    expected = (other - velocity).square().mean((1, 2, 3, 4))
    found = recipe["train_motion"].velocity_error(predicted, noise.float(), alphas)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_beginning_of_a_clip_is_whole_and_its_own(recipe: dict[str, ModuleType]) -> None:
    clips = recipe["clips"]
    numbers = torch.arange(5 * 16).view(5, 16, 1, 1, 1).expand(-1, -1, 4, 16, 16).half()
    moving = clips.Clips(numbers, torch.tensor([7, 3, 9, 1, 4]))
    found, pictures = moving.draw(40, 8, torch.Generator().manual_seed(0))
    first = found[:, :, 0, 0, 0]
    assert found.shape == (40, 8, 4, 16, 16) and first.diff(dim=1).eq(1).all()
    assert torch.equal(pictures, moving.pictures[(first[:, 0] // 16).long()])
    assert first[:, 0].remainder(16).eq(0).all()


def test_the_loras_pairs_are_the_motion_modules_attention_alone(recipe: dict[str, ModuleType]) -> None:
    from fourstroke.models.motion import MotionAdapter, attach_motion_
    from fourstroke.models.unet import UNet2DConditionModel

    train_motion, lora = recipe["train_motion"], recipe["train_motion_lora"]
    unet = UNet2DConditionModel.from_config(train_motion.BASE)
    attach_motion_(unet, MotionAdapter.from_config(train_motion.CONFIG))
    pairs = lora.MotionPairs(unet).pairs
    assert len(pairs) == 9 * 2 * 4  # modules, attentions, layers
    assert all(".motion_modules." in name and ".attn" in name for name in pairs)
