"""What mkdocs adds to docs/: files of the repository as pages, links to them, and what a block of code needs.

Pages are written so that they read well on a Git host too: links are those of the repository
(``../benchmarks/RESULTS.md`` from a page of docs/), and marks of code blocks are comments. Here links become those of
the site, and what a block needs becomes its title. A link that leads nowhere stays as it is, and ``mkdocs build
--strict`` refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent

# Path in the repository -> path in the site. What is not named here and not in docs/ is no part of the site.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "benchmarks/RESULTS.md": "results.md"}
ASSETS = ("benchmarks/*.png", "recipes/*.yaml", "examples/*.py")

LINK = re.compile(r"(?<!`)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```[ ]*$", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r"^<!-- include ([\w./-]+) (\w+) -->$", re.MULTILINE)
NEEDS = re.compile(r"^<!-- needs ([^>]+?) -->\n```(\w+)$", re.MULTILINE)
MARK = re.compile(r"^<!-- (?:runnable|output|given)[^>]*?(?:=>[^>]*?)*-->\n", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>~?([^<]+)</code>")


def site_paths() -> dict[str, str]:
    """Everything outside docs/ that the site has, by its path in the repository."""
    assets = [path.relative_to(ROOT).as_posix() for pattern in ASSETS for path in ROOT.glob(pattern)]
    return {**PAGES, **{path: f"files/{path}" for path in sorted(assets)}}


def on_files(files: Any, config: Any) -> Any:
    """Add the files from outside docs/."""
    for path, place in site_paths().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put in what is included, make the links the site's, and give a block that needs something a title."""
    place = page.file.src_uri
    home = {site: path for path, site in PAGES.items()}.get(place, f"docs/{place}")
    markdown = with_links(markdown, home, place)
    markdown = INCLUDE.sub(lambda found: with_links(section(found[1], found[2]), found[1], place), markdown)
    markdown = NEEDS.sub(lambda found: f'```{found[2]} title="needs {found[1]}"', markdown)
    return MARK.sub("", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name objects in Sphinx's way; what is left of that here is the name."""
    return ROLE.sub(r"<code>\1</code>", html)


def section(path: str, name: str) -> str:
    """The part of a file between ``<!-- docs: NAME -->`` and the next ``<!-- docs: end -->``."""
    text = (ROOT / path).read_text(encoding="utf-8")
    _, begun, rest = text.partition(f"<!-- docs: {name} -->\n")
    part, ended, _ = rest.partition("<!-- docs: end -->")
    if not (begun and ended):
        raise ValueError(f"{path} has no part between `<!-- docs: {name} -->` and `<!-- docs: end -->`")
    return part.strip()


def with_links(markdown: str, home: str, place: str) -> str:
    """Text of the repository's file ``home`` with its links as the site's page ``place`` needs them."""

    def moved(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(home), found[1]))
        there = target.removeprefix("docs/") if target.startswith("docs/") else site_paths().get(target)
        if there is None:
            return found[0]
        return f"]({posixpath.relpath(there, posixpath.dirname(place) or '.')}{found[2] or ''})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(moved, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(moved, markdown[end:])])
