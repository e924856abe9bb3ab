"""``lowrank-lit plan RECIPE --dry-run``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowrank_lit._footprints import ModelSize, RunShape, kept_parameters, token_flops
from lowrank_lit._recipes import recipes_folder
from lowrank_lit._session import RecipeCLI
from lowrank_lit._tables import gibibytes, table
from lowrank_lit.callbacks._run_shape import measure_config, remarks, run_shape, settings_of_run
from lowrank_lit.errors import ModelError, RecipeError
from lowrank_lit.estimate import (
    COMPRESSED_STAGES,
    PLACES,
    STAGES,
    Item,
    Place,
    estimate,
    on_host,
    over_gpus,
    peaks,
    stage_flops,
    streamed,
    totals,
)
from lowrank_lit.settings import Settings

# Public configurations that travel with the package, for models too large to fetch only to count their parameters.
_CARRIED_CONFIGS = {
    "huggyllama/llama-7b": "llama-7b.json",
    "meta-llama/Llama-2-7b-hf": "llama-2-7b.json",
    "meta-llama/Meta-Llama-3-70B": "llama-3-70b.json",
    "Qwen/Qwen3-8B": "qwen3-8b.json",
    "Qwen/Qwen3-235B-A22B": "qwen3-235b-a22b.json",
}
_GPUS = (1, 8, 16, 64)
_PER_MACHINE = 8
_ZERO = (0, 2, 3)
_DEVICES = ("cpu", "cuda")
_ON_DEVICES = ("accelerator", "devices", "num_nodes", "strategy", "precision", "plugins", "sync_batchnorm")
_RATE_SECONDS = 2.0
_RATED = {"weights": "the weights' type", "float64": "float64"}


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


def dry_run_report(
    cli: RecipeCLI,
    config_json: str | None,
    *,
    accelerator: str | None = None,
    gpus: str | None = None,
    measure_rate: bool = False,
) -> str:
    """What the recipe's model has and a run of it will need, from the configuration alone.

    Args:
        cli: The recipe's trainer, model and data; nothing of them is loaded.
        config_json: The model's configuration, where it is not to be looked for: a file, or one that the package
            carries, by its file's name or that of its model.
        accelerator: ``cuda`` or ``cpu``: what to count for, whatever this machine has; by default what the trainer
            would take here.
        gpus: Numbers of GPUs to count for, separated by commas.
        measure_rate: Multiply matrices on this machine for some seconds, and give times at that rate.

    Raises:
        ModelError: If there is no configuration of the model on this machine.
        RecipeError: For a value that an option does not take.
    """
    counts = read_gpus(gpus)
    device = _device(accelerator or (None if gpus is None else "cuda"), cli.trainer.strategy.root_device.type)
    rates = _rates(device, cli.model.dtype_in_memory) if measure_rate else {}
    config, origin = _config(cli.model.source, config_json)
    options = settings_of_run(cli.trainer)  # what a preset stands for is filled in
    size = measure_config(config, None if options is None else options.targets)
    weights = cli.model.dtype_in_memory
    run = run_shape(cli.trainer, cli.model, cli.datamodule, weights=weights, stored=config.dtype or weights)
    items = on_host(estimate(size, run)) if device == "cpu" else estimate(size, run)
    lines = [
        f"Configuration: {origin}",
        *_counts(size, run),
        *_compression_line(options, run),
        "",
        _items_table(items),
        "",
        _adding(items),
        f"Tensors only; Python, libraries and the device's context come on top. The device is {device}"
        f"{', which is the host' if device == 'cpu' else ''}.",
        *remarks(cli.trainer, size, run),
    ]
    if not size.shared:
        lines.append("Layers that share an input could not be found; every one counts its own second moment.")
    lines += ["", *_work(size, run, (1,) if device == "cpu" else counts, rates)]
    if device != "cpu":
        lines += ["", *_by_gpus(size, run, counts)]
    return "\n".join(lines)


def without_devices(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's settings that any machine can make a trainer of: one process on the CPU. For a count on
    devices that are asked for, wherever they are; nothing that is counted depends on what is left out."""
    own = {key: value for key, value in (settings.get("trainer") or {}).items() if key not in _ON_DEVICES}
    return {**settings, "trainer": {**own, "accelerator": "cpu", "devices": 1}}


def read_gpus(text: str | None) -> tuple[int, ...]:
    """Numbers of GPUs from a text such as ``1,8,64``.

    Raises:
        RecipeError: If it is no such text.
    """
    if text is None:
        return _GPUS
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise RecipeError(f"option '--gpus': '{text}' is no list of numbers of GPUs; give one, such as 1,8,64")
    return tuple(sorted(set(found)))


