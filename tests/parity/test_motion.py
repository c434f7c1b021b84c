"""Motion adapters in our UNet compute what diffusers' UNetMotionModel computes, key for key, LoRAs included."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourstroke import MotionAdapter
from fourstroke.config import MotionAdapterConfig, UnsupportedConfig
from fourstroke.loading import WeightError
from fourstroke.lora import AdapterSet, read_lora
from fourstroke.models.motion import attach_motion_, check_frames, detach_motion_
from fourstroke.models.unet import UNet2DConditionModel

from .oracles import UNETS, assert_close, randomise, unet_inputs

VIDEOS, FRAMES = 2, 4
COMMON: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "motion_layers_per_block": 1,
    "motion_norm_num_groups": 8,
    "motion_num_attention_heads": 4,
}
# A published kind of adapter -> the UNet it is for, diffusers' keyword arguments.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "v1": ("sd15", {**COMMON, "use_motion_mid_block": False, "motion_max_seq_length": 6}),
    "v2": ("sd15", {**COMMON, "motion_max_seq_length": 8}),
    "xl": ("xl", {**COMMON, "use_motion_mid_block": False}),
    "deep": (
        "sd21",
        {
            **COMMON,
            "motion_transformer_layers_per_block": (1, 2),
            "motion_transformer_layers_per_mid_block": (2,),
            "motion_num_attention_heads": (2, 4),
        },
    ),
}


class Pair:
    """diffusers' UNet with a motion adapter and ours, of the same random weights; ours are loaded from files."""

    def __init__(self, kind: str, folder: Path):
        self.config = UNETS[ADAPTERS[kind][0]]
        unet = randomise(diffusers.UNet2DConditionModel(**self.config))
        self.adapter = randomise(diffusers.MotionAdapter(**ADAPTERS[kind][1]))
        unet.save_pretrained(folder / "unet")
        self.adapter.save_pretrained(folder / "adapter")
        self.oracle = diffusers.UNetMotionModel.from_unet2d(unet, self.adapter).eval().requires_grad_(False)
        if "add_embedding.linear_1.weight" in self.oracle.state_dict():  # from_unet2d forgets it
            self.oracle.add_embedding.load_state_dict(unet.add_embedding.state_dict())
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
        self.ours = MotionAdapter.from_pretrained(folder / "adapter").requires_grad_(False)
        attach_motion_(self.unet, self.ours)
        self.inputs = unet_inputs(self.config, batch=VIDEOS * FRAMES)
        for name, value in self.inputs.get("added_cond_kwargs", {}).items():  # one a video for diffusers
            self.inputs["added_cond_kwargs"][name] = value[:VIDEOS].repeat_interleave(FRAMES, dim=0)

    def result(self, **changes: Any) -> Tensor:
        return self.unet(**self.inputs | changes, frames=FRAMES)

    def expected(self, **changes: Any) -> Tensor:
        inputs = self.inputs | changes
        if "added_cond_kwargs" in inputs:
            inputs["added_cond_kwargs"] = {name: x[::FRAMES] for name, x in inputs["added_cond_kwargs"].items()}
        inputs["sample"] = inputs["sample"].unflatten(0, (VIDEOS, FRAMES)).transpose(1, 2)
        return self.oracle(**inputs).sample.transpose(1, 2).flatten(0, 1).detach()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_unet_with_motion(kind: str, tmp_path: Path) -> None:
    pair = Pair(kind, tmp_path)
    assert set(pair.unet.state_dict()) == set(pair.oracle.state_dict())
    expected = pair.expected()
    assert_close(pair.result(), expected)
    # A guard: without the adapter, or with the frames in another order, the oracle computes something else.
    detach_motion_(pair.unet)
    assert (pair.result() - expected).abs().mean() > 1e-2 * expected.abs().mean()
    turned = pair.inputs["sample"].unflatten(0, (VIDEOS, FRAMES)).flip(1).flatten(0, 1)
    back = pair.expected(sample=turned).unflatten(0, (VIDEOS, FRAMES)).flip(1).flatten(0, 1)
    assert (back - expected).abs().mean() > 1e-3 * expected.abs().mean()


def test_odd_sizes(tmp_path: Path) -> None:
    pair = Pair("v2", tmp_path)
    sample = torch.randn(VIDEOS * FRAMES, 4, 9, 13)
    assert_close(pair.result(sample=sample), pair.expected(sample=sample))


