"""Finding and reading recipes: a path, or from anywhere the name of a recipe that the package carries."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Hashable, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lowrank_lit.errors import RecipeError

_SUFFIXES = (".yaml", ".yml")


def recipes_folder() -> Path:
    """Folder of the recipes that the package carries."""
    return Path(str(resources.files("lowrank_lit.recipes")))


def carried_recipes() -> dict[str, Path]:
    """Recipes that the package carries, by their name without folder and suffix."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def carried(name: str) -> Path | None:
    """The carried recipe called ``name`` (``quickstart``, ``quickstart.yaml`` or ``recipes/quickstart.yaml``), if there
    is one.
    """
    path = Path(name)
    if path.parent not in (Path("."), Path("recipes")):
        return None
    return carried_recipes().get(path.stem if path.suffix in _SUFFIXES else path.name)


def find_recipe(name: str) -> Path:
    """Path of a recipe: an existing file, else the carried recipe of that name.

    Raises:
        RecipeError: If there is neither.
    """
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    found = carried(name)
    if found is not None:
        if found.stem != name:  # it reads like a path, and there is no such file
            print(f"recipe '{name}' is no file here; taking the package's own, {found}", file=sys.stderr)
        return found
    known = list(carried_recipes())
    close = nearest(Path(name).stem, known)
    hint = f"did you mean '{close}'?" if close else "give a path or one of the names"
    raise RecipeError(f"recipe '{name}' does not exist; {hint} (carried with the package: {', '.join(known)})")


def load_recipe(path: Path) -> dict[str, Any]:
    """Settings of a recipe, with its paths resolved.

    A string that starts with ``./`` or ``../`` is a path relative to the recipe's own folder and becomes absolute;
    every other path is left alone and so is relative to the current directory. Keys given twice are refused.

    Raises:
        RecipeError: If the file cannot be read or is not a mapping in YAML.
    """
    try:
        # A subclass of SafeLoader: nothing but plain values can be built.
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe '{path}' cannot be read ({error}); give a readable UTF-8 file") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {_yaml_problem(error)}") from error
    if not isinstance(settings, dict) or not settings:
        raise RecipeError(f"{path}: not a recipe; a recipe has the keys trainer, model and data")
    resolved: dict[str, Any] = resolve_paths(settings, path.resolve().parent)
    return resolved


def read_value(text: str) -> Any:
    """Value of a setting written on the command line, read as YAML; text that is not YAML is itself.

    Examples:
        >>> read_value("1e-4"), read_value("[1, 2]"), read_value("a: b: c")
        (0.0001, [1, 2], 'a: b: c')
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def resolve_paths(value: Any, folder: Path) -> Any:
    """A copy of ``value`` in which every string that starts with ``./`` or ``../`` is an absolute path below
    ``folder``.
    """
    if isinstance(value, dict):
        return {key: resolve_paths(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve_paths(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return os.path.normpath(folder / value)
    return value


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like ``name``, or None where nothing is alike."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


class _Loader(yaml.SafeLoader):
    """YAML as a reader of recipes expects it: ``1e-4`` is a number, a date is text, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, Hashable) else str(key))
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with the YAML and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else f"not YAML: {problem}"
