"""Every public name is documented: what it is, and which errors it raises on purpose."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fourstroke
import fourstroke.utils

SOURCE = Path(fourstroke.__file__).parent
NAMES = [name for name in fourstroke.__all__ if name != "__version__"]


def own_methods(cls: type) -> Iterator[tuple[str, object]]:
    """Public methods and properties that the package itself defines for ``cls``."""
    for name in dir(cls):
        for base in cls.__mro__:
            if name in vars(base):
                member = vars(base)[name]
                member = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                if base.__module__.startswith("fourstroke") and (callable(member) or isinstance(member, property)):
                    yield f"{base.__qualname__}.{name}", member
                break


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_a_docstring(name: str) -> None:
    value = getattr(fourstroke, name)
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own and own.strip(), "not only an inherited docstring"
    # dataclasses without a docstring get their signature as one
    assert not own.startswith(f"{name}("), own


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(getattr(fourstroke, name))])
def test_public_methods_have_docstrings(name: str) -> None:
    cls = getattr(fourstroke, name)
    members = [(path, member) for path, member in own_methods(cls) if not path.split(".")[-1].startswith("_")]
    without = [path for path, member in members if not inspect.getdoc(member)]
    overridden = {path for path in without if any(getattr(base, path.split(".")[-1], None) for base in cls.__mro__[1:])}
    assert not set(without) - overridden


@pytest.mark.parametrize("name", fourstroke.utils.__all__)
def test_helpers_have_docstrings(name: str) -> None:
    assert getattr(fourstroke.utils, name).__doc__


def public_functions() -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """(name, function, docstring of its class) of every function and method whose name has no underscore in front."""
    for path in sorted(SOURCE.rglob("*.py")):
        where = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if getattr(node, "name", "_").startswith("_"):
                continue
            if isinstance(node, ast.FunctionDef):
                yield f"{where}.{node.name}", node, ""
            elif isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                        yield f"{where}.{node.name}.{inner.name}", inner, ast.get_docstring(node) or ""


def raised(function: ast.FunctionDef) -> set[str]:
    """The exceptions that a function raises itself, by name; re-raised and internal ones aside."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            names.add(node.exc.func.id)
    return names


FUNCTIONS = list(public_functions())


@pytest.mark.parametrize(("name", "function", "about"), [pytest.param(*item, id=item[0]) for item in FUNCTIONS])
def test_errors_are_documented(name: str, function: ast.FunctionDef, about: str) -> None:
    """A public function that raises says so: under ``Raises:``, or in a sentence with the word."""
    names = raised(function)
    text = (ast.get_docstring(function) or "") + about
    assert not names or re.search(r"Raises:|[Rr]aise", text), f"{name} raises {names} without saying so"
