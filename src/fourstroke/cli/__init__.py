"""The command line: ``fourstroke generate "a red fox"``, and the other verbs that ``fourstroke --help`` lists.

Whatever is slow to import is imported inside the verbs, so that ``--help`` and completion answer at once.

Exit codes: 0 done, 1 the work failed, 2 the command line or a file is wrong, 130 interrupted. An error is one line on
stderr that says what to do; results are on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .console import INTERRUPTED, OK, did_you_mean, fail, warnings_as_notes, without_network
from .options import complete_anything

__all__ = ["app"]

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class Verbs(TyperGroup):
    """The verbs, with errors in one line."""

    def main(self, args: Sequence[str] | None = None, *more: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(args, *more, standalone_mode=False, **extra)
            if code == INTERRUPTED:  # typer has turned the exception into the code
                fail(KeyboardInterrupt(), debug=False)
        except Exception as error:
            code = fail(error, debug="--debug" in given)
        except KeyboardInterrupt as error:
            code = fail(error, debug=False)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else OK)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that ``args`` begin with, as click returns it.

        Raises:
            ValueError: there is no such verb; the message suggests a similar one.
        """
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            mend = did_you_mean(args[0], self.commands)
            # Somebody who forgot the verb has typed a sentence, not a word.
            mend = f" Did you mean fourstroke generate {args[0]!r}?" if " " in args[0].strip() else mend
            raise ValueError(f"There is no verb {args[0]!r}; there are {', '.join(self.commands)}.{mend}")
        return super().resolve_command(ctx, args)


class Verb(TyperCommand):
    """A verb whose options are made when they are first asked for: they come from the library."""

    complete = False

    def get_params(self, ctx: Any) -> Any:
        if not self.complete:
            # By their full names, for in this module those of some are the verbs'.
            from .bench import command as bench
            from .generate import command as generate
            from .train import command as train

            own = {"generate": generate, "bench": bench}.get(str(self.name))
            made = train(str(self.name)) if own is None else own()
            self.params, self.callback, self.complete = made.params, made.callback, True
        return super().get_params(ctx)


app = typer.Typer(
    name="fourstroke",
    cls=Verbs,
    help="Stable Diffusion pictures in one to eight steps.",
    epilog='Begin with: fourstroke generate "a red fox"',
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"fourstroke {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _fourstroke(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command(cls=Verb)
def generate() -> None:
    """Paint pictures of PROMPT and print the paths of their files.

    Each file holds the settings that it was made with: the text that AUTOMATIC1111's web UI writes, and JSON.
    """


@app.command(cls=Verb)
def distill() -> None:
    """Distil an LCM-LoRA of MODEL, with which it paints in 1 to 8 steps, and print the path of the file.

    The same command again goes on where the run stopped.
    """


trainings = typer.Typer(cls=Verbs, help="Train a LoRA on pictures: [bold]fourstroke train lora[/bold].")
app.add_typer(trainings, name="train")


@trainings.callback(invoke_without_command=True)
def _train(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@trainings.command("lora", cls=Verb)
def train_lora() -> None:
    """Train a LoRA of MODEL on pictures: a style, a subject. Print the path of the file.

    The same command again goes on where the run stopped.
    """


@app.command(cls=Verb)
def bench() -> None:
    """Measure how fast MODEL is here, in every way that it can run: seconds, memory, and how they compare.

    Each way has a process of its own, and they take turns.
    """


@app.command()
def models(as_json: Json = False, debug: Debug = False) -> None:
    """List the models and adapters that are shipped, and those in the hub's cache."""
    from . import report

    _tell(report.models(), report.show_models, as_json)


@app.command()
def inspect(
    what: Annotated[
        str,
        typer.Argument(metavar="FILE|FOLDER|REPO", help="What to look at.", autocompletion=complete_anything),
    ],
    offline: Annotated[bool, typer.Option("--offline", help="Use what is in the hub's cache; ask no network.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell what a LoRA, checkpoint, model or picture is.

    Of a LoRA: family, dialect, rank, alpha, targets, trigger words, and how to run it. Of a picture: how it was made.
    Of a repository on the hub only the configuration is downloaded, or the LoRA that it holds.
    """
    from . import report

    with without_network(offline), warnings_as_notes():
        facts = report.describe(what)
    _tell(facts, report.show_description, as_json)


@app.command()
def info(as_json: Json = False, debug: Debug = False) -> None:
    """Tell versions, devices, and what can run here."""
    from . import report

    with warnings_as_notes():
        facts = report.environment()
    _tell(facts, report.show_environment, as_json)


def _tell(facts: Any, show: Callable[[Any], None], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
    else:
        show(facts)