def _device(asked: str | None, own: str) -> str:
    chosen = {"gpu": "cuda"}.get(asked or own, asked or own)
    if asked is not None and chosen not in _DEVICES:
        raise RecipeError(f"option '--accelerator': '{asked}' is unknown; choose one of {', '.join(_DEVICES)}")
    return chosen


def _counts(size: ModelSize, run: RunShape) -> list[str]:
    kept = kept_parameters(size, run.final_ratio)
    lines = [
        f"Whole model: {size.parameters:,} parameters; after compression {kept:,} at most "
        f"({kept / size.parameters:.4f})",
        f"Target matrices ({len(size.matrices)}): {size.target_parameters:,} parameters; kept at "
        f"keep_ratio={run.final_ratio}: {int(run.final_ratio * size.target_parameters):,} at most (the budget)",
    ]
    if size.experts:
        state = f"{size.expert_targets:,} matrices of them are targets" if size.expert_targets else "none is a target"
        lines.append(
            f"Experts: {size.expert_parameters:,} parameters in {len(size.experts)} fused tensors, {size.active} of "
            f"{max(count for count, _, _ in size.experts)} at work for a token; {state}"
        )
    lines.append(
        f"Counted for: weights of {run.weight_bytes} bytes in memory and {run.storage_bytes} on disk, batches of "
        f"{run.batch_size} x {run.block_size} tokens, {run.calibration_tokens:,} calibration tokens, one process"
    )
    return lines


def _adding(items: Sequence[Item]) -> str:
    found, sums = peaks(items), totals(items)
    told = []
    for place in PLACES[:2]:
        if place in found:
            stage = max((key for key in sums if key[1] == place), key=sums.__getitem__)[0]
            told.append(f"{place} {gibibytes(found[place])} ({stage})")
    text = "What is in one place in one stage adds up. Stages follow one another: the peak is the largest of them, "
    text += ", ".join(told)
    return text + f". What is written stays: disk {gibibytes(found['disk'])} in all." if "disk" in found else text + "."


def gemm_rate(device: str, dtype: torch.dtype, *, seconds: float = _RATE_SECONDS) -> float:
    """Floating-point operations per second of a product of square matrices on a device, measured: after one product,
    as many as fit in ``seconds``. The side is 4096, on a CPU 1024."""
    side = 1024 if device == "cpu" else 4096
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    left @ right
    wait()
    started, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds or not done:
        left @ right
        wait()
        done += 1
    return 2 * side**3 * done / spent


