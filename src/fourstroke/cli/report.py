"""What ``fourstroke models``, ``inspect`` and ``info`` tell: facts as plain values, and how they look on a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import hub
from .console import did_you_mean, one_line
from .options import sampler_label
from .output import SUFFIXES, parameters_text, read_settings

if TYPE_CHECKING:
    from ..lora import LoraInfo, Settings
    from ..single_file import SingleFile

INDEX_NAME, CONFIG_NAME, WEIGHTS = "model_index.json", "config.json", ".safetensors"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
PACKAGES = ("torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "pillow", "typer", "rich")
# Package -> what it is for; without it the rest works.
EXTRAS = {
    "openvino": "fast on Intel CPUs (fourstroke[cpu])",
    "fastapi": "the server (fourstroke[server])",
    "ray": "many machines (fourstroke[ray])",
    "accelerate": "training (fourstroke[train])",
    "av": "video files (fourstroke[video])",
    "opencv-python-headless": "control pictures (fourstroke[controls])",
}

Facts = dict[str, Any]


# models


def is_pipeline(folder: Path) -> bool:
    """Whether ``folder`` holds a whole model."""
    return (folder / INDEX_NAME).is_file()


def is_lora(folder: Path) -> bool:
    """Whether ``folder`` holds weights without a configuration, as LoRAs come."""
    return not (folder / CONFIG_NAME).is_file() and any(folder.glob("*" + WEIGHTS))


def kind_of(folder: Path) -> str:
    """The published class of what is in ``folder``, ``LoRA``, or ``unknown``."""
    if is_pipeline(folder):
        return hub.read_json(folder / INDEX_NAME).get("_class_name") or "pipeline"
    if (folder / CONFIG_NAME).is_file():
        config = hub.read_json(folder / CONFIG_NAME)
        return config.get("_class_name") or next(iter(config.get("architectures") or ()), "network")
    return "LoRA" if is_lora(folder) else "unknown"


def cache_folder() -> Path:
    """huggingface_hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_names() -> list[str]:
    """The ids of the model repositories in the hub's cache."""
    return sorted(path.name[8:].replace("--", "/") for path in cache_folder().glob("models--*") if path.is_dir())


