"""Pipelines as objects: files, components, devices, callbacks, LoRA by name, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fourstroke
from fourstroke import AutoPipelineForText2Image, DiffusionPipeline, LatentConsistencyModelPipeline
from fourstroke.lora import LoraError
from tests.unit import tiny


def painted(pipe: DiffusionPipeline, **options: Any) -> np.ndarray:
    defaults = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    generator = torch.Generator().manual_seed(1)
    return pipe("a red fox", generator=generator, **(defaults | options)).images  # type: ignore[operator]


def lora(pipe: DiffusionPipeline, seed: int = 0) -> dict[str, torch.Tensor]:
    """Kohya-layout tensors for every attention query of the UNet."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in pipe.unet.named_modules():
        if name.endswith("to_q"):
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.randn(2, module.in_features, generator=generator)
            tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 2, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    return tensors


@pytest.mark.parametrize("make", [tiny.sd, tiny.xl])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_what_is_saved_loads_to_the_same_pictures(make: Any, variant: str | None, tmp_path: Path) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path / "model", variant=variant)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == type(pipe).__name__ and index["unet"] == ["diffusers", "UNet2DConditionModel"]
    again = DiffusionPipeline.from_pretrained(tmp_path / "model", variant=variant)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    assert np.array_equal(painted(again), painted(pipe))


def test_components_can_be_given_and_left_out(tmp_path: Path) -> None:
    tiny.sd().save_pretrained(tmp_path)
    vae = tiny.vae()
    pipe = DiffusionPipeline.from_pretrained(tmp_path, vae=vae, safety_checker=None, torch_dtype=torch.float16)
    assert pipe.vae is vae and pipe.dtype == torch.float16


def test_a_misspelt_keyword_warns_and_goes_on(tmp_path: Path) -> None:
    tiny.sd().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="ignored unknown arguments 'varient'"):
        DiffusionPipeline.from_pretrained(tmp_path, varient="fp16")
    with pytest.warns(UserWarning, match="ignored unknown arguments 'num_steps'"):
        painted(tiny.sd(), num_steps=3)


