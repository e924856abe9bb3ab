"""The checkout, pyproject.toml and the installed package agree."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lowrank_lit
from lowrank_lit._version import __version__

ROOT = Path(__file__).resolve().parent.parent
LINKS = {"lowrank_lit/callbacks": "../callbacks", "lowrank_lit/recipes": "../recipes"}

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists() or not (ROOT / "callbacks").exists(), reason="only in a checkout"
)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    names = [canonicalize_name(requirement.name) for requirement in found]
    assert len(names) == len(set(names)), "constraints.txt pins a package twice"
    return dict(zip(names, found, strict=True))


def packages_on_disk() -> dict[str, Path]:
    """Every folder with a Python file in it, by the dotted name it is imported under; the links are not followed."""
    found = {}
    for home, name in (("lowrank_lit", "lowrank_lit"), *((t.removeprefix("../"), s) for s, t in LINKS.items())):
        for folder, folders, files in os.walk(ROOT / home):
            folders[:] = [part for part in folders if part != "__pycache__"]
            if any(file.endswith(".py") for file in files):
                inside = Path(folder).relative_to(ROOT / home).parts
                found[".".join((*name.split("/"), *inside))] = Path(folder)
    return found


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    on_disk = packages_on_disk()
    assert {"lowrank_lit", "lowrank_lit.callbacks", "lowrank_lit.recipes"} <= on_disk.keys()
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(on_disk)
    without_init = [name for name, folder in on_disk.items() if not (folder / "__init__.py").exists()]
    assert not without_init


def test_every_listed_package_imports(project: dict[str, Any]) -> None:
    for name in project["tool"]["setuptools"]["packages"]:
        assert importlib.import_module(name).__name__ == name


@pytest.mark.parametrize(("link", "target"), LINKS.items())
def test_links_are_links(link: str, target: str) -> None:
    assert (ROOT / link).is_symlink(), f"{link} has become a copy: it goes stale, restore the link"
    assert os.readlink(ROOT / link) == target


@pytest.mark.parametrize("link", LINKS)
def test_links_are_links_in_git(link: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--stage", "--", link], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"git cannot be asked: {error}")
    assert listed.startswith("120000 "), f"git holds {link} as {listed!r}, not as a link (mode 120000)"


@pytest.mark.parametrize("name", ["callbacks", "recipes"])
def test_folders_are_not_imported_by_their_own_name(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr
    assert f"lowrank_lit.{name}" in done.stderr


def test_version_has_one_source(project: dict[str, Any]) -> None:
    assert "version" in project["project"]["dynamic"]
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lowrank_lit._version.__version__"}
    assert lowrank_lit.__version__ == __version__ == str(Version(__version__))
    literal = f'"{__version__}"'
    sources = [path for folder in packages_on_disk().values() for path in folder.glob("*.py")]
    assert [path.name for path in sources if literal in path.read_text(encoding="utf-8")] == ["_version.py"]


def test_installed_version_is_this_one() -> None:
    try:
        installed = importlib.metadata.version("lowrank-lit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed: running from the checkout alone")
    assert installed == __version__


def test_python_versions_agree(project: dict[str, Any]) -> None:
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["mypy"]["python_version"] == "3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"


def test_extras(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    assert extras.keys() == {"qlora", "deepspeed", "eval", "kernels", "all", "docs", "dev"}
    (everything,) = [Requirement(text) for text in extras["all"]]
    assert everything.name == project["project"]["name"]
    assert everything.extras == {"qlora", "deepspeed", "eval", "kernels"}


def test_constraints_cover_every_dependency(project: dict[str, Any], pins: dict[str, Requirement]) -> None:
    table = project["project"]
    texts = table["dependencies"] + [text for extra in table["optional-dependencies"].values() for text in extra]
    wanted = [requirement for requirement in map(Requirement, texts) if requirement.name != table["name"]]
    assert len(wanted) > 15
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints.txt lacks {name}"
        (pin,) = pins[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version, prereleases=True), f"{pins[name]} is outside {requirement}"
        bounds = {bound.operator for bound in requirement.specifier}
        assert bounds == {">="}, f"{requirement} needs one lower bound and no upper one"


def test_constraints_fit_every_index(pins: dict[str, Requirement]) -> None:
    local = [str(pin) for pin in pins.values() for spec in pin.specifier if Version(spec.version).local]
    assert not local, f"a local version such as +cpu exists on one index only: {local}"


def test_console_scripts_exist(project: dict[str, Any]) -> None:
    scripts = project["project"]["scripts"]
    assert scripts.keys() == {"lightning", "lowrank-lit"}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_recipes_are_found_through_the_package() -> None:
    here = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    packaged = {entry.name for entry in importlib.resources.files("lowrank_lit.recipes").iterdir()}
    assert here
    assert here <= packaged
