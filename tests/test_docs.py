"""What the documentation says exists and runs."""

import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import datasets.config
import griffe
import pytest
import tyro
from markdown.extensions.toc import slugify

from forwardgrad.augmentation import AUGMENTATIONS
from forwardgrad.cli._data import ShowOptions
from forwardgrad.cli._readout import ReadoutOptions
from forwardgrad.cli._report import ReportOptions
from forwardgrad.cli._train import read_options
from forwardgrad.experiments import COMPARE, EXPERIMENTS, DiagnoseOptions
from forwardgrad.results import Grid, Options, Summary, TableCell, over_seeds, read
from forwardgrad.rewrite._walk import RULES

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
SITE = sorted((ROOT / "docs").rglob("*.md"))

FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path):
    """Language, code and number of the first line of each fenced block."""
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        yield match[2], match[3], text.count("\n", 0, match.start(3)) + 1


def examples():
    """Pages with Python code."""
    return [p for p in (*TOP, *SITE) if any(language == "python" for language, *_ in blocks(p))]


def commands():
    """Lines of shell, continued ones joined, one command each."""
    for page in (*TOP, *SITE):
        for language, code, _ in blocks(page):
            if language == "bash":
                for line in code.replace("\\\n", " ").splitlines():
                    for command in line.split("&&"):
                        words = shlex.split(command, comments=True)
                    while words and "=" in words[0]:  # A variable for the command.
                        words.pop(0)
                    if words:
                        yield pytest.param(words, id=f"{relative(page)}: {' '.join(words)}")


@pytest.fixture(scope="module")
def package():
    return griffe.load("forwardgrad", search_paths=[ROOT / "src"], allow_inspection=False)


def modules(module):
    yield module
    for inner in module.modules.values():
        if not inner.is_alias:
            yield from modules(inner)


def documented():
    pages = (path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    return {name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}


def target(package, path):
    found = package[path.removeprefix("forwardgrad.")]
    return found.final_target if found.is_alias else found


def test_public_names_are_documented(package):
    pages = {target(package, name).path for name in documented()}
    public = [f"{m.path}.{name}" for m in modules(package) for name in m.exports or ()]
    assert len(public) > 40
    bare = [name for name in public if not target(package, name).has_docstring]
    assert not bare, f"without a docstring: {bare}"
    absent = [name for name in public if target(package, name).path not in pages]
    assert not absent, f"not in docs/api: {absent}"


@pytest.mark.parametrize("page", examples(), ids=relative)
def test_python_runs(page, tmp_path, monkeypatch):
    """In order, in one namespace; what a block prints is what a text block after it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    registries = [(registry, dict(registry)) for registry in (RULES, AUGMENTATIONS)]
    printed, namespace = None, {"__name__": "example"}
    try:
        for language, code, line in blocks(page):
            if language == "text" and printed:
                assert code == printed
            printed = None
            if language == "python":
                # Empty lines, so that a traceback has the page's line numbers.
                source = compile("\n" * (line - 1) + code, relative(page), "exec")
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(source, namespace)
                printed = out.getvalue()
    finally:
        for registry, before in registries:
            registry.clear()
            registry.update(before)


@pytest.mark.parametrize("words", list(commands()))
def test_command_is_one(words, monkeypatch):
    """Its options exist; nothing is run."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    match words:
        case ["forwardgrad", "train", *options]:
            read_options(options)
        case ["forwardgrad", "readout", *options]:
            tyro.cli(ReadoutOptions, args=options)
        case ["forwardgrad", "data", "show", *options]:
            tyro.cli(ShowOptions, args=options)
        case ["forwardgrad", "compare", *options]:
            tyro.cli(COMPARE.options, args=options)
        case ["forwardgrad", "diagnose", *options]:
            tyro.cli(DiagnoseOptions, args=options)
        case ["forwardgrad", "reproduce", name, *options]:
            tyro.cli(EXPERIMENTS[name].options, args=options)
        case ["forwardgrad", "report", *options]:
            tyro.cli(ReportOptions, args=options)
        case ["python", script, *options]:
            monkeypatch.syspath_prepend(str((ROOT / script).parent))
            tyro.cli(importlib.import_module(Path(script).stem).Options, args=options)
        case ["pip", "install", *_]:
            extra = re.search(r"\[(\w+)\]", words[-1])
            assert extra is None or extra[1] in extras["optional-dependencies"]
        case _:
            assert words[0] in ("mkdocs", "pyright", "pytest", "python3", "ruff", "source")


def test_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\npip install '.[train]' && forwardgrad train\n" in readme
    assert "\npip install '.[dev]' && pytest\n" in readme


@pytest.mark.parametrize("page", TOP, ids=relative)
def test_links_lead_somewhere(page):
    """Those of the site's own pages are checked by its build."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        assert (page.parent / path).is_file(), f"{link} does not exist"
        text = (page.parent / path).read_text(encoding="utf-8") if anchor else ""
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert not anchor or anchor in {slugify(h, "-") for h in headings}, link


def test_notebook_is_stored_without_outputs():
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


def test_site_builds(tmp_path):
    """Strictly: pages, links, anchors, references and formulas; it runs the notebook."""
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "<math" in (tmp_path / "method" / "index.html").read_text(encoding="utf-8")
    tutorial = (tmp_path / "tutorial" / "index.html").read_text(encoding="utf-8")
    assert "perturbed activations: test error" in tutorial
    assert "jp-RenderedImage" in tutorial


TABLES = [
    ("table3", "| algorithm | s/1/1 |", {1: "table3: mnist s/1/1", 3: "table3: mnist m/1/16"}),
    ("table3", "| algorithm | m/8/16", {1: "table3-cifar10: cifar10 m/8/16"}),
    (
        *("table3", "| algorithm | images as they are |"),
        {
            i + 1: f"table3-small{s}: cifar10 m/4/16"
            for i, s in enumerate(("", "-lower", "-crop", "-plain"))
        },
    ),
    ("table3", "| row | what changes |", {2: "ideas: cifar10 m/4/16"}),
    ("table3", "| algorithm | digits m/1/16 |", {1: "compare: digits m/1/16"}),
    ("table4", "| algorithm | m/8/16, 1 epoch |", {1: "table4: cifar10 m/8/16"}),
]
"""Pages, how the heads of their tables begin, and the results and columns of their own columns."""


@pytest.mark.parametrize(("page", "head", "columns"), TABLES)
def test_table_holds_what_is_stored(page, head, columns):
    """Every stored mean is in its row, and nothing else is."""
    lines = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(head))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    cells = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in rows]
    for place, source in columns.items():
        folder, _, column = source.partition(": ")
        (path,) = (ROOT / "results" / folder).glob("*.json")
        stored = read(path, Grid[TableCell, Options]).cells
        means = over_seeds([cell for cell in stored if cell.column == column])
        assert {mean.cells[0].algorithm: mean.text for mean in means.values()} == {
            row[0]: row[place] for row in cells if row[place]
        }


def test_table_holds_what_its_runs_say():
    text = (ROOT / "docs" / "table3.md").read_text(encoding="utf-8")
    paths = list((ROOT / "results" / "few-images").glob("*/summary.json"))
    assert paths
    for path in paths:
        run = read(path, Summary)
        errors = (run.train_error, run.validation_error, run.test_error)
        row = " | ".join([f"`{run.algorithm}`", *(f"{error:.2f}" for error in errors)])
        assert text.count(f"| {row} |") == 1
