"""``lowrank-lit plan RECIPE --dry-run``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_lit._footprints import kept_parameters
from lowrank_lit._recipes import recipes_folder
from lowrank_lit._session import RecipeCLI
from lowrank_lit._tables import gibibytes, table
from lowrank_lit.callbacks._run_shape import measure_config, run_shape, settings_of_run
from lowrank_lit.errors import ModelError, RecipeError
from lowrank_lit.estimate import PLACES, STAGES, Item, estimate, on_host, totals
from lowrank_lit.settings import Settings

# Public configurations that travel with the package, for models too large to fetch only to count their parameters.
_CARRIED_CONFIGS = {"huggyllama/llama-7b": "llama-7b.json", "Qwen/Qwen3-8B": "qwen3-8b.json"}


def compression_callback(cli: RecipeCLI, recipe: Path) -> Any:
    """The recipe's LowRankCompression.

    Raises:
        RecipeError: If it has none.
    """
    trainer: Any = cli.trainer  # sets its attribute `callbacks` where type checkers do not see it
    for callback in trainer.callbacks:
        if type(callback).__name__ == "LowRankCompression":
            return callback
    raise RecipeError(
        f"{recipe}: trainer.callbacks has no LowRankCompression, so there are no ranks to plan; add it to the recipe"
    )


def dry_run_report(cli: RecipeCLI, config_json: str | None) -> str:
    """What the recipe's model has and a run of it will need, from the configuration alone.

    Args:
        cli: The recipe's trainer, model and data; nothing of them is loaded.
        config_json: The model's configuration, where it is not to be looked for.

    Raises:
        ModelError: If there is no configuration of the model on this machine.
    """
    config, origin = _config(cli.model.source, config_json)
    options = settings_of_run(cli.trainer)  # what a preset stands for is filled in
    size = measure_config(config, None if options is None else options.targets)
    weights = cli.model.dtype_in_memory
    shape = run_shape(cli.trainer, cli.model, cli.datamodule, weights=weights, stored=config.dtype or weights)
    kept = kept_parameters(size, shape.final_ratio)
    device = cli.trainer.strategy.root_device
    items = estimate(size, shape)
    same = ", which is the host" if device.type == "cpu" else ""
    lines = [
        f"Configuration: {origin}",
        f"Whole model: {size.parameters:,} parameters; after compression {kept:,} ({kept / size.parameters:.4f})",
        f"Target matrices ({len(size.matrices)}): {size.target_parameters:,} parameters; kept at "
        f"keep_ratio={shape.final_ratio}: {int(shape.final_ratio * size.target_parameters):,}",
        f"Counted for: weights of {shape.weight_bytes} bytes in memory and {shape.storage_bytes} on disk, batches of "
        f"{shape.batch_size} x {shape.block_size} tokens, {shape.calibration_tokens:,} calibration tokens, one process",
        *_compression_line(options, backward=shape.backward),
        "",
        _items_table(on_host(items) if device.type == "cpu" else items),
        "",
        f"Tensors only; Python, libraries and the device's context come on top. The device is {device}{same}.",
    ]
    if not size.shared:
        lines.append("Layers that share an input could not be found; every one counts its own second moment.")
    return "\n".join(lines)


def _compression_line(options: Settings | None, *, backward: bool) -> list[str]:
    if options is None:
        return []
    passes = (
        "forward and backward passes of the whole model on the device"
        if backward
        else "forward passes, one block at a time on the device"
    )
    made = f"metric {options.metric}, allocator {options.allocator}, feedback {options.feedback}"
    return [f"Compression: {made}; calibration takes {passes}"]


def _items_table(items: Sequence[Item]) -> str:
    sums = totals(items)
    rows = [["stage", "where", "what", "size"]]
    for stage in STAGES:
        for place in PLACES:
            inside = [item for item in items if (item.stage, item.place) == (stage, place)]
            rows += [[stage, place, item.what, gibibytes(item.bytes)] for item in inside]
            if len(inside) > 1:
                rows.append([stage, place, "= total", gibibytes(sums[stage, place])])
    return table(rows)


def _config(source: str | dict[str, Any], config_json: str | None) -> tuple[Any, str]:
    """Configuration of the recipe's model without the network, and where it is from."""
    from transformers import AutoConfig

    if config_json is not None:
        return _read_config(Path(config_json)), config_json
    if isinstance(source, dict):
        return AutoConfig.for_model(**source), "model.model of the recipe"
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True), f"{source} (on this machine)"
    except Exception as error:  # a name that is not in the cache, a folder without a configuration: many kinds of error
        if source in _CARRIED_CONFIGS:
            carried = recipes_folder() / "configs" / _CARRIED_CONFIGS[source]
            return _read_config(
                carried
            ), f"{source} (recipes/configs/{carried.name} of the package: it is not on this machine)"
        raise ModelError(
            f"model '{source}': no configuration on this machine; give its config.json with --config_json FILE"
        ) from error


def _read_config(file: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"configuration '{file}' cannot be read ({error}); give a config.json with model_type"
        ) from error
