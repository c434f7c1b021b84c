"""Pick the pipeline for a task by what the repository holds and what is passed along."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from .. import hub
from ..loading import read_json
from .components import INDEX_NAME, PIPELINES, pipeline_class
from .pipeline import DiffusionPipeline

# A published pipeline class: its family, the networks that steer it, its task.
NAME = re.compile(
    r"(?P<family>StableDiffusionXL|StableDiffusion|LatentConsistencyModel|AnimateDiffSDXL|AnimateDiff)"
    r"(?:ControlNet|Adapter)?(?:Img2Img|Inpaint|VideoToVideo)?(?:ControlNet)?Pipeline"
)

# Component that steers -> what the names of the pipelines with it say.
STEERING: Mapping[str, str] = {"controlnet": "ControlNet", "adapter": "Adapter"}


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

        ``controlnet=…`` gives the ControlNet form, ``adapter=…`` the T2I-Adapter form. So do ControlNets and
        T2I-Adapters in the repository, unless ``controlnet=None`` or ``adapter=None`` leaves them out.

        Raises:
            ValueError: the repository's kind of model is not supported, or not for this task.
        """
        where = {name: options[name] for name in hub.OPTIONS if name in options}
        folder = hub.fetch(pretrained_model_name_or_path, lambda files: hub.required(files, INDEX_NAME), **where)
        index = read_json(folder / INDEX_NAME)
        held = {name for name, value in index.items() if isinstance(value, list) and value[1] is not None}
        target = cls._pick(index.get("_class_name", ""), held, options)
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
            ValueError: there is no pipeline for this kind of model and task.
        """
        held = {name for name, component in pipeline.components.items() if component is not None}
        target = cls._pick(type(pipeline).__name__, held, components)
        return pipeline.as_pipeline(target, **components)

    @classmethod
    def _pick(cls, class_name: str, held: Collection[str], given: Mapping[str, Any]) -> type[DiffusionPipeline]:
        """The class for this task and for the components that are ``held`` or, which counts more, ``given``."""
        found = NAME.fullmatch(class_name)
        if found is None:
            raise ValueError(f"{cls.__name__} knows no pipeline for {class_name!r}; it knows {NAME.pattern}.")
        wanted = [name for name in STEERING if given.get(name) is not None]
        wanted += [name for name in STEERING if name in held and name not in given]
        steered = STEERING[wanted[0]] if wanted else ""
        if steered == "Adapter" and cls.task:
            # There is no such form, in diffusers neither.
            warnings.warn(
                f"{cls.__name__} leaves the T2I-Adapter out; pass adapter=None if that is meant.", stacklevel=3
            )
            steered = ""
        name = f"{found['family']}{steered}{cls.task}Pipeline"
        if name not in itertools.chain(*PIPELINES.values()):
            raise ValueError(f"{cls.__name__} has no pipeline for {class_name}: there is no {name}.")
        return pipeline_class(name)


class AutoPipelineForText2Image(_AutoPipeline):
    """Loads the text-to-image pipeline that fits a repository or another pipeline's components."""


class AutoPipelineForImage2Image(_AutoPipeline):
    """Loads the image-to-image pipeline that fits a repository or another pipeline's components."""

    task = "Img2Img"


class AutoPipelineForInpainting(_AutoPipeline):
    """Loads the inpainting pipeline that fits a repository or another pipeline's components."""

    task = "Inpaint"