def test_positions_come_from_the_file(tmp_path: Path) -> None:
    """``pe`` is a buffer, which `randomise` leaves alone."""
    pair = Pair("v2", tmp_path)
    before = pair.expected()
    state = {name: torch.randn_like(x) if name.endswith(".pe") else x for name, x in pair.ours.state_dict().items()}
    pair.ours.load_state_dict(state)
    pair.oracle.load_state_dict(state, strict=False)
    assert_close(pair.result(), pair.expected())
    assert (pair.expected() - before).abs().mean() > 1e-3 * before.abs().mean()


def test_one_frame_is_an_animation_too(tmp_path: Path) -> None:
    pair = Pair("v2", tmp_path)
    sample = pair.inputs["sample"]
    expected = pair.oracle(**pair.inputs | {"sample": sample[:, :, None]}).sample[:, :, 0]
    assert_close(pair.unet(**pair.inputs, frames=1), expected)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_folders_go_both_ways(kind: str, tmp_path: Path) -> None:
    theirs = randomise(diffusers.MotionAdapter(**ADAPTERS[kind][1]))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MotionAdapter.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = diffusers.MotionAdapter.from_pretrained(tmp_path / "ours")
    for state in (ours.state_dict(), again.state_dict()):
        assert set(state) == set(theirs.state_dict())
        assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    published = {name: value for name, value in theirs.config.items() if not name.startswith("_")}
    assert json.dumps({name: again.config[name] for name in published}) == json.dumps(published)


def test_fresh_adapters_have_diffusers_positions() -> None:
    config = ADAPTERS["v2"][1]
    theirs, ours = diffusers.MotionAdapter(**config), MotionAdapter.from_config(config)
    name = "mid_block.motion_modules.0.transformer_blocks.0.pos_embed.pe"
    assert_close(ours.state_dict()[name], theirs.state_dict()[name])
    with torch.device("meta"):
        assert MotionAdapter().config == MotionAdapterConfig()
        assert set(MotionAdapter().state_dict()) == set(diffusers.MotionAdapter().state_dict())


def test_fp16_variant(tmp_path: Path) -> None:
    theirs = randomise(diffusers.MotionAdapter(**ADAPTERS["v2"][1])).half()
    theirs.save_pretrained(tmp_path, variant="fp16")
    ours = MotionAdapter.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert ours.dtype == torch.float16
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_adapter_takes_the_dtype_of_the_unet(tmp_path: Path) -> None:
    pair = Pair("v1", tmp_path)
    detach_motion_(pair.unet)
    attach_motion_(pair.unet.double(), pair.ours)
    assert pair.ours.dtype == torch.float64
    assert {x.dtype for x in pair.unet.state_dict().values()} == {torch.float64}


def test_modules_are_shared_and_leave_without_a_trace(tmp_path: Path) -> None:
    pair = Pair("v2", tmp_path)
    plain = {name for name in pair.unet.state_dict() if "motion_modules" not in name}
    for name, parameter in pair.ours.named_parameters():
        assert pair.unet.get_parameter(name) is parameter
    assert pair.unet.source is not None and set(pair.unet.source.places) == set(pair.unet.state_dict())
    detach_motion_(pair.unet)
    assert set(pair.unet.state_dict()) == plain == set(pair.unet.source.places)
    detach_motion_(pair.unet)
    attach_motion_(pair.unet, pair.ours)
    assert_close(pair.result(), pair.expected())
    # An adapter without a module for the mid block takes the place of one that has it.
    attach_motion_(pair.unet, MotionAdapter.from_config(ADAPTERS["v1"][1]))
    assert pair.unet.mid_block is not None and pair.unet.mid_block.motion_modules is None


def test_saved_unet_is_without_the_adapter(tmp_path: Path) -> None:
    pair = Pair("v2", tmp_path)
    pair.unet.save_pretrained(tmp_path / "saved", variant="x")
    assert set(diffusers.UNet2DConditionModel(**pair.config).state_dict()) == set(
        load_file(tmp_path / "saved" / "diffusion_pytorch_model.x.safetensors")
    )
    again = UNet2DConditionModel.from_pretrained(tmp_path / "saved", variant="x")
    attach_motion_(again, pair.ours)
    assert torch.equal(again(**pair.inputs, frames=FRAMES), pair.result())


