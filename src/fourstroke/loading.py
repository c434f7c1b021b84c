"""Building networks from published files: meta build, memory-mapped weights, strict key check, atomic save."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import hub
from .config import Config, config_from_dict, config_to_dict
from .hub import read_json
from .parts import cast

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG_NAME = "config.json"
WEIGHT_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
MAX_LISTED = 20
# Of a file on the hub: the repository, the revision (if any) and the path in it.
ADDRESS = r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:(?:blob|resolve)/([^/]+)/)?([^?]+)(?:\?.*)?"


class WeightError(ValueError):
    """The tensors of a file and the parameters of a network do not match; the message lists every key."""


def listed(names: Iterable[str]) -> str:
    """``names`` in one line, cut after `MAX_LISTED` of them, for error messages."""
    names = list(names)
    more = f", … and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def refuse_pickle(path: str | os.PathLike[str]) -> None:
    """Raise when ``path`` is a pickle: reading one can run any code that its author put into it.

    Raises:
        ValueError: the file name ends like a pickle's.
    """
    if str(path).endswith(PICKLE_SUFFIXES):
        raise ValueError(
            f"{path} is a pickle, and loading a pickle can run code hidden in it, so only .safetensors files are read. "
            "Convert it once, in an environment that you trust: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
        )


def resolve_file(path: str | os.PathLike[str], **where: Any) -> Path:
    """The local file that ``path`` names, downloaded when it is an address on the hub.

    Args:
        path: a file, or ``https://huggingface.co/owner/name/blob/main/folder/file.safetensors`` (``resolve`` for
            ``blob``, and leaving both out with the revision, will do).
        where: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a pickle.
    """
    refuse_pickle(path)
    local = Path(path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        raise FileNotFoundError(f"{path} is a folder; load it with from_pretrained, or name the file in it.")
    found = re.fullmatch(ADDRESS, str(path))
    if found is None:
        raise FileNotFoundError(
            f"There is no file {str(path)!r}. Give a local .safetensors file or an address of the form "
            "https://huggingface.co/owner/name/blob/main/file.safetensors; download others first."
        )
    repository, revision, name = found.groups()
    refuse_pickle(name)
    where = {**where, "revision": where.get("revision") or revision}
    return hub.fetch(repository, lambda files: hub.required(files, name), **where) / name


def open_tensors(path: Path) -> Any:
    """Open a .safetensors file, memory-mapped, on the CPU.

    Raises:
        ValueError: the file is a pickle (see `refuse_pickle`).
        WeightError: it cannot be read.
    """
    refuse_pickle(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightError(
            f"{path} is not a readable .safetensors file ({error}); download or convert it again."
        ) from None


class WeightSource:
    """Where a network's tensors lie on disk, so that the pristine weights can be read again at any time.

    The files are memory-mapped; a read costs no memory beyond the page cache.

    Args:
        places: our state-dict name -> (file, the tensor's name in that file).
        transforms: our state-dict name -> what makes our tensor of the file's, where the layouts differ.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[Path, str]],
        transforms: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ):
        self.places = dict(places)
        self.transforms = dict(transforms or {})
        self._files: dict[Path, Any] = {}

    @classmethod
    def from_files(cls, files: Iterable[Path], rename: Callable[[str], str | None]) -> WeightSource:
        """Index ``files``; ``rename`` maps a tensor's name to ours, or to None when the tensor carries nothing.

        Raises:
            WeightError: a file cannot be read, or two tensors claim one name.
        """
        source = cls({})
        for path in files:
            for key in source._open(path).keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                name = rename(key)
                if name is None:
                    continue
                if name in source.places:
                    raise WeightError(f"{path}: {key!r} and {source.places[name][1]!r} both hold {name!r}.")
                source.places[name] = (path, key)
        return source

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = open_tensors(path)
        return self._files[path]

    def close(self) -> None:
        """Forget the open files; tensors that were read stay valid, and later reads map the files anew.

        All reads through one mapping share its memory, so whoever changes a tensor in place calls this first, or else
        would read the change back as the pristine weight.
        """
        self._files.clear()

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` (a state-dict name of ours) in our layout and the file's own dtype, on the CPU.

        Raises:
            KeyError: the files hold no such tensor.
        """
        path, key = self.places[name]
        tensor = self._open(path).get_tensor(key)
        return self.transforms[name](tensor) if name in self.transforms else tensor


class Model(nn.Module):
    """Base of every network: configuration, loading and saving. How a network runs is none of its business.

    Class attributes:
        config_class: the dataclass of its configuration.
        renames: (pattern, replacement) pairs that turn older published key forms into today's.
        ignored: patterns of published keys that carry no weight (buffers of other libraries).
    """

    config_class: ClassVar[type[Config]]
    renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.source: WeightSource | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @classmethod
    def from_config(cls, config: Config | Mapping[str, Any]) -> Self:
        """A network with freshly initialised weights.

        Raises:
            UnsupportedConfig: see `config_from_dict`.
        """
        return cls(config if isinstance(config, Config) else config_from_dict(cls.config_class, config))

    @classmethod
    def published_name(cls, key: str) -> str | None:
        """Our state-dict name of a published tensor, or None when it carries no weight."""
        if any(re.search(pattern, key) for pattern in cls.ignored):
            return None
        for pattern, replacement in cls.renames:
            key = re.sub(pattern, replacement, key)
        return key

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **unknown: Any,
    ) -> Self:
        """Load a published network.

        Args:
            pretrained_model_name_or_path: hub id, shipped name (``emoji/base``) or folder.
            subfolder: folder inside it (``"unet"``).
            variant: read ``….{variant}.safetensors`` where there is one, and the plain file otherwise.
            torch_dtype, dtype: dtype of the parameters, two names of one thing (default ``torch.float32``).
            revision, token, cache_dir, local_files_only, force_download: as in huggingface_hub.
            unknown: any other keyword warns and is ignored.

        Raises:
            FileNotFoundError: the repository has no such configuration or weights.
            UnsupportedConfig, WeightError: the files do not describe this network.
        """
        warn_unknown(f"{cls.__name__}.from_pretrained", unknown)
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        folder = hub.fetch(
            pretrained_model_name_or_path,
            lambda files: [*hub.required(files, prefix + CONFIG_NAME), *select_weights(files, prefix, variant)],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return load_model(cls, hub.part(folder, prefix), variant=variant, dtype=dtype or torch_dtype)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        ignore: Collection[str] = (),
        **options: Any,
    ) -> Self:
        """Load this network alone from a ``.safetensors`` file in the original layout or diffusers'.

        Args:
            pretrained_model_link_or_path: a whole checkpoint, or a file of this network alone, or its address on the
                hub (``https://huggingface.co/owner/name/blob/main/file.safetensors``).
            config: family (``"sdxl"``), folder or hub id with the configuration, when the tensors do not tell.
            torch_dtype, dtype: dtype of the parameters, two names of one thing (default ``torch.float32``).
            ignore: patterns of tensor names that carry nothing and are left out.
            options: ``subfolder`` of ``config``; ``revision``, ``token``, ``cache_dir``, ``local_files_only``,
                ``force_download`` as in huggingface_hub; any other keyword warns and is ignored.

        Raises:
            FileNotFoundError: there is no such file or configuration.
            TypeError: networks of this class do not come in such files.
            ValueError, WeightError: the file is a pickle, is something else, or its tensors do not fit.
        """
        # People look for this on the class, while the layouts lie above the networks: the one import that goes up.
        from .single_file import load_network_file

        known = {name: options.pop(name) for name in ("subfolder", *hub.OPTIONS) if name in options}
        warn_unknown(f"{cls.__name__}.from_single_file", options)
        dtype = dtype or torch_dtype
        return load_network_file(cls, pretrained_model_link_or_path, config=config, dtype=dtype, ignore=ignore, **known)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, variant: str | None = None, stem: str = WEIGHT_STEMS[0]
    ) -> None:
        """Write ``config.json`` and ``{stem}[.{variant}].safetensors`` into ``save_directory``, each atomically."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_NAME, config_to_dict(self.config))
        save_tensors(folder / weight_name(stem, variant), self.state_dict(), metadata={"format": "pt"})


ModelT = TypeVar("ModelT", bound=Model)


def warn_unknown(where: str, unknown: Mapping[str, Any]) -> None:
    """Warn once for all keywords that ``where`` does not know (the LCM-LoRA guide itself writes ``varient=``)."""
    if unknown:
        warnings.warn(f"{where}: ignored unknown arguments {', '.join(map(repr, unknown))}.", stacklevel=3)


def weight_name(stem: str, variant: str | None) -> str:
    """The published name of a weight file: ``model.fp16.safetensors``."""
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def select_weights(files: Iterable[str], prefix: str, variant: str | None) -> list[str]:
    """The weight files to load for the component in folder ``prefix``, out of all ``files`` of a repository.

    One file, or an index and its shards; the ``variant`` if there is one, else (with a warning) the plain form.

    Raises:
        FileNotFoundError: no weights there; when there are only pickles the message says how to convert them.
    """
    names = {name[len(prefix) :] for name in files if name.startswith(prefix) and "/" not in name[len(prefix) :]}
    for wanted in dict.fromkeys((variant, None)):
        for stem in WEIGHT_STEMS:
            single = weight_name(stem, wanted)
            # Shards of a variant are published with its name before or after their number.
            tag = re.escape(f".{wanted}") if wanted else ""
            number = r"-\d+-of-\d+"
            index = re.compile(rf"{re.escape(stem)}(\.safetensors\.index{tag}|{tag}\.safetensors\.index)\.json")
            shard = re.compile(rf"{re.escape(stem)}({number}{tag}|{tag}{number})\.safetensors")
            sharded = any(map(index.fullmatch, names))
            found = [single] if single in names else sorted(filter(shard.fullmatch, names)) if sharded else []
            if found:
                if wanted != variant:
                    warnings.warn(f"{prefix or './'} has no variant {variant!r}; {found[0]} is loaded.", stacklevel=2)
                return [prefix + name for name in found]
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        refuse_pickle(prefix + pickles[0])
    raise FileNotFoundError(
        f"No .safetensors weights in {prefix or './'}; it holds: {listed(sorted(names)) or 'nothing'}."
    )


def load_model(
    cls: type[ModelT], folder: Path, *, variant: str | None = None, dtype: torch.dtype | None = None
) -> ModelT:
    """Build ``cls`` from a local folder that holds ``config.json`` and weights."""
    config = config_from_dict(cls.config_class, read_json(folder / CONFIG_NAME))
    files = select_weights([path.name for path in folder.iterdir()], "", variant)
    source = WeightSource.from_files([folder / name for name in files], cls.published_name)
    return build(cls, config, source, dtype=dtype, where=str(folder))


def build(
    cls: type[ModelT], config: Config, source: WeightSource, *, dtype: torch.dtype | None = None, where: str = ""
) -> ModelT:
    """Build ``cls`` on the meta device and give it the tensors of ``source``: no second copy, no random weights.

    A tensor that already has the wanted ``dtype`` (default ``torch.float32``) stays memory-mapped, copy-on-write.

    Raises:
        WeightError: keys are missing, unexpected or of the wrong shape; all of them are named.
    """
    with torch.device("meta"), _NoInitialisation():
        model = cls(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {name: cast(source.read(name), dtype or torch.float32) for name in source.places if name in expected}
    problems = {
        "missing": [name for name in expected if name not in source.places],
        "unexpected": [
            name if key == name else f"{name} ({key} in the file)"
            for name, (_, key) in source.places.items()
            if name not in expected
        ],
        "of the wrong shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name])}"
            for name, tensor in state.items()
            if tensor.shape != expected[name]
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names)
        raise WeightError(f"{where or cls.__name__}: the weights do not fit {cls.__name__}. {found}.")
    model.load_state_dict(state, assign=True, strict=True)
    # The parameters own this mapping from here on and may be changed in place; the source reads through a new one.
    source.close()
    model.source = source
    return model.eval()


class _NoInitialisation(TorchFunctionMode):
    """Leaves new parameters as they are: on the meta device initialising them only costs time, mostly imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def write_atomically(path: Path, write: Callable[[Path], object], *, private: bool = False) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it, so that no half-written file remains.

    A ``private`` file is its owner's alone, others follow the user's umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        if not private:  # as which mkstemp makes them
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, in the published style (sorted keys, two spaces)."""
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` as a .safetensors file, atomically."""
    from safetensors.torch import save_file

    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(packed, temporary, metadata=dict(metadata or {})))
