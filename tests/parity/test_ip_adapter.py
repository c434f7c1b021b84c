"""IP-Adapters: every kind, scale and picture gives what diffusers gives; unloading leaves nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fourstroke
from fourstroke.loading import WeightError
from fourstroke.lora import AdapterSet, read_lora
from fourstroke.lora.keys import named_weights
from fourstroke.models.ip_adapter import (
    attach_ip_adapters_,
    detach_ip_adapters_,
    project,
    read_ip_adapter,
    set_ip_adapter_scales_,
)
from fourstroke.pipelines.ip_adapter import (
    encode_image,
    image_tokens,
    load_ip_adapter,
    prepare_ip_adapter_image_embeds,
    set_ip_adapter_scale,
    unload_ip_adapter,
)

from .. import fakehub
from . import lora_files
from .image_prompts import (
    CLIP_WIDTHS,
    Nested,
    adapter,
    embeds,
    flat,
    give_encoder,
    load_both,
    oracle,
    picture,
    repository,
    stand_in,
    write,
)
from .lora_files import World
from .oracles import assert_close
from .test_motion import FRAMES, VIDEOS, Pair


@pytest.fixture(autouse=True)
def quiet_peer() -> Iterator[None]:
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    yield


def ours(world: World, image_embeds: list[Tensor]) -> Tensor:
    unet: Any = world.ours["unet"]
    with torch.no_grad():
        return unet(**world.inputs, image_tokens=project(unet, image_embeds))


def moved(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().mean() / b.abs().mean()) > 1e-2


def worlds(kind: str, *kinds: str) -> tuple[World, Any]:
    world = World(kind)
    pipe = stand_in(world)
    load_both(world, pipe, [adapter(world.pipe.unet, one) for one in kinds], load_ip_adapter)
    return world, pipe


# The network


@pytest.mark.parametrize("kind", CLIP_WIDTHS)
@pytest.mark.parametrize("family", ["sd15", "sd21", "xl", "ssd1b"])
def test_unet(family: str, kind: str) -> None:
    world, _ = worlds(family, kind)
    given = [embeds(kind)]
    expected = oracle(world, given)
    assert_close(ours(world, given), expected)
    assert moved(expected, world.result()["unet"])


def test_several_adapters() -> None:
    """Each with its own number of pictures."""
    world, pipe = worlds("sd15", "plus", "plain", "full")
    given = [embeds("plus"), embeds("plain", images=2), embeds("full", images=3)]
    assert_close(ours(world, given), oracle(world, given))
    for scales in ([0.3, 0.0, 0.8], [0.0, 0.0, 1.2]):
        set_ip_adapter_scale(pipe, scales)
        world.pipe.set_ip_adapter_scale(scales)
        assert_close(ours(world, given), oracle(world, given))


def test_a_number_holds_for_all_adapters() -> None:
    world, pipe = worlds("sd15", "plain", "plain")
    given = [embeds("plain"), embeds("plain")]
    set_ip_adapter_scale(pipe, 0.4)
    world.pipe.set_ip_adapter_scale([0.4, 0.4])
    assert_close(ours(world, given), oracle(world, given))


SCALES: list[Any] = [
    0.5,
    0,
    [0.7],
    {"down": {"block_1": [0.9]}},
    {"up": {"block_0": [0.0, 0.6]}},
    {"down": {"block_1": [0.0]}, "mid": 0.7, "up": {"block_0": 0.3}},
    {"mid": [0.4]},
    {"up": 1.5},
    {"down": 0.2, "mid": 0.5, "up": 0.9},
]


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_scales(scale: Any) -> None:
    world, pipe = worlds("xl", "plain")
    given = [embeds("plain")]
    full = ours(world, given)
    before = copy.deepcopy(scale)
    set_ip_adapter_scale(pipe, scale)
    world.pipe.set_ip_adapter_scale(copy.deepcopy(scale))
    found = ours(world, given)
    assert_close(found, oracle(world, given))
    assert not torch.equal(found, full)
    assert scale == before
    set_ip_adapter_scale(pipe, 1.0)
    assert torch.equal(ours(world, given), full)


def test_scales_by_block_of_two_adapters() -> None:
    """Style of one picture and layout of another (InstantStyle)."""
    world, pipe = worlds("xl", "plain", "plus")
    given = [embeds("plain"), embeds("plus")]
    scale = [{"down": {"block_1": [1.0]}}, {"up": {"block_0": [0.0, 1.0]}}]
    set_ip_adapter_scale(pipe, scale)
    world.pipe.set_ip_adapter_scale(copy.deepcopy(scale))
    assert_close(ours(world, given), oracle(world, given))


def test_scales_by_block_without_attention_in_the_middle() -> None:
    """diffusers cannot scale SSD-1B by block; a block at 1 and the rest at 0 is what its processors then compute."""
    world, pipe = worlds("ssd1b", "plain")
    given = [embeds("plain")]
    set_ip_adapter_scale(pipe, {"up": {"block_1": [0, 0.5, 0]}})
    for name, processor in world.pipe.unet.attn_processors.items():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [0.5 if name.startswith("up_blocks.1.attentions.1.") else 0.0]
    assert_close(ours(world, given), oracle(world, given))


def test_scale_zero_and_no_tokens_are_no_adapter_to_the_bit() -> None:
    world = World("xl")
    base = world.result()["unet"]
    pipe = stand_in(world)
    load_ip_adapter(pipe, adapter(world.pipe.unet, "plain"), "", "", None)
    assert torch.equal(world.result()["unet"], base)
    set_ip_adapter_scale(pipe, 0.0)
    assert torch.equal(ours(world, [embeds("plain")]), base)


def test_half_precision() -> None:
    """The adapter takes the UNet's dtype, when it is loaded and whenever the UNet is converted."""
    world = World("sd15")
    nested = adapter(world.pipe.unet, "plus")
    pipe = stand_in(world)
    load_ip_adapter(pipe, nested, "", "", None)
    given = [embeds("plus")]
    unet: Any = world.ours["unet"]
    expected = ours(world, given)
    unet.to(torch.float64)
    assert project(unet, given)[0].dtype == torch.float64
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in world.inputs.items()}
    double = unet(**inputs, image_tokens=project(unet, given))
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, rtol=1e-4, atol=1e-4)
    attach_ip_adapters_(unet, [read_ip_adapter(nested)])
    assert {buffer.dtype for buffer in unet.buffers()} == {torch.float64}


