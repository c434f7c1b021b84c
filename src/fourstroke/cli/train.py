"""``fourstroke distill`` and ``fourstroke train lora``: from the command line to a LoRA file.

The options are the fields of `DistillOptions`, `LoraOptions` and `DataOptions`, with their help texts and defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import note, one_line, warnings_as_notes, without_network
from .generate import quiet_loading
from .options import TYPES, complete_models, option

DATA, METHOD, TRAINING, LORA, MEMORY, OUTPUT = "Data", "Method", "Training", "LoRA", "Speed and memory", "Output"
# Field -> panel of the help text; those of `DataOptions` are data, and all others are training.
PANELS: Mapping[str, str] = {
    **dict.fromkeys(("caption", "cache", "prior_data", "prior_weight", "caption_dropout"), DATA),
    **dict.fromkeys(("guidance", "num_ddim_timesteps", "loss", "huber_c", "ema_target"), METHOD),
    **dict.fromkeys(("min_snr_gamma", "noise_offset", "train_text_encoder", "text_learning_rate"), METHOD),
    **dict.fromkeys(("rank", "alpha", "targets", "text_targets", "init_from", "layout", "save_precision"), LORA),
    **dict.fromkeys(("device", "precision", "base_precision", "gradient_checkpointing", "optimizer"), MEMORY),
    **dict.fromkeys(("save_every", "keep", "sample_every", "sample_prompts", "log"), OUTPUT),
}
# What people who come from other trainers type -> the option here.
OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("--lr", "--learning_rate", "--unet_lr"), "--learning-rate"),
    **dict.fromkeys(
        ("--max-train-steps", "--max_train_steps", "--iterations", "--epochs", "--num_train_epochs"), "--steps"
    ),
    **dict.fromkeys(("--train-batch-size", "--train_batch_size", "--batch", "--bs", "-b"), "--batch-size"),
    **dict.fromkeys(("--gradient_accumulation_steps", "--gradient-accumulation-steps"), "--gradient-accumulation"),
    **dict.fromkeys(("--network_dim", "--network-dim", "--dim", "--lora-rank", "--lora_rank"), "--rank"),
    **dict.fromkeys(("--network_alpha", "--network-alpha", "--lora-alpha"), "--alpha"),
    **dict.fromkeys(("--train_data_dir", "--train-data-dir", "--dataset", "--instance_data_dir", "--images"), "--data"),
    **dict.fromkeys(("--train_shards_path_or_url", "--folder", "--pictures", "--input", "-i"), "--data"),
    **dict.fromkeys(("--output_dir", "--output-dir", "--out", "--outdir"), "--output"),
    **dict.fromkeys(("--mixed_precision", "--mixed-precision", "--dtype", "--fp16", "--bf16"), "--precision"),
    **dict.fromkeys(("--random_flip", "--random-flip", "--flip_aug"), "--flip"),
    **dict.fromkeys(("--instance_prompt", "--instance-prompt", "--trigger"), "--caption"),
    **dict.fromkeys(("--class_data_dir", "--class-data-dir", "--reg_data_dir"), "--prior-data"),
    **dict.fromkeys(("--size", "--width", "--height"), "--resolution"),
    **dict.fromkeys(("--checkpointing_steps", "--checkpointing-steps", "--save_every_n_steps"), "--save-every"),
    **dict.fromkeys(("--validation_prompt", "--validation-prompt", "--prompt"), "--sample-prompt"),
    **dict.fromkeys(("--use_8bit_adam", "--optimizer_type"), "--optimizer"),
    **dict.fromkeys(("--w_min", "--w_max", "--cfg", "--guidance-scale", "--guidance_scale"), "--guidance"),
    **dict.fromkeys(("--prompt-file", "--prompts-file"), "--prompts"),
}
# Fields whose option is not called as they are: what may be repeated is called by one of it.
FLAGS: Mapping[str, str] = {"sample_prompts": "--sample-prompt", "targets": "--target", "text_targets": "--text-target"}
WITH_PICTURES = ("buckets", "crop", "crops", "flip", "latents")
WITHOUT_PICTURES = ("images_per_prompt", "teacher_steps", "teacher_guidance")
PAIR = tuple[float, float]
KINDS: Mapping[str, Any] = {
    **TYPES,
    "tuple[float, float]": PAIR,
    "tuple[str, ...]": list[str] | None,
    "tuple[str, ...] | None": list[str] | None,
}
MEMORY_MEND = (
    "Try --gradient-checkpointing, a smaller --batch-size (with --gradient-accumulation for the same result), "
    "--optimizer adamw8bit, or a lower --resolution."
)
UNTRAINED = "Nothing was trained yet; what is encoded is kept."
LINE_EVERY = 30.0  # seconds between lines about the progress where there is no terminal


def command(name: str) -> Any:
    """The verb ``distill`` or ``lora`` with all its options, as typer's command object."""
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name)(
        {"distill": _with_options(distill, "DistillOptions"), "lora": _with_options(lora, "LoraOptions")}[name]
    )
    return typer.main.get_command(single)


