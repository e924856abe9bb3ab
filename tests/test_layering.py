"""A module imports only from its own group or an earlier one, without cycles; Lightning stays at the outer end.

What is imported from elsewhere is declared in pyproject.toml (see test_packaging.py for the versions).
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lowrank_lit

PACKAGE = Path(lowrank_lit.__file__).parent
# From the inside out. A folder stands for all its modules. A module that is in no group fails the test: add it here.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors", "linalg", "pivot", "extras", "gauge", "nf4", "loader", "optimizers", "memory", "paging"),
    ("products", "sharing"),
    ("distributed",),
    ("_checkpoints", "_tables", "curves"),
    ("statistics", "experts", "pooling"),
    (
        "streaming",
        "dataflow",
        "residual",
        "gradients",
        "batches",
        "collector",
        "calibration",
        "metrics",
        "spectrum",
        "kept",
    ),
    ("allocation", "plan", "settings"),
    ("reallocation",),
    ("stacking", "layers", "surgery", "pointwise", "unmerging", "_triton", "kernels", "acceleration"),
    ("adapter_config", "adapter_starts", "masks", "merging", "product_lora", "quantize", "recovery", "refinement"),
    ("evidence", "overview", "refit", "selection", "probes", "intruders"),
    ("collection", "study"),
    (
        *("compress", "sweep", "cache", "distillation", "evaluation"),
        *("folders", "weights", "modeling_lowrank", "formats", "hub", "plain", "report"),
        *("cuts", "head_tail", "diagnosis"),
    ),
    ("windows", "timing", "harness"),
    ("_markup", "svg", "pictures", "html"),
    ("_footprints", "estimate"),
    ("corpus", "sources", "choices", "instructions", "data", "module", "strategies"),
    ("callbacks", "recipes"),
    ("_recipes", "_scripts"),
    ("_settings",),
    ("_session",),
    ("_convert", "_dry_run", "_evaluate", "_stages", "_prediction", "_sweep", "_diagnose", "_laser", "cli", "__main__"),
)
LEVEL = {name: level for level, group in enumerate(GROUPS) for name in group}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
MAY_USE_LIGHTNING = {"data", "module", "strategies", "callbacks", "_settings", "_session", "cli"}


def source_files() -> dict[str, Path]:
    """Every module by its dotted name without the package's own; the package itself is the empty name."""
    found: dict[str, Path] = {}
    for folder in (PACKAGE, *(PACKAGE / name for name in ("allocation", "callbacks", "recipes"))):
        for path in sorted(folder.glob("*.py")):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = source_files()


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of everything a file imports, wherever the statement stands.

    ``from a import b`` yields ``a.b``; ``importlib.import_module("a")`` yields ``a``.
    """
    package = ["lowrank_lit", *module.split(".")] if module else ["lowrank_lit"]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def own_imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, module of this package) for every import of a sibling."""
    for line, name in imports(path, module):
        first, _, rest = name.partition(".")
        if first == "lowrank_lit":
            while rest and rest not in FILES:  # the last part may be a name inside the module
                rest = rest.rpartition(".")[0]
            yield line, rest


def test_walk_finds_the_package() -> None:
    assert {"", "errors", "allocation", "callbacks", "recipes"} <= FILES.keys()
    folders = {path.parent for path in PACKAGE.glob("*/*.py")}
    assert folders == {PACKAGE / name for name in ("allocation", "callbacks", "recipes")}


def test_imports_are_seen(tmp_path: Path) -> None:
    source = "import a.b\ndef f():\n    from .c import d\n    import_module('lightning')\nfrom ..e import f as g\n"
    (tmp_path / "x.py").write_text(source)
    seen = {name for _, name in imports(tmp_path / "x.py", "allocation.x")}
    assert seen == {"a.b", "lowrank_lit.allocation.c.d", "lightning", "lowrank_lit.e.f"}


@pytest.mark.parametrize("module", [name for name in FILES if name])
def test_module_imports_only_from_its_group_or_earlier(module: str) -> None:
    own = module.partition(".")[0]
    assert own in LEVEL, f"{module} is in no group: add it to GROUPS"
    for line, other in own_imports(FILES[module], module):
        where = f"{FILES[module].name}:{line}"
        assert other, f"{where} imports from the package itself or from no module of it: name the module"
        level = LEVEL[other.partition(".")[0]]
        assert level <= LEVEL[own], f"{where}: {module} (group {LEVEL[own]}) imports {other} (group {level})"


def test_no_import_cycles() -> None:
    graph = {
        module: {other for _, other in own_imports(path, module) if other != module}
        for module, path in FILES.items()
        if module
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("module", FILES)
def test_lightning_stays_at_the_outer_end(module: str) -> None:
    used = [line for line, name in imports(FILES[module], module) if name.partition(".")[0] in LIGHTNING]
    if module.partition(".")[0] not in MAY_USE_LIGHTNING:
        assert not used, f"{FILES[module].name}:{used[0]} imports Lightning; only {sorted(MAY_USE_LIGHTNING)} may"


def test_every_import_is_a_declared_dependency() -> None:
    file = PACKAGE.parent / "pyproject.toml"
    if not file.exists():
        pytest.skip("only in a checkout")
    table = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = table["optional-dependencies"]
    declared = {canonicalize_name(Requirement(text).name) for text in table["dependencies"]}
    declared |= {
        canonicalize_name(Requirement(text).name)
        for extra in ("qlora", "deepspeed", "eval", "kernels")
        for text in extras[extra]
    }
    providers = packages_distributions()
    seen = set()
    for module, path in FILES.items():
        for line, name in imports(path, module):
            top = name.partition(".")[0]
            if top != "lowrank_lit" and top not in sys.stdlib_module_names:
                seen.add(top)
                names = {canonicalize_name(distribution) for distribution in providers.get(top, [top])}
                assert names & declared, f"{path.name}:{line} imports {top}, which pyproject.toml does not declare"
    assert "torch" in seen


PROBE = """
import os, sys
try:
    import transformers.quantizers, transformers.utils.quantization_config  # what they set is theirs
except ImportError:
    import torch
environment, stdout, stderr = dict(os.environ), sys.stdout, sys.stderr
import lowrank_lit
changed = {k for k in environment.keys() | os.environ.keys() if environment.get(k) != os.environ.get(k)}
assert not changed, f"importing changes environment variables: {sorted(changed)}"
assert lowrank_lit.__version__
heavy = {"lightning", "pytorch_lightning", "bitsandbytes", "peft", "deepspeed", "matplotlib", "datasets"}
loaded = sorted(heavy & {name for name, module in sys.modules.items() if module is not None})
assert not loaded, f"importing loads {loaded}"
"""

# None in sys.modules is how Python itself marks a module that must not be found.
TORCH_ALONE = """
import sys
absent = ["transformers", "peft", "lightning", "pytorch_lightning", "torchmetrics", "datasets", "jsonargparse", "rich",
          "safetensors", "tokenizers", "matplotlib", "tensorboard", "bitsandbytes", "deepspeed", "accelerate", "yaml"]
sys.modules.update(dict.fromkeys(absent))
"""


@pytest.mark.parametrize("prelude", ["", TORCH_ALONE], ids=["everything-installed", "torch-alone"])
def test_importing_is_free(prelude: str) -> None:
    """No Lightning, no environment variable, no output; and torch with numpy and tqdm is all it needs."""
    done = subprocess.run([sys.executable, "-c", prelude + PROBE], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.stderr == ""
    assert (done.returncode, done.stdout) == (0, "")
