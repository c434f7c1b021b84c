"""What every scheduler has: a configuration that travels between classes and files, a noise schedule, a place in it."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .. import hub
from ..loading import write_atomically
from . import noise as noise_


class SchedulerConfig(dict[str, Any]):
    """An immutable mapping whose values can be read as attributes too: ``config["beta_end"]`` is ``config.beta_end``.

    Besides the options it holds ``_class_name``, every key of the file that its class does not know, and
    ``_use_default_values``: the options that nobody chose, for which another class uses its own defaults (not saved).
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the scheduler's config has no {name!r}; it has: {', '.join(self)}.") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "a scheduler's config cannot be changed; build another: X.from_config(scheduler.config, option=value)."
        )

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = __ior__ = _refuse  # type: ignore[assignment]
    clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return type(self), (dict(self),)

    def with_values(self, values: Mapping[str, Any]) -> SchedulerConfig:
        """A copy in which ``values`` replace or join the entries."""
        return SchedulerConfig({**self, **values})


@dataclass(frozen=True)
class SchedulerOutput:
    """What `step` returns: a record that can be indexed by position or name, unpacked, or made a dict.

    ``prev_sample`` is the sample for the next step, with the shape and dtype of the sample that went in.
    """

    prev_sample: Tensor

    def keys(self) -> tuple[str, ...]:
        """The names of the fields."""
        return tuple(field.name for field in fields(self))

    def values(self) -> tuple[Tensor, ...]:
        """The fields."""
        return tuple(getattr(self, name) for name in self.keys())

    to_tuple = values

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.values()[key]


