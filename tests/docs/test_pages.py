"""The pages say what is true: links lead somewhere, code runs, names exist, commands work."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fourstroke
from fourstroke import hub

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fourstroke"
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "recipes").glob("*/*.md"),
    *SOURCE.glob("zoo/*/*/README.md"),
]
MAX_EXAMPLE_LINES = 40
# The main path, in reading order.
PATH = [
    "pipelines/stable_diffusion.py",
    "request.py",
    "denoise.py",
    "schedulers/lcm.py",
    "models/unet.py",
]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# Links


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_paths_in_text_exist(page: Path) -> None:
    """Every `path/of/a.file` in backticks; a path in the package may be given from there."""
    for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)`", page.read_text(encoding="utf-8")):
        looks_like_a_path = path.endswith("/") or re.search(r"/.*\.(py|md|toml|txt|json)$", path)
        if looks_like_a_path:
            assert any((base / path).exists() for base in (ROOT, SOURCE, page.parent)), path


# Names


def definitions(path: Path) -> set[str]:
    """What a file defines: ``name``, and ``Class.name`` for what is inside a class."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for name in defined(node):
            names.add(name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{name}" for inner in node.body for name in defined(inner))
    return names


def defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def tour_items() -> list[str]:
    """The numbered and bulleted items of the tour."""
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    return [item for item in re.split(r"\n(?=\d\. |- |\n)", text) if re.match(r"\s*(\d\. |- )", item)]


@pytest.mark.parametrize("item", tour_items(), ids=lambda item: item.split("`")[1] if "`" in item else item[:20])
def test_names_of_the_tour_are_where_it_says(item: str) -> None:
    linked = [ROOT / "docs" / target for target in re.findall(r"\]\((\.\./src[^)]+)\)", item)]
    assert linked, "an item of the tour links to the files that it speaks of"
    names = set().union(*(definitions(path) for path in linked))
    text = re.sub(r"\[`[^`]+`\]\([^)]+\)", "", item)
    for name in re.findall(r"`(\w+(?:\.\w+)*)`", text):
        assert name in names, f"{name} is not defined in {', '.join(path.name for path in linked)}"


@pytest.mark.parametrize("page", ["README.md", "docs/tour.md"])
def test_the_main_path_is_named_in_reading_order(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    places = [text.index(f"src/fourstroke/{name}") for name in PATH]
    assert places == sorted(places)


def test_every_module_is_on_the_map() -> None:
    """Each file or folder of the package has a place in the README's file map or in the tour."""
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/tour.md"))
    for path in sorted(SOURCE.iterdir()):
        if path.name.startswith("_") or not (path.is_dir() or path.suffix == ".py"):
            continue
        if path.is_dir() and not any(file.stat().st_size for file in path.rglob("*") if file.is_file()):
            continue  # nothing in it yet
        assert re.search(rf"\b{re.escape(path.name)}\b", text), path.name


def test_compatibility_page_lists_the_public_names() -> None:
    text = (ROOT / "docs" / "compat.md").read_text(encoding="utf-8")
    table = text[text.index("## What is there") : text.index("## What differs")]
    names = set(re.findall(r"`(\w+)`", table)) - {"make_image_grid", "load_image"}
    public = {name for name in fourstroke.__all__ if name.endswith(("Pipeline", "Scheduler")) or "AutoPipeline" in name}
    assert names <= set(fourstroke.__all__)
    assert public <= names, "what is public is in the table"


def test_methods_of_the_lora_page_exist() -> None:
    text = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    calls = {name for name in re.findall(r"`(\w+)\(", text) if name != "pipe"}
    assert len(calls) >= 8
    for name in calls:
        assert callable(getattr(fourstroke.DiffusionPipeline, name)), name


def test_errors_of_the_lora_page_are_raised() -> None:
    text = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (SOURCE / "lora").glob("*.py"))
    messages = re.findall(r"^\| ([^|]+) \|", text[text.index("| message | mend |") :], flags=re.MULTILINE)[1:]
    assert len(messages) >= 6
    for message in messages:
        # What stands for a name or a kind, and "keys that", which the report puts in front.
        for part in re.split(r"^keys that|…|SDXL|SD 1\.5|OFT \(.*?\)", message):
            assert part.strip() in source, part


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_shipped_names_of_the_pages_exist(page: Path) -> None:
    for name in re.findall(r"[`\"](emoji/[\w-]+)[`\"]", page.read_text(encoding="utf-8")):
        assert name in hub.shipped(), name


# Code


def python_blocks() -> list[tuple[str, str]]:
    return [(page_id(page), code) for page in PAGES for code in blocks(page, "python")]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), python_blocks(), ids=lambda value: value if value.endswith(".md") else "")
def test_code_of_the_pages_runs(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= MAX_EXAMPLE_LINES


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    """Each example prints, as its last line, the path of the file that it has made."""
    from PIL import Image

    run = subprocess.run(
        [sys.executable, "-W", "error", str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    made = Path(run.stdout.splitlines()[-1])
    assert made.is_relative_to(tmp_path)
    with Image.open(made) as picture:
        assert picture.width % 128 == picture.height % 128 == 0 and len(picture.getcolors(1 << 24) or []) > 100


# Commands


def readme_commands() -> list[str]:
    lines = "\n".join(blocks(ROOT / "README.md", "sh")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_readme_has_two_commands_to_set_up() -> None:
    assert [command for command in readme_commands() if command.startswith("make ")] == ["make demo", "make test"]


def test_targets_of_the_makefile() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", text, flags=re.MULTILINE))
    assert targets == {"demo", "test", "check", "bench", "docs"}
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make (\w+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert target in targets, f"{page_id(page)}: make {target}"


@pytest.mark.slow
@pytest.mark.parametrize("command", [line for line in readme_commands() if line.startswith("fourstroke ")])
def test_commands_of_the_readme_work(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)[1:]
    run = subprocess.run(
        [sys.executable, "-m", "fourstroke.cli", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    if "-o" in words:
        assert (tmp_path / words[words.index("-o") + 1]).is_file()


def test_benchmarks_and_extras_of_the_pages_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(
        re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
    )
    assert extras == {"cpu", "server", "ray", "accelerate", "8bit", "train", "video", "controls", "annotators"}
    for page in PAGES:
        for extra in re.findall(r"fourstroke\[(\w+)\]", page.read_text(encoding="utf-8")):
            assert extra in extras, extra
