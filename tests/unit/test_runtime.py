"""How pipelines run: networks that wait on the CPU, pieces of pictures, and what devices allow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

import fourstroke
from fourstroke.models.ip_adapter import cross_attentions, projections
from fourstroke.pipelines.pipeline import DiffusionPipeline
from fourstroke.runtime.device import accelerator, check_device
from fourstroke.runtime.offload import Offload, copy_to
from tests.parity.image_prompts import VISION, plain_projection
from tests.unit import tiny

CPU = torch.device("cpu")


def painted(pipe: Any, **options: Any) -> np.ndarray:
    defaults = {"num_inference_steps": 2, "guidance_scale": 1.5, "output_type": "np"}
    result = pipe("a red fox", generator=torch.Generator().manual_seed(1), **(defaults | options))
    return result.frames if hasattr(result, "frames") else result.images


def picture(seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def lora(pipe: DiffusionPipeline, strength: float = 0.5) -> dict[str, Tensor]:
    """Rank-one changes of the UNet's and the text encoder's attention."""
    tensors = {}
    for prefix, network, ending in (("unet", pipe.unet, "to_q"), ("te", pipe.text_encoder, "q_proj")):  # type: ignore[attr-defined]
        for name, module in network.named_modules():
            if name.endswith(ending):
                key = f"lora_{prefix}_{name.replace('.', '_')}"
                tensors[f"{key}.lora_down.weight"] = torch.full((1, module.in_features), strength)
                tensors[f"{key}.lora_up.weight"] = torch.full((module.out_features, 1), strength)
    return tensors


def steered() -> Any:
    """Everything at once: a start picture, a mask, and a ControlNet."""
    base = tiny.sd()
    torch.manual_seed(3)
    net = tiny.filled(fourstroke.ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8,) * 4))
    pipe = fourstroke.StableDiffusionControlNetInpaintPipeline(**base.components, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    return pipe


STEERED: dict[str, Any] = {
    "image": picture(1),
    "mask_image": picture(2, "L"),
    "control_image": picture(3),
    "strength": 0.9,
    "height": 32,
    "width": 32,
}


def prompted() -> Any:
    """An IP-Adapter with its image encoder, a safety checker that flags nothing, and a T2I-Adapter."""
    base = tiny.sd()
    torch.manual_seed(4)
    encoder = tiny.filled(fourstroke.CLIPVisionModelWithProjection.from_config(VISION))
    checker = tiny.filled(fourstroke.StableDiffusionSafetyChecker.from_config({"vision_config": VISION} | CHECKER))
    nn.init.constant_(checker.concept_embeds_weights, 2.0)  # type: ignore[arg-type]
    nn.init.constant_(checker.special_care_embeds_weights, 2.0)  # type: ignore[arg-type]
    size = {"height": 28, "width": 28}
    extractor = fourstroke.CLIPImageProcessor(size=size, crop_size=size)
    parts = {"image_encoder": encoder, "safety_checker": checker, "feature_extractor": extractor}
    pipe = fourstroke.StableDiffusionPipeline(**{**base.components, **parts})
    pipe.load_ip_adapter(
        {"image_proj": plain_projection(tiny.WIDTH), "ip_adapter": layers(pipe.unet)}, None, None, None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def layers(unet: Any) -> dict[str, Tensor]:
    found = {}
    for i, (_, attention) in enumerate(cross_attentions(unet)):
        for part in "kv":
            found[f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(attention.to_k.weight.shape) / 4
    return found


def adapted() -> Any:
    torch.manual_seed(5)
    adapter = tiny.filled(
        fourstroke.T2IAdapter.from_config({"channels": (16, 32), "downscale_factor": 8, "num_res_blocks": 1})
    )
    pipe = fourstroke.StableDiffusionAdapterPipeline.from_pipe(tiny.sd(), adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animated() -> Any:
    base = tiny.sd()
    torch.manual_seed(6)
    config = {"block_out_channels": (16, 32), "motion_layers_per_block": 1, "motion_num_attention_heads": 2}
    adapter = tiny.filled(fourstroke.MotionAdapter.from_config(config | {"motion_norm_num_groups": 4}))
    pipe = fourstroke.AnimateDiffPipeline.from_pipe(base, motion_adapter=adapter)
    pipe.enable_free_init(num_iters=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CHECKER = {"projection_dim": 12}
Case = tuple[Callable[[], Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "sd": (tiny.sd, {}),
    "xl": (tiny.xl, {}),
    "controlnet inpainting": (steered, STEERED),
    "image prompt, safety checker": (prompted, {"ip_adapter_image": picture(4)}),
    "T2I-Adapter": (adapted, {"image": picture(5)}),
    "animation": (animated, {"num_frames": 2, "height": 32, "width": 32}),
}


class Watched:
    """An offload to the "device" CPU whose copies are real ones, and a record of which networks ran, and were there."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch):
        self.names = {id(network): name for name, network in pipe.components.items() if isinstance(network, nn.Module)}
        self.names |= {id(projection): "image projection" for projection in projections(pipe.unet)}
        self.offload = Offload("cpu", copy=lambda tensor, _: tensor.clone())
        self.ran: list[tuple[str, set[str]]] = []
        self.moves: list[set[str]] = []
        pipe._offload = self.offload
        bring = self.offload.bring

        def recorded(*networks: nn.Module) -> None:
            bring(*networks)
            self.moves.append(self.resident)

        monkeypatch.setattr(self.offload, "bring", recorded)
        running = [*pipe.components.items(), *(("image projection", part) for part in projections(pipe.unet))]
        for name, network in running:
            if name == "motion_adapter":
                continue  # its modules are in the UNet
            for method in ("forward", "encode", "decode", "embed_condition"):
                if isinstance(network, nn.Module) and hasattr(network, method):
                    monkeypatch.setattr(network, method, self.recorder(name, getattr(network, method)))

    @property
    def resident(self) -> set[str]:
        return {self.names[id(network)] for network in self.offload.resident}

    def recorder(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.ran.append((name, self.resident))
            return method(*args, **kwargs)

        return recorded


@pytest.mark.parametrize(("make", "call"), CASES.values(), ids=list(CASES))
def test_offloaded_networks_are_there_when_they_run_and_give_the_same_picture(
    make: Callable[[], Any], call: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = make()
    wanted = painted(pipe, **call)
    before = {name: network.state_dict() for name, network in pipe.components.items() if isinstance(network, nn.Module)}
    before = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in before.items()}
    watched = Watched(pipe, monkeypatch)
    assert np.array_equal(painted(pipe, **call), wanted)

    assert watched.ran and all(name in there for name, there in watched.ran)
    text = {name for name in watched.names.values() if name.startswith("text_encoder")}
    alone = ({name} for name in ("vae", "adapter", "image_encoder", "image projection", "safety_checker"))
    together = [text, {"unet"} | ({"controlnet"} & set(watched.names.values())), *alone]
    assert all(any(there <= group for group in together) for there in watched.moves)
    # No network comes twice in a row, and a ControlNet stays from its condition to the last step.
    order = [
        name for (name, _), (last, _) in zip(watched.ran, [("", set()), *watched.ran], strict=False) if name != last
    ]
    first = {name: order.index(name) for name in {"unet", "vae", *text}}
    assert max(first[name] for name in text) < first["unet"]
    tail = [name for name in order[first["unet"] :] if name not in ("unet", "controlnet")]
    assert tail in (["vae"], ["vae", "safety_checker"])
    assert "safety_checker" not in watched.names.values() or tail[-1] == "safety_checker"
    assert not {"image_encoder", "image projection", "adapter"} & set(order[first["unet"] :])

    assert not watched.offload.resident, "every run ends with all networks on the CPU"
    for name, state in before.items():
        after = pipe.components[name].state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in state.items())