def original_tensors(config: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Random tensors in AnimateDiff's own layout: animatediff/models/motion_module.py, VanillaTemporalModule."""
    widths, layers, length = config["block_out_channels"], config["motion_layers_per_block"], 6
    blocks = {f"down_blocks.{i}": (width, layers) for i, width in enumerate(widths)}
    blocks |= {f"up_blocks.{i}": (width, layers + 1) for i, width in enumerate(reversed(widths))}
    if config.get("use_motion_mid_block", True):
        blocks["mid_block"] = (widths[-1], 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for block, (width, count) in blocks.items():
        for i in range(count):
            outer = f"{block}.motion_modules.{i}.temporal_transformer"
            inner = f"{outer}.transformer_blocks.0"
            for norm in (f"{outer}.norm", f"{inner}.norms.0", f"{inner}.norms.1", f"{inner}.ff_norm"):
                shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
            linears = {f"{outer}.proj_in": (width, width), f"{outer}.proj_out": (width, width)}
            linears |= {f"{inner}.ff.net.0.proj": (8 * width, width), f"{inner}.ff.net.2": (width, 4 * width)}
            for attention in (f"{inner}.attention_blocks.0", f"{inner}.attention_blocks.1"):
                shapes |= {f"{attention}.to_{part}.weight": (width, width) for part in "qkv"}
                shapes[f"{attention}.pos_encoder.pe"] = (1, length, width)
                linears[f"{attention}.to_out.0"] = (width, width)
            for name, shape in linears.items():
                shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    tensors = {prefix + name: torch.randn(shape) for name, shape in shapes.items()}
    positions = diffusers.models.embeddings.SinusoidalPositionalEmbedding
    for name, tensor in tensors.items():
        if name.endswith(".pe"):
            tensor.copy_(positions(tensor.shape[-1], length).pe)
    return tensors


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_original_layout(kind: str, prefix: str, tmp_path: Path) -> None:
    config = ADAPTERS[kind][1] | {"motion_max_seq_length": 6}
    tensors = original_tensors(config, prefix)
    save_file(tensors, tmp_path / "mm.safetensors")
    oracle = diffusers.MotionAdapter(**config)
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    oracle.load_state_dict(
        oracle.state_dict() | convert_animatediff_checkpoint_to_diffusers(bare)
    )  # strict: all names are known
    ours = MotionAdapter.from_single_file(
        tmp_path / "mm.safetensors", config={**ADAPTERS[kind][1], "motion_max_seq_length": 6}
    )
    found = ours.state_dict()
    assert set(found) == set(oracle.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in oracle.state_dict().items())
    # The repository form of such a file: a configuration beside it.
    (tmp_path / "config.json").write_text(json.dumps(dict(oracle.config)))
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(x, found[name]) for name, x in MotionAdapter.from_pretrained(tmp_path).state_dict().items())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_single_file_tells_its_configuration(kind: str, tmp_path: Path) -> None:
    """All but heads and groups, which are 8 and 32 in all published adapters."""
    config = ADAPTERS[kind][1] | {"motion_norm_num_groups": 32, "motion_num_attention_heads": 8}
    theirs = randomise(diffusers.MotionAdapter(**config))
    theirs.save_pretrained(tmp_path)
    ours = MotionAdapter.from_single_file(tmp_path / "diffusion_pytorch_model.safetensors")
    single = {"motion_transformer_layers_per_mid_block": 2} if kind == "deep" else {}
    assert ours.config == MotionAdapter.from_config(config | single).config
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in ours.state_dict().items())


def test_single_file_errors(tmp_path: Path) -> None:
    tensors = original_tensors(ADAPTERS["v2"][1])

    def load(changed: dict[str, Tensor], **options: Any) -> None:
        save_file(changed, tmp_path / "mm.safetensors")
        MotionAdapter.from_single_file(tmp_path / "mm.safetensors", **options)

    with pytest.raises(WeightError, match=r"1 unexpected: conv_in\.weight"):
        load({**tensors, "conv_in.weight": torch.ones(1)})
    gone = "up_blocks.1.motion_modules.1.temporal_transformer.transformer_blocks.0.norms.1.bias"
    with pytest.raises(WeightError, match=r"1 missing: up_blocks\.1\.motion_modules\.1\.transformer_blocks\.0\.norm2"):
        load({name: tensor for name, tensor in tensors.items() if name != gone})
    with pytest.raises(WeightError, match=r"not a motion adapter: down_blocks\.0\.motion_modules\.0\.norm\.weight"):
        load({"conv_in.weight": torch.ones(1)})
    with pytest.raises(UnsupportedConfig, match=r"'conv_in_channels' is 9"):
        load(tensors, config={"conv_in_channels": 9})
    with pytest.raises(ValueError, match="is a pickle"):
        MotionAdapter.from_single_file(tmp_path / "mm_sd_v15_v2.ckpt")
    with pytest.raises(ValueError, match="is a pickle"):
        MotionAdapter.from_single_file("https://huggingface.co/guoyww/animatediff/blob/main/mm_sd_v15_v2.ckpt")
    with pytest.raises(FileNotFoundError, match=r"There is no file 'mm\.safetensors'. Give a local"):
        MotionAdapter.from_single_file("mm.safetensors")
    with pytest.raises(FileNotFoundError, match="'ann/motion' is not in the cache"):
        MotionAdapter.from_single_file("https://huggingface.co/ann/motion/resolve/main/sub/mm.safetensors")
    with pytest.warns(UserWarning, match=r"MotionAdapter\.from_single_file: ignored unknown arguments 'varient'"):
        load(tensors, varient="fp16")


