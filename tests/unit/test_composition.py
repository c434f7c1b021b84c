"""Tasks are conditions of one loop: any of them together, each with its effect, and none where its scale is zero."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from fourstroke import (
    AnimateDiffPipeline,
    Control,
    ControlNetModel,
    FreeInit,
    GenerateRequest,
    MotionAdapter,
    StableDiffusionPipeline,
    T2IAdapter,
    Windows,
)
from fourstroke.lora.layers import LCM_LORA_TARGETS, init_pairs
from tests.unit import tiny
from tests.unit.tiny import picture

EFFECT = 0.2 / 255
PART = PIL.Image.new("L", (32, 32))
PART.paste(255, (8, 8, 24, 32))


def steered() -> Any:
    """A pipeline for pictures with two ControlNets, a T2I-Adapter and a LoRA (which is not active yet)."""
    pipe: Any = tiny.sd()
    pipe.controlnet = [tiny.filled(ControlNetModel.from_unet(pipe.unet)) for _ in range(2)]
    pipe.adapter = tiny.filled(
        T2IAdapter.from_config(
            {
                "in_channels": 3,
                "channels": [16, 32],
                "num_res_blocks": 1,
                "downscale_factor": 8,
                "adapter_type": "full_adapter",
            }
        )
    )
    generator = torch.Generator().manual_seed(0)
    pairs = init_pairs(pipe.unet, LCM_LORA_TARGETS, rank=2, alpha=2, generator=generator)
    state = {}
    for path, pair in pairs.items():
        path = path.removesuffix(".weight")
        state[f"unet.{path}.lora_A.weight"] = pair.down.detach()
        state[f"unet.{path}.lora_B.weight"] = torch.randn(pair.up.shape, generator=generator) * 0.2
    pipe.load_lora_weights(state, adapter_name="style")
    return pipe


ALL: dict[str, Any] = {
    "prompt": "a red fox",
    "seed": 3,
    "guidance_scale": 1.5,
    "image": picture(0),
    "strength": 0.9,
    "mask_image": PART,
    "controls": (Control(picture(1), 1.0), Control(picture(2), 0.8, end=0.75)),
    "adapters": (Control(picture(3), 1.0),),
    "output_type": "np",
}


def painted(pipe: Any, **changes: Any) -> np.ndarray:
    return pipe.generate(GenerateRequest(**{**ALL, **changes})).images


@pytest.fixture(scope="module")
def pipe() -> Any:
    return steered()


def without(values: tuple[Control, ...], i: int) -> tuple[Control, ...]:
    return tuple(dataclasses.replace(value, scale=0.0) if j == i else value for j, value in enumerate(values))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "x y z"},
        {"negative_prompt": "fox"},
        {"guidance_scale": 1.0},
        {"image": picture(9)},
        {"strength": 0.5},
        {"mask_image": PIL.Image.new("L", (32, 32), 255)},
        {"controls": without(ALL["controls"], 0)},
        {"controls": without(ALL["controls"], 1)},
        {"controls": (ALL["controls"][0], dataclasses.replace(ALL["controls"][1], end=0.25))},
        {"adapters": without(ALL["adapters"], 0)},
        {"guess_mode": True},
        {"lora_scale": 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_inpainted_controlled_styled_picture_is_one_request_and_each_condition_counts(
    pipe: Any, change: Any
) -> None:
    whole = painted(pipe)
    assert whole.shape == (1, 32, 32, 3)
    assert np.abs(painted(pipe, **change) - whole).mean() >= EFFECT


def test_a_scale_of_zero_is_as_if_the_network_were_not_there(pipe: Any) -> None:
    silent = {"controls": tuple(Control(picture(1), 0.0) for _ in range(2)), "adapters": (Control(picture(3), 0.0),)}
    plain = StableDiffusionPipeline(**{name: getattr(pipe, name) for name in StableDiffusionPipeline.component_names})
    plain.set_progress_bar_config(disable=True)
    pipe.merge_adapters()
    expected = painted(plain, controls=(), adapters=())
    np.testing.assert_array_equal(painted(pipe, **silent), expected)
    never = tuple(dataclasses.replace(control, start=1.0, end=1.0) for control in ALL["controls"])
    np.testing.assert_array_equal(painted(pipe, controls=never, adapters=silent["adapters"]), expected)


def test_the_unmasked_part_of_the_latents_is_the_pictures(pipe: Any) -> None:
    black = PIL.Image.new("L", (32, 32))
    latents = painted(pipe, mask_image=black, output_type="latent")
    other = painted(pipe, mask_image=black, output_type="latent", prompt="x y z")
    torch.testing.assert_close(latents, other, rtol=0, atol=0)


def test_a_number_of_pictures_that_fits_nothing_is_named_before_anything_runs(pipe: Any) -> None:
    with pytest.raises(ValueError, match="1 control pictures for 2 ControlNets: give one picture"):
        painted(pipe, controls=(Control(picture(1)),))
    with pytest.raises(ValueError, match="0 control pictures for 1 T2I-Adapters"):
        painted(pipe, adapters=())
    with pytest.raises(ValueError, match="3 pictures for 1 prompts: give one, or one a prompt"):
        painted(tiny.sd(), image=[picture(i) for i in range(3)], mask_image=None, controls=(), adapters=())
    with pytest.raises(ValueError, match="The mask is 16 x 16 and the picture 32 x 32 pixels"):
        painted(pipe, mask_image=PIL.Image.new("L", (16, 16), 255))
    with pytest.raises(ValueError, match="A control picture is missing"):
        Control(None)
    with pytest.raises(ValueError, match="fractions of the schedule with 0 <= start <= end <= 1"):
        Control(picture(0), start=0.5, end=0.4)


def test_an_adapter_that_cannot_read_a_size_says_so_before_anything_runs(pipe: Any) -> None:
    adapter, pipe.adapter = (
        pipe.adapter,
        tiny.filled(T2IAdapter.from_config({"channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 16})),
    )
    try:
        with pytest.raises(ValueError, match="multiples of 16, and this one is to be 40 x 32; ask for 32 x 32"):
            painted(pipe, width=40)
    finally:
        pipe.adapter = adapter


def test_an_adapters_picture_is_cut_out_with_the_mask(pipe: Any) -> None:
    fields = {"padding_mask_crop": 2, "output_type": "pil", "controls": tuple(Control(picture(1), 0.0) for _ in "ab")}
    outside = picture(3)
    outside.paste(picture(5).crop((0, 0, 2, 32)), (0, 0))
    same = painted(pipe, **fields)[0], painted(pipe, **fields, adapters=(Control(outside),))[0]
    # What lies outside the cut-out changes nothing; what lies inside does.
    np.testing.assert_array_equal(*map(np.asarray, same))
    other = painted(pipe, **fields, adapters=(Control(picture(5)),))[0]
    assert np.abs(np.asarray(other, float) - np.asarray(same[0], float)).mean() > 0.1


def animated() -> Any:
    """An animation pipeline with a ControlNet and motion modules for up to eight frames."""
    pipe = tiny.sd()
    motion = tiny.filled(
        MotionAdapter.from_config(
            {
                "block_out_channels": (16, 32),
                "motion_layers_per_block": 1,
                "motion_num_attention_heads": 2,
                "motion_norm_num_groups": 4,
                "motion_max_seq_length": 8,
                "use_motion_mid_block": False,
            }
        )
    )
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    made: Any = AnimateDiffPipeline(**{name: getattr(pipe, name) for name in names}, motion_adapter=motion)
    made.set_progress_bar_config(disable=True)
    made.controlnet = [tiny.filled(ControlNetModel.from_unet(pipe.unet))]
    return made


FRAMES = [picture(i) for i in range(4)]
VIDEO: dict[str, Any] = {"adapters": (), "num_frames": 4, "image": FRAMES, "controls": (Control(FRAMES, 1.0),)}


@pytest.fixture(scope="module")
def animator() -> Any:
    return animated()


@pytest.mark.parametrize(
    "change",
    [
        {"image": FRAMES[::-1]},
        {"image": picture(7)},
        {"mask_image": None},
        {"controls": (Control(FRAMES, 0.0),)},
        {"controls": (Control(FRAMES[::-1], 1.0),)},
        {"free_init": FreeInit(iterations=2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_video_may_be_repainted_masked_and_controlled_at_once(animator: Any, change: Any) -> None:
    whole = painted(animator, **VIDEO)
    assert whole.shape == (1, 4, 32, 32, 3)
    assert np.abs(painted(animator, **{**VIDEO, **change}) - whole).mean() >= EFFECT


def test_each_animation_of_a_batch_is_that_of_its_seed_alone(animator: Any) -> None:
    both = painted(animator, **VIDEO, num_images_per_prompt=2)
    for i in range(2):
        alone = painted(animator, **VIDEO, seed=ALL["seed"] + i)
        assert np.abs(both[i] - alone[0]).max() <= 1 / 255


def test_motion_modules_leave_pictures_alone(animator: Any) -> None:
    plain = tiny.sd()
    fields = {"controls": (), "adapters": (), "mask_image": None, "image": None, "strength": None}
    animator.controlnet, kept = [], animator.controlnet
    try:
        np.testing.assert_array_equal(painted(animator, **fields), painted(plain, **fields))
    finally:
        animator.controlnet = kept


def test_windows_show_the_network_no_more_frames_than_one_window_has(
    animator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, forward = [], animator.unet.forward
    monkeypatch.setattr(animator.unet, "forward", lambda *a, **k: (seen.append(len(a[0])), forward(*a, **k))[1])
    fields = {**VIDEO, "num_frames": 20, "image": None, "mask_image": None, "strength": None}
    fields["controls"] = (Control([picture(i) for i in range(20)]),)
    long = painted(animator, **fields, windows=Windows(6, 3))
    assert long.shape == (1, 20, 32, 32, 3) and set(seen) == {2 * 6}
    assert np.abs(np.diff(long[0], axis=0)).mean(axis=(1, 2, 3)).min() > 0


def test_windows_change_nothing_where_one_holds_all_frames(animator: Any) -> None:
    fields = {**VIDEO, "image": None, "mask_image": None, "strength": None}
    np.testing.assert_array_equal(painted(animator, **fields), painted(animator, **fields, windows=Windows(8, 4)))


def test_frames_that_nothing_can_relate_are_refused(animator: Any) -> None:
    with pytest.raises(ValueError, match="num_frames needs a motion adapter"):
        painted(tiny.sd(), num_frames=4, image=None, mask_image=None, controls=(), adapters=())
    with pytest.raises(ValueError, match="9 frames at a time, but the motion adapter was trained on at most 8"):
        painted(animator, **{**VIDEO, "num_frames": 9, "image": picture(0), "controls": (Control(picture(1)),)})
    with pytest.raises(ValueError, match="3 control pictures for an animation of 4 frames"):
        painted(animator, **{**VIDEO, "controls": (Control(FRAMES[:3]),)})
    with pytest.raises(ValueError, match="1 <= stride <= length"):
        Windows(4, 5)


def test_a_callback_may_end_guidance_with_everything_attached(pipe: Any) -> None:
    def end(pipe: Any) -> Any:
        def on_step(state: Any) -> None:
            if state.index == 0:
                pipe._guidance_scale = 1.0

        return on_step

    request = GenerateRequest(**{**ALL, "guidance_scale": 2.0, "mask_image": None, "strength": 1.0})
    whole = pipe.generate(request).images
    stopped = pipe.generate(request, on_step=end(pipe)).images
    assert np.abs(stopped - whole).mean() >= EFFECT
    # With guidance ended after the last step nothing changes.
    late = pipe.generate(
        request, on_step=lambda state: setattr(pipe, "_guidance_scale", 2.0 if state.index < 3 else 1.0)
    )
    np.testing.assert_array_equal(late.images, whole)