def models() -> Facts:
    """Shipped models and those in the hub's cache: name, kind, bytes, folder."""
    aliases = {name: alias for alias, name in hub.ALIASES.items()}
    shipped = [_model(name, hub.ZOO / name) | {"alias": aliases.get(name)} for name in hub.shipped()]
    cached = []
    for name in cached_names():
        folder = cache_folder() / f"models--{name.replace('/', '--')}"
        snapshots = sorted(folder.glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
        if snapshots:
            cached.append(_model(name, snapshots[-1]) | {"bytes": _size(folder)})
    return {"shipped": shipped, "cached": cached, "cache": str(cache_folder())}


def _model(name: str, folder: Path) -> Facts:
    return {"name": name, "kind": kind_of(folder), "bytes": _size(folder), "folder": str(folder)}


def _size(folder: Path) -> int:
    """Bytes on disk; the cache's links into its blobs do not count."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def show_models(facts: Facts) -> None:
    """Print `models` as tables."""
    from rich.table import Table

    console = _console()
    for title, rows in (("Shipped", facts["shipped"]), (f"In {facts['cache']}", facts["cached"])):
        if not rows:
            console.print(f"{title}: nothing", markup=False, highlight=False)
            continue
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for heading in ("name", "kind"):
            table.add_column(heading, overflow="fold")
        table.add_column("size", justify="right")
        for row in rows:
            alias = f" ({row['alias']})" if row.get("alias") else ""
            table.add_row(one_line(row["name"]) + alias, one_line(row["kind"]), _bytes(row["bytes"]))
        console.print(table)


# inspect


def describe(what: str) -> Facts:
    """What ``what`` is: a file, a folder, a shipped model or a hub repository, from headers and configurations only.

    Raises:
        FileNotFoundError: there is no such thing.
        ValueError: it cannot be read, or is a pickle.
    """
    path = Path(what).expanduser()
    if path.is_file():
        return {"name": what} | (_picture(path) or _weights(path, what))
    folder = hub.local_folder(what)
    if folder is None and what.endswith(WEIGHTS) and what.count("/") > 1:
        return {"name": what} | _weights(_lora_file(what), what)
    if folder is None:
        try:
            folder = hub.fetch(what, lambda files: [file for file in files if file.endswith(".json")])
        except FileNotFoundError as error:
            known = [*hub.ALIASES, *hub.shipped(), *cached_names(), *_neighbours(path)]
            raise FileNotFoundError(f"{error}{did_you_mean(what, known)}") from error
    return {"name": what} | _folder(folder, what)


def _lora_file(what: str) -> Path:
    """The file of a folder, of a repository, or at a path in one: ``owner/name/path/in/it``."""
    from ..pipelines.components import lora_file
    from ..plan import split_place

    return lora_file(*split_place(what), None, {})


def _neighbours(path: Path) -> list[str]:
    return [str(path.parent / other.name) for other in path.parent.iterdir()] if path.parent.is_dir() else []


def _picture(path: Path) -> Facts | None:
    if path.suffix.lower() not in SUFFIXES:
        return None
    settings = read_settings(path)
    if settings is None:
        raise ValueError(f"{path} is a picture without fourstroke's settings in it.")
    return {"kind": "picture", "settings": settings}


def _folder(folder: Path, name: str) -> Facts:
    if is_pipeline(folder):
        return _pipeline(folder, name)
    if (folder / CONFIG_NAME).is_file():
        return {"kind": "network", "class": kind_of(folder), **weights_in(folder)}
    return _weights(_lora_file(name), name)


def _pipeline(folder: Path, name: str) -> Facts:
    from ..lora import recommended

    index = hub.read_json(folder / INDEX_NAME)
    components = {
        name: {"class": entry[1], **weights_in(hub.part(folder, name))}
        for name, entry in index.items()
        if isinstance(entry, list) and entry[1] is not None
    }
    return {
        "kind": "pipeline",
        "class": index.get("_class_name"),
        "components": components,
        "parameters": sum(part["parameters"] for part in components.values()),
        "bytes": sum(part["bytes"] for part in components.values()),
        "dtypes": sorted({dtype for part in components.values() for dtype in part["dtypes"]}),
        "settings": {
            name: value for name, value in index.items() if not isinstance(value, list) and not name.startswith("_")
        },
        "recommended": _settings(recommended(name)),
    }


def weights_in(folder: Path) -> Facts:
    """Parameters, bytes and dtypes of the weights in ``folder``: of the plain form, or else of one variant."""
    files = sorted(folder.glob("*" + WEIGHTS))
    variants = {path: path.name.split(".")[1:-1] for path in files}  # model.fp16.safetensors -> fp16
    chosen = min(variants.values(), default=[])
    return _count([path for path in files if variants[path] == chosen])


def _count(files: Iterable[Path]) -> Facts:
    from ..loading import open_tensors

    dtypes: Counter[str] = Counter()
    size = 0
    for path in files:
        file = open_tensors(path)
        size += path.stat().st_size
        for key in file.keys():  # noqa: SIM118 - no mapping
            tensor = file.get_slice(key)
            dtype = str(tensor.get_dtype())
            dtypes[DTYPES.get(dtype, dtype)] += math.prod(tensor.get_shape())
    return {"parameters": dtypes.total(), "bytes": size, "dtypes": [name for name, _ in dtypes.most_common()]}


def _weights(path: Path, name: str) -> Facts:
    from ..lora import LoraError, inspect_lora
    from ..single_file import SingleFile, infer_family

    file = SingleFile.open(path)
    try:
        family = infer_family(file.shapes, file.metadata, read=file.read)
    except ValueError as reason:
        try:
            return _lora(inspect_lora(path, name=name)) | _count([path])
        except LoraError:
            return {"kind": "other", "about": str(reason), **_count([path])}
    return _checkpoint(file, family)


# Attributes of `LoraInfo`, as JSON tells them.
OF_A_LORA = (
    *("family", "fits", "dialect", "kinds", "rank", "ranks", "alpha", "alphas", "targets"),
    *("base_model", "trigger_words", "unknown_keys", "metadata"),
)


def _lora(found: LoraInfo) -> Facts:
    facts = {name: getattr(found, name) for name in OF_A_LORA}
    return {"kind": "lora", **facts, "recommended": _settings(found.recommended)}


def _settings(recommended: Settings | None) -> Facts | None:
    return None if recommended is None else dataclasses.asdict(recommended)


def _checkpoint(file: SingleFile, family: str) -> Facts:
    from ..lora import recommended
    from ..single_file import infer_prediction_type
    from ..single_file.layout import PLACES, find_place

    components = {}
    for name in PLACES:
        place = find_place(name, file.shapes)
        if place is not None:
            shapes = [shape for key, shape in file.shapes.items() if key.startswith(place.prefix)]
            components[name] = {"parameters": sum(map(math.prod, shapes)), "layout": place.dialect}
    return {
        "kind": "checkpoint",
        "family": family,
        "prediction_type": infer_prediction_type(file.shapes, file.metadata),
        "components": components,
        **_count([file.path]),
        "metadata": dict(file.metadata),
        "recommended": _settings(recommended(file.path.absolute(), file.metadata)),
    }


def show_description(facts: Facts) -> None:
    """Print what `describe` found."""
    if facts["kind"] == "picture":
        for line in parameters_text(facts["settings"]).splitlines():
            _console().print(one_line(line), markup=False, highlight=False)
        return
    rows = {"name": facts["name"], **_SHOWN[facts["kind"]](facts)}
    if "parameters" in facts:
        rows["size"] = f"{_number(facts['parameters'])} parameters, {_bytes(facts['bytes'])}, {_dtypes(facts)}"
    _show_rows(rows)


def _show_lora(facts: Facts) -> Facts:
    targets = ", ".join(f"{component} ({len(modules)} modules)" for component, modules in facts["targets"].items())
    return {
        "kind": f"LoRA ({' + '.join(facts['kinds'])})",
        "family": facts["family"],
        "made for": " or ".join(facts["fits"]),
        "dialect": facts["dialect"],
        "rank": ", ".join(map(str, facts["ranks"])),
        "alpha": ", ".join(f"{alpha:g}" for alpha in facts["alphas"]) or "none (scale 1)",
        "targets": targets,
        "trained on": facts["base_model"],
        "trigger words": ", ".join(facts["trigger_words"]),
        "run with": _command(f"--lora {facts['name']}", facts["recommended"]),
        "unknown keys": ", ".join(facts["unknown_keys"][:8]),
        **_told(facts["metadata"], "title", "author", "license", "usage_hint"),
    }


def _told(metadata: Mapping[str, str], *names: str) -> Facts:
    """What a header says of its file, by https://github.com/Stability-AI/ModelSpec."""
    return {name.replace("_", " "): metadata.get(f"modelspec.{name}") for name in names}


def _command(what: str, settings: Facts | None) -> str | None:
    """How to run what ``--lora`` or ``--model`` names, and what that brings with it."""
    if settings is None:
        return None
    brings = {
        "scheduler": sampler_label(settings["scheduler"]),
        "steps": settings["num_inference_steps"],
        "guidance": f"{settings['guidance_scale']:g}",
        "eta": settings["eta"] or None,
        "weight": settings["weight"] if settings["weight"] != 1 and what.startswith("--lora") else None,
        **settings["scheduler_options"],
        "timesteps": settings["timesteps"],
    }
    values = ", ".join(f"{name}={value}" for name, value in brings.items() if value is not None)
    return f"{settings['method']}: {what}, which brings {values}"


def _show_checkpoint(facts: Facts) -> Facts:
    parts = facts["components"].items()
    return {
        "kind": "checkpoint in one file",
        "family": facts["family"],
        "prediction": facts["prediction_type"],
        "holds": ", ".join(f"{name} ({_number(part['parameters'])})" for name, part in parts),
        "run with": _command(f"--model {facts['name']}", facts["recommended"]),
        **_told(facts["metadata"], "title", "author", "license", "trigger_phrase"),
    }


def _show_pipeline(facts: Facts) -> Facts:
    rows: Facts = {"kind": facts["class"], "run with": _command(f"--model {facts['name']}", facts["recommended"])}
    for name, part in facts["components"].items():
        size = f", {_number(part['parameters'])}, {_dtypes(part)}" if part["parameters"] else ""
        rows[name] = part["class"] + size
    return rows


_SHOWN = {
    "lora": _show_lora,
    "checkpoint": _show_checkpoint,
    "pipeline": _show_pipeline,
    "network": lambda facts: {"kind": facts["class"]},
    "other": lambda facts: {"kind": "other", "about": facts["about"]},
}


# info


def environment() -> Facts:
    """Versions, devices, threads and what can run here."""
    import torch

    from .. import __version__

    cuda = torch.cuda.is_available()
    devices = [{"name": "cpu", "about": _cpu_name(), "memory": _memory()}]
    for i in range(torch.cuda.device_count() if cuda else 0):
        facts = torch.cuda.get_device_properties(i)
        devices.append({"name": f"cuda:{i}", "about": facts.name, "memory": facts.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "about": "Apple GPU", "memory": None})
    return {
        "versions": {
            "fourstroke": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "extras": {name: _version(name) for name in EXTRAS},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "devices": devices,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "backends": {
            "eager": True,
            "compile": any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")),
        },
        "cuda": torch.version.cuda,
        "cache": str(cache_folder()),
        "shipped": hub.shipped(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def show_environment(facts: Facts) -> None:
    """Print `environment`."""
    rows = {name: version or "not installed" for name, version in facts["versions"].items()}
    rows["system"] = facts["system"]
    for device in facts["devices"]:
        memory = f", {_bytes(device['memory'])}" if device["memory"] else ""
        rows[device["name"]] = device["about"] + memory
    rows["threads"] = f"{facts['threads']} on {facts['cores']} cores, {facts['cpu_capability']}"
    rows["backends"] = ", ".join(name for name, there in facts["backends"].items() if there)
    for name, version in facts["extras"].items():
        rows[name] = version or f"not installed: {EXTRAS[name]}"
    rows["cache"] = facts["cache"]
    rows["shipped"] = ", ".join(facts["shipped"]) or "nothing"
    _show_rows(rows)


# How things look.


def _console() -> Any:
    from rich.console import Console

    # Lines that a program reads are not wrapped.
    return Console(width=None if sys.stdout.isatty() else 10_000)


def _show_rows(rows: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value not in (None, ""):
            table.add_row(name, Text(one_line(value)))
    _console().print(table)


def _bytes(size: int) -> str:
    number, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"


def _number(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _dtypes(facts: Facts) -> str:
    return ", ".join(facts["dtypes"]) or "no weights here"