def test_hub_address(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--ann--motion" / "snapshots" / "c0ffee"
    (snapshot / "sub").mkdir(parents=True)
    (tmp_path / "models--ann--motion" / "refs").mkdir()
    (tmp_path / "models--ann--motion" / "refs" / "main").write_text("c0ffee")
    save_file(original_tensors(ADAPTERS["v1"][1]), snapshot / "sub" / "mm.safetensors")
    address = "https://huggingface.co/ann/motion/blob/main/sub/mm.safetensors"
    ours = MotionAdapter.from_single_file(address, cache_dir=tmp_path)
    assert ours.config.block_out_channels == (32, 64)
    assert not ours.config.use_motion_mid_block


def test_config_errors() -> None:
    for name, value in (
        ("conv_in_channels", 9),
        ("motion_activation_fn", "gelu"),
        ("motion_attention_bias", True),
        ("motion_cross_attention_dim", 768),
    ):
        with pytest.raises(UnsupportedConfig, match=f"MotionAdapter: config field '{name}' is"):
            MotionAdapter.from_config({name: value})
    for name, value, count in (
        ("motion_layers_per_block", [2, 2], 4),
        ("motion_num_attention_heads", (8,), 4),
        ("motion_transformer_layers_per_block", [[1, 1]] * 4, 4),
        ("motion_transformer_layers_per_mid_block", (1, 1), 1),
    ):
        with pytest.raises(UnsupportedConfig, match=rf"MotionAdapter: {name} is .*one integer, or {count} of them"):
            MotionAdapter.from_config({name: value})


def test_adapter_of_another_unet(tmp_path: Path) -> None:
    pair = Pair("v2", tmp_path)
    before = {name: tensor.clone() for name, tensor in pair.unet.state_dict().items()}
    for changes, message in (
        ({"block_out_channels": (32, 32)}, r"down_blocks\.1 has layers of \[64\] channels, the adapter's have \[32\]"),
        ({"motion_layers_per_block": 2}, r"up_blocks\.0 has layers of \[64, 64\] channels, .* \[64, 64, 64\]"),
        ({"block_out_channels": (32,)}, r"down_blocks\.1 has layers of \[64\] channels, the adapter's have \[\]"),
        (
            {"block_out_channels": (32, 64, 64)},
            r"down_blocks\.2 has layers of \[\] channels, the adapter's have \[64\]",
        ),
        ({"motion_mid_block_layers_per_block": 2}, r"mid_block has layers of \[64\] .* have \[64, 64\]"),
    ):
        other = MotionAdapter.from_config(ADAPTERS["v2"][1] | changes)
        with pytest.raises(ValueError, match=f"does not fit the UNet.*{message}.*block_out_channels \\(32, 64\\)"):
            attach_motion_(pair.unet, other)
    assert_close(pair.result(), pair.expected())
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.unet.state_dict().items())


def test_an_adapter_for_the_mid_block_needs_a_transformer_there() -> None:
    unet = UNet2DConditionModel.from_config(UNETS["ssd1b"])
    config = {"block_out_channels": (32, 64, 64), "motion_norm_num_groups": 8, "motion_num_attention_heads": 4}
    with pytest.raises(ValueError, match=r"mid_block has layers of \[\] channels, the adapter's have \[64\]"):
        attach_motion_(unet, MotionAdapter.from_config(config))
    attach_motion_(unet, MotionAdapter.from_config({**config, "use_motion_mid_block": False}))


def test_too_many_frames(tmp_path: Path) -> None:
    pair = Pair("v1", tmp_path)
    inputs = unet_inputs(pair.config, batch=7)
    with pytest.raises(ValueError, match=r"7 frames, but .* positions for 1 to 6 \(motion_max_seq_length\).*windows"):
        pair.unet(**inputs, frames=7)
    with pytest.raises(ValueError, match="7 pictures are no whole number of videos of 2 frames"):
        pair.unet(**inputs, frames=2)
    with pytest.raises(ValueError, match="0 frames"):
        check_frames(0, 6)
    check_frames(6, 6)


