"""Pick the pipeline for a task by what the repository holds and what is passed along."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from .. import hub
from ..loading import read_json
from .components import INDEX_NAME, pipeline_class
from .pipeline import DiffusionPipeline

# A published pipeline class: its family, the networks that steer it, its task.
NAME = re.compile(
    r"(?P<family>StableDiffusionXL|StableDiffusion|LatentConsistencyModel|AnimateDiff)"
    r"(?:ControlNet|Adapter)?(?:Img2Img|Inpaint|VideoToVideo)?(?:ControlNet)?Pipeline"
)


class _AutoPipeline:
    """What the three kinds share; ``task`` is the part of a class name that stands for theirs."""

    task: ClassVar[str] = ""

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} makes other classes: use its from_pretrained(…) or from_pipe(…).")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> DiffusionPipeline:
        """As `DiffusionPipeline.from_pretrained`, whatever task the repository's own pipeline is for.

        ``controlnet=…`` gives the ControlNet form, ``adapter=…`` the T2I-Adapter form.

        Raises:
            ValueError: the repository's kind of model is not supported.
        """
        where = {name: options[name] for name in hub.OPTIONS if name in options}
        folder = hub.fetch(pretrained_model_name_or_path, lambda files: hub.required(files, INDEX_NAME), **where)
        target = cls._pick(read_json(folder / INDEX_NAME).get("_class_name", ""), options)
        return target.from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path: str | os.PathLike[str], **options: Any
    ) -> DiffusionPipeline:
        """As `DiffusionPipeline.from_single_file`, in the form for this task.

        Raises:
            ValueError: the file's kind of model is not supported.
        """
        loaded = DiffusionPipeline.from_single_file(pretrained_model_link_or_path, **options)
        return cls.from_pipe(loaded, **{name: options[name] for name in ("controlnet", "adapter") if name in options})

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> DiffusionPipeline:
        """A pipeline for this task that shares the components and the LoRAs of ``pipeline``.

        ``components`` replace some; ``controlnet=None`` takes a ControlNet out.

        Raises:
            ValueError: the pipeline's kind of model is not supported.
        """
        shared = pipeline.components | pipeline.settings | components
        target = cls._pick(type(pipeline).__name__, shared)
        return pipeline.as_pipeline(target, **components)

    @classmethod
    def _pick(cls, class_name: str, components: Mapping[str, Any]) -> type[DiffusionPipeline]:
        found = NAME.fullmatch(class_name)
        if found is None:
            raise ValueError(f"{cls.__name__} knows no pipeline for {class_name!r}; it knows {NAME.pattern}.")
        steered = "ControlNet" if components.get("controlnet") is not None else ""
        if components.get("adapter") is not None and not cls.task:
            steered = "Adapter"
        return pipeline_class(f"{found['family']}{steered}{cls.task}Pipeline")


class AutoPipelineForText2Image(_AutoPipeline):
    """Loads the text-to-image pipeline that fits a repository or another pipeline's components."""


class AutoPipelineForImage2Image(_AutoPipeline):
    """Loads the image-to-image pipeline that fits a repository or another pipeline's components."""

    task = "Img2Img"


class AutoPipelineForInpainting(_AutoPipeline):
    """Loads the inpainting pipeline that fits a repository or another pipeline's components."""

    task = "Inpaint"