def fields_of(cls: Any) -> Iterator[dataclasses.Field[Any]]:
    """The fields that are options: those with a help text, the data's after the training's.

    Args:
        cls: `DistillOptions` or `LoraOptions`.
    """
    from ..train.data import DataOptions

    for options in (cls, DataOptions):
        yield from (field for field in dataclasses.fields(options) if "help" in field.metadata)


def flag_of(name: str) -> str:
    """The option string of the field ``name``."""
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def in_flags(text: str, cls: Any) -> str:
    """The library's ``text`` with the options' names for the fields': ``--batch-size`` for ``batch_size``."""
    names = [field.name for field in fields_of(cls)]
    # A field whose name is an everyday word is meant where a message begins with it.
    compound, plain = "|".join(name for name in names if "_" in name), "|".join([*names, "output"])
    return re.sub(rf"\b({compound})\b|^({plain})(?=:? (is|are|has|holds|needs|\S+ (is|holds))\b)", _flag_for, text)


def _flag_for(found: re.Match[str]) -> str:
    return flag_of(found[0])


def _parameters(cls: Any) -> Iterator[inspect.Parameter]:
    """A keyword parameter for each option of ``cls``, annotated as typer wants it.

    Raises:
        TypeError: a field has a type that `KINDS` does not know.
    """
    from rich.markup import escape

    from ..train.data import DataOptions

    data = {field.name for field in dataclasses.fields(DataOptions)}
    for field in fields_of(cls):
        if field.type not in KINDS:
            raise TypeError(f"{field.name} is {field.type!r}: add the type to fourstroke.cli.train.KINDS.")
        many = KINDS[str(field.type)] == KINDS["tuple[str, ...]"]
        default = None if many else CHOSEN.get(field.name, field.default)
        hint = HINTS.get(field.name, "") + (" May be repeated." if many else "")
        kind = str | None if field.name in CHOSEN else KINDS[str(field.type)]
        made = typer.Option(
            flag_of(field.name) if kind is not bool else f"{flag_of(field.name)}/--no-{flag_of(field.name)[2:]}",
            help=escape(field.metadata["help"] + hint),
            rich_help_panel=DATA if field.name in data else PANELS.get(field.name, TRAINING),
            show_default=default is not None,
            metavar="LOW HIGH" if field.name == "guidance" else None,
        )
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made]
        )


# What is chosen by the device unless it is typed, and what the help says of that.
CHOSEN: Mapping[str, None] = {"precision": None}
HINTS: Mapping[str, str] = {"precision": " If not given: bf16 on a GPU (fp16 on one without it), fp32 on a CPU."}


def _with_options(verb: Callable[..., None], name: str) -> Callable[..., None]:
    """``verb(context, …, *, …, **fields)`` with the options of the class ``name`` for ``fields``."""
    from ..train import options as library

    @functools.wraps(verb)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        verb(*args, **kwargs)

    own = list(inspect.signature(verb, eval_str=True).parameters.values())[:-1]
    parameters = [*own, *_parameters(getattr(library, name))]
    vars(wrapper)["__signature__"] = inspect.Signature(parameters)
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


Model = Annotated[
    str,
    typer.Argument(
        help="Shipped name, hub id, folder, or single-file checkpoint (.safetensors).", autocompletion=complete_models
    ),
]
Output = Annotated[
    str, option(OUTPUT, "Folder for the LoRA and all that belongs to the run; a run in it goes on.", "--output", "-o")
]
Offline = Annotated[bool, option(OUTPUT, "Use what is in the hub's cache; ask no network.", "--offline")]
Debug = Annotated[bool, option(OUTPUT, "Show the traceback of an error.", "--debug")]
PLACE = "Folder of pictures and captions, or webdataset shards such as 'shards-{000..041}.tar'."


