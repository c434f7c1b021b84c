"""CLIP's vision encoder, its picture preparation and the safety checker, against transformers and diffusers."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from diffusers.pipelines.stable_diffusion import safety_checker as diffusers_safety
from safetensors.torch import save_file
from torch import Tensor, nn

from fourstroke.config import CLIPVisionConfig, SafetyCheckerConfig, config_from_dict
from fourstroke.loading import Model
from fourstroke.models.clip_vision import CLIPImageProcessor, CLIPVisionModel, CLIPVisionModelWithProjection
from fourstroke.models.safety import StableDiffusionSafetyChecker, is_flagged

from .oracles import assert_close, randomise

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 12,
    "layer_norm_eps": 1e-4,
}
TEXT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CHECKER: dict[str, Any] = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 20}


def give_weights(ours: Model, oracle: nn.Module) -> None:
    """Copy the oracle's weights; transformers 5 leaves out one of the names of a published key, 4 does not."""
    state = {ours.published_name(name): tensor for name, tensor in oracle.state_dict().items()}
    assert set(state) - {None} == set(ours.state_dict())
    ours.load_state_dict(state)


def checker_pair() -> tuple[StableDiffusionSafetyChecker, Any]:
    oracle = randomise(diffusers_safety.StableDiffusionSafetyChecker(transformers.CLIPConfig(**CHECKER)), std=0.5)
    ours = StableDiffusionSafetyChecker.from_config(oracle.config.to_dict()).eval()
    give_weights(ours, oracle)
    return ours, oracle


def cosines(oracle: Any, clip_input: Tensor) -> tuple[Tensor, Tensor]:
    """Of every picture with the concepts (N, 17) and with the special-care concepts (N, 3), by the oracle's parts."""
    embeds = oracle.visual_projection(oracle.vision_model(clip_input)[1])
    return cosine(embeds, oracle.concept_embeds), cosine(embeds, oracle.special_care_embeds)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)


def set_thresholds(checkers: tuple[Any, ...], concepts: Tensor, special: Tensor) -> None:
    for checker in checkers:
        checker.concept_embeds_weights.data = concepts.clone()
        checker.special_care_embeds_weights.data = special.clone()


def to_array(picture: Any) -> np.ndarray:
    return picture.numpy().copy() if isinstance(picture, Tensor) else np.array(picture)


def quiet(checker: StableDiffusionSafetyChecker, *arguments: Any, **keywords: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The safety checker flagged")
        return checker(*arguments, **keywords)


# --- the vision encoder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_vision_model_with_projection(act: str) -> None:
    oracle = randomise(
        transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, hidden_act=act))
    )
    ours = CLIPVisionModelWithProjection.from_config(oracle.config.to_dict())
    give_weights(ours, oracle)
    pixels = torch.randn(3, 3, 28, 28)
    output, expected = ours(pixels), oracle(pixels, output_hidden_states=True)
    assert_close(output.pooled.detach(), expected.image_embeds)
    assert_close(output.last_hidden_state.detach(), expected.last_hidden_state)
    assert len(output.hidden_states) == len(expected.hidden_states) == 3
    for state, expected_state in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert_close(state.detach(), expected_state)


def test_vision_model_without_projection() -> None:
    oracle = randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)))
    ours = CLIPVisionModel.from_config(oracle.config.to_dict())
    give_weights(ours, oracle)
    pixels = torch.randn(2, 3, 28, 28)
    assert_close(ours(pixels).pooled.detach(), oracle(pixels).pooler_output)


def test_pictures_that_patches_do_not_cover() -> None:
    """16 is not a multiple of 7: the last two rows and columns are seen by no patch."""
    config = transformers.CLIPVisionConfig(**{**VISION, "image_size": 16})
    oracle = randomise(transformers.CLIPVisionModelWithProjection(config))
    ours = CLIPVisionModelWithProjection.from_config(config.to_dict())
    give_weights(ours, oracle)
    pixels = torch.randn(2, 3, 16, 16)
    assert_close(ours(pixels).pooled.detach(), oracle(pixels).image_embeds)


def test_a_picture_of_a_batch_is_that_picture_alone() -> None:
    ours = CLIPVisionModelWithProjection.from_config(VISION)
    randomise(ours)
    pixels = torch.randn(3, 3, 28, 28)
    assert_close(ours(pixels).pooled, torch.cat([ours(one[None]).pooled for one in pixels]))