def test_animation(tmp_path: Path) -> None:
    """All frames of an animation see its picture; motion modules are passed over in the numbering."""
    pair = Pair("v2", tmp_path)
    nested = adapter(World("sd15").pipe.unet, "plain")
    alone = pair.result()
    pair.oracle._load_ip_adapter_weights([nested])
    attach_ip_adapters_(pair.unet, [read_ip_adapter(nested)])
    given = embeds("plain", rows=VIDEOS)
    tokens = [one.repeat_interleave(FRAMES, dim=0) for one in project(pair.unet, [given])]
    expected = pair.expected(added_cond_kwargs={"image_embeds": [given]})
    assert_close(pair.result(image_tokens=tokens), expected)
    assert moved(expected, alone)


# Pictures


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", CLIP_WIDTHS)
def test_prepared_pictures(kind: str, images: int, guided: bool) -> None:
    world = World("sd15")
    pipe = give_encoder(world)
    load_both(world, pipe, [adapter(world.pipe.unet, kind)], load_ip_adapter)
    pictures = [[picture(i) for i in range(images)]] if images > 1 else picture()
    found = prepare_ip_adapter_image_embeds(pipe, pictures, None, "cpu", 3, guided)
    expected = world.pipe.prepare_ip_adapter_image_embeds(pictures, None, "cpu", 3, guided)
    assert len(found) == len(expected) == 1
    assert found[0].shape[:2] == (6 if guided else 3, images)
    assert_close(found[0], expected[0])
    again = prepare_ip_adapter_image_embeds(pipe, None, [found[0][::3].contiguous()], "cpu", 3, guided)
    assert torch.equal(again[0], found[0])
    expected = world.pipe.prepare_ip_adapter_image_embeds(None, [expected[0][::3]], "cpu", 3, guided)
    assert_close(again[0], expected[0])
    assert torch.equal(prepare_ip_adapter_image_embeds(pipe, None, found, "cpu", 3, guided)[0], found[0])


@pytest.mark.parametrize("hidden", [False, True])
def test_encode_image(hidden: bool) -> None:
    world = World("xl")
    pipe = give_encoder(world)
    for pictures in (picture(), [picture(1), picture(2)], torch.randn(2, 3, 28, 28)):
        found = encode_image(pipe, pictures, "cpu", 2, hidden)
        expected = world.pipe.encode_image(pictures, "cpu", 2, hidden)
        assert_close(found[0], expected[0])
        if hidden:
            assert_close(found[1], expected[1])
        else:
            assert found[1].shape == expected[1].shape and not found[1].any() and not expected[1].any()