def records_config(init: Callable[..., None]) -> Callable[..., None]:
    """Make a scheduler's ``__init__`` store its arguments as ``self.config`` before it runs.

    Raises:
        TypeError: (from that ``__init__``) an argument is unknown or missing; the message names the class.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def recording(self: Scheduler, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        unchosen = [name for name in signature.parameters if name not in bound.arguments]
        bound.apply_defaults()
        values = {name: value for name, value in bound.arguments.items() if name != "self"}
        defaults = {"_use_default_values": unchosen} if unchosen else {}
        self.config = SchedulerConfig({**values, "_class_name": type(self).__name__, **defaults})
        init(self, *args, **kwargs)

    return recording


class Scheduler:
    """The base of every scheduler; speaks diffusers' public scheduler protocol.

    Attributes:
        config: the options it was built with.
        betas, alphas, alphas_cumprod: the noise schedule, (T,) float32.
        sigmas: of the schedulers that work with them, (n + 1,) float32, on the CPU: its elements mix with tensors on
            any device without a copy or a sync.
        timesteps: the timesteps to run, descending, (n,), on the device given to `set_timesteps`.
        num_inference_steps: n, or None before `set_timesteps`.
        init_noise_sigma: the standard deviation of the first sample.
        order: network calls a step.
        step_index, begin_index: where the next step is, and where the first was; None before the first step, and until
            `set_begin_index`.
    """

    config_name = "scheduler_config.json"
    order = 1

    config: SchedulerConfig
    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    sigmas: Tensor
    timesteps: Tensor
    init_noise_sigma: float | Tensor = 1.0
    num_inference_steps: int | None = None
    step_index: int | None = None
    begin_index: int | None = None

    # -- configuration ---------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build this class from the configuration of any scheduler.

        Options that the other scheduler's owner never chose take this class's defaults. What this class does not know
        stays in ``config``, so that going back loses nothing.

        Args:
            config: ``other.config``, or the mapping in a ``scheduler_config.json``.
            return_unused_kwargs: return ``(scheduler, unused)``.
            **kwargs: options that replace those of ``config``.

        Raises:
            TypeError: ``config`` is not a mapping (a folder or repository goes to `from_pretrained`).
            UnsupportedConfig: an option asks for what this class does not do.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"{cls.__name__}.from_config takes a mapping such as pipe.scheduler.config, not {config!r}; to read a "
                f"folder or a repository use {cls.__name__}.from_pretrained(name, subfolder='scheduler')."
            )
        unchosen = {*config.get("_use_default_values", ()), "_use_default_values"}
        given = {name: value for name, value in config.items() if name not in unchosen}
        options = _options(cls)
        chosen = {name: kwargs.get(name, given.get(name)) for name in options if name in given or name in kwargs}
        hidden = {name: value for name, value in given.items() if name not in chosen}
        unused = {name: value for name, value in kwargs.items() if name not in options}
        for name in () if return_unused_kwargs else unused:
            near = difflib.get_close_matches(name, options, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            warnings.warn(f"{cls.__name__} has no option {name!r}; it has no effect.{hint}", stacklevel=2)
        scheduler = cls(**chosen)
        scheduler.config = SchedulerConfig({**hidden, **scheduler.config})
        return (scheduler, {**hidden, **unused}) if return_unused_kwargs else scheduler

    @classmethod
    def load_config(
        cls, name: str | os.PathLike[str], subfolder: str | None = None, **hub_options: Any
    ) -> dict[str, Any]:
        """The mapping in ``scheduler_config.json`` of a folder, a hub repository, a shipped model, or that file itself.

        Args:
            name, subfolder: where it is.
            **hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

        Raises:
            FileNotFoundError: there is no such repository, folder or file.
            ValueError: the file is not JSON.
        """
        path = Path(name)
        if not path.is_file():
            inside = f"{subfolder}/{cls.config_name}" if subfolder else cls.config_name
            path = hub.fetch(name, lambda files: hub.required(files, inside), **hub_options) / inside
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON file: {error}. Download it again.") from error

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Build this class from a ``scheduler_config.json``: `load_config`, then `from_config` with other options."""
        hub_options = {name: kwargs.pop(name) for name in hub.OPTIONS if name in kwargs}
        config = cls.load_config(pretrained_model_name_or_path, subfolder, **hub_options)
        return cls.from_config(config, return_unused_kwargs, **kwargs)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False) -> None:
        """Write ``scheduler_config.json``, which diffusers reads too, into a folder (made if missing).

        Raises:
            NotADirectoryError: the path is a file.
            ValueError: ``push_to_hub`` was asked for.
        """
        if push_to_hub:
            raise ValueError("push_to_hub is not done here; save, then huggingface_hub.upload_folder(...).")
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file; give a folder to write {self.config_name} into.")
        folder.mkdir(parents=True, exist_ok=True)
        text = self.to_json_string()
        write_atomically(folder / self.config_name, lambda path: path.write_text(text, encoding="utf-8"))

    save_pretrained = save_config

    def to_json_string(self) -> str:
        """The text of ``scheduler_config.json``."""
        values = {name: value for name, value in self.config.items() if name != "_use_default_values"}
        return json.dumps(values, indent=2, sort_keys=True, default=_to_json) + "\n"

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes whose `from_config` takes this scheduler's config."""
        return _runnable()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    # -- noise schedule --------------------------------------------------------------------------------------------

    def _init_schedule(self, *, finite_sigma: bool = False) -> None:
        """Set the noise schedule from the configuration.

        Args:
            finite_sigma: keep the last sigma finite under ``rescale_betas_zero_snr`` (2^-24 is the least float16).
        """
        c = self.config
        betas = noise_.make_betas(c.beta_schedule, c.beta_start, c.beta_end, c.num_train_timesteps, c.trained_betas)
        self.betas = noise_.rescale_zero_terminal_snr(betas) if c.rescale_betas_zero_snr else betas
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        if c.rescale_betas_zero_snr and finite_sigma:
            self.alphas_cumprod[-1] = 2**-24
        self.timesteps = torch.arange(c.num_train_timesteps - 1, -1, -1)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The network's input for ``sample``; the sample itself unless the scheduler works with sigmas."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean samples up to timesteps (`noise.add_noise`).

        Args:
            original_samples, noise: (B, ...).
            timesteps: (B,) or (1,) integers below ``num_train_timesteps``.
        """
        return noise_.add_noise(original_samples, noise, self._alphas_cumprod_at(timesteps, original_samples.device))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of a v-prediction network (`noise.get_velocity`); arguments as for `add_noise`."""
        return noise_.get_velocity(sample, noise, self._alphas_cumprod_at(timesteps, sample.device))

    def _alphas_cumprod_at(self, timesteps: Tensor, device: torch.device) -> Tensor:
        self.alphas_cumprod = self.alphas_cumprod.to(device)  # stays there: one copy, not one a step
        return self.alphas_cumprod[timesteps.to(device, torch.long)]

    # -- place in the schedule -------------------------------------------------------------------------------------

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say which of ``timesteps`` comes first, so that it need not be looked up (which waits for the device)."""
        self.begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The place of ``timestep`` in ``timesteps``, or the second place when it occurs more than once.

        (A schedule that repeats a timestep and is entered there, as image-to-image does, must not skip a sigma.)

        Raises:
            ValueError: it does not occur.
        """
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        wanted = timestep.to(schedule.device) if isinstance(timestep, Tensor) else timestep
        places = (schedule == wanted).nonzero().flatten().tolist()
        if not places:
            raise ValueError(f"timestep {float(timestep):g} is not in the schedule; it is one of {schedule.tolist()}.")
        return places[min(1, len(places) - 1)]

    def _require_schedule(self) -> None:
        """Raise ValueError unless `set_timesteps` has been called."""
        if self.num_inference_steps is None:
            raise ValueError(f"{type(self).__name__} has no schedule yet: call set_timesteps(n) before step.")

    def _enter(self, timestep: float | Tensor) -> int:
        """The index of the step to take now; ValueError when all have been taken."""
        index = self.begin_index if self.step_index is None else self.step_index
        self.step_index = self.index_for_timestep(timestep) if index is None else index
        if self.step_index >= len(self.timesteps):
            raise ValueError(
                f"all {len(self.timesteps)} steps have been taken; call set_timesteps(n) for another loop."
            )
        return self.step_index

    def _start(self, timesteps: np.ndarray | list[int], device: torch.device | str | None, dtype: torch.dtype) -> None:
        """Begin a schedule anew."""
        self.timesteps = torch.as_tensor(np.asarray(timesteps)).to(device=device, dtype=dtype)
        self.num_inference_steps = len(timesteps)
        self.step_index = self.begin_index = None

    def _sigmas_at(self, timesteps: Tensor, sample: Tensor) -> Tensor:
        """The sigmas for noising samples: where the loop is if it has a begin index, else where the timesteps are.

        Returns:
            0-dimensional and on the CPU in a loop; else (B, 1, ..., 1), on the device and in the dtype of ``sample``.
        """
        if self.begin_index is not None:
            return self.sigmas[self.begin_index if self.step_index is None else self.step_index]
        sigmas = self.sigmas[[self.index_for_timestep(t) for t in timesteps]]
        return sigmas.to(sample.device, sample.dtype).reshape(-1, *[1] * (sample.dim() - 1))

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """The timestep that follows ``timestep`` in the schedule (-1 after the last), 0-dimensional int64."""
        if self.num_inference_steps is None:
            return torch.as_tensor(timestep) - 1
        index = self.index_for_timestep(timestep)
        return self.timesteps[index + 1] if index + 1 < len(self.timesteps) else torch.tensor(-1)


def _runnable() -> list[type[Scheduler]]:
    return [kind for kind in Scheduler.__subclasses__() if kind.__name__ != "ConfigOnly"]


def _options(cls: type[Scheduler]) -> list[str]:
    """The names of the configuration's options, from the constructor."""
    return list(inspect.signature(cls).parameters)


def _to_json(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
