"""Which checkpoint a run goes on from, and what DeepSpeed's checkpoints, which are folders, consist of."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_lit.errors import ExportError, RecipeError, reason_of

# Where ModelCheckpoint writes below a folder: there, or below a logger's name and version.
_BELOW = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt", "*/*/checkpoints/*.ckpt")


def resolve_checkpoint(trainer: Any, wanted: str) -> Path:
    """The checkpoint that ``--ckpt_path`` means, once it is known to be whole.

    Args:
        trainer: Its ``ModelCheckpoint`` callbacks, or else its root folder and its loggers', say where ``last`` is
            looked for: the newest checkpoint there. A folder of DeepSpeed's is to be of as many processes as it has.
        wanted: A path, or ``last``.

    Raises:
        RecipeError: If there is none, which is no fresh start.
        ExportError: If it is truncated, and the newest one that can be read is named; if it is DeepSpeed's, and was
            written by another number of processes or the trainer has another strategy.
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
    strategy = trainer.strategy
    if chosen.is_dir() or hasattr(strategy, "zero_stage_3"):
        require_shards(
            chosen,
            processes=trainer.num_devices * trainer.num_nodes,
            stage=getattr(strategy, "stage", 3 if getattr(strategy, "zero_stage_3", False) else None),
            deepspeed=hasattr(strategy, "zero_stage_3"),
        )
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
    if path.is_dir():
        try:
            find_shards(path)
        except ExportError as error:
            return str(error)
        return None
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a truncated or foreign file surfaces as many kinds of error
        return reason_of(error)
    missing = [key for key in ("state_dict", "optimizer_states") if key not in checkpoint]
    return f"it holds no {missing[0]}" if missing else None


@dataclass(frozen=True)
class Shards:
    """A checkpoint of DeepSpeed: the folder of its parts, its processes, the stage of ZeRO (2 for 1 and 2), and the
    file with the module of the first process and the state of the trainer."""

    folder: Path
    processes: int
    stage: int
    states: Path


def find_shards(path: Path) -> Shards:
    """The parts of a folder that DeepSpeed has written, all of which are there.

    Raises:
        ExportError: If it is no such folder, or a part is missing; the message names it.
    """
    try:
        tag = (path / "latest").read_text(encoding="utf-8").strip()  # DeepSpeed writes it when all parts are written
    except OSError as error:
        raise ExportError("a folder without DeepSpeed's file 'latest'") from error
    folder = path / tag
    found = {file.name for file in folder.glob("*.pt")}
    stage = 3 if any(name.startswith("zero_pp_rank_") and name.endswith("_model_states.pt") for name in found) else 2
    first = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    if first not in found:
        raise ExportError(f"'{folder / first}' is missing")
    states = _load(folder / first)
    if "dp_world_size" not in states:
        raise ExportError(f"'{folder / first}' is no part of DeepSpeed's")
    processes = int(states["dp_world_size"])
    kind = "bf16_" if any(name.startswith("bf16_") for name in found) else ""
    needed = [f"{kind}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(processes)]
    if stage == 3:
        needed += [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(processes)]
    missing = [name for name in needed if name not in found]
    if missing:
        raise ExportError(f"'{folder / missing[0]}' is missing, {len(missing)} of {len(needed)} parts are")
    for name in needed:
        # The table at the end of a file lists what is before it: parts are pickles, which are not read to find out.
        if not zipfile.is_zipfile(folder / name):
            raise ExportError(f"'{folder / name}' is truncated, or no part of DeepSpeed's")
    return Shards(folder, processes, stage, folder / first)


def require_shards(path: Path, *, processes: int, stage: int | None, deepspeed: bool = True) -> None:
    """Refuse a folder that this run cannot go on from.

    Args:
        path: Of the checkpoint.
        processes: Of this run.
        stage: Of ZeRO in this run, None if unknown.
        deepspeed: Whether this run has DeepSpeed at all.

    Raises:
        ExportError: If it is no folder, parts are missing or truncated, or it was written by another number of
            processes or in another stage.
    """
    if path.is_file():
        raise ExportError(
            f"checkpoint '{path}' is a file, and DeepSpeed resumes from its own folders: resume with the strategy that "
            "wrote it"
        )
    try:
        shards = find_shards(path)
    except ExportError as error:
        raise ExportError(f"checkpoint '{path}' cannot be resumed from: {error}") from error
    plain = f"; `lowrank-lit convert {path}` makes a model of it, from which a new run can start"
    if not deepspeed:
        raise ExportError(f"checkpoint '{path}' is DeepSpeed's, resume with the strategy that wrote it{plain}")
    if shards.processes != processes:
        raise ExportError(
            f"checkpoint '{path}' was written by {shards.processes} processes, and this run has {processes}: resume "
            f"with trainer.devices times trainer.num_nodes = {shards.processes}{plain}"
        )
    if stage is not None and (stage == 3) != (shards.stage == 3):
        wrote = "3" if shards.stage == 3 else "1 or 2"
        raise ExportError(
            f"checkpoint '{path}' was written in ZeRO stage {wrote}, and this run has stage {stage}: resume with the "
            f"stage that wrote it{plain}"
        )


def gather_shards(path: Path) -> dict[str, Any]:
    """A folder of DeepSpeed as one checkpoint: ``state_dict`` with whole weights, and the state of the trainer.

    Weights have the types that they had in the module. Stage 3 is gathered by DeepSpeed's own tool, which unpickles the
    parts: they are to be trusted.

    Raises:
        ExportError: If a part is missing or cannot be read; LowRankError if stage 3 needs DeepSpeed and it is missing.
    """
    shards = find_shards(path)
    checkpoint: dict[str, Any] = _load(shards.states)
    weights: dict[str, Any] = dict(checkpoint["module"])
    if shards.stage == 3:
        from lowrank_lit.extras import load_deepspeed

        load_deepspeed(f"a checkpoint of ZeRO stage 3 ('{path}')")
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                whole = get_fp32_state_dict_from_zero_checkpoint(str(path), shards.folder.name)
            except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
                raise ExportError(f"the parts in '{shards.folder}' cannot be read ({reason_of(error)})") from error
        # What is no parameter and no buffer, such as the scales of 4-bit weights, is not split, and the tool drops it.
        own = {name: value for name, value in weights.items() if name not in whole}
        weights = own | {name: value.to(weights[name].dtype) for name, value in whole.items() if name in weights}
    return {**checkpoint, "state_dict": weights}


def _load(file: Path) -> dict[str, Any]:
    import torch

    try:
        loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a truncated or foreign file surfaces as many kinds of error
        raise ExportError(f"'{file}' cannot be read ({reason_of(error)})") from error
    return loaded


def disk_reason(error: BaseException) -> str:
    """What the system said that kept a file from being written; torch reports the place it reached in its stead."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return cause.strerror or reason_of(cause)
    return "the disk did not take all of it" if "inline_container" in str(error) else reason_of(error)


def unwritten(path: Path, reason: str) -> ExportError:
    """For a checkpoint that could not be written, from :func:`disk_reason`."""
    return ExportError(
        f"checkpoint '{path}' cannot be written ({reason}); free space, or set ModelCheckpoint.dirpath to another "
        "disk; an earlier checkpoint is as it was"
    )
