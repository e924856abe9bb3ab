"""The documentation is true: its code runs, its tests exist, its tables are those of the files."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import lowrank_lit
import lowrank_lit.callbacks
from tests.pages import CODE, PROSE, ROOT, blocks_of, pages, require_output

PAGES = pages()
BLOCKS = {name: blocks_of(path.read_text(encoding="utf-8")) for name, path in PAGES.items()}
QUICK = [name for name, blocks in BLOCKS.items() if any(block.mark == "runnable" for block in blocks)]
SLOW = [name for name, blocks in BLOCKS.items() if any(block.mark == "runnable slow" for block in blocks)]

Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a page in a folder and a process of its own; its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
    command = [sys.executable, "-m", "tests.pages"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    given: list[Path] = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as server:  # type: ignore[call-overload]

        def ask(**request: str) -> str:
            folder = tmp_path_factory.mktemp("page")
            for name in ("recipes", "examples"):
                (folder / name).symlink_to(ROOT / name)
            output = folder / "printed.txt"
            if "page" in request and "<!-- given out -->" in PAGES[request["page"]].read_text(encoding="utf-8"):
                if not given:
                    made = tmp_path_factory.mktemp("given") / "out"
                    ask(given=str(made))
                    given.append(made)
                shutil.copytree(given[0], folder / "out")
            server.stdin.write(json.dumps({**request, "folder": str(folder), "output": str(output)}) + "\n")
            server.stdin.flush()
            status = server.stdout.readline().strip()
            printed = output.read_text(encoding="utf-8") if output.exists() else ""
            assert status == "0", printed[-8000:]
            return printed

        yield ask
        server.stdin.close()


@pytest.mark.parametrize("name", QUICK)
def test_code_of_a_page(name: str, run: Run) -> None:
    printed = run(page=name)
    quick = [block for block in BLOCKS[name] if block.mark == "runnable"]
    assert printed.count(f"--- {name}:") == len(quick)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_all_code_of_a_page(name: str, run: Run) -> None:
    printed = run(page=name, slow="yes")
    assert printed.count(f"--- {name}:") == sum(block.runnable for block in BLOCKS[name])


@pytest.mark.parametrize("name", PAGES)
def test_every_block_runs_or_says_what_it_needs(name: str) -> None:
    for block in BLOCKS[name]:
        where = f"{name}:{block.line}"
        assert block.language in CODE | PROSE, f"{where}: no language of these pages: {block.language}"
        if block.language in CODE:
            assert block.runnable or re.match(r"needs \w", block.mark), (
                f"{where} is neither runnable nor says `needs ...`"
            )
        else:
            assert block.mark in ("", "output"), where
        block.as_run()
    fences = len(re.findall(r"^```", PAGES[name].read_text(encoding="utf-8"), re.M))
    assert fences == 2 * len(BLOCKS[name]), f"{name}: a fence that is not read"


def test_output_is_compared_line_by_line() -> None:
    require_output("a\n...\nd\n", "x\na\nb\nc\nd\n", "here")
    for wrong in ("a\nc\n", "d\n...\na\n", "a \n...\ne\n"):
        with pytest.raises(AssertionError, match="not printed"):
            require_output(wrong, "x\na\nb\nc\nd\n", "here")


def test_a_block_with_its_replacements() -> None:
    text = (
        "# x\n\n<!-- runnable\nn = 100 => n = 1\n-->\n```python\nn = 100\n```\n\n<!-- needs a GPU -->\n```sh\nls\n```\n"
    )
    small, other = blocks_of(text)
    assert (small.line, small.runnable, small.as_run()) == (7, True, "n = 1\n")
    assert (other.runnable, other.mark, other.language) == (False, "needs a GPU", "sh")
    with pytest.raises(ValueError, match="no 'n = 100' to replace"):
        blocks_of(text.replace("n = 100\n```", "n = 5\n```"))[0].as_run()


def test_every_public_name_is_in_the_reference() -> None:
    named = [
        line.removeprefix("::: ").strip()
        for path in (ROOT / "docs/api").glob("*.md")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("::: ")
    ]
    objects = [getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in named]
    strategies = importlib.import_module("lowrank_lit.strategies")
    public = [getattr(lowrank_lit, name) for name in lowrank_lit.__all__ if name != "__version__"]
    public += [getattr(lowrank_lit.callbacks, name) for name in lowrank_lit.callbacks.__all__]
    public += [strategies.LowRankDeepSpeed]
    assert len(named) == len(set(named))
    assert {id(one) for one in objects} == {id(one) for one in public}


def test_every_test_that_is_named_exists() -> None:
    """``test_x.py`` or ``test_x.py::test_y``; what a test of that name checks is for a reader to say."""
    defined: dict[str, set[str]] = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        defined[path.name] = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    named = 0
    for name, path in PAGES.items():
        for file, test in re.findall(r"(test_\w+\.py)(?:::(\w+))?", path.read_text(encoding="utf-8")):
            assert file in defined, f"{name} names {file}"
            assert not test or test in defined[file], f"{name} names {file}::{test}"
            named += bool(test)
    assert named > 30


def test_every_question_has_an_answer_and_what_settles_it() -> None:
    parts = re.split(r"^### ", PAGES["docs/faq.md"].read_text(encoding="utf-8"), flags=re.M)[1:]
    assert len(parts) == 22
    for part in parts:
        title = part.partition("\n")[0]
        assert title.endswith("?"), title
        settled = part.partition("\n*Settled by:*")[2]
        assert "test_" in settled or "](" in settled or "Nothing" in settled, title


def header_of(recipe: Path) -> dict[str, str]:
    """What a recipe's first comment says, by its words before the colon."""
    text = recipe.read_text(encoding="utf-8").partition("seed_everything:")[0]
    fields = re.split(r"^# (\w+): ", text, flags=re.M)
    return {
        key: " ".join(value.replace("\n#", " ").split()) for key, value in zip(fields[1::2], fields[2::2], strict=True)
    }


def test_the_table_of_recipes_is_that_of_their_headers() -> None:
    page = PAGES["docs/recipes.md"].read_text(encoding="utf-8")
    plain = page.replace("`", "").replace("[benchmarks/RESULTS.md](../benchmarks/RESULTS.md)", "benchmarks/RESULTS.md")
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert len(recipes) > 5
    for recipe in recipes:
        (row,) = [line for line in plain.splitlines() if line.startswith(f"| [{recipe.stem}](")]
        header = header_of(recipe)
        hardware = re.split(r"\. What each stage|\. lowrank-lit plan|\.$", header["Hardware"])[0]
        assert hardware in row, f"{recipe.stem}: {hardware}"
        assert header["Obtained"].rstrip(".") in row, f"{recipe.stem}: {header['Obtained']}"


def test_the_site_holds_every_page() -> None:
    class Loader(yaml.SafeLoader):
        pass

    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [leaf for value in values for leaf in leaves(value)]  # type: ignore[attr-defined]

    shown = leaves(settings["nav"])
    assert len(shown) == len(set(shown))
    assert settings["theme"]["font"] is False
    written = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    generated = {"results.md", "contributing.md", "changelog.md"}
    assert set(shown) - generated <= written
