"""Pick the pipeline for a task by what the repository holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .. import hub
from ..loading import read_json
from .components import INDEX_NAME
from .pipeline import DiffusionPipeline
from .stable_diffusion import LatentConsistencyModelPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

# Prefix of a published pipeline class -> its text-to-image form. The first that fits wins, so longer ones come first.
TEXT_TO_IMAGE: Mapping[str, type[DiffusionPipeline]] = {
    "StableDiffusionXL": StableDiffusionXLPipeline,
    "StableDiffusion": StableDiffusionPipeline,
    "LatentConsistencyModel": LatentConsistencyModelPipeline,
}


class AutoPipelineForText2Image:
    """Loads the text-to-image pipeline that fits a repository or another pipeline's components."""

    def __init__(self) -> None:
        raise TypeError("AutoPipelineForText2Image makes other classes: use its from_pretrained(…) or from_pipe(…).")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> DiffusionPipeline:
        """As `DiffusionPipeline.from_pretrained`, whatever task the repository's own pipeline is for.

        Raises:
            ValueError: the repository's kind of model is not supported.
        """
        where = {name: options[name] for name in hub.OPTIONS if name in options}
        folder = hub.fetch(pretrained_model_name_or_path, lambda files: hub.required(files, INDEX_NAME), **where)
        target = _pick(read_json(folder / INDEX_NAME).get("_class_name", ""))
        return target.from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
        """A text-to-image pipeline that shares the components of ``pipeline``; ``components`` replace some.

        Raises:
            ValueError: the pipeline's kind of model is not supported.
        """
        target = _pick(type(pipeline).__name__)
        shared = pipeline.components | pipeline.settings | components
        known = {name: shared[name] for name in (*target.component_names, *pipeline.settings) if name in shared}
        return target(**known)


def _pick(class_name: str) -> type[DiffusionPipeline]:
    for prefix, target in TEXT_TO_IMAGE.items():
        if class_name.startswith(prefix):
            return target
    raise ValueError(
        f"AutoPipelineForText2Image knows no pipeline for {class_name!r}; it knows {', '.join(TEXT_TO_IMAGE)}…"
    )