def distill(
    context: typer.Context,
    model: Model,
    *,
    data: Annotated[str | None, option(DATA, PLACE, metavar="PLACE")] = None,
    prompts: Annotated[
        str | None, option(DATA, "No pictures: a file with a prompt a line, which the model paints.", metavar="FILE")
    ] = None,
    output: Output,
    offline: Offline = False,
    debug: Debug = False,
    **fields: Any,
) -> None:
    """See the verb's help text in `fourstroke.cli`.

    Raises:
        ValueError: options do not go together, or have no effect on what the data is.
    """
    from ..train.options import DistillOptions

    if bool(data) == bool(prompts):
        raise ValueError(f"Give either --data or --prompts; {'both are' if data else 'neither is'} given.")
    with _work(context, DistillOptions, model, offline, output) as run:
        source = run.open(str(prompts or data), fields)
        if prompts is not None and source.pictures:
            raise ValueError(f"--prompts {prompts} holds pictures; give them with --data.")
        from ..train import distill as work

        run.finish(work, source, fields)


def lora(
    context: typer.Context,
    model: Model,
    *,
    data: Annotated[str, option(DATA, PLACE, metavar="PLACE")],
    output: Output,
    offline: Offline = False,
    debug: Debug = False,
    **fields: Any,
) -> None:
    """See the verb's help text in `fourstroke.cli`.

    Raises:
        ValueError: options do not go together, or have no effect on what the data is.
    """
    from ..train.options import LoraOptions

    with _work(context, LoraOptions, model, offline, output) as run:
        source = run.open(data, fields)
        if source.prompts:
            raise ValueError(f"--data {data} holds prompts; a LoRA is trained on pictures.")
        from ..train import train_lora as work

        run.finish(work, source, fields)


# The work.


@dataclasses.dataclass
class Work:
    """One run of the command.

    Attributes:
        cls: of the options.
        typed: the names of the options on the command line.
        show: what is told of the progress.
    """

    cls: Any
    model: str
    output: str
    typed: set[str]
    show: Show

    def open(self, place: str, fields: dict[str, Any]) -> Any:
        """Look at the data, and check that all that was typed has an effect on it.

        Raises:
            ValueError: see `fourstroke.train.data.open_source`, or something has no effect.
        """
        from ..train.data import DataError, open_source

        self.options(fields)  # wrong values are told of before any file is opened
        try:
            source = open_source(place, fields["caption"])
        except FileNotFoundError as error:
            raise DataError(str(error)) from error  # of a missing model another name is suggested
        vain = WITH_PICTURES if source.prompts else () if fields.get("prior_data") else WITHOUT_PICTURES
        for name in sorted(self.typed & {*vain}):
            what = "prompts" if source.prompts else "pictures"
            raise ValueError(f"{flag_of(name)} has no effect: {place} holds {what}.")
        return source

    def options(self, fields: dict[str, Any]) -> Any:
        """The options of the run, out of the command line's.

        Raises:
            ValueError: a value breaks a rule.
        """
        from ..train.data import DataOptions

        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        for field in fields_of(self.cls):
            if values[field.name] is None and field.default is not None and field.name not in CHOSEN:
                values[field.name] = field.default
        values["precision"] = values["precision"] or usual_precision(values["device"])
        names = {field.name for field in dataclasses.fields(DataOptions)}
        data = DataOptions(**{name: values.pop(name) for name in names})
        return self.cls(data=data, **values)

    def finish(self, work: Callable[..., Path], source: Any, fields: dict[str, Any]) -> None:
        """Train, print the path of the LoRA, and say how to use it."""
        path = work(self.model, source, self.output, self.options(fields), self.show)
        self.show.close()
        if os.environ.get("RANK", "0") != "0":  # one of several processes; the first one tells
            return
        caption = source.prompts[0] if source.prompts else source.pictures[0].captions[0]
        words = ["fourstroke", "generate", caption, "--model", self.model, "--lora", str(path)]
        typer.echo(str(path))
        typer.echo(one_line(f"Use it: {shlex.join(words)}"), file=self.show.stream)


