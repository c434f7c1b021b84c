"""Building the networks of a single file: every tensor is used, or it is known why it carries nothing."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from ..config import Config, ControlNetConfig, UNetConfig, config_from_dict
from ..loading import CONFIG_NAME, Model, WeightError, WeightSource, build, listed, read_json, resolve_file
from ..models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ..models.controlnet import ControlNetModel, control_config
from ..models.unet import UNet2DConditionModel
from ..models.vae import AutoencoderKL
from .assets import INDEX_NAME, clip_vocabulary, config_folder, tokenizer_of
from .detect import (
    FAMILIES,
    PREDICTION_TYPES,
    SingleFile,
    infer_family,
    infer_prediction_type,
    is_ignored,
    refuse_foreign,
)
from .layout import PLACES, Place, Transform, find_place, translator

TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
GUIDANCE = "time_embedding.cond_proj.weight"
NETWORKS: Mapping[str, type[Model]] = {
    cls.__name__: cls for cls in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection)
}

ModelT = TypeVar("ModelT", bound=Model)


def load_single_file(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    skip: Collection[str] = (),
    ignore: Collection[str] = (),
    progress: Callable[[list[str]], Iterable[str]] = iter,
    **where: Any,
) -> dict[str, Any]:
    """Load a whole checkpoint of Stable Diffusion in the original layout.

    Args:
        path: a ``.safetensors`` file, or its address on the hub (``https://huggingface.co/owner/name/blob/main/file``).
        config: one of `families`, a folder of component configurations, or a hub id; by default the shipped
            configuration of the family that `infer_family` finds. No network is needed for that.
        prediction_type: ``epsilon`` or ``v_prediction``, when the file does not say it and the guess is wrong.
        torch_dtype, dtype: of the networks, two names of one thing (default ``torch.float32``); in the file's own dtype
            they stay memory-mapped.
        skip: components that are not to be loaded because the caller has others.
        ignore: patterns of tensor names that carry nothing and are left out.
        progress: wraps the list of the components' names while they are loaded, for a progress bar.
        where: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``, for hub names.

    Returns:
        What the pipeline's class takes: ``unet``, ``vae``, ``text_encoder`` and ``tokenizer`` (with ``_2`` for SDXL),
        ``scheduler`` (its configuration, a dict), and the settings of ``model_index.json``.

    Raises:
        FileNotFoundError: there is no such file or configuration.
        ValueError: the file is a pickle or of a kind that is not supported.
        WeightError: a tensor is unknown, missing or of the wrong shape, or a component is not in the file.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(f"prediction_type is {prediction_type!r}; it is one of {', '.join(PREDICTION_TYPES)}.")
    file = SingleFile.open(resolve_file(path, **where))
    refuse_foreign(file.shapes)
    if config is None:
        config = infer_family(file.shapes, file.metadata, prediction_type=prediction_type, read=file.read)
    folder = config_folder(config, **where)
    index = {name: value for name, value in read_json(folder / INDEX_NAME).items() if not name.startswith("_")}
    parts = {name: value for name, value in index.items() if not isinstance(value, list)}
    parts |= {name: None for name, value in index.items() if value == [None, None]}
    wanted = {name: value[1] for name, value in index.items() if name not in parts and name not in skip}
    places = {name: find_place(name, file.shapes, bare=False) for name in PLACES if name in index}
    _check_parts(file, wanted, places)
    _check_names(file, [place.prefix for place in places.values() if place], ignore)
    vocabulary: tuple[dict[str, int], list[tuple[str, str]]] | None = None
    for name in progress(list(wanted)):
        place, kind = places.get(name), wanted[name]
        if place is not None:
            parts[name] = _load(file, place, NETWORKS[kind], folder / name, dtype or torch_dtype, ignore)
        elif name == "scheduler":
            parts[name] = _scheduler_config(folder / name, file, prediction_type)
        elif kind in TOKENIZERS:
            vocabulary = vocabulary or clip_vocabulary()
            parts[name] = tokenizer_of(folder / name, *vocabulary)
        else:
            parts[name] = None
    return parts


def load_unet_file(path: str | os.PathLike[str], **options: Any) -> UNet2DConditionModel:
    """Load the UNet of a checkpoint, or a file that holds a UNet alone, in the original layout or diffusers'.

    Args:
        path: see `load_single_file`.
        options: ``config`` (also the folder of the UNet's own ``config.json``) and ``subfolder`` in it, and
            ``torch_dtype``, ``dtype``, ``ignore`` and hub options as for `load_single_file`.

    Raises:
        FileNotFoundError, ValueError, WeightError: as `load_single_file`.
    """
    return _load_alone("unet", UNet2DConditionModel, path, **options)


def load_vae_file(path: str | os.PathLike[str], **options: Any) -> AutoencoderKL:
    """Load the VAE of a checkpoint, or a file that holds a VAE alone, in the original layout or diffusers'.

    A VAE alone does not say what it belongs to, on which the scale of its latents depends: without ``config=`` that of
    SD 1.5 and 2.x is taken, with a warning.

    Args:
        path, options: as for `load_unet_file`; ``config="sdxl"`` for a VAE of SDXL or SSD-1B.

    Raises:
        FileNotFoundError, ValueError, WeightError: as `load_single_file`.
    """
    return _load_alone("vae", AutoencoderKL, path, **options)


def load_controlnet_file(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    ignore: Collection[str] = (),
    **where: Any,
) -> ControlNetModel:
    """Load a ControlNet from one file, in the layout of lllyasviel's code or diffusers'.

    Args:
        path: see `load_single_file`.
        config: a folder or hub id with the network's ``config.json``, or a family whose UNet it is a full copy of; by
            default the family that the width of its texts tells. Needed for the smaller networks for SDXL, and where
            a file does not say enough: "shuffle" has ``global_pool_conditions``.
        subfolder: of ``config``.
        torch_dtype, dtype, ignore, where: see `load_single_file`.

    Raises:
        FileNotFoundError, ValueError, WeightError: as `load_single_file`.
    """
    file = SingleFile.open(resolve_file(path, **where))
    place = find_place("controlnet", file.shapes)
    if place is None:
        raise WeightError(f"{file.path} holds no ControlNet; its tensors are {listed(file.shapes)}.")
    folder = config_folder(_family_of_controlnet(file, place) if config is None else config, **where)
    folder = folder / subfolder if subfolder else folder
    return _build(file, place, ControlNetModel, _controlnet_config(folder), dtype or torch_dtype, ignore)


def _family_of_controlnet(file: SingleFile, place: Place) -> str:
    names = (key for key in file.shapes if key.startswith(place.prefix) and key.endswith(".attn2.to_k.weight"))
    width = next((file.shapes[name][1] for name in names), None)
    if width is None or (width, 4) not in FAMILIES:
        raise ValueError(
            f"{file.path} is a ControlNet that reads {f'texts of width {width}' if width else 'no text'}, which tells "
            "no family. Pass config= with the folder or the hub id of its configuration."
        )
    return FAMILIES[width, 4]


def _controlnet_config(folder: Path) -> ControlNetConfig:
    """What the folder says of a ControlNet, or else what its UNet implies."""
    for path in (folder / "controlnet" / CONFIG_NAME, folder / CONFIG_NAME):
        if path.is_file():
            return config_from_dict(ControlNetConfig, read_json(path))
    return control_config(config_from_dict(UNetConfig, read_json(folder / "unet" / CONFIG_NAME)))


# Class -> what loads it alone.
NETWORK_FILES: Mapping[type[Model], Callable[..., Model]] = {
    UNet2DConditionModel: load_unet_file,
    AutoencoderKL: load_vae_file,
    ControlNetModel: load_controlnet_file,
}


def load_network_file(cls: type[ModelT], path: str | os.PathLike[str], **options: Any) -> ModelT:
    """Load a ``cls`` by that one of the functions above which is for it; see `Model.from_single_file`.

    Raises:
        TypeError: none is.
        FileNotFoundError, ValueError, WeightError: as `load_single_file`.
    """
    if cls not in NETWORK_FILES:
        known = ", ".join(kind.__name__ for kind in NETWORK_FILES)
        raise TypeError(
            f"{cls.__name__} is not read from single files; {known} are. Use {cls.__name__}.from_pretrained, or the "
            "pipeline's from_single_file for a whole checkpoint."
        )
    return cast(ModelT, NETWORK_FILES[cls](path, **options))


def _load_alone(
    component: str,
    cls: type[ModelT],
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    ignore: Collection[str] = (),
    **where: Any,
) -> ModelT:
    file = SingleFile.open(resolve_file(path, **where))
    refuse_foreign(file.shapes)
    place = find_place(component, file.shapes)
    if place is None:
        raise WeightError(f"{file.path} holds no {component}; its tensors are {listed(file.shapes)}.")
    if config is not None:
        folder = config_folder(config, **where)
    elif component == "vae" and find_place("unet", file.shapes) is None:
        folder = config_folder(_family_of_vae(file))
    else:
        folder = config_folder(infer_family(file.shapes, file.metadata, read=file.read))
    inner = folder / (subfolder or component)
    return _load(file, place, cls, inner if inner.is_dir() else folder, dtype or torch_dtype, ignore)


def _family_of_vae(file: SingleFile) -> str:
    if "xl" in file.metadata.get("modelspec.architecture", ""):
        return "sdxl"
    warnings.warn(
        f"{file.path} does not say which model its VAE belongs to; the latents' scale of SD 1.5 and 2.x is taken. Pass "
        'config="sd15" if that is right, and config="sdxl" for a VAE of SDXL.',
        stacklevel=4,
    )
    return "sd15"


def _check_parts(file: SingleFile, wanted: Mapping[str, str], places: Mapping[str, Place | None]) -> None:
    """Raise when a network is not in the file or not supported; warn when it is one that no such file holds."""
    missing = [name for name, place in places.items() if place is None and name in wanted]
    if missing:
        mend = ", ".join(f"{name}={wanted[name]}.from_pretrained(…)" for name in missing)
        alone = " It holds a UNet alone; UNet2DConditionModel.from_single_file loads it."
        mend += "." + (alone if len(missing) == len(places) else "")
        raise WeightError(f"{file.path} holds no {', '.join(missing)}. Load it from elsewhere and pass {mend}")
    for name in places:
        if name in wanted and wanted[name] not in NETWORKS:
            raise ValueError(
                f"{name} is a {wanted[name]}, which is not supported; supported are {', '.join(NETWORKS)}."
            )
    left_out = [
        name for name, kind in wanted.items() if name not in places and name != "scheduler" and kind not in TOKENIZERS
    ]
    if left_out:
        warnings.warn(
            f"{file.path} cannot hold {', '.join(left_out)}, which its configuration names; pass it, or None, to say "
            "that it is not wanted.",
            stacklevel=4,
        )


def _check_names(file: SingleFile, prefixes: Iterable[str], ignore: Collection[str]) -> None:
    """Raise when a tensor belongs to no component."""
    prefixes = tuple(prefixes)
    unknown = [key for key in file.shapes if not key.startswith(prefixes) and not is_ignored(key, ignore)]
    if unknown:
        raise WeightError(_unknown(file, unknown))


def _unknown(file: SingleFile, keys: Collection[str]) -> str:
    return (
        f"{file.path}: {len(keys)} tensors are unknown: {listed(keys)}. If they have no effect on pictures, pass "
        "ignore= with patterns of their names; if they have, the file is not what its configuration (config=) says."
    )


def _load(
    file: SingleFile,
    place: Place,
    cls: type[ModelT],
    folder: Path,
    dtype: torch.dtype | None,
    ignore: Collection[str],
) -> ModelT:
    """Build one network out of the tensors at ``place``, with the configuration in ``folder``."""
    config = config_from_dict(cls.config_class, read_json(folder / CONFIG_NAME))
    if isinstance(config, UNetConfig) and place.dialect == "published" and GUIDANCE in file.shapes:
        config = dataclasses.replace(config, time_cond_proj_dim=file.shapes[GUIDANCE][1])
    return _build(file, place, cls, config, dtype, ignore)


def _build(
    file: SingleFile,
    place: Place,
    cls: type[ModelT],
    config: Config,
    dtype: torch.dtype | None,
    ignore: Collection[str],
) -> ModelT:
    rename = translator(cls, config, place.dialect)
    places: dict[str, tuple[Path, str]] = {}
    transforms: dict[str, Transform] = {}
    unknown = []
    for key in file.shapes:
        if not key.startswith(place.prefix) or is_ignored(key, ignore):
            continue
        rows = rename(key[len(place.prefix) :])
        if rows is None:
            unknown.append(key)
        for name, transform in rows or ():
            if name in places:
                raise WeightError(f"{file.path}: {key!r} and {places[name][1]!r} both hold {name!r}.")
            places[name] = (file.path, key)
            if transform is not None:
                transforms[name] = transform
    if unknown:
        raise WeightError(_unknown(file, unknown))
    return build(cls, config, WeightSource(places, transforms), dtype=dtype, where=str(file.path))


def _scheduler_config(folder: Path, file: SingleFile, prediction_type: str | None) -> dict[str, Any]:
    config = read_json(folder / "scheduler_config.json")
    prediction_type = prediction_type or infer_prediction_type(file.shapes, file.metadata)
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    if "ztsnr" in file.shapes:
        # Trained with zero terminal signal-to-noise ratio (Lin et al. 2023, arXiv 2305.08891): starts at t = 999.
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config
