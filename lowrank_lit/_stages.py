"""What the commands do, one function each; all take the recipe, the overrides and the flags for Lightning's parser."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowrank_lit._checkpoints import newest_checkpoint, resolve_checkpoint
from lowrank_lit._diagnose import diagnose_recipe, diagnosis_options
from lowrank_lit._dry_run import compression_callback, dry_run_report, without_devices
from lowrank_lit._evaluate import evaluate_recipe, wanted
from lowrank_lit._laser import laser_options, laser_recipe
from lowrank_lit._prediction import predicted_plan, show_prediction
from lowrank_lit._scripts import clash
from lowrank_lit._session import RecipeCLI, build
from lowrank_lit._settings import Override, callback_entry, callback_help, drop_callback, read_settings
from lowrank_lit._sweep import grid_of, sweep_recipe
from lowrank_lit._tables import table
from lowrank_lit.errors import ExportError, RecipeError
from lowrank_lit.plan import RankPlan
from lowrank_lit.settings import Settings

_RESOLVED_BY_LIGHTNING = ("best", "hpc")  # of --ckpt_path
# Callbacks of the recovery: a compression alone does without them.
_RECOVERY = ("RankPreservingLoRA", "FactorTuning", "Refinement", "RankReallocation")


def run(recipe: Path | None, overrides: Sequence[Override], flags: Sequence[str]) -> int:
    """Fit: every stage hangs on a callback of the recipe."""
    if recipe is None:
        RecipeCLI({}, flags)  # prints its help and exits
        return 0
    settings = read_settings(recipe, overrides)
    if _answered(settings, flags):
        return 0
    _fit(build(recipe, settings, flags))
    return 0


def compress(recipe: Path, overrides: Sequence[Override], flags: Sequence[str]) -> int:
    """The recipe without recovery."""
    settings = read_settings(recipe, overrides)
    for name in _RECOVERY:
        drop_callback(settings, name)
    # Setup and the end of the fit run their hooks; no batch is drawn, so a recipe needs no training text for it.
    settings["trainer"].update(max_steps=0, limit_train_batches=0, num_sanity_val_steps=0)
    if not _answered(settings, flags):
        _fit(build(recipe, settings, flags))
    return 0


def evaluate(
    recipe: Path, overrides: Sequence[Override], flags: Sequence[str], *, path: str | None = None, **options: Any
) -> int:
    """The dense and the exported model measured alike: perplexity, and what ``options`` ask for."""
    asked = wanted(**options)  # an unknown name is refused before anything is loaded
    settings = read_settings(recipe, overrides)
    folder = Path(path) if path else _export_folder(settings)
    if not (folder / "config.json").is_file():
        raise ExportError(
            f"no exported model in '{folder}'; run `lowrank-lit run {recipe}` first, or give --path FOLDER"
        )
    return evaluate_recipe(build(recipe, settings, flags), folder, asked)


class _Measured(NamedTuple):
    parameters: int
    bytes: int
    perplexity: float


def _measured(cli: RecipeCLI, source: Any) -> _Measured:
    from lowrank_lit.module import LowRankModule
    from lowrank_lit.surgery import count_parameters, stored_bytes

    module = LowRankModule(source, dtype=_dtype_name(cli.model.dtype_in_memory))
    module.configure_model()
    value = _perplexity(cli, module.model, _test_blocks(cli))
    return _Measured(count_parameters(module.model), stored_bytes(module.model), value)


def _perplexity(cli: RecipeCLI, model: Any, blocks: torch.Tensor) -> float:
    from lowrank_lit.evaluation import perplexity

    return perplexity(model, blocks, batch_size=cli.datamodule.batch_size, device=cli.trainer.strategy.root_device)


def _test_blocks(cli: RecipeCLI) -> torch.Tensor:
    cli.datamodule.prepare_data()
    blocks: torch.Tensor = cli.datamodule.evaluation("test")
    return blocks


def export(
    recipe: Path,
    overrides: Sequence[Override],
    flags: Sequence[str],
    *,
    ckpt_path: str | None = None,
    path: str | None = None,
    format: str = "lowrank",
) -> int:
    """A Lightning checkpoint as a Hugging Face folder."""
    from lowrank_lit import formats, hub
    from lowrank_lit.callbacks.export import own_fingerprint, plan_of
    from lowrank_lit.module import load_checkpoint

    formats.check_format(format)
    settings = read_settings(recipe, overrides)
    exported = _export_folder(settings)
    folder = Path(path) if path else exported
    if not path and format != formats.OWN:
        folder = folder.with_name(f"{folder.name}-{format}")
    cli = build(recipe, settings, flags)
    try:
        checkpoint = Path(ckpt_path) if ckpt_path else newest_checkpoint(cli.trainer)
    except RecipeError:
        if format in (formats.OWN, formats.ARENA) or not (exported / "config.json").is_file():
            raise
        return _export_again(exported, folder, format, cli.datamodule.tokenizer)
    if not checkpoint.is_file():
        raise RecipeError(f"checkpoint '{checkpoint}' does not exist; give --ckpt_path FILE")
    dense = _measured(cli, cli.model.source) if format == formats.ARENA else None
    load_checkpoint(cli.model, checkpoint)
    if format == formats.ARENA and cli.model.plan is None:
        raise ExportError(
            f"format='{format}' needs a checkpoint of a run that compressed a dense model, and '{checkpoint}' is none; "
            "choose another format"
        )
    plan = plan_of(cli.model, cli.model.model)
    dtype = cli.model.storage_dtype
    evaluation = None if dense is None else _for_the_arena(cli, dense)
    hub.export(
        cli.model.model,
        plan,
        folder,
        dtype=dtype,
        tokenizer=cli.datamodule.tokenizer,
        fingerprint=own_fingerprint(cli.model) if cli.model.plan is None else None,
        format=format,
        evaluation=evaluation,
    )
    print(f"{checkpoint} -> {folder}")
    return 0


def _export_again(exported: Path, folder: Path, format: str, tokenizer: Any) -> int:
    """A folder that a run has exported, in another format."""
    from lowrank_lit import hub

    model = hub.load(exported, dtype="auto")
    hub.export(model, model.config.quantization_config.rank_plan(), folder, tokenizer=tokenizer, format=format)
    print(f"{exported} -> {folder}")
    return 0


def _for_the_arena(cli: RecipeCLI, dense: _Measured) -> dict[str, Any]:
    """Perplexities of the dense and of the loaded model, the weights as they will be stored, and their protocol."""
    from lowrank_lit.callbacks.export import round_weights
    from lowrank_lit.report import data_hash

    if cli.model.storage_dtype is not None:
        round_weights(cli.model.model, cli.model.storage_dtype)
    blocks = _test_blocks(cli)
    count, length = blocks.shape
    return {
        "dense": dense.perplexity,
        "compressed": _perplexity(cli, cli.model.model, blocks),
        "protocol": {
            "text": cli.datamodule.sources["test"],
            "blocks": count,
            "length": length,
            "targets": count * (length - 1),
            "start": "of the text, block after block",
            "special_tokens": "none added",
            "dtype": _dtype_name(cli.model.dtype_in_memory),
            "sha256_of_the_tokens": data_hash([blocks]),
        },
    }


def plan(
    recipe: Path,
    overrides: Sequence[Override],
    flags: Sequence[str],
    *,
    dry_run: bool = False,
    config_json: str | None = None,
    path: str | None = None,
    **counted: Any,
) -> int:
    """Ranks of every matrix, or with ``dry_run`` what a run will need, ``counted`` as the options say."""
    settings = read_settings(recipe, overrides)
    if dry_run:
        asked = counted.get("accelerator") or counted.get("gpus")
        cli = build(recipe, without_devices(settings) if asked else settings, flags)
        print(dry_run_report(cli, config_json, **counted))
        return 0
    cli = build(recipe, settings, flags)
    compression = compression_callback(cli, recipe)
    cli.datamodule.prepare_data()
    batches = cli.datamodule.calibration_batches()
    cli.model.configure_model()
    planned = predicted_plan(
        cli.model.model,
        batches,
        Settings(**compression.settings()),
        device=cli.trainer.strategy.root_device,
        workspace=compression.workspace,
    )
    _print_plan(planned.plan)
    target = Path(path) if path else Path(cli.trainer.default_root_dir) / "plan.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    planned.plan.save(target)
    print(f"Written: {', '.join(map(str, (target, *show_prediction(planned, target.parent))))}")
    return 0


def _print_plan(plan: RankPlan) -> None:
    rows = [["matrix", "shape", "form", "rank", "kept", "energy"]]
    for matrix in plan.matrices:
        energy = "" if matrix.kept_energy is None else f"{matrix.kept_energy:.4f}"
        share = f"{matrix.parameters / matrix.dense_parameters:.3f}"
        rows.append([matrix.name, f"{matrix.rows} x {matrix.columns}", matrix.form, str(matrix.rank), share, energy])
    print(table(rows))
    print(
        "kept: share of a matrix's numbers that are stored; energy: share of its squared singular values, in the "
        "plan's metric, that the rank keeps."
    )
    kept = f"{plan.parameters:,} kept ({plan.keep_ratio:.4f})"
    print(f"Target matrices: {plan.dense_parameters:,} parameters, {kept}.")
    for note in plan.notes:
        print(f"note: {note}")


def sweep(
    recipe: Path,
    overrides: Sequence[Override],
    flags: Sequence[str],
    *,
    seeds: int,
    split: str,
    path: str | None = None,
    laser: bool = False,
    keep_share: list[str] | None = None,
    **axes: list[str] | None,
) -> int:
    """Perplexity over a grid of settings, from one calibration pass per draw, or over cuts of one matrix at a time."""
    if seeds < 1:
        raise RecipeError(f"option '--seeds': {seeds} is too small; give the number of draws, 1 or more")
    if laser:
        options = laser_options(axes, keep_share)
        cli = build(recipe, read_settings(recipe, overrides), flags)
        folder = Path(path) if path else Path(cli.trainer.default_root_dir) / "laser"
        return laser_recipe(cli, recipe, options, split=split, folder=folder)
    if keep_share is not None:
        raise RecipeError("option '--keep-share' belongs to --laser; add it, or give --keep-ratio for the grid")
    grid = grid_of(**axes)  # an unknown name is refused before anything is loaded
    settings = read_settings(recipe, overrides)
    cli = build(recipe, settings, flags)
    folder = Path(path) if path else Path(cli.trainer.default_root_dir) / "sweep"
    return sweep_recipe(cli, recipe, grid, seeds=seeds, split=split, folder=folder)


def diagnose(
    recipe: Path, overrides: Sequence[Override], flags: Sequence[str], *, path: str | None = None, **options: Any
) -> int:
    """Where a compression loses what it loses."""
    asked = diagnosis_options(**options)
    cli = build(recipe, read_settings(recipe, overrides), flags)
    folder = Path(path) if path else Path(cli.trainer.default_root_dir) / "diagnostics"
    return diagnose_recipe(cli, recipe, asked, folder)


def doctor() -> int:
    """Versions, device, and who answers to ``lightning``; 1 where something wants mending."""
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in (
        "lowrank-lit",
        "torch",
        "lightning",
        "transformers",
        "peft",
        "jsonargparse",
        "bitsandbytes",
        "deepspeed",
    ):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"Devices: {', '.join(devices) or 'CPU'}, {torch.get_num_threads()} threads")
    problem = clash()
    print(problem or "Script lightning: no clash")
    return 1 if problem else 0


def _answered(settings: dict[str, Any], flags: Sequence[str]) -> bool:
    """Print the help of a callback where ``--CALLBACK.help`` asks for it."""
    asked = [flag.removeprefix("--").partition(".help")[0] for flag in flags if ".help" in flag]
    names = [name for name in asked if "." not in name and name[:1].isupper()]
    for name in names:
        print(callback_help(settings, name))
    return bool(names)


def _fit(cli: RecipeCLI) -> None:
    wanted = cli.config.get("ckpt_path")
    resume: dict[str, Any] = {}
    if wanted in _RESOLVED_BY_LIGHTNING:
        resume["ckpt_path"] = wanted
    elif wanted:
        # Set here and not passed on, so that callbacks know it in `setup`, before anything is computed.
        cli.trainer.ckpt_path = str(resolve_checkpoint(cli.trainer, wanted))
    # A checkpoint is data: nothing in it is run. Older releases of Lightning have no such argument. DeepSpeed reads its
    # own shards, which are pickles: a folder of these is to be trusted before it is resumed from.
    if wanted and "weights_only" in inspect.signature(cli.trainer.fit).parameters:
        resume["weights_only"] = True
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, **resume)


def _root(settings: dict[str, Any]) -> Path:
    return Path(settings.get("trainer", {}).get("default_root_dir") or ".")


def _export_folder(settings: dict[str, Any]) -> Path:
    """Where the recipe's ``ExportOnFitEnd`` writes."""
    entry = callback_entry(settings, "ExportOnFitEnd") or {}
    chosen = (entry.get("init_args") or {}).get("dirpath")
    return Path(chosen) if chosen else _root(settings) / "model"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


STAGES: dict[str, Callable[..., int]] = {
    "run": run,
    "compress": compress,
    "evaluate": evaluate,
    "export": export,
    "plan": plan,
    "sweep": sweep,
    "diagnose": diagnose,
}