def test_vision_model_reads_what_transformers_saved(tmp_path: Path) -> None:
    oracle = randomise(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION)))
    oracle.save_pretrained(tmp_path / "image_encoder")
    ours = CLIPVisionModelWithProjection.from_pretrained(tmp_path, subfolder="image_encoder")
    pixels = torch.randn(2, 3, 28, 28)
    assert_close(ours(pixels).pooled.detach(), oracle(pixels).image_embeds)


# --- the safety checker ---------------------------------------------------------------------------------------------


def test_published_names() -> None:
    """The names in runwayml/stable-diffusion-v1-5's safety_checker/model.safetensors, but for the number of layers."""
    layer = "vision_model.vision_model.encoder.layers.{}."
    modules = [f"self_attn.{name}_proj" for name in "kvq"] + ["self_attn.out_proj", "layer_norm1", "layer_norm2"]
    modules += ["mlp.fc1", "mlp.fc2"]
    expected = {layer.format(i) + f"{name}.{kind}" for i in (0, 1) for name in modules for kind in ("weight", "bias")}
    expected |= {
        f"vision_model.vision_model.{name}.{kind}"
        for name in ("pre_layrnorm", "post_layernorm")
        for kind in ("weight", "bias")
    }
    expected |= {
        "vision_model.vision_model.embeddings.class_embedding",
        "vision_model.vision_model.embeddings.patch_embedding.weight",
        "vision_model.vision_model.embeddings.position_embedding.weight",
        "visual_projection.weight",
        "concept_embeds",
        "concept_embeds_weights",
        "special_care_embeds",
        "special_care_embeds_weights",
    }
    assert set(StableDiffusionSafetyChecker.from_config(CHECKER).state_dict()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_picture_gets_the_oracle_s_verdict(dtype: torch.dtype) -> None:
    """Thresholds between the pictures' cosines, so that one is flagged and the next is not."""
    ours, oracle = checker_pair()
    clip_input = torch.randn(6, 3, 28, 28)
    concepts, special = cosines(oracle, clip_input)
    # Above every cosine, but for concept 4, whose threshold is in the middle of the widest gap between two pictures.
    thresholds = concepts.amax(dim=0) + 0.1
    ranked = concepts[:, 4].sort().values
    gap = int((ranked[1:] - ranked[:-1]).argmax())
    thresholds[4] = (ranked[gap] + ranked[gap + 1]) / 2
    assert ranked[gap + 1] - ranked[gap] > 0.05, "the pictures are too alike to tell half precision's error apart"
    set_thresholds((ours, oracle), thresholds, special.amax(dim=0) + 0.1)
    ours, oracle, clip_input = ours.to(dtype), oracle.to(dtype), clip_input.to(dtype)
    images = np.random.default_rng(0).random((6, 8, 8, 3), dtype=np.float32)
    expected_images, expected = oracle(clip_input=clip_input, images=images.copy())
    result, flags = quiet(ours, clip_input=clip_input, images=images)
    assert flags == expected == (concepts[:, 4] > thresholds[4]).tolist()
    assert any(flags) and not all(flags)
    assert all(type(flag) is bool for flag in flags)
    np.testing.assert_array_equal(result, expected_images)


def test_special_care_judges_more_strictly() -> None:
    """Concept 3 stays 0.005 below its threshold: only the adjustment of 0.01 flags the picture."""
    ours, oracle = checker_pair()
    clip_input = torch.randn(1, 3, 28, 28)
    concepts, special = cosines(oracle, clip_input)
    images = np.ones((1, 4, 4, 3), dtype=np.float32)
    for margin, expected in ((-0.1, True), (0.1, False)):
        thresholds = concepts[0] + 0.1
        thresholds[3] = concepts[0, 3] + 0.005
        special_thresholds = special[0] + 0.1
        special_thresholds[1] = special[0, 1] + margin
        set_thresholds((ours, oracle), thresholds, special_thresholds)
        assert oracle(clip_input, images.copy())[1] == [expected]
        assert ours.flags(clip_input) == [expected]


def test_special_care_alone_flags_nothing() -> None:
    ours, oracle = checker_pair()
    clip_input = torch.randn(2, 3, 28, 28)
    concepts, special = cosines(oracle, clip_input)
    set_thresholds((ours, oracle), concepts.amax(dim=0) + 0.1, special.amin(dim=0) - 0.1)
    assert oracle(clip_input, np.ones((2, 4, 4, 3)))[1] == ours.flags(clip_input) == [False, False]


def test_rule_and_rounding_at_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores in steps of 0.0001 around zero, where only exact rounding gives the oracle's verdict."""
    ours, oracle = checker_pair()
    offsets = torch.arange(-120, 40) * 1e-4  # (N,)
    thresholds, special_thresholds = torch.full((17,), 0.1993), torch.full((3,), 0.21)
    set_thresholds((ours, oracle), thresholds, special_thresholds)
    clip_input = torch.zeros(len(offsets), 3, 28, 28)
    verdicts = []
    for special_offset in (-0.02, 0.0004, 0.0005, 0.0006, 0.02):
        concepts = thresholds - 0.3 + torch.zeros(len(offsets), 17)
        concepts[:, 16] = thresholds[16] + offsets
        special = special_thresholds - 0.3 + torch.zeros(len(offsets), 3)
        special[:, 0] = special_thresholds[0] + special_offset
        pending = [special, concepts]  # the oracle asks for them in this order
        monkeypatch.setattr(diffusers_safety, "cosine_distance", lambda *_, pending=pending: pending.pop(0))
        expected = oracle(clip_input, np.zeros((len(offsets), 1, 1, 3)))[1]
        assert not pending
        assert is_flagged(concepts, thresholds, special, special_thresholds).tolist() == expected
        verdicts.append(sum(expected))
    assert verdicts[0] < verdicts[-1], "special care changes nothing here, so nothing is tested"


@pytest.mark.parametrize("kind", ["array", "tensor", "arrays", "tensors", "pil"])
def test_flagged_pictures_come_back_black_and_the_caller_keeps_its_own(kind: str) -> None:
    ours, oracle = checker_pair()
    clip_input = torch.randn(3, 3, 28, 28)
    concepts, special = cosines(oracle, clip_input)
    flagged = int(concepts[:, 0].argmax())
    thresholds = concepts.amax(dim=0) + 0.1
    thresholds[0] = concepts[:, 0].sort().values[-2:].mean()
    set_thresholds((ours, oracle), thresholds, special.amax(dim=0) + 0.1)

    pixels = torch.rand(3, 3, 6, 5) * 0.9 + 0.1
    array = pixels.permute(0, 2, 3, 1).numpy()
    images: Any = {
        "array": lambda: array.copy(),
        "tensor": lambda: pixels.clone(),
        "arrays": lambda: [one.copy() for one in array],
        "tensors": lambda: [one.clone() for one in pixels],
        "pil": lambda: [PIL.Image.fromarray((one * 255).astype(np.uint8)) for one in array],
    }[kind]()
    before = [to_array(image) for image in images]
    result, flags = quiet(ours, clip_input, images)
    assert flags == [index == flagged for index in range(3)]
    assert type(result) is type(images) and result is not images
    for index, (old, image, new) in enumerate(zip(before, images, result, strict=True)):
        np.testing.assert_array_equal(to_array(image), old)
        np.testing.assert_array_equal(to_array(new), np.zeros_like(old) if index == flagged else old)
        assert to_array(new).dtype == old.dtype
    if kind != "pil":
        theirs = oracle(clip_input, images)[0]  # changes its argument, so it comes last
        for new, expected in zip(result, theirs, strict=True):
            np.testing.assert_array_equal(to_array(new), to_array(expected))


def test_nothing_flagged_returns_equal_pictures_in_a_new_container() -> None:
    ours, oracle = checker_pair()
    clip_input = torch.randn(2, 3, 28, 28)
    concepts, special = cosines(oracle, clip_input)
    set_thresholds((ours, oracle), concepts.amax(dim=0) + 0.1, special.amax(dim=0) + 0.1)
    images = torch.rand(2, 3, 4, 4)
    result, flags = ours(clip_input, images)  # no warning: warnings are errors
    assert flags == oracle(clip_input, images.clone())[1] == [False, False]
    assert torch.equal(result, images) and result.data_ptr() != images.data_ptr()


# --- files ----------------------------------------------------------------------------------------------------------

# What transformers 4.16 to 4.22 wrote for every part of a CLIP, whatever its values: the form of the published files.
OLD_FIELDS: dict[str, Any] = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "attention_dropout": 0.0,
    "bad_words_ids": None, "bos_token_id": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": None,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "hidden_act": "quick_gelu", "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_factor": 1.0, "initializer_range": 0.02, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "layer_norm_eps": 1e-05, "length_penalty": 1.0, "max_length": 20,
    "min_length": 0, "model_type": "clip_vision_model", "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False,
    "pad_token_id": None, "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": None,
    "torchscript": False, "transformers_version": "4.22.0.dev0", "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip


def published_config() -> dict[str, Any]:
    return {
        "_commit_hash": "0123456789abcdef",
        "_name_or_path": "CompVis/stable-diffusion-safety-checker",
        "architectures": ["StableDiffusionSafetyChecker"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 20,
        "text_config": {**OLD_FIELDS, **TEXT, "model_type": "clip_text_model", "vocab_size": 49408},
        "text_config_dict": TEXT,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": {**OLD_FIELDS, **VISION, "num_channels": 3},
        "vision_config_dict": VISION,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_reads_the_published_form(tmp_path: Path, dtype: torch.dtype) -> None:
    """Old configuration, half-precision file with doubled names and a buffer of positions."""
    reference, oracle = checker_pair()
    oracle = oracle.half()
    folder = tmp_path / "safety_checker"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published_config()))
    tensors = {name: tensor.half() for name, tensor in reference.state_dict().items()}
    tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, folder / "model.fp16.safetensors")
    ours = StableDiffusionSafetyChecker.from_pretrained(
        tmp_path, subfolder="safety_checker", variant="fp16", torch_dtype=dtype
    )
    assert ours.dtype == dtype
    assert not ours.concept_embeds.requires_grad
    theirs = {ours.published_name(name): tensor for name, tensor in oracle.state_dict().items()}
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name].to(dtype)), name
    assert ours.source is not None
    assert ours.source.read("concept_embeds").dtype == torch.float16


