"""The console script ``lightning``: what is no recipe goes to whom it would have gone without this package.

Lightning itself installs ``fabric``; the script ``lightning`` belongs to ``lightning-sdk`` where that is installed. Two
packages that carry a script of one name overwrite each other's file, and the one installed last wins. ``lowrank-lit``
is never in doubt.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lowrank_lit.errors import RecipeError

_OWN = "lowrank-lit"
REINSTALL = f"pip install --force-reinstall --no-deps {_OWN}"


def script_owners(name: str = "lightning") -> list[str]:
    """Installed distributions that carry a console script of this name, in alphabetical order."""
    owners = set()
    for distribution in metadata.distributions():
        if any(entry.name == name for entry in distribution.entry_points.select(group="console_scripts")):
            owners.add(str(distribution.metadata["Name"]).lower().replace("_", "-"))
    return sorted(owners)


def answers_for(script: Path) -> str | None:
    """Whom a script file runs: ``lowrank-lit``, the name of another module, or None where that cannot be told."""
    try:
        lines = script.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # on Windows a script is a program
        return None
    modules = [line.split()[1] for line in lines if line.startswith("from ") and " import " in line]
    if not modules:
        return None
    return _OWN if modules[0].partition(".")[0] == "lowrank_lit" else modules[0]


def clash() -> str | None:
    """What to do about the script ``lightning``, in one line; None where nothing is wrong."""
    others = [owner for owner in script_owners() if owner != _OWN]
    found = shutil.which("lightning")
    answer = answers_for(Path(found)) if found else None
    if found and answer not in (None, _OWN):
        return (
            f"the script 'lightning' ({found}) runs {answer}: use `lowrank-lit run RECIPE.yaml`, or take the script "
            f"back with `{REINSTALL}` (every other command is passed on)"
        )
    if others and answer is None:
        names = ", ".join([*others, _OWN])
        return f"{names} carry a script 'lightning' each; `lowrank-lit run RECIPE.yaml` works with any of them"
    return None


def forward(argv: Sequence[str]) -> int:
    """Pass a command line on to ``lightning-sdk`` where that is installed, else to Lightning's ``fabric``.

    Raises:
        RecipeError: If neither can take it.
    """
    function, name = _successor()
    if name == "fabric" and (not argv or argv[0] in ("-h", "--help")):
        print("lightning run RECIPE.yaml [--KEY=VALUE ...]   runs a recipe (help: lowrank-lit --help)")
        print("Everything else is Lightning's own command line, fabric:\n", flush=True)
    saved, sys.argv = sys.argv, [name, *argv]  # both read the command line themselves
    try:
        code = function()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = saved
    if isinstance(code, str):
        print(code, file=sys.stderr)
        return 1
    return int(code or 0) if isinstance(code, int | None) else 0


def _successor() -> tuple[Callable[[], Any], str]:
    for distributions, script in ((("lightning-sdk",), "lightning"), (("lightning", "lightning-fabric"), "fabric")):
        for distribution in distributions:
            try:
                entries = metadata.distribution(distribution).entry_points.select(group="console_scripts", name=script)
                for entry in entries:
                    return entry.load(), script
            except metadata.PackageNotFoundError:
                continue
            except (ImportError, AttributeError) as error:
                raise RecipeError(
                    f"the command line of {distribution} cannot be loaded ({error}); pip install click"
                ) from error
    raise RecipeError("this is no recipe, and no other command line of Lightning is installed; see lowrank-lit --help")