def _rates(device: str, weights: torch.dtype) -> dict[str, float]:
    """Measured rates by what is multiplied: ``weights`` and ``float64``."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "option '--measure_rate': there is no GPU here to measure; leave it out, or count for the cpu"
        )
    return {"weights": gemm_rate(device, weights), "float64": gemm_rate(device, torch.float64)}


def _work(size: ModelSize, run: RunShape, counts: Sequence[int], rates: Mapping[str, float]) -> list[str]:
    """Operations of each process by stage and number of processes, and their time at measured rates."""
    heads = [_named(count) for count in counts] if len(counts) > 1 or counts[0] > 1 else ["1 process"]
    rows = [["stage", "way", *heads]]
    # Streamed, a backward pass computes every block again from its inputs.
    again = run.calibration_tokens * token_flops(size, run.block_size) if run.backward else 0
    times = {"calibrate": 1, "feedback": run.rounds - 1}
    for stage, whole in stage_flops(size, run).items():
        ways = {"": [float(whole)] * len(counts)}
        if stage in COMPRESSED_STAGES:
            shared = [(whole + times.get(stage, 0) * again) / count for count in counts]
            ways = {"in memory": ways[""], "streamed": shared}
        rate = rates.get("float64" if stage == "factor" else "weights")
        rows += [[stage, way, *(_operations(count, rate) for count in each)] for way, each in ways.items()]
    lines = [
        "Floating-point operations of each process (multiplication and addition are two; factoring is in float64)",
        table(rows),
    ]
    if rates:
        told = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {_RATED[name]}" for name, rate in rates.items())
        lines.append(
            f"Times are at the rates just measured with large products ({told}): small products, decompositions, "
            "reading and sending come on top."
        )
    if run.recovery is not None and run.training_steps:
        lines.append(f"recover: {run.training_steps:,} batches in each process, whatever the number of processes.")
    return lines


def _by_gpus(size: ModelSize, run: RunShape, counts: Sequence[int]) -> list[str]:
    """Memory of each GPU and of each machine, by stage, way and number of GPUs."""
    found: dict[tuple[str, str], list[dict[Place, int]]] = {}
    for gpus in counts:
        for key, items in _ways(size, run, gpus).items():
            found.setdefault(key, []).append(
                {place: sum(i.bytes for i in items if i.place == place) for place in PLACES}
            )
    ordered = sorted(found.items(), key=lambda entry: STAGES.index(entry[0][0]))
    headings: dict[Place, str] = {
        "device": "Memory of each GPU",
        "host": f"Memory of each machine (one process for each GPU, at most {_PER_MACHINE})",
    }
    lines = []
    for place, heading in headings.items():
        rows = [["stage", "way", *(_named(count) for count in counts)]]
        for (stage, way), each in ordered:
            several = place == "host" and stage not in ("checkpoint", "export")  # which one process does
            together = [min(count, _PER_MACHINE) if several else 1 for count in counts]
            cells = [gibibytes(sums[place] * times) for sums, times in zip(each, together, strict=True)]
            if any(sums[place] for sums in each):
                rows.append([stage, way, *cells])
        lines += [heading, table(rows), ""]
    written = [(key, each[0]["disk"]) for key, each in ordered if each[0]["disk"]]
    seen = {stage: [way for (other, way), _ in written if other == stage] for (stage, _), _ in written}
    disk = [
        [stage, "" if stage == "recover" else way, gibibytes(count)]
        for (stage, way), count in written
        if stage != "recover" or way == seen[stage][0]  # checkpoints are as large, however they are shared out
    ]
    lines += ["Disk, whatever the number of GPUs", table([["stage", "way", "size"], *disk]), ""]
    lines.append(
        "in memory: every process has the model and does the same work. streamed: one block at a time, weights read "
        "from the files, text and matrices shared out. ZeRO 0 is DDP. Formulas: docs/scaling.md."
    )
    return lines


def _ways(size: ModelSize, run: RunShape, gpus: int) -> dict[tuple[str, str], list[Item]]:
    """Items by stage and way of doing it."""
    whole = estimate(size, replace(run, streamed=False))
    found: dict[tuple[str, str], list[Item]] = {}
    for item in whole:
        if item.stage != "recover":
            way = "in memory" if item.stage in COMPRESSED_STAGES else ""
            # DeepSpeed's processes write their pieces each, tensor by tensor.
            found.setdefault((item.stage, "ZeRO 0" if item.stage == "checkpoint" else way), []).append(item)
    for item in streamed(size, run, gpus):
        found.setdefault((item.stage, "streamed"), []).append(item)
    training = [item for item in whole if item.stage == "recover"]
    for zero in _ZERO if training else ():
        found["recover", f"ZeRO {zero}"] = over_gpus(training, size, run, gpus, zero)
    return found


def _named(gpus: int) -> str:
    return f"{gpus} GPU{'s' * (gpus > 1)}"


def _operations(count: float, rate: float | None) -> str:
    if rate is None:
        return f"{count:.2e}"
    seconds = count / rate
    unit, size = next(((u, s) for u, s in (("d", 86400), ("h", 3600), ("min", 60)) if seconds >= s), ("s", 1))
    return f"{count:.2e} ({seconds / size:.1f} {unit})"


def _compression_line(options: Settings | None, run: RunShape) -> list[str]:
    if options is None:
        return []
    passes = (
        "forward and backward passes of the whole model on the device"
        if run.backward and not run.streamed
        else f"{'forward and backward' if run.backward else 'forward'} passes, one block at a time on the device"
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
        carried = _carried(config_json)
        return _read_config(carried or Path(config_json)), (
            f"{config_json} (recipes/configs/{carried.name} of the package)" if carried else config_json
        )
    if isinstance(source, dict):
        return AutoConfig.for_model(**source), "model.model of the recipe"
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True), f"{source} (on this machine)"
    except Exception as error:  # a name that is not in the cache, a folder without a configuration: many kinds of error
        if carried := _carried(source):
            return _read_config(
                carried
            ), f"{source} (recipes/configs/{carried.name} of the package: it is not on this machine)"
        raise ModelError(
            f"model '{source}': no configuration on this machine; give its config.json with --config_json FILE"
        ) from error


def _carried(name: str) -> Path | None:
    """A configuration of the package, by the name of its file or of its model, if no such file is here."""
    if Path(name).exists():
        return None
    file = _CARRIED_CONFIGS.get(name, f"{name.removesuffix('.json')}.json")
    return recipes_folder() / "configs" / file if file in _CARRIED_CONFIGS.values() else None


def _read_config(file: Path) -> Any:
    from transformers import AutoConfig

    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(**{name: value for name, value in fields.items() if name != "_source"})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"configuration '{file}' cannot be read ({error}); give a config.json with model_type"
        ) from error
