"""The recipes that ship with the package, found with ``importlib.resources.files("lowrank_lit.recipes")``."""

if __name__ != "lowrank_lit.recipes":
    raise ModuleNotFoundError(
        "The repository's recipes/ directory is the source of `lowrank_lit.recipes`; import it under that name."
    )
