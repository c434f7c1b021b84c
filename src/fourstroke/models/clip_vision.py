"""CLIP's vision transformer (Radford et al. 2021; Dosovitskiy et al. 2021) and the pictures that it sees."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from .. import hub
from ..config import CLIPVisionConfig, Config, UnsupportedConfig, config_from_dict, config_to_dict
from ..loading import Model, read_json, write_json
from .clip import Encoder

if TYPE_CHECKING:
    from typing_extensions import Self

PREPROCESSOR_NAME = "preprocessor_config.json"


class CLIPImages(NamedTuple):
    """Prepared pictures; ``pixel_values`` is (N, 3, H, W) float32."""

    pixel_values: Tensor

    def to(self, *args: Any, **kwargs: Any) -> CLIPImages:
        """The same on another device, in another dtype; arguments as of `torch.Tensor.to`."""
        return CLIPImages(self.pixel_values.to(*args, **kwargs))


@dataclass(frozen=True)
class CLIPImageProcessor(Config):
    """What CLIP's pictures go through: resize, centre crop, scale to [0, 1], normalise. Read from, and named as in,
    ``preprocessor_config.json``.

    Attributes:
        size: ``{"shortest_edge": n}`` keeps the proportions, ``{"height": h, "width": w}`` does not. Older files hold
            n alone.
        crop_size: ``{"height": h, "width": w}``, in older files one int. What a picture lacks is filled with black.
        resample: PIL's number of the filter; 3 is bicubic.
        image_mean, image_std: of the red, green and blue values after rescaling.
    """

    class_name: ClassVar[str] = "CLIPImageProcessor"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("image_processor_type", "feature_extractor_type", "processor_class"), ()),
        # How another library runs, not what it computes. Whatever do_convert_rgb says, only RGB has three channels.
        **dict.fromkeys(("do_convert_rgb", "device", "disable_grouping", "return_tensors", "image_seq_length"), ()),
        "data_format": (None, "channels_first"),
        "input_data_format": (None,),
        "default_to_square": (None, False),
        "use_square_size": (None, False),
        "do_pad": (None, False),
        "pad_size": (),
    }

    do_resize: bool = True
    size: Mapping[str, int] = field(default_factory=lambda: {"shortest_edge": 224})
    resample: int = 3
    do_center_crop: bool = True
    crop_size: Mapping[str, int] = field(default_factory=lambda: {"height": 224, "width": 224})
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if isinstance(self.size, int):
            object.__setattr__(self, "size", {"shortest_edge": self.size})
        if isinstance(self.crop_size, int):
            object.__setattr__(self, "crop_size", {"height": self.crop_size, "width": self.crop_size})
        rectangle = {"height", "width"}
        for name, forms in {"size": ({"shortest_edge"}, rectangle), "crop_size": (rectangle,)}.items():
            value = getattr(self, name)
            if not isinstance(value, Mapping) or set(value) not in forms:
                allowed = " or ".join(str(sorted(form)) for form in forms)
                raise UnsupportedConfig(f"{self.class_name}: {name} is {value!r}; give a mapping with {allowed}.")
        if self.resample not in tuple(PIL.Image.Resampling):
            raise UnsupportedConfig(f"{self.class_name}: resample is {self.resample!r}; give one of PIL's 0 to 5.")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise UnsupportedConfig(f"{self.class_name}: {name} is {getattr(self, name)!r}; give three numbers.")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], *, subfolder: str | None = None, **where: Any) -> Self:
        """Read a published ``preprocessor_config.json``.

        Args:
            name, subfolder: hub id, shipped name or folder, and the folder inside it (``"feature_extractor"``).
            where: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            FileNotFoundError: there is no such file.
            UnsupportedConfig: it asks for a preparation that is not CLIP's.
        """
        path = f"{subfolder.strip('/')}/{PREPROCESSOR_NAME}" if subfolder else PREPROCESSOR_NAME
        folder = hub.fetch(name, lambda files: hub.required(files, path), **where)
        return config_from_dict(cls, read_json(folder / path))

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``preprocessor_config.json`` into ``save_directory``."""
        data = config_to_dict(self)
        data["image_processor_type"] = data.pop("_class_name")
        write_json(Path(save_directory) / PREPROCESSOR_NAME, data)

    def __call__(
        self, images: PIL.Image.Image | Sequence[PIL.Image.Image], return_tensors: str | None = "pt"
    ) -> CLIPImages:
        """Prepare one picture or several, of any mode and size; transparent ones are laid on white.

        Raises:
            TypeError: something is not a PIL image.
            ValueError: the prepared pictures differ in size (no crop), or ``return_tensors`` is not ``"pt"``.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors is {return_tensors!r}; pixel values come as 'pt' tensors only.")
        prepared = [self.prepare(image) for image in ([images] if isinstance(images, PIL.Image.Image) else images)]
        sizes = {(array.shape[1], array.shape[0]) for array in prepared}
        if len(sizes) > 1:
            raise ValueError(f"The prepared pictures have the sizes {sorted(sizes)}; crop them, or pass one each.")
        return CLIPImages(torch.from_numpy(np.stack(prepared)).permute(0, 3, 1, 2).contiguous())

    def prepare(self, image: PIL.Image.Image) -> np.ndarray:
        """One picture -> (H, W, 3) float32."""
        image = to_rgb(image)
        if self.do_resize:
            image = image.resize(self.resized(*image.size), resample=self.resample)
        if self.do_center_crop:
            width, height = self.crop_size["width"], self.crop_size["height"]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        array = np.asarray(image, dtype=np.float64)
        if self.do_rescale:
            array = array * self.rescale_factor
        array = array.astype(np.float32)
        if self.do_normalize:
            array = (array - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return array

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) to which a picture of ``width`` x ``height`` is resized; fractions are cut off."""
        if "shortest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        edge = self.size["shortest_edge"]
        return (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """``image`` in mode RGB, laid on white where it is transparent.

    Raises:
        TypeError: it is not a PIL image.
    """
    if not isinstance(image, PIL.Image.Image):
        raise TypeError(f"CLIPImageProcessor takes PIL images, not {type(image).__name__}; use PIL.Image.fromarray.")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    white = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


class CLIPVisionOutput(NamedTuple):
    """What the encoder gives; L is one class token plus the number of patches.

    Attributes:
        last_hidden_state: (N, L, D) of the last layer, without the final layer norm.
        hidden_states: the normalised embeddings and every layer's output, (N, L, D) each.
        pooled: (N, D) the class token after the final layer norm, (N, projection_dim) where the model projects it.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]
    pooled: Tensor


class VisionEmbeddings(nn.Module):
    """A class token and linearly embedded patches, plus learnt positions."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.picture = (config.num_channels, config.image_size, config.image_size)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, C, S, S) -> (N, L, D).

        Raises:
            ValueError: the pictures have another shape.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != self.picture:
            raise ValueError(
                f"pixel_values have the shape {tuple(pixel_values.shape)}, but this CLIP sees {('N', *self.picture)}; "
                "prepare the pictures with the CLIPImageProcessor of the same repository."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (N, D, S/p, S/p)
        token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([token, patches.flatten(2).transpose(1, 2)], dim=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Embeddings, layers that see the whole picture, final layer norm of the class token."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelt as published
        self.encoder = Encoder(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> CLIPVisionOutput:
        """(N, C, S, S) -> every state and the class token (N, D)."""
        states = [self.pre_layrnorm(self.embeddings(pixel_values))]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return CLIPVisionOutput(states[-1], tuple(states), self.post_layernorm(states[-1][:, 0]))


class CLIPVisionModel(Model):
    """The vision encoder by itself."""

    config_class = CLIPVisionConfig
    renames = ((r"^(?!vision_model\.|visual_projection\.)", "vision_model."),)
    # A buffer of old exports, and the projection that this model does not use.
    ignored: tuple[str, ...] = (r"embeddings\.position_ids$", r"^visual_projection\.")

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        self.config: CLIPVisionConfig = config
        self.vision_model = VisionTransformer(config)

    def forward(self, pixel_values: Tensor) -> CLIPVisionOutput:
        """Pictures (N, num_channels, image_size, image_size) as `CLIPImageProcessor` prepares them -> states, pooled.

        Raises:
            ValueError: the pictures have another shape.
        """
        return self.vision_model(pixel_values)


class CLIPVisionModelWithProjection(CLIPVisionModel):
    """The vision encoder whose class token goes through a projection into the space that CLIP shares with text."""

    ignored = (r"embeddings\.position_ids$",)

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixel_values: Tensor) -> CLIPVisionOutput:
        """As `CLIPVisionModel.forward`; ``pooled`` is (N, projection_dim)."""
        output = super().forward(pixel_values)
        return output._replace(pooled=self.visual_projection(output.pooled))