def test_embeddings_one_a_picture() -> None:
    world, pipe = worlds("sd15", "plain")
    given = embeds("plain", rows=2)
    [found] = prepare_ip_adapter_image_embeds(pipe, None, [given], "cpu", 4, False)
    assert torch.equal(found, given[[0, 0, 1, 1]])  # a prompt's pictures lie side by side
    [found] = prepare_ip_adapter_image_embeds(pipe, None, [given], "cpu", 3, True)
    assert torch.equal(found, given[[0, 0, 0, 1, 1, 1]])


def test_tokens_of_a_call() -> None:
    world = World("sd15")
    pipe = give_encoder(world)
    assert image_tokens(pipe, None, None, 2, True) == ()
    load_both(world, pipe, [adapter(world.pipe.unet, "plain"), adapter(world.pipe.unet, "plus")], load_ip_adapter)
    pictures = [picture(0), [picture(1), picture(2)]]
    tokens = image_tokens(pipe, pictures, None, 3, True)
    width = world.config["cross_attention_dim"]
    assert [tuple(one.shape) for one in tokens] == [(6, 4, width), (6, 10, width)]
    prepared = world.pipe.prepare_ip_adapter_image_embeds(pictures, None, "cpu", 3, True)
    expected = world.pipe.unet.encoder_hid_proj(prepared)
    for one, theirs in zip(tokens, expected, strict=True):
        assert_close(one, theirs.detach().flatten(1, 2))


# Files


def test_load_from_a_repository(tmp_path: Path) -> None:
    world = World("sd15")
    nested = {kind: adapter(world.pipe.unet, kind) for kind in ("plain", "plus")}
    files = {f"models/{kind}.safetensors": tensors for kind, tensors in nested.items()}
    repository(tmp_path, files)
    pipe = stand_in(world)
    for load in (lambda *a, **k: load_ip_adapter(pipe, *a, **k), world.pipe.load_ip_adapter):
        load(str(tmp_path), subfolder="models", weight_name=["plain.safetensors", "plus.safetensors"])
    size = pipe.image_encoder.config.image_size
    assert pipe.feature_extractor.size == {"shortest_edge": size}
    assert pipe.feature_extractor.crop_size == {"height": size, "width": size}
    for name, theirs in world.pipe.image_encoder.state_dict().items():
        assert torch.equal(pipe.image_encoder.state_dict()[pipe.image_encoder.published_name(name)], theirs)
    pixels = torch.randn(2, 3, 28, 28)
    pictures = [pixels[:1], pixels]
    given = prepare_ip_adapter_image_embeds(pipe, pictures, None, "cpu", 1, True)
    expected = world.pipe.prepare_ip_adapter_image_embeds(pictures, None, "cpu", 1, True)
    assert_close(ours(world, given), oracle(world, expected))


def test_the_image_encoder_of_another_folder(tmp_path: Path) -> None:
    world = World("xl")
    files = {"sdxl_models/plain.safetensors": adapter(world.pipe.unet, "plain")}
    repository(tmp_path, files)
    pipe = stand_in(world)
    load_ip_adapter(pipe, tmp_path, "sdxl_models", "plain.safetensors", image_encoder_folder="models/image_encoder")
    assert pipe.image_encoder is not None
    kept = pipe.image_encoder, pipe.feature_extractor
    load_ip_adapter(pipe, tmp_path, "sdxl_models", None)  # the only file; the encoder that is there stays
    assert (pipe.image_encoder, pipe.feature_extractor) == kept
    unload_ip_adapter(pipe)
    with pytest.raises(FileNotFoundError, match="sdxl_models/image_encoder/config.json"):
        load_ip_adapter(pipe, tmp_path, "sdxl_models", "plain.safetensors")
    assert pipe.unet.image_projections is None and pipe.image_encoder is None


def test_a_file_and_its_encoder(tmp_path: Path) -> None:
    world = World("sd15")
    repository(tmp_path, {"models/plain.safetensors": adapter(world.pipe.unet, "plain")})
    pipe = stand_in(world)
    load_ip_adapter(pipe, tmp_path / "models" / "plain.safetensors", None, None)
    assert pipe.image_encoder is not None


def test_without_an_image_encoder() -> None:
    world, pipe = worlds("sd15", "plain")
    assert pipe.image_encoder is None and pipe.feature_extractor.size == {"shortest_edge": 224}
    with pytest.raises(ValueError, match="no image_encoder.*ip_adapter_image_embeds"):
        image_tokens(pipe, picture(), None, 1, False)
    with pytest.raises(ValueError, match="tensors come without one"):
        load_ip_adapter(pipe, adapter(world.pipe.unet, "plain"), "", "")


