"""The documentation is true: its Python runs and prints what it says, its files, links, modules and commands exist."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import re
from pathlib import Path

import pytest

from cuflash.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels_cu/*.md")])
SUFFIXES = "py|md|cu|cuh|toml|cfg|svg|png|jpg|json"
# A bare name may be that of a file in any folder of the tree, or of one that a run makes.
BENCHMARKED = {f"{name}.{suffix}" for name in ("forward", "sparse") for suffix in ("json", "png")}
MADE_BY_A_RUN = {"denoised.png", "regression.png", "summary.json", "build/benchmarks", *BENCHMARKED}
FOLDERS = ("cuflash", "kernels_cu", "tests", "docs", "benchmarks", "examples")
KNOWN_NAMES = MADE_BY_A_RUN | {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md"} <= {path.name for path in PAGES}


@page
def test_python_runs_and_prints_what_it_says(page: Path) -> None:
    """Blocks with prompts run, all of a page in one namespace; others, excerpts of code, must parse."""
    python = blocks(page, "python")
    for block in python:
        if ">>>" not in block:
            ast.parse(block)
    session = "\n".join(block for block in python if ">>>" in block)
    test = doctest.DocTestParser().get_doctest(session, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@page
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", without_blocks(page))
    missing = [t for t in targets if not t.startswith("https://") and not (page.parent / t).exists()]
    assert not missing


@page
def test_paths_exist(page: Path) -> None:
    """Every path in backticks, from the page's folder, the root, the package, the CUDA sources or the tests."""
    named = re.findall(rf"`([\w.-]+/[\w./-]*|[\w./-]+\.(?:{SUFFIXES}))(?:::\w+)?`", without_blocks(page))
    folders = (page.parent, ROOT, ROOT / "cuflash", ROOT / "kernels_cu", ROOT / "tests")
    missing = [name for name in named if name not in KNOWN_NAMES and not any((f / name).exists() for f in folders)]
    assert not missing


@page
def test_modules_and_commands_exist(page: Path) -> None:
    """`python -m module`, and of `python -m cuflash` the command."""
    text = page.read_text(encoding="utf-8")
    for module in set(re.findall(r"python -m ([\w.]+)", text)):
        assert importlib.util.find_spec(module), module
    commands = {command.__name__.rpartition(".")[2] for command in COMMANDS}
    assert set(re.findall(r"python -m cuflash (\w+)", text)) <= commands


@pytest.mark.parametrize("section", ["Run it", "Test it"])
def test_readme_has_one_line_to_run_and_one_to_test(section: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    body = re.search(rf"^## {section}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert body
    (block,) = re.findall(r"^```\w*\n(.*?)^```", body[1], re.MULTILINE | re.DOTALL)
    assert block.count("\n") == 1