def test_an_error_leaves_nothing_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sd()
    watched = Watched(pipe, monkeypatch)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        painted(pipe, callback_on_step_end=stop)
    assert {"unet"} in watched.moves and not watched.offload.resident


def test_loras_change_offloaded_networks_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, pipe = tiny.sd(), tiny.sd()
    base = painted(pipe)
    Watched(pipe, monkeypatch)
    for each in (plain, pipe):
        each.load_lora_weights(lora(each), adapter_name="style")
    styled = painted(plain)
    assert np.abs(styled - base).max() > 1 / 255
    assert np.array_equal(painted(pipe), styled)
    # Encoding leaves the text encoder on the device, and it has to change there as well.
    pipe.encode_prompt("a red fox", None, 1, False)
    pipe.set_adapters("style", 0.5)
    plain.set_adapters("style", 0.5)
    assert np.array_equal(painted(pipe), painted(plain))
    pipe.encode_prompt("a red fox", None, 1, False)
    pipe.unload_lora_weights()
    assert np.array_equal(painted(pipe), base)


def test_buffers_are_swapped_as_objects_and_shared_tensors_once() -> None:
    network = nn.Module()
    network.one = nn.Linear(2, 2)
    network.two = nn.Linear(2, 2)
    network.two.weight = network.one.weight
    network.register_buffer("counts", torch.arange(3.0))
    homes = {name: tensor.data_ptr() for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    parameter, copied = network.one.weight, []
    offload = Offload("cpu", copy=lambda tensor, _: copied.append(tensor.shape) or tensor.clone())  # type: ignore[func-returns-value]
    offload.bring(network)
    assert network.one.weight is parameter and network.two.weight is parameter
    assert len(copied) == 4 and offload.resident == (network,)
    places = {name: tensor.data_ptr() for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    assert not set(places.values()) & set(homes.values())
    network.to(torch.float64)  # as a VAE that is upcast for decoding
    offload.rest()
    assert {name: t.data_ptr() for name, t in (*network.named_parameters(), *network.named_buffers())} == homes
    assert network.one.weight is parameter and network.counts.dtype == torch.float32


def test_pipelines_that_share_components_share_the_offload() -> None:
    pipe = tiny.sd()
    pipe.enable_model_cpu_offload(device="cpu")
    other = fourstroke.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other._offload is pipe._offload
    pipe.remove_all_hooks()
    assert pipe._offload is None


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_is_switched_on_and_off_by_the_known_names(method: str) -> None:
    pipe = tiny.xl()
    wanted = painted(pipe)
    getattr(pipe, method)(device="cpu")
    assert np.array_equal(painted(pipe), wanted) and pipe.device == CPU and pipe._execution_device == CPU
    pipe.maybe_free_model_hooks()
    pipe.reset_device_map()
    assert pipe._offload is None and np.array_equal(painted(pipe), wanted)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_without_an_accelerator_names_the_way_out(method: str) -> None:
    with pytest.raises(RuntimeError, match=rf'{method} moves networks to an accelerator.*use \.to\("cpu"\)'):
        getattr(tiny.sd(), method)()
    with pytest.raises(RuntimeError, match=r"There is no 'cuda' device here"):
        getattr(tiny.sd(), method)(device="cuda")


def test_devices_are_checked() -> None:
    with pytest.raises(ValueError, match="is given the device 'cpu:0' and the number 1; give one of the two"):
        accelerator("offloading", 1, "cpu:0")
    assert accelerator("offloading", 1, "cpu") == CPU
    check_device(torch.device("meta"))


def test_moving_an_offloaded_pipeline_to_the_device_warns() -> None:
    pipe = tiny.sd()
    pipe.enable_model_cpu_offload(device="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.to("cpu")
        assert not caught
        pipe.to("meta")
    assert "leaves all networks on the device, which enable_model_cpu_offload" in str(caught[0].message)


def test_float16_runs_as_float32_on_the_cpu_and_says_so_once() -> None:
    pipe = tiny.sd().to(torch.float16)
    wide = copy.deepcopy(pipe.unet).to(torch.float32)
    with pytest.warns(UserWarning, match="float32 runs instead"):
        first = painted(pipe)
    assert {network.dtype for network in pipe.networks} == {torch.float32}
    assert all(torch.equal(tensor, wide.state_dict()[name]) for name, tensor in pipe.unet.state_dict().items())
    assert np.array_equal(painted(pipe), first)


def test_float16_stays_until_the_first_picture_and_bfloat16_stays() -> None:
    pipe = tiny.sd().to(torch.float16)
    assert pipe.dtype == torch.float16
    pipe.to(torch.bfloat16)
    painted(pipe)
    assert pipe.dtype == torch.bfloat16


@pytest.mark.parametrize("make", [tiny.sd, tiny.xl])
def test_tiles_and_slices_are_switched_by_the_pipelines_methods(make: Callable[[], Any]) -> None:
    pipe = make()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size, pipe.vae.tile_overlap_factor = 16, 2, 0.5
    whole = painted(pipe, num_images_per_prompt=2)
    pipe.enable_vae_slicing()
    assert np.abs(painted(pipe, num_images_per_prompt=2) - whole).max() < 1e-4
    pipe.enable_vae_tiling()
    assert np.abs(painted(pipe, num_images_per_prompt=2) - whole).max() > 1 / 255
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert np.array_equal(painted(pipe, num_images_per_prompt=2), whole)


def test_tiles_that_would_not_meet_are_refused() -> None:
    vae = tiny.vae()
    vae.enable_tiling()
    vae.tile_latent_min_size = 2  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Tiles of 2 that give 32 cannot be 1 apart and overlap by 8"):
        vae.decode(torch.zeros(1, 4, 4, 4))


def test_what_makes_no_difference_is_taken_and_leaves_the_picture() -> None:
    pipe = tiny.sd()
    wanted = painted(pipe)
    pipe.enable_attention_slicing()
    pipe.enable_attention_slicing("max")
    pipe.set_attention_slice(1)
    pipe.disable_attention_slicing()
    pipe.enable_xformers_memory_efficient_attention()
    pipe.set_use_memory_efficient_attention_xformers(True)
    pipe.disable_xformers_memory_efficient_attention()
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    pipe.enable_lora_hotswap(target_rank=64)
    pipe.disable_freeu()
    pipe.upcast_vae()
    assert np.array_equal(painted(pipe), wanted)


def test_what_would_change_the_picture_and_is_left_out_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"FreeU is left out.*docs/compat\.md"):
        tiny.sd().enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


@pytest.mark.gpu
@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize(("make", "call"), CASES.values(), ids=list(CASES))
def test_offloading_to_a_gpu_gives_the_gpus_picture(make: Callable[[], Any], call: dict[str, Any], pin: bool) -> None:
    pipe = make().to("cuda")
    wanted = painted(pipe, **call)
    pipe.enable_model_cpu_offload(pin_memory=pin)
    for _ in range(2):
        assert np.array_equal(painted(pipe, **call), wanted)
        assert {network.device.type for network in pipe.networks} == {"cpu"}  # type: ignore[union-attr]
    assert all(value.is_pinned() for value in pipe.unet.parameters()) == pin
    pipe.remove_all_hooks()
    assert np.array_equal(painted(pipe.to("cuda"), **call), wanted)


@pytest.mark.gpu
def test_one_network_at_a_time_takes_less_of_a_gpus_memory() -> None:
    pipe = tiny.sd(block_out_channels=(256, 512)).to("cuda")
    peaks = []
    for offload in (False, True):
        if offload:
            pipe.enable_model_cpu_offload()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        painted(pipe)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]


def test_the_default_copy_moves() -> None:
    assert copy_to(torch.ones(2), torch.device("meta")).is_meta
