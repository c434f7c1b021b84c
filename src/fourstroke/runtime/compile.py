"""torch.compile as an option: a network's forward compiled, with what the compiler made kept on disk.

::

    compile_(unet)           # compiles when a shape comes for the first time
    uncompile_(unet)         # the off switch

Unlike ``pipe.unet = torch.compile(pipe.unet)``, which wraps the module, this replaces the forward of that one object:
its class, its parameters and their names stay. Weights are inputs of the compiled code, so adapters switch without
compiling anew.
"""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..loading import write_atomically
from .cache import cache_folder
from .calls import Arguments, Forward, describe, map_tensors, replace_forward_, restore_forward_

GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes in which torch puts CUDA graphs of its own around the code."""


def compile_(
    network: nn.Module,
    *,
    mode: str | None = None,
    dynamic: bool = False,
    cache: bool | str | os.PathLike[str] = True,
    backend: str | Callable[..., Any] = "inductor",
) -> Compiled:
    """Compile the forward of this one object; called again on the same network it starts anew.

    Args:
        network: any module, such as a UNet, a ControlNet, or the ``decoder`` of an autoencoder.
        mode: as in `torch.compile`: None, ``"reduce-overhead"`` (with CUDA graphs), ``"max-autotune"``,
            ``"max-autotune-no-cudagraphs"``.
        dynamic: one code for all shapes instead of one a shape. Of the latter torch makes 8 a class and then runs
            eagerly, with a warning.
        cache: keep what the compiler made in ``fourstroke/compile`` in the user's cache, or in this folder, or (False)
            not beyond torch's own cache in the temporary folder. It is read back before the first call of a shape. That
            is trusted like code.
        backend: as in `torch.compile`.

    Returns:
        The compiled forward; also ``network.forward`` from now on.

    Raises:
        RuntimeError: another backend runs ``network`` already, or the mode is none of torch's.
    """
    folder = None if cache is False else cache_folder("compile") if cache is True else Path(cache)
    compiled = Compiled(network, mode=mode, dynamic=dynamic, folder=folder, backend=backend)
    replace_forward_(network, compiled)
    return compiled


def uncompile_(network: nn.Module) -> None:
    """Undo `compile_`: the class's own forward runs again. Where nothing is compiled it does nothing."""
    restore_forward_(network, Compiled)


class Compiled(Forward):
    """The compiled forward of one network, and the files that hold what was compiled.

    Args:
        network, mode, dynamic, backend: as for `compile_`.
        folder: of the files; None keeps nothing.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mode: str | None = None,
        dynamic: bool = False,
        folder: Path | None = None,
        backend: str | Callable[..., Any] = "inductor",
    ):
        super().__init__(network)
        self.mode, self.dynamic, self.folder, self.backend = mode, dynamic, folder, backend
        # The class's function, which is given the module at each call, and not a bound method, which would keep it.
        self._run = torch.compile(type(network).forward, mode=mode, dynamic=dynamic, backend=backend)
        self._seen: set[Any] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled network has the same settings and compiles for itself."""
        return _anew, (self.network, self.mode, self.dynamic, self.folder, self.backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One evaluation; the arguments and the result are those of the network's own forward."""
        arguments = self.arguments(args, kwargs)
        if self.folder is None:
            return self._evaluate(arguments)
        weight = next(self.network.parameters(), torch.empty(0))
        key = (describe(arguments, shapes=not self.dynamic), weight.dtype, weight.device, torch.is_grad_enabled())
        if key in self._seen:
            return self._evaluate(arguments)
        file = self.folder / self._name(key)
        load_artifacts(file)
        result = self._evaluate(arguments)
        save_artifacts(file)
        self._seen.add(key)
        return result

    def _evaluate(self, arguments: Arguments) -> Any:
        args, kwargs = arguments
        if self.mode not in GRAPH_MODES:
            return self._run(self.network, *args, **kwargs)
        # torch's graphs write each result where the last one was.
        torch.compiler.cudagraph_mark_step_begin()
        return map_tensors(self._run(self.network, *args, **kwargs), Tensor.clone)

    def _name(self, key: Any) -> str:
        """The file for a call: another torch, device, structure or shape makes other code."""
        device = key[2]
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        facts = (gpu, self.mode, self.dynamic, str(self.backend), key, str(self.network))
        return f"{torch.__version__}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.bin"


def _anew(network: nn.Module, mode: str | None, dynamic: bool, folder: Path | None, backend: Any) -> Compiled:
    return Compiled(network, mode=mode, dynamic=dynamic, folder=folder, backend=backend)


def load_artifacts(file: Path) -> bool:
    """Hand compiled code to torch's cache; whether there was any. Torch before 2.7 has no way to."""
    if not (hasattr(torch.compiler, "load_cache_artifacts") and file.is_file()):
        return False
    return torch.compiler.load_cache_artifacts(file.read_bytes()) is not None


def save_artifacts(file: Path) -> bool:
    """Write the compiled code of this process, all at once or not at all; whether there was any.

    What torch took from its cache counts too, so a file that was read is not written smaller. A folder that cannot be
    written to warns.
    """
    found = torch.compiler.save_cache_artifacts() if hasattr(torch.compiler, "save_cache_artifacts") else None
    if found is None:
        return False
    try:
        # Only for its owner: it is run.
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(file, lambda temporary: temporary.write_bytes(found[0]), private=True)
    except OSError as error:
        warnings.warn(
            f"Compiled code cannot be kept in {file.parent} ({error.strerror or error}), so the next start compiles "
            "again. Give compile_ another folder (cache=…), or none (cache=False).",
            stacklevel=2,
        )
        return False
    return True
