"""What an import costs and brings, which way imports point, and how long files and functions may be."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fourstroke"
MAX_LINES, MAX_FUNCTION_LINES = 500, 60

# Never: the libraries that results are compared with. Not before they are needed: everything else on this list.
FORBIDDEN = [
    *(
        "transformers",
        "diffusers",
        "peft",
        "accelerate",
        "tokenizers",
        "huggingface_hub",
        "httpx",
        "httpx2",
        "requests",
    ),
    *("openvino", "onnx", "onnxruntime", "fastapi", "starlette", "uvicorn", "pydantic", "ray", "tensorboard"),
    *("typer", "click", "rich", "tqdm", "av", "cv2", "imageio", "imageio_ffmpeg", "scipy", "pandas", "matplotlib"),
    *("torchvision", "torchaudio"),
]
STATEMENTS = "import fourstroke; from fourstroke import StableDiffusionXLPipeline, LCMScheduler"


def modules_after(statements: str) -> set[str]:
    """The names in ``sys.modules`` of a fresh interpreter that has run ``statements``."""
    script = f"import json, sys\n{statements}\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


@pytest.fixture(scope="module")
def torch_alone() -> set[str]:
    return modules_after("import torch")


@pytest.fixture(scope="module")
def with_pipelines() -> set[str]:
    return modules_after(STATEMENTS)


def test_importing_the_package_imports_nothing() -> None:
    assert {name for name in modules_after("import fourstroke") if name.startswith("fourstroke.")} == set()
    assert "torch" not in modules_after("import fourstroke")


@pytest.mark.parametrize("name", FORBIDDEN)
def test_pipelines_do_not_load(name: str, with_pipelines: set[str], torch_alone: set[str]) -> None:
    assert name not in with_pipelines or name in torch_alone


def test_pipelines_load_little_beside_torch(with_pipelines: set[str], torch_alone: set[str]) -> None:
    """Third parties that come with the pipelines: safetensors, which reads every weight, and nothing sizeable."""
    extra = {name.split(".")[0] for name in with_pipelines - torch_alone}
    installed = {name for name in extra if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert installed <= {"fourstroke", "safetensors", "numpy", "PIL"}


def test_public_names_exist() -> None:
    import fourstroke

    for name in fourstroke.__all__:
        assert getattr(fourstroke, name) is not None
    assert set(dir(fourstroke)) >= set(fourstroke.__all__)
    with pytest.raises(AttributeError, match="module 'fourstroke' has no attribute 'Wings'"):
        fourstroke.Wings  # noqa: B018


def test_imports_go_down_the_layers() -> None:
    """The contracts in pyproject.toml: the layers, and none of the libraries that results are compared with."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 kept, 0 broken" in run.stdout


def python_files() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", python_files(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_LINES, f"{lines} lines; split the file"
    long = {name: length for name, length in functions(ast.parse(text)) if length > MAX_FUNCTION_LINES}
    assert not long, f"function bodies of more than {MAX_FUNCTION_LINES} lines: {long}"


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every function with the length of its body; signatures are often diffusers', and docstrings may be long."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, node.end_lineno - body[0].lineno + 1 if body and node.end_lineno else 0


def library_files() -> list[Path]:
    """Without the edges of the program, which may print and look around."""
    return [path for path in python_files() if path.relative_to(SOURCE).parts[0] not in ("cli", "cli.py", "runtime")]


@pytest.mark.parametrize("path", library_files(), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_library_code_neither_prints_nor_reads_the_environment(path: Path) -> None:
    """Rule 13 of the house: no prints, and no environment variables outside the run-time options and the CLI."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno} prints"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("environ", "getenv"), f"line {node.lineno} reads the environment"


def test_no_module_draws_random_numbers_when_imported() -> None:
    names = [
        ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in library_files()
    ]
    script = (
        "import torch, importlib; before = torch.get_rng_state(); threads = torch.get_num_threads()\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "assert torch.equal(before, torch.get_rng_state()) and threads == torch.get_num_threads()"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
