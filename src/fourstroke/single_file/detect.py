"""Which model a file holds, told by the names and shapes of its tensors and by what its header says."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..loading import listed, open_tensors
from .assets import families
from .layout import find_place

PREDICTION_TYPES = ("epsilon", "v_prediction")

# Tensors that a picture does not depend on, by the reason why.
IGNORED: Mapping[str, str] = {
    "moving averages of the weights during training": r"^(first_stage_model\.)?model_ema\.",
    "the noise schedule, which the scheduler computes": (
        r"^(betas|(sqrt_)?alphas_cumprod(_prev)?|(sqrt|log)_one_minus_alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod|"
        r"posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|denoiser\.(log_)?sigmas)$"
    ),
    "losses of the training": r"^(first_stage_model\.)?loss\.",
    "state of the training": r"^(global_step|epoch|scale_factor|model\.scale_factor)$",
    "marks of the kind of prediction, which `infer_prediction_type` reads": r"^(v_pred|ztsnr)$",
    "CLIP's temperature and a projection that is not used": (
        r"^(cond_stage_model|conditioner\.embedders\.\d)\.(model\.)?logit_scale$|"
        r"^(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?$"
    ),
    "constant buffers of CLIP": r"\.embeddings\.position_ids$",
    "a copy of the text encoder that textual inversion's training keeps": r"^embedding_manager\.",
}

# Files that are something else: what tells them, what they are, what to do.
FOREIGN: tuple[tuple[str, str, str], ...] = (
    (r"^lora_(unet|te\d?)_|\.lora_([AB]|up|down)\.|\.lora_linear_layer\.", "a LoRA", "use pipe.load_lora_weights(…)"),
    (r"^(control_model|input_hint_block|zero_convs|controlnet_(cond_embedding|down_blocks))\.", "a ControlNet",
     "load it with fourstroke.single_file.load_controlnet_file"),
    (r"(^|\.)motion_modules\.", "a motion module of AnimateDiff", "load it as a MotionAdapter"),
    (r"^(emb_params|clip_[lg]|string_to_param\b.*)$", "a textual inversion embedding", "it is not supported"),
    (r"^(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3", "it is not supported"),
    (r"^(model\.diffusion_model\.)?double_blocks\.", "FLUX", "it is not supported"),
    (r"^edm_(mean|std|vpred\.sigma_max)$", "Playground 2.5 or another EDM model", "it is not supported"),
    (r"^conditioner\.embedders\.0\.model\.", "the SDXL refiner", "it is not supported; load an SDXL base checkpoint"),
    (r"^embedder\.model\.visual\.", "Stable unCLIP", "it is not supported"),
    (r"^unet\.down_blocks\.|^text_encoder\.text_model\.", "a pipeline in diffusers' naming",
     "split it into the folders of its components and use from_pretrained"),
)  # fmt: skip

# (width of the text states, channels of the input) of a UNet -> its family, or what it is when it is not supported.
FAMILIES: Mapping[tuple[int, int], str] = {
    (768, 4): "sd15",
    (768, 9): "sd15-inpainting",
    (1024, 4): "sd2-768",
    (1024, 9): "sd2-inpainting",
    (2048, 4): "sdxl",
    (2048, 9): "sdxl-inpainting",
}
UNSUPPORTED_UNETS: Mapping[tuple[int, int], str] = {
    (768, 8): "InstructPix2Pix",
    (1024, 5): "Stable Diffusion 2 with depth",
    (1024, 7): "the Stable Diffusion x4 upscaler",
    (1280, 4): "the SDXL refiner",
    (2048, 8): "InstructPix2Pix for SDXL",
}


@dataclass(frozen=True)
class SingleFile:
    """The header of a .safetensors file: what is in it, without its contents.

    Attributes:
        path: the file.
        shapes: shape of each tensor by name.
        metadata: what the author wrote into the header (``modelspec.…`` keys tell about the model).
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> SingleFile:
        """Read the header of ``path``.

        Raises:
            ValueError: the file is a pickle.
            WeightError: it is not a readable .safetensors file.
        """
        file = open_tensors(path)
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
        return cls(path, shapes, file.metadata() or {})

    def read(self, key: str) -> Tensor:
        """One tensor in the file's own dtype and layout."""
        return open_tensors(self.path).get_tensor(key)