def test_reads_what_diffusers_saved(tmp_path: Path) -> None:
    _, oracle = checker_pair()
    oracle.save_pretrained(tmp_path)
    ours = StableDiffusionSafetyChecker.from_pretrained(tmp_path)
    assert not ours.training
    pixels = torch.randn(2, 3, 28, 28)
    expected = oracle.visual_projection(oracle.vision_model(pixels)[1])
    assert_close(ours.visual_projection(ours.vision_model(pixels).pooled).detach(), expected)


def test_diffusers_reads_what_we_saved(tmp_path: Path) -> None:
    ours, oracle = checker_pair()
    ours.save_pretrained(tmp_path, stem="model")
    again, info = diffusers_safety.StableDiffusionSafetyChecker.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert StableDiffusionSafetyChecker.from_pretrained(tmp_path).config == ours.config


def test_vision_config_dict_wins_as_in_transformers() -> None:
    """It replaces the whole of ``vision_config``, with defaults for what it leaves out."""
    data = {"vision_config": {**VISION, "hidden_act": "gelu"}, "vision_config_dict": {"hidden_size": 48}}
    theirs = transformers.CLIPConfig(**copy.deepcopy(data)).vision_config  # it changes its argument
    ours = config_from_dict(SafetyCheckerConfig, data).vision_config
    assert ours == config_from_dict(CLIPVisionConfig, theirs.to_dict())
    assert (ours.hidden_size, ours.hidden_act) == (48, "quick_gelu")