def test_reading_is_the_same_from_a_file_and_from_tensors(tmp_path: Path) -> None:
    nested = adapter(World("sd15").pipe.unet, "plus")
    read = [
        read_ip_adapter(write(nested, tmp_path / "a.safetensors")),
        read_ip_adapter(nested),
        read_ip_adapter(flat(nested)),
    ]
    for one in read:
        assert one.kind == "plus" and one.projection.keys() == nested["image_proj"].keys()
        for i, pair in enumerate(one.layers):
            assert torch.equal(pair[0], nested["ip_adapter"][f"{2 * i + 1}.to_k_ip.weight"])
            assert torch.equal(pair[1], nested["ip_adapter"][f"{2 * i + 1}.to_v_ip.weight"])
    assert [one.name for one in read] == ["a", "(tensors)", "(tensors)"]


# Undoing


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("family", ["sd15", "xl"])
def test_unloading_leaves_nothing(family: str) -> None:
    world = World(family)
    pipe = give_encoder(world)
    extractor = pipe.feature_extractor
    unet: Any = pipe.unet
    before, output, modules = state(unet), world.result()["unet"], [name for name, _ in unet.named_modules()]
    load_ip_adapter(pipe, adapter(world.pipe.unet, "plain"), "", "", None)
    set_ip_adapter_scale(pipe, 0.7)
    assert moved(ours(world, [embeds("plain")]), output)
    load_ip_adapter(pipe, adapter(world.pipe.unet, "plus"), "", "", None)  # in the place of the first
    ours(world, [embeds("plus")])
    unload_ip_adapter(pipe)
    after = unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(world.result()["unet"], output)
    assert [name for name, _ in unet.named_modules()] == modules and not list(unet.buffers())
    assert pipe.image_encoder is None
    assert pipe.feature_extractor is (None if family == "xl" else extractor)  # a safety checker would need it
    unload_ip_adapter(pipe)  # once more does nothing
    with pytest.raises(ValueError, match="0 IP-Adapters"):
        unet(**world.inputs, image_tokens=[torch.randn(2, 4, 24)])


def test_what_is_attached_is_neither_saved_nor_trained_nor_a_target(tmp_path: Path) -> None:
    world, pipe = worlds("sd15", "plain")
    unet: Any = pipe.unet
    keys = set(World("sd15").ours["unet"].state_dict())
    assert set(unet.state_dict()) == set(named_weights(unet)) == {name for name, _ in unet.named_parameters()} == keys
    unet.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == keys


def test_with_a_lora(tmp_path: Path) -> None:
    """The LoRA's merge and the adapter do not know of each other, whichever comes first."""
    world, pipe = worlds("sd15", "plain")
    given = [embeds("plain")]
    path = lora_files.write(
        tmp_path / "a.safetensors", lora_files.kohya({"unet": world.pairs("unet", lora_files.ATTENTION)})
    )
    alone = ours(world, given)
    adapters = AdapterSet({"unet": world.ours["unet"]})
    adapters.add("a", read_lora(path, adapters.models))
    adapters.apply()
    world.load(path, "a")
    both = ours(world, given)
    assert_close(both, oracle(world, given))
    assert moved(both, alone)
    unload_ip_adapter(pipe)
    lora = world.result()["unet"]
    assert moved(lora, both)
    load_ip_adapter(pipe, read_nested(world), "", "", None)
    assert torch.equal(ours(world, given), both)
    adapters.clear()
    adapters.apply()
    assert torch.equal(ours(world, given), alone)


def read_nested(world: World) -> Nested:
    """The adapter that the oracle has, as a file would hold it."""
    processors = list(world.pipe.unet.attn_processors.values())
    layers = {
        f"{i}.to_{part}_ip.weight": getattr(processor, f"to_{part}_ip")[0].weight
        for i, processor in enumerate(processors)
        if hasattr(processor, "to_k_ip")
        for part in "kv"
    }
    [projection] = world.pipe.unet.encoder_hid_proj.image_projection_layers
    names = {"image_embeds": "proj", "norm": "norm"}
    tensors = {
        f"{names[name]}.{key}": tensor
        for name, part in projection.named_children()
        for key, tensor in part.state_dict().items()
    }
    return {"image_proj": tensors, "ip_adapter": layers}


