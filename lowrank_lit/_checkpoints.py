"""Which checkpoint a run goes on from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lowrank_lit.errors import ExportError, RecipeError, reason_of

# Where ModelCheckpoint writes below a folder: there, or below a logger's name and version.
_BELOW = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt", "*/*/checkpoints/*.ckpt")


def resolve_checkpoint(trainer: Any, wanted: str) -> Path:
    """The checkpoint that ``--ckpt_path`` means, once it is known to be whole.

    Args:
        trainer: Its ``ModelCheckpoint`` callbacks, or else its root folder and its loggers', say where ``last`` is
            looked for: the newest checkpoint there.
        wanted: A path, or ``last``.

    Raises:
        RecipeError: If there is none, which is no fresh start.
        ExportError: If it is truncated; the newest one that can be read is named.
    """
    chosen = newest_checkpoint(trainer) if wanted == "last" else Path(wanted)
    if not chosen.exists():
        raise RecipeError(f"checkpoint '{wanted}' does not exist; give --ckpt_path FILE, or --ckpt_path last")
    problem = damage(chosen)
    if problem is not None:
        beside = _newest_first(chosen.parent.glob("*.ckpt"))
        others = (path for path in beside if path.resolve() != chosen.resolve())
        whole = next((path for path in others if damage(path) is None), None)
        remedy = f"go on from an older one: --ckpt_path={whole}" if whole else "there is no other; start again"
        raise ExportError(f"checkpoint '{chosen}' is damaged ({problem}); {remedy}")
    return chosen


def newest_checkpoint(trainer: Any) -> Path:
    """The newest checkpoint where the trainer's ``ModelCheckpoint`` callbacks write.

    Raises:
        RecipeError: If there is none.
    """
    chosen = [callback.dirpath for callback in trainer.checkpoint_callbacks if getattr(callback, "dirpath", None)]
    loggers = [logger.save_dir for logger in trainer.loggers if logger.save_dir]
    folders = [Path(folder) for folder in dict.fromkeys(map(str, chosen or [trainer.default_root_dir, *loggers]))]
    found = _newest_first(path for folder in folders for pattern in _BELOW for path in folder.glob(pattern))
    if not found:
        names = ", ".join(f"'{folder}'" for folder in folders)
        raise RecipeError(
            f"no checkpoint in {names}; run the recipe without --ckpt_path (a compression that was finished is not "
            "computed again), or give --ckpt_path FILE"
        )
    return found[0]


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """Checkpoints, each once; of two of the same age, the one named ``last`` first."""
    own = {path.resolve(): path for path in paths if path.exists()}  # a link may lead nowhere
    age = {path: (path.stat().st_mtime_ns, path.stem.startswith("last")) for path in own.values()}
    return sorted(age, key=age.__getitem__, reverse=True)


def damage(path: Path) -> str | None:
    """What keeps a checkpoint from being read, or None. Tensors are not read, only where they lie."""
    if path.is_dir():  # DeepSpeed's, which names the part to load when all parts are written
        return None if (path / "latest").is_file() else "a folder without DeepSpeed's file 'latest'"
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a truncated or foreign file surfaces as many kinds of error
        return reason_of(error)
    missing = [key for key in ("state_dict", "optimizer_states") if key not in checkpoint]
    return f"it holds no {missing[0]}" if missing else None