def test_a_pipeline_or_component_that_is_not_supported_is_named(tmp_path: Path) -> None:
    tiny.sd().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="pipeline is 'FluxPipeline', which is not supported. Supported: Stable"):
        DiffusionPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "FluxTransformer2DModel"]}))
    with pytest.raises(ValueError, match="Component 'unet' is a FluxTransformer2DModel, which is not supported"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    pipe = tiny.sd()
    pipe.safety_checker = lambda images, clip_input: (images, [False] * len(images))
    with pytest.raises(ValueError, match="'safety_checker' is a function, which cannot be saved: set pipe"):
        pipe.save_pretrained(tmp_path / "model")
    pipe.safety_checker = None
    with pytest.raises(ValueError, match=r"Only \.safetensors files are written"):
        pipe.save_pretrained(tmp_path / "model", safe_serialization=False)
    with pytest.raises(ValueError, match="push_to_hub is not done here"):
        pipe.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert not (tmp_path / "model").exists()
    with pytest.warns(UserWarning, match="ignored unknown arguments 'use_flashpack', 'max_shard_size'"):
        pipe.save_pretrained(tmp_path / "model", max_shard_size="5GB", use_flashpack=True)
    assert (tmp_path / "model" / "model_index.json").exists()


def test_what_is_saved_has_the_loras_that_act_now(tmp_path: Path) -> None:
    pipe = tiny.sd()
    pipe.load_lora_weights(lora(pipe))  # nothing was painted with it yet
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(painted(again), painted(pipe))
    pipe.unload_lora_weights()
    assert not np.array_equal(painted(again), painted(pipe))


def test_a_compiled_network_is_saved_under_its_own_name(tmp_path: Path) -> None:
    pipe = tiny.sd()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_downloading_gives_the_folder_and_loads_nothing(tmp_path: Path) -> None:
    tiny.sd().save_pretrained(tmp_path)
    assert DiffusionPipeline.download(tmp_path) == str(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="No .safetensors weights in vae/"):
        fourstroke.StableDiffusionPipeline.download(tmp_path)
    assert fourstroke.StableDiffusionPipeline.download(tmp_path, vae=None) == str(tmp_path)


def test_a_component_that_is_left_out_warns_only_when_it_is_something(tmp_path: Path) -> None:
    tiny.xl().save_pretrained(tmp_path)
    DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    with pytest.warns(UserWarning, match="ignored unknown arguments 'safety_checker'"):
        DiffusionPipeline.from_pretrained(tmp_path, safety_checker=len)


def test_what_is_no_folder_and_no_hub_id_is_named_with_the_shipped_models() -> None:
    with pytest.raises(FileNotFoundError, match="'emojy' is neither a folder, nor a shipped model"):
        DiffusionPipeline.from_pretrained("emojy")


def test_the_text_to_image_form_of_a_pipeline_shares_its_components(tmp_path: Path) -> None:
    pipe = tiny.xl()
    auto = AutoPipelineForText2Image.from_pipe(pipe)
    assert type(auto) is type(pipe) and auto.unet is pipe.unet and auto.settings == pipe.settings
    pipe.save_pretrained(tmp_path)
    assert type(AutoPipelineForText2Image.from_pretrained(tmp_path)) is type(pipe)
    with pytest.raises(TypeError, match="use its from_pretrained"):
        AutoPipelineForText2Image()


def test_a_missing_device_is_named_with_the_mend() -> None:
    if torch.cuda.is_available():
        pytest.fail("this test wants a machine without CUDA; run it there")
    with pytest.raises(RuntimeError, match=r"There is no 'cuda' device here; use \.to\(.cpu.\)"):
        tiny.sd().to("cuda")


def test_to_takes_devices_and_dtypes_in_any_order() -> None:
    pipe = tiny.sd().to(torch.bfloat16, "cpu")
    assert pipe.dtype == torch.bfloat16 and pipe.vae.dtype == torch.bfloat16 and pipe.device.type == "cpu"
    assert pipe.to(torch_dtype=torch.float32).dtype == torch.float32


def test_callbacks_see_and_replace_the_loops_tensors() -> None:
    pipe, seen = tiny.sd(), []

    def zero(_: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, int(timestep), set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = painted(
        pipe,
        output_type="latent",
        callback_on_step_end=zero,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert seen == [(0, 999, {"latents", "prompt_embeds"}), (1, 499, {"latents", "prompt_embeds"})]
    assert not latents.any()
    with pytest.raises(ValueError, match="names 'noise'; it may name latents"):
        painted(pipe, callback_on_step_end=zero, callback_on_step_end_tensor_inputs=["noise"])


def test_callbacks_read_the_run_from_the_pipeline() -> None:
    pipe, seen = tiny.sd(), []
    assert (pipe.clip_skip, pipe.lora_scale, pipe.guidance_rescale) == (None, 1.0, 0.0)

    def read(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((pipe.do_classifier_free_guidance, pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt))
        return {}

    call = {"guidance_scale": 1.5, "clip_skip": 1, "guidance_rescale": 0.5, "cross_attention_kwargs": {"scale": 0.5}}
    painted(pipe, callback_on_step_end=read, num_inference_steps=3, **call)
    assert seen == [(True, 1.5, 3, False)] * 3
    assert (pipe.clip_skip, pipe.lora_scale, pipe.guidance_rescale) == (1, 0.5, 0.5)
    assert pipe.cross_attention_kwargs == {"scale": 0.5}
    assert (pipe.denoising_start, pipe.denoising_end) == (None, None)


def test_a_callback_can_stop_the_loop() -> None:
    pipe, steps = tiny.sd(), []

    def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = True
        return {}

    painted(pipe, num_inference_steps=4, callback_on_step_end=stop)
    assert steps == [0]


@pytest.mark.parametrize("make", [tiny.sd, tiny.xl])
def test_encoded_prompts_give_the_prompts_pictures(make: Any) -> None:
    pipe = make()
    options = {"guidance_scale": 1.5, "num_inference_steps": 2, "output_type": "np"}
    direct = painted(pipe, negative_prompt="x", **options)
    if isinstance(pipe, fourstroke.StableDiffusionXLPipeline):
        encoded = pipe.encode_prompt("a red fox", negative_prompt="x")
        names = (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        )
    else:
        encoded = pipe.encode_prompt("a red fox", "cpu", 1, True, negative_prompt="x")
        names = ("prompt_embeds", "negative_prompt_embeds")
    embeds = dict(zip(names, encoded, strict=True))
    assert np.array_equal(pipe(**embeds, **options, generator=torch.Generator().manual_seed(1)).images, direct)


def test_sdxl_embeddings_without_the_pooled_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt_embeds needs pooled_prompt_embeds beside it"):
        tiny.xl()(prompt_embeds=torch.zeros(1, 77, 2 * tiny.WIDTH), guidance_scale=1.0)


def test_what_is_not_supported_says_so() -> None:
    with pytest.raises(ValueError, match="none is loaded; call pipe.load_ip_adapter"):
        painted(tiny.sd(), ip_adapter_image=object())
    pipe = tiny.sd()
    with pytest.raises(ValueError, match="no guidance embedding"):
        LatentConsistencyModelPipeline(**pipe.components)("fox")


def test_loras_go_by_name_and_leave_no_trace(tmp_path: Path) -> None:
    pipe = tiny.sd()
    base = painted(pipe)
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    for i, name in enumerate(("one", "two")):
        save_file(lora(pipe, i), tmp_path / f"{name}.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="one.safetensors", adapter_name="one")
    pipe.load_lora_weights(tmp_path / "two.safetensors", adapter_name="two")
    assert pipe.get_active_adapters() == ["two"] and pipe.get_list_adapters() == {"unet": ["one", "two"]}
    pipe.set_adapters(["one", "two"], [1.0, 0.8])
    both = painted(pipe)
    assert np.abs(both - base).mean() > 1 / 255
    assert np.array_equal(painted(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    pipe.disable_lora()
    assert np.array_equal(painted(pipe), base)
    pipe.enable_lora()
    assert np.array_equal(painted(pipe), both)
    pipe.fuse_lora(adapter_names=["one", "two"])
    pipe.unload_lora_weights()
    assert np.array_equal(painted(pipe), both)
    pipe.unfuse_lora()
    assert np.array_equal(painted(pipe), base)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())


def test_adapters_survive_a_change_of_dtype() -> None:
    pipe = tiny.sd()
    pipe.load_lora_weights(lora(pipe))
    before = painted(pipe)
    pipe.to(torch.float16)
    pipe.merge_adapters()
    pipe.to(torch.float32)
    assert np.abs(painted(pipe) - before).max() < 0.05
    assert pipe.get_active_adapters() == ["default_0"]


def test_loras_are_replaced_in_place_counted_and_moved() -> None:
    pipe = tiny.sd()
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(lora(pipe), adapter_name="style")
    first = painted(pipe)
    pipe.load_lora_weights(lora(pipe, 1), adapter_name="style", hotswap=True)
    swapped, other = painted(pipe), tiny.sd()
    other.load_lora_weights(lora(other, 1))
    assert np.array_equal(swapped, painted(other)) and not np.array_equal(swapped, first)
    assert pipe.get_active_adapters() == ["style"] and (pipe.fused_loras, pipe.num_fused_loras) == (set(), 0)
    pipe.set_lora_device(["style"], "cpu")
    pipe.fuse_lora()
    assert (pipe.fused_loras, pipe.num_fused_loras) == ({"style"}, 1)
    assert np.array_equal(painted(pipe), swapped)


def test_long_animations_are_switched_by_the_known_names() -> None:
    pipe = tiny.sd()
    assert not pipe.free_noise_enabled and not pipe.free_init_enabled
    pipe.enable_free_noise(context_length=8)
    pipe.enable_free_noise_split_inference()
    pipe.enable_free_init(num_iters=2)
    assert pipe.free_noise_enabled and pipe.free_init_enabled
    pipe.disable_free_noise()
    pipe.disable_free_init()
    assert not pipe.free_noise_enabled and not pipe.free_init_enabled
    with pytest.raises(NotImplementedError, match=r"Prompts that change along an animation are left out.*compat\.md"):
        pipe.enable_free_noise(prompt_interpolation_callback=len)


def test_lora_repositories_say_which_file_is_meant(tmp_path: Path) -> None:
    pipe = tiny.sd()
    with pytest.raises(FileNotFoundError, match=r"no 'pytorch_lora_weights\.safetensors'"):
        pipe.load_lora_weights(tmp_path)
    save_file(lora(pipe), tmp_path / "only.safetensors")
    pipe.load_lora_weights(tmp_path, adapter_name="only")
    save_file(lora(pipe), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds several LoRAs; pass weight_name=, one of only\.\w+, other"):
        pipe.load_lora_weights(tmp_path, adapter_name="x")
    with pytest.raises(LoraError, match="'only' is already in use"):
        pipe.load_lora_weights(tmp_path, weight_name="only.safetensors", adapter_name="only")
    with pytest.raises(ValueError, match="is a pickle"):
        pipe.load_lora_weights(tmp_path / "old.bin")
    pipe.save_lora_weights(tmp_path / "saved", "only")
    assert (tmp_path / "saved" / "pytorch_lora_weights.safetensors").exists()


def test_every_public_name_exists() -> None:
    for name in fourstroke.__all__:
        assert getattr(fourstroke, name) is not None
    assert set(dir(fourstroke)) == set(fourstroke.__all__)
    with pytest.raises(AttributeError, match="no attribute 'FluxPipeline'"):
        _ = fourstroke.FluxPipeline