def infer_family(
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str] | None = None,
    *,
    prediction_type: str | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> str:
    """The family (see `families`) of a checkpoint in the original layout, or of a UNet alone in any layout.

    It is told by the width of the text states that the UNet attends to, by the channels of its input, and, for SDXL's
    relatives, by the depth of its transformers and whether its middle block has one (SSD-1B's has none).

    Args:
        shapes: shape of each tensor by name.
        metadata, prediction_type, read: see `infer_prediction_type`; SD 2.x comes as ``sd2-base`` (epsilon) and as
            ``sd2-768`` (v_prediction).

    Raises:
        ValueError: the file is of a kind that is not supported; the message names the kind.
    """
    refuse_foreign(shapes)
    place = find_place("unet", shapes)
    if place is None:
        raise ValueError(
            f"No UNet of Stable Diffusion is among the {len(shapes)} tensors ({listed(list(shapes)[:3])}). Is it the "
            "right file? For a VAE use AutoencoderKL.from_single_file."
        )
    unet = [key for key in shapes if key.startswith(place.prefix)]
    context = next((shapes[key][1] for key in unet if key.endswith(".attn2.to_k.weight")), 0)
    kind = (context, shapes[place.prefix + place.marker][1])
    if kind not in FAMILIES:
        name = UNSUPPORTED_UNETS.get(kind, f"a UNet with {kind[1]} input channels and texts of width {context}")
        raise ValueError(
            f"This checkpoint is {name}, which is not supported as a single file. Supported: {', '.join(families())}. "
            "If it is a variant of one of them, pass config= with the folder of its configuration."
        )
    if context == 2048:
        return _infer_xl(FAMILIES[kind], unet)
    if kind == (1024, 4) and _infer_sd2(shapes, metadata or {}, prediction_type, read, place.prefix) == "epsilon":
        return "sd2-base"
    return FAMILIES[kind]


def _infer_xl(family: str, unet: Collection[str]) -> str:
    depths = {int(found[1]) for key in unet if (found := re.search(r"\.transformer_blocks\.(\d+)\.", key))}
    middle = any(re.search(r"\bmiddle_block\.1\.|\bmid_block\.attentions\.", key) for key in unet)
    if max(depths) == 9 and middle:
        return family
    if max(depths) == 9 and family == "sdxl":
        return "ssd-1b"
    raise ValueError(
        f"This is a relative of SDXL whose transformers are at most {max(depths) + 1} deep, with "
        f"{'a' if middle else 'no'} transformer in the middle (Segmind Vega and KOALA are such). It is not among the "
        f"families {', '.join(families())}; pass config= with the folder of its configuration."
    )


def infer_prediction_type(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> str | None:
    """``epsilon`` or ``v_prediction`` if the file says so itself, else None.

    It says so by an (empty) tensor ``v_pred``, as ComfyUI's and NoobAI's files do, or in its header as
    ``modelspec.prediction_type`` or by an ``modelspec.architecture`` that ends in ``-512`` or ``-768-v``
    (https://github.com/Stability-AI/ModelSpec).
    """
    metadata = metadata or {}
    if "v_pred" in shapes:
        return "v_prediction"
    stated = metadata.get("modelspec.prediction_type", "").lower()
    if stated in ("v", "v_prediction", "v-prediction"):
        return "v_prediction"
    if stated == "epsilon":
        return "epsilon"
    architecture = metadata.get("modelspec.architecture", "").lower()
    if architecture.startswith("stable-diffusion-v2"):
        return "v_prediction" if architecture.endswith("-768-v") else "epsilon"
    return None


def _infer_sd2(
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    prediction_type: str | None,
    read: Callable[[str], Tensor] | None,
    prefix: str,
) -> str:
    """Tell SD 2.x base from SD 2.x 768, which have the same tensors.

    What the caller or the file says counts. Else it is guessed as ComfyUI does: a bias of the last transformer has a
    standard deviation above 0.09 in v-prediction models. Without contents to look at, the 768 model is assumed, as
    diffusers does.
    """
    known = prediction_type or infer_prediction_type(shapes, metadata)
    bias = prefix + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if known or read is None or bias not in shapes:
        return known or "v_prediction"
    return "v_prediction" if float(read(bias).float().std(correction=0)) > 0.09 else "epsilon"


def refuse_foreign(shapes: Iterable[str]) -> None:
    """Raise when the tensors' names are those of something else than a checkpoint of Stable Diffusion.

    Raises:
        ValueError: it names what the file is and what to do with it.
    """
    for pattern, kind, mend in FOREIGN:
        found = next((key for key in shapes if re.search(pattern, key)), None)
        if found is not None:
            raise ValueError(f"This file is {kind} (it holds {found!r}), not a checkpoint of Stable Diffusion: {mend}.")


def is_ignored(key: str, ignore: Collection[str] = ()) -> bool:
    """Whether the tensor ``key`` matches a pattern of `IGNORED` or of ``ignore``."""
    return any(re.search(pattern, key) for pattern in (*IGNORED.values(), *ignore))