# Motion LoRAs


def targets(unet: nn.Module) -> list[str]:
    """What AnimateDiff's motion LoRAs adapt: all projections of the temporal attentions."""
    return [
        name for name, _ in unet.named_modules() if re.search(r"motion_modules\..*attn\d\.to_(q|k|v|out\.0)$", name)
    ]


def lora_tensors(unet: nn.Module, rank: int = 4) -> dict[str, Tensor]:
    """In peft's names: no alpha, as the published ones."""
    found = {}
    for name in targets(unet):
        outputs, inputs = unet.get_parameter(f"{name}.weight").shape
        found[f"unet.{name}.lora_A.weight"] = 0.3 * torch.randn(rank, inputs)
        found[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(outputs, rank)
    return found


def dialect(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The same LoRA as other programs write it."""
    rules: list[tuple[str, str]] = [(r"\.lora_A\.", ".lora.down."), (r"\.lora_B\.", ".lora.up.")]
    if name == "peft":
        rules = []
    if name in ("processors", "original", "original module"):
        rules += [
            (r"\.to_([qkv])\.lora\.", r".processor.to_\1_lora."),
            (r"\.to_out\.0\.lora\.", ".processor.to_out_lora."),
        ]
    if name.startswith("original"):
        rules += [
            (r"^unet\.", "module." if name == "original module" else ""),
            (r"(motion_modules\.\d+)", r"\1.temporal_transformer"),
            (r"\.attn1\.", ".attention_blocks.0."),
            (r"\.attn2\.", ".attention_blocks.1."),
        ]
    found = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        found[key] = tensor
    return found


@pytest.mark.parametrize("name", ["peft", "diffusers", "processors", "original", "original module"])
def test_motion_lora(name: str, tmp_path: Path) -> None:
    pair = Pair("v2", tmp_path)
    base, tensors = pair.expected(), lora_tensors(pair.oracle)
    written = dialect(tensors, name)
    assert name == "peft" or not set(written) & set(tensors)
    save_file(written, tmp_path / "lora.safetensors")
    adapters = AdapterSet({"unet": pair.unet, "text_encoder": None})
    adapters.add("zoom", read_lora(tmp_path / "lora.safetensors", adapters.models))
    adapters.set("zoom", 0.8)
    adapters.apply()
    pair.oracle.load_lora_adapter(tensors, prefix="unet", adapter_name="zoom")
    pair.oracle.set_adapters("zoom", 0.8)
    expected = pair.expected()
    assert (expected - base).abs().mean() > 1e-2 * base.abs().mean()
    assert_close(pair.result(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_motion_weights_come_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    pair = Pair("v2", tmp_path)
    pair.unet.to(dtype)
    before = {name: tensor.clone() for name, tensor in pair.unet.state_dict().items()}
    adapters = AdapterSet({"unet": pair.unet})
    for name in ("a", "b"):
        adapters.add(name, read_lora(lora_tensors(pair.unet), adapters.models, name=name))
    states = []
    for name in ("a", "b", "a", []):
        adapters.set(name)
        adapters.apply()
        states.append({name: tensor.clone() for name, tensor in pair.unet.state_dict().items()})
    first, second, third, last = states
    moved = {f"{name}.weight" for name in targets(pair.unet)}
    assert {name for name in first if not torch.equal(first[name], before[name])} == moved
    assert {name for name in first if not torch.equal(first[name], second[name])} == moved
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert all(torch.equal(last[name], before[name]) for name in last)


@pytest.mark.parametrize("loaded", [True, False], ids=["from files", "made in memory"])
def test_pristine_motion_weights_are_read_from_the_adapters_file(loaded: bool, tmp_path: Path) -> None:
    """No copy is kept where a file has the weights; one is where there is no file."""
    pair = Pair("v2", tmp_path)
    if not loaded:
        fresh = MotionAdapter.from_config(ADAPTERS["v2"][1])
        fresh.load_state_dict(pair.ours.state_dict())
        attach_motion_(pair.unet, fresh.requires_grad_(False))
    before = {name: tensor.clone() for name, tensor in pair.unet.state_dict().items()}
    adapters = AdapterSet({"unet": pair.unet})
    adapters.add("zoom", read_lora(lora_tensors(pair.unet), adapters.models))
    adapters.apply()
    copies = [slot.copy is not None and not slot.mapped for slot in adapters._bases["unet"].slots.values()]
    assert len(copies) == len(targets(pair.unet))
    assert not any(copies) if loaded else all(copies)
    adapters.clear()
    adapters.apply()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.unet.state_dict().items())