# --- the preparation of pictures ------------------------------------------------------------------------------------

SIZES = [(37, 53), (53, 37), (28, 28), (301, 29), (29, 301), (9, 7), (1, 3), (512, 512)]
MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"]
OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "ints": {"size": 28, "crop_size": 28},
    "odd crop": {"crop_size": {"height": 27, "width": 25}},
    "crop larger than the picture": {"crop_size": {"height": 41, "width": 60}},
    "squeezed": {"size": {"height": 28, "width": 28}},
    "bilinear": {"resample": 2},
    "another mean": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.125]},
    "another scale": {"rescale_factor": 0.5},
    "not resized": {"do_resize": False},
    "not normalised": {"do_normalize": False},
    "not rescaled": {"do_rescale": False, "image_mean": [120, 130, 140], "image_std": [60, 70, 80]},
}


def their_processor(**options: Any) -> Any:
    # The PIL one, which CLIPImageProcessor itself was until transformers 5, and is where torchvision is missing.
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return kind(**{"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, **options})


def picture(size: tuple[int, int], mode: str = "RGB") -> PIL.Image.Image:
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return PIL.Image.fromarray(noise).convert(mode) if mode != "RGBA" else PIL.Image.fromarray(noise)


def saved_and_read(processor: Any, folder: Path) -> CLIPImageProcessor:
    processor.save_pretrained(folder)
    return CLIPImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_prepares_pictures_of_any_size(tmp_path: Path, size: tuple[int, int], options: dict[str, Any]) -> None:
    theirs = their_processor(**options)
    ours = saved_and_read(theirs, tmp_path)
    expected = theirs(picture(size), return_tensors="pt").pixel_values
    pixels = ours(picture(size), return_tensors="pt").pixel_values
    assert pixels.dtype == expected.dtype == torch.float32 and pixels.is_contiguous()
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", MODES)
def test_prepares_pictures_of_any_mode(tmp_path: Path, mode: str) -> None:
    theirs = their_processor()
    expected = theirs(picture((40, 33), mode), return_tensors="pt").pixel_values
    pixels = saved_and_read(theirs, tmp_path)(picture((40, 33), mode)).pixel_values
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


def test_prepares_several_pictures() -> None:
    theirs = their_processor()
    ours = config_from_dict(CLIPImageProcessor, theirs.to_dict())
    pictures = [picture(size) for size in SIZES]
    expected = theirs(pictures, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours(pictures).pixel_values, expected, rtol=0, atol=1e-5)


def test_diffusers_snippet_runs_with_either_class() -> None:
    """diffusers' own way of preparing pictures for a checker; both classes and both checkers understand it."""
    ours, oracle = checker_pair()
    set_thresholds((ours, oracle), torch.full((17,), 2.0), torch.full((3,), 2.0))  # no cosine is larger than 1
    pictures = [picture((40, 30)), picture((30, 40))]
    mine = config_from_dict(CLIPImageProcessor, their_processor().to_dict())
    for processor in (mine, their_processor()):
        clip_input = processor(pictures, return_tensors="pt").to("cpu")
        for checker in (ours, oracle):
            images, flags = checker(images=np.ones((2, 4, 4, 3)), clip_input=clip_input.pixel_values.to(torch.float32))
            assert flags == [False, False] and images.shape == (2, 4, 4, 3)


def test_the_defaults_are_those_of_the_published_file() -> None:
    theirs = transformers.CLIPImageProcessorPil() if hasattr(transformers, "CLIPImageProcessorPil") else None
    theirs = theirs or transformers.CLIPImageProcessor()
    assert CLIPImageProcessor() == config_from_dict(CLIPImageProcessor, theirs.to_dict())
    expected = theirs(picture((300, 260)), return_tensors="pt").pixel_values
    torch.testing.assert_close(CLIPImageProcessor()(picture((300, 260))).pixel_values, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "published",
    [
        # runwayml/stable-diffusion-v1-5 in its old form, and in today's.
        {"crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor", "size": 224},
        {
            "crop_size": {"height": 224, "width": 224},
            "do_convert_rgb": True,
            "do_rescale": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_processor_type": "CLIPFeatureExtractor",
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 224},
        },
    ],
    ids=["old", "new"],
)
def test_reads_the_published_preprocessor(tmp_path: Path, published: dict[str, Any]) -> None:
    common = {"do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    common["image_mean"] = [0.48145466, 0.4578275, 0.40821073]
    common["image_std"] = [0.26862954, 0.26130258, 0.27577711]
    (tmp_path / "feature_extractor").mkdir()
    file = tmp_path / "feature_extractor" / "preprocessor_config.json"
    file.write_text(json.dumps({**common, **published}))
    ours = CLIPImageProcessor.from_pretrained(tmp_path, subfolder="feature_extractor")
    kind = type(their_processor())
    expected = kind.from_pretrained(file.parent)(picture((240, 300)), return_tensors="pt").pixel_values
    torch.testing.assert_close(ours(picture((240, 300))).pixel_values, expected, rtol=0, atol=1e-5)


def test_transformers_reads_the_preprocessor_that_we_saved(tmp_path: Path) -> None:
    ours = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 28, "width": 26}, resample=2)
    ours.save_pretrained(tmp_path)
    theirs = type(their_processor()).from_pretrained(tmp_path)
    expected = theirs(picture((50, 40)), return_tensors="pt").pixel_values
    torch.testing.assert_close(ours(picture((50, 40))).pixel_values, expected, rtol=0, atol=1e-5)
    assert CLIPImageProcessor.from_pretrained(tmp_path) == ours