def usual_precision(device: str | None) -> str:
    """What networks compute in on ``device`` (None: the GPU if there is one) unless something else is asked for."""
    import torch

    accelerated = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    kind = torch.device(device).type if device is not None else accelerated.type if accelerated else "cpu"
    if kind != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp16"


@contextlib.contextmanager
def _work(context: typer.Context, cls: Any, model: str, offline: bool, output: str) -> Iterator[Work]:
    """What both verbs do around their work: notes, progress, Ctrl-C, and errors in the command line's words."""
    names = context.params
    typed = {name for name in names if context.get_parameter_source(name).name != "DEFAULT"}  # pyright: ignore
    show = Show(sys.stderr)
    try:
        with (
            warnings_as_notes(lambda text: in_flags(text, cls)),
            without_network(offline),
            quiet_loading(model, []),
            show.stopping(),
        ):
            yield Work(cls, model, output, typed, show)
    except KeyboardInterrupt:
        show.close()
        note(f"{show.where}The same command goes on from the last checkpoint." if show.where else UNTRAINED)
        raise
    except FileNotFoundError:
        raise
    except (ValueError, ImportError) as error:
        raise ValueError(in_flags(str(error), cls)) from error
    except (RuntimeError, MemoryError) as error:
        text = in_flags(str(error) or "There is not enough memory", cls)
        if "memory" in text.lower():
            text = f"{one_line(text).rstrip('.')}. {MEMORY_MEND}"
        told = type(error)(text) if type(error) in (RuntimeError, MemoryError) else RuntimeError(text)
        told.mend = ""  # pyright: ignore[reportAttributeAccessIssue]
        raise told from error
    finally:
        show.close()


class Show:
    """What is told of a run while it runs: bars on a terminal, a line now and then elsewhere.

    Attributes:
        where: how far the training is, as a sentence; empty before it begins.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.where = ""
        self._progress: Any = None
        self._task: Any = None
        self._what, self._told, self._stop = "", 0.0, False

    def __call__(self, what: str, done: int, total: int, figures: Mapping[str, float] | None = None) -> None:
        """See `fourstroke.train.options.Progress`.

        Raises:
            Stop: somebody has asked to stop. It is raised here, between two steps.
        """
        if what == "training":
            self.where = f"Stopped after step {done} of {total}. "
        if os.environ.get("RANK", "0") == "0":
            (self._draw if self.stream.isatty() else self._write)(what, done, total, figures or {})
        if self._stop and done < total:
            from ..train.options import Stop

            raise Stop

    def _draw(self, what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
            )
            plain: dict[str, Any] = {"redirect_stdout": False, "redirect_stderr": False}
            self._progress = Progress(*columns, TimeElapsedColumn(), console=Console(file=self.stream), **plain)
            self._progress.start()
        if what != self._what:
            self._what = what
            self._task = self._progress.add_task(what, total=total, completed=done, told="")
        self._progress.update(self._task, completed=done, total=total, told=told_of(figures))

    def _write(self, what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        if what != self._what or done == total or now - self._told >= LINE_EVERY:
            self._what, self._told = what, now
            told = told_of(figures)
            typer.echo(f"{what}: {done} of {total}{', ' + told if told else ''}", file=self.stream)

    def close(self) -> None:
        """End the bars."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside, the first Ctrl-C (or SIGTERM) ends the work after the step that runs, and the second at once."""

        def stop(number: int, frame: Any) -> None:
            signal.signal(number, before[number])
            self._stop = True
            note("Stopping after this step; press Ctrl-C again to stop at once.", self.stream)

        try:
            before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            for number in before:
                signal.signal(number, stop)
        except ValueError:  # not the main thread, which alone gets signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def told_of(figures: Mapping[str, float]) -> str:
    """``loss 0.0123, 3.2 steps/s, 4:10 left``, as far as it is known."""
    parts = []
    if "loss" in figures:
        parts.append(f"loss {figures['loss']:.4g}")
    if "rate" in figures:
        rate = figures["rate"]
        parts.append(f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.3g} s/step")
    if "left" in figures:
        minutes, seconds = divmod(round(figures["left"]), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append((f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}") + " left")
    return ", ".join(parts)
