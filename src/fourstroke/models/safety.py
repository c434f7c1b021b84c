"""The safety checker of Stable Diffusion: blacks out a picture whose CLIP embedding is close to an unwanted concept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SafetyCheckerConfig
from ..loading import Model, listed
from .clip_vision import CLIPVisionModel

CONCEPTS, SPECIAL_CARE_CONCEPTS = 17, 3
SPECIAL_CARE_ADJUSTMENT = 0.01
SCORE_DECIMALS = 3

Picture = TypeVar("Picture", Tensor, np.ndarray, PIL.Image.Image)


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (N, M) of the angles between the rows of ``a`` (N, D) and those of ``b`` (M, D)."""
    return F.normalize(a) @ F.normalize(b).T


def is_flagged(concepts: Tensor, thresholds: Tensor, special: Tensor, special_thresholds: Tensor) -> Tensor:
    """The published rule: which pictures are closer to a concept than its threshold allows.

    A picture that is close to a special-care concept has its distances to all others judged more strictly, by
    `SPECIAL_CARE_ADJUSTMENT`. Scores are rounded to `SCORE_DECIMALS` and computed in float32, whatever the dtypes.

    Args:
        concepts: (N, K) cosines to the concepts.
        thresholds: (K,).
        special: (N, S) cosines to the special-care concepts.
        special_thresholds: (S,).

    Returns:
        (N,) bool.
    """
    special_scores = (special.float() - special_thresholds.float()).round(decimals=SCORE_DECIMALS)  # (N, S)
    adjustment = SPECIAL_CARE_ADJUSTMENT * (special_scores > 0).any(dim=1, keepdim=True)  # (N, 1)
    scores = (concepts.float() - thresholds.float() + adjustment).round(decimals=SCORE_DECIMALS)  # (N, K)
    return (scores > 0).any(dim=1)


def black(picture: Picture) -> Picture:
    """A black picture of the same kind, size and dtype: zeros."""
    if isinstance(picture, Tensor):
        return torch.zeros_like(picture)
    if isinstance(picture, np.ndarray):
        return np.zeros_like(picture)
    return PIL.Image.new(picture.mode, picture.size)


class StableDiffusionSafetyChecker(Model):
    """CLIP's vision encoder, the embeddings of concepts that a picture must not be close to, and their thresholds."""

    config_class = SafetyCheckerConfig
    # Newer exports leave one of the two nested names out.
    renames = ((r"^vision_model\.(?!vision_model\.)", "vision_model.vision_model."),)
    ignored = (r"embeddings\.position_ids$",)

    def __init__(self, config: SafetyCheckerConfig):
        super().__init__(config)
        self.config: SafetyCheckerConfig = config
        width = config.projection_dim
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(CONCEPTS, width), requires_grad=False)
        self.special_care_embeds = nn.Parameter(torch.ones(SPECIAL_CARE_CONCEPTS, width), requires_grad=False)
        self.concept_embeds_weights = nn.Parameter(torch.ones(CONCEPTS), requires_grad=False)
        self.special_care_embeds_weights = nn.Parameter(torch.ones(SPECIAL_CARE_CONCEPTS), requires_grad=False)

    @torch.no_grad()
    def flags(self, clip_input: Tensor) -> list[bool]:
        """Which pictures are flagged.

        Args:
            clip_input: (N, 3, S, S), S = ``vision_config.image_size`` (224), as `CLIPImageProcessor` prepares them.

        Raises:
            ValueError: ``clip_input`` has another shape.
        """
        embeds = self.visual_projection(self.vision_model(clip_input).pooled)  # (N, projection_dim)
        return is_flagged(
            cosine_similarity(embeds, self.concept_embeds),
            self.concept_embeds_weights,
            cosine_similarity(embeds, self.special_care_embeds),
            self.special_care_embeds_weights,
        ).tolist()

    def forward(
        self, clip_input: Tensor, images: Tensor | np.ndarray | Sequence[Picture]
    ) -> tuple[Tensor | np.ndarray | list[Picture], list[bool]]:
        """Black out the flagged pictures, with a warning.

        Args:
            clip_input: see `flags`.
            images: the N pictures themselves: a tensor or array with N first, or a sequence of tensors, arrays or PIL
                images. Black is zero, so their range must begin there ([0, 1], not [-1, 1]). They stay as they are.

        Returns:
            The pictures, in a new tensor, array or list, and N flags.

        Raises:
            ValueError: ``clip_input`` has another shape or another number of pictures than ``images``.
        """
        if len(clip_input) != len(images):
            raise ValueError(f"clip_input holds {len(clip_input)} pictures, images {len(images)}; give one for each.")
        flags = self.flags(clip_input)
        flagged = [index for index, flag in enumerate(flags) if flag]
        if flagged:
            warnings.warn(
                f"The safety checker flagged {len(flagged)} of {len(flags)} pictures (number "
                f"{listed(map(str, flagged))}, counted from 0); they are returned black. Try another prompt or seed.",
                stacklevel=4,  # past the two frames of torch's Module.__call__
            )
        if isinstance(images, (Tensor, np.ndarray)):
            result = images.clone() if isinstance(images, Tensor) else images.copy()
            result[flagged] = 0
            return result, flags
        return [black(picture) if flag else picture for picture, flag in zip(images, flags, strict=True)], flags