def test_detaching_twice_and_attaching_again() -> None:
    world = World("sd15")
    unet: Any = world.ours["unet"]
    read = read_ip_adapter(adapter(world.pipe.unet, "plain"))
    detach_ip_adapters_(unet)
    attach_ip_adapters_(unet, [read])
    first = ours(world, given := [embeds("plain")])
    set_ip_adapter_scales_(unet, [0.2])
    attach_ip_adapters_(unet, [read])  # at scale 1 again
    assert torch.equal(ours(world, given), first)


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    """Weights of the UNet's own dtype are not copied: the file's memory is the adapter's."""
    world = World("sd15")
    read = read_ip_adapter(write(adapter(world.pipe.unet, "plain"), tmp_path / "a.safetensors"))
    unet: Any = world.ours["unet"]
    attach_ip_adapters_(unet, [read])
    pointers = {tensor.data_ptr() for pair in read.layers for tensor in pair}
    assert pointers <= {buffer.data_ptr() for buffer in unet.buffers()}
    save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(WeightError, match="b is no IP-Adapter"):
        read_ip_adapter(tmp_path / "b.safetensors")


# Whole pictures

PROMPT, NEGATIVE = "a red fox in the snow", "low quality"
STEPS = 3


def pipelines(family: str, cache: Path) -> tuple[Any, Any]:
    """The same random pipeline in both libraries, without an image encoder."""
    name = {"sd15": fakehub.SD15, "xl": fakehub.XL}[family]
    fakehub.add_pipeline(cache, name, [PROMPT, NEGATIVE])
    folder = fakehub.snapshot(cache, name)
    fakehub.put_into_form(folder, [PROMPT, NEGATIVE], "new")
    options = {"torch_dtype": torch.float32}
    mine, theirs = (library.DiffusionPipeline.from_pretrained(folder, **options) for library in (fourstroke, diffusers))
    for library, pipe in ((fourstroke, mine), (diffusers, theirs)):
        pipe.scheduler = library.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
    return mine, theirs


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("family", "kinds"), [("sd15", ["plain"]), ("sd15", ["plus"]), ("xl", ["plain", "plus"])])
def test_pictures(family: str, kinds: list[str], guidance: float, tmp_path: Path) -> None:
    mine, theirs = pipelines(family, tmp_path / "model")
    files = {f"models/{kind}.safetensors": adapter(theirs.unet, kind) for kind in kinds}
    repository(tmp_path / "ip", files)
    latents = torch.randn(2, 4, 8, 8)
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_images_per_prompt": 2, "latents": latents}
    call |= {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "latent"}
    alone = theirs(**call).images
    weights = [f"{kind}.safetensors" for kind in kinds]
    scale = [0.6 + 0.3 * i for i in range(len(kinds))]
    for pipe in (mine, theirs):
        pipe.load_ip_adapter(tmp_path / "ip", "models", weights)
        pipe.set_ip_adapter_scale(scale)
    pixels = [torch.randn(1 + i, 3, 28, 28) for i in range(len(kinds))]
    found, expected = (pipe(**call, ip_adapter_image=pixels).images for pipe in (mine, theirs))
    assert_same_latents(found, expected)
    assert moved(expected, alone)
    given = mine.prepare_ip_adapter_image_embeds(pixels, None, "cpu", 1, guidance > 1)
    assert_close(mine(**call, ip_adapter_image_embeds=given).images, found)
    with pytest.raises(ValueError, match="but no pictures for them"):
        mine(**call)
    mine.unload_ip_adapter()
    assert_same_latents(mine(**call).images, alone)


def assert_same_latents(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning")
def test_a_pipeline_with_an_image_encoder_is_saved_and_read(tmp_path: Path) -> None:
    mine, theirs = pipelines("xl", tmp_path / "model")
    repository(tmp_path / "ip", {"plain.safetensors": adapter(theirs.unet, "plain")}, ("image_encoder",))
    mine.load_ip_adapter(tmp_path / "ip", None, "plain.safetensors")
    mine.save_pretrained(tmp_path / "saved")
    again, read = (
        library.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
        for library in (fourstroke, diffusers)
    )
    pixels = torch.randn(2, 3, 28, 28)
    expected = mine.image_encoder(pixels).pooled
    assert torch.equal(again.image_encoder(pixels).pooled, expected)
    with torch.no_grad():
        assert_close(read.image_encoder(pixels).image_embeds, expected)
    assert again.feature_extractor == mine.feature_extractor
    assert again.unet.state_dict().keys() == read.unet.state_dict().keys()
