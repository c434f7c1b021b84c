"""What the command line says on stderr: one line a message, and the exit code that goes with an error."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

import typer

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# The class of "the command line is wrong" has no public name of its own; it is what BadParameter derives from.
UsageError: Any = typer.BadParameter.__mro__[1]

MEMORY_MEND = "Try a smaller --size or fewer pictures (--num)."
BAD_INPUTS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, NotImplementedError)


def one_line(text: object) -> str:
    """``text`` without line breaks, and without control characters, with which a file could steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))


def say(kind: str, text: object, colour: str, stream: TextIO | None = None) -> None:
    """Write the line ``kind: text`` to stderr (or ``stream``), ``kind`` in ``colour`` where there are colours."""
    stream = stream or cast(TextIO, sys.stderr)
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        stream.write("\r\x1b[2K")  # instead of a progress bar, which is drawn again below
    typer.secho(f"{kind}: ", file=stream, fg=colour, nl=False)
    typer.echo(one_line(text), file=stream)


def note(text: object, stream: TextIO | None = None) -> None:
    """Write a line that warns of something; the work goes on."""
    say("note", text, "yellow", stream)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the most similar of ``known``, or nothing when none is similar."""
    near = difflib.get_close_matches(name, [other for other in known if other != name], 1)
    return f" Did you mean {near[0]!r}?" if near else ""


@contextlib.contextmanager
def warnings_as_notes(translate: Any = str) -> Iterator[None]:
    """Inside, each of the library's warnings is one note, however often it comes; ``translate`` rewords it."""
    seen: set[str] = set()
    stream = sys.stderr  # also while somebody else's progress bars are kept from it

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        text = translate(str(message))
        if issubclass(category, UserWarning) and text not in seen:
            seen.add(text)
            note(text, stream)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def without_network(offline: bool) -> Iterator[None]:
    """Inside, the hub is not asked if ``offline``."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def explain(error: BaseException) -> tuple[str, int]:
    """The line and the exit code for ``error``: 2 when the command line or a file is wrong, 1 when the work failed."""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted", INTERRUPTED
    if isinstance(error, UsageError):
        return _explain_usage(error), BAD_INPUT
    text = str(error) or type(error).__name__
    if isinstance(error, BAD_INPUTS):
        return text, BAD_INPUT
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return f"{text.rstrip('.')}. {getattr(error, 'mend', MEMORY_MEND)}".rstrip(), FAILED
    # Ours, that a package is missing, say how to get it.
    if isinstance(error, OSError | RuntimeError) or (isinstance(error, ImportError) and "pip install" in text):
        return text, FAILED
    return f"{type(error).__name__}: {text} (--debug shows where)", FAILED


def _explain_usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    place = f" See {context.command_path} --help." if context is not None else ""
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        from . import options, train

        flags = {flag for parameter in context.command.params for flag in parameter.opts} if context else set()
        known = next((found for other in (options, train) if (found := other.OTHER_NAMES.get(option)) in flags), None)
        mend = f" Did you mean {known!r}?" if known else did_you_mean(option, error.possibilities or ())
        return f"There is no option {option}.{mend or place}"
    # typer passes pydantic's words on: "Input should be a valid integer, unable to parse string as an integer".
    text = re.sub(
        r"Input should be ([^,]+?)(, unable to parse [^.]*)?(?=\.?$)", r"it should be \1", error.format_message()
    )
    return f"{text.rstrip('.')}.{place}"


def fail(error: BaseException, *, debug: bool) -> int:
    """Report ``error`` in one line, with its traceback before it when ``debug``, and return the exit code."""
    text, code = explain(error)
    if debug and not isinstance(error, UsageError):
        traceback.print_exception(error, file=sys.stderr)
    say("error", text, "red")
    return code
