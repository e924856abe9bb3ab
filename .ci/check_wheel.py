"""Build the sdist and the wheel, look inside both, and use the wheel outside the checkout.

    python .ci/check_wheel.py [folder for the two files, default dist]

Run it with the Python of the development environment; it needs no network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = {".git", "__pycache__", "build", "dist", "runs", "lightning_logs"}

# Run by the Python of the new environment, in a folder that is not the checkout.
PROBE = """
import importlib.metadata, importlib.resources, pathlib, sys
import lowrank_lit, lowrank_lit.allocation, lowrank_lit.callbacks, lowrank_lit.recipes
home = pathlib.Path(sys.prefix).resolve()
for module in (lowrank_lit, lowrank_lit.allocation, lowrank_lit.callbacks, lowrank_lit.recipes):
    path = pathlib.Path(module.__file__).resolve()
    assert path.is_relative_to(home), f"{module.__name__} comes from {path}, not from the wheel"
recipes = importlib.resources.files("lowrank_lit.recipes")
assert any(entry.name.endswith(".yaml") for entry in recipes.iterdir()), "no recipe in the installed wheel"
version = importlib.metadata.version("lowrank-lit")
print(f"lowrank-lit {version} imported from {home}")
"""


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "dist").resolve()
    with tempfile.TemporaryDirectory(prefix="lowrank-lit-wheel-") as name:
        folder = Path(name).resolve()
        wheel, sdist = build(folder / "source", out)
        check_wheel(wheel)
        check_sdist(sdist)
        check_installed(wheel, folder)
    print(f"OK: {wheel.name} and {sdist.name} in {out}")


def build(source: Path, out: Path) -> tuple[Path, Path]:
    """Build from a copy, where no build/ of an earlier run can put deleted modules into the wheel."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        found = {n for n in names if n in NOT_SOURCE or n.endswith((".egg-info", "_cache"))}
        return found | {n for n in names if Path(folder, n, "pyvenv.cfg").exists()}

    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    shutil.rmtree(out, ignore_errors=True)
    # No isolation: setuptools is part of the development environment, and an isolated build would download it again.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def check_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    own = {name for name in top if not name.endswith(".dist-info")}
    expect(own == {"lowrank_lit"} and len(top) == 2, f"top level of the wheel is {sorted(top)}, not lowrank_lit alone")
    expect(len(names) == len(set(names)), "the wheel holds a path twice")
    expect("lowrank_lit/py.typed" in names, "the wheel lacks lowrank_lit/py.typed")
    installed = {"lowrank_lit": "lowrank_lit", "callbacks": "lowrank_lit/callbacks", "recipes": "lowrank_lit/recipes"}
    for here, there in installed.items():
        wanted = source_files(ROOT / here)
        missing = sorted(f"{there}/{path}" for path in wanted if f"{there}/{path}" not in names)
        expect(bool(wanted), f"{here}/ has no files to look for")
        expect(not missing, f"the wheel lacks {missing}")


def source_files(folder: Path) -> list[str]:
    """The modules, recipes and quick-start files of one folder, relative to it; links are not followed."""
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = Path(base, name).relative_to(folder)
            if path.suffix in {".py", ".yaml", ".json"} or (folder.name == "recipes" and path.parts[0] == "quickstart"):
                found.append(path.as_posix())
    return found


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = [member.name.partition("/")[2] for member in archive.getmembers() if not member.isdir()]
    for path in (
        "callbacks/__init__.py",
        "recipes/__init__.py",
        "tests/conftest.py",
        "tests/tiny.py",
        "constraints.txt",
    ):
        expect(members.count(path) == 1, f"the sdist holds {path} {members.count(path)} times, not once")
    twice = [path for path in members if path.startswith(("lowrank_lit/callbacks/", "lowrank_lit/recipes/"))]
    expect(not twice, f"the sdist holds linked folders a second time: {twice[:3]}")


def check_installed(wheel: Path, folder: Path) -> None:
    """Install into a new environment and use it from a folder outside the checkout."""
    home = folder / "environment"
    venv.create(home, symlinks=os.name != "nt")
    python = home / "bin" / "python"
    own = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    # The dependencies are lent by the development environment: a second copy would be gigabytes of torch for nothing.
    # A path that a .pth file adds comes after the environment's own packages, and .pth files found in it are not read:
    # the development environment's editable install of this package therefore stays out. The probe asserts it.
    lent = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (own / "zz_lent_dependencies.pth").write_text("".join(f"{path}\n" for path in lent))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    run(python, "-c", PROBE, cwd=elsewhere)
    for script in ("lightning", "lowrank-lit"):
        run(home / "bin" / script, "run", "--help", cwd=elsewhere, quiet=True)


def run(*command: str | Path, cwd: Path = ROOT, quiet: bool = False) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else None,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{done.stdout or ''}\nwheel check: {' '.join(map(str, command[:4]))} ... failed: {done.returncode}")


def expect(holds: bool, message: str) -> None:
    if not holds:
        sys.exit(f"wheel check: {message}")


if __name__ == "__main__":
    main()
