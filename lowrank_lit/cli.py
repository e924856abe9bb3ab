"""The command line: ``lightning run RECIPE.yaml`` and ``lowrank-lit COMMAND RECIPE.yaml``.

Importing this module is cheap: torch and Lightning are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowrank_lit._recipes import carried, carried_recipes, find_recipe, nearest
from lowrank_lit._scripts import forward
from lowrank_lit.errors import LowRankError, RecipeError

_USAGE = """usage: lowrank-lit COMMAND RECIPE [--KEY=VALUE ...] [--debug]

Low-rank compression of language models with PyTorch Lightning.

  run       the whole recipe: calibrate, allocate, factor, recover, evaluate, export, report
  compress  the recipe without recovery
  evaluate  perplexity, accuracy and speed of the dense and of the exported model
  export    a Lightning checkpoint as a Hugging Face folder
  convert   the same without a recipe, also of a folder of DeepSpeed's: CHECKPOINT --model MODEL --output FOLDER
  plan      ranks of every matrix and the predicted loss; with --dry-run counts, memory and disk from the configuration
  report    the page of a run again, from the record in its FOLDER
  sweep     perplexity over metrics, allocators, keep ratios and presets, from one calibration pass per draw; with
            --laser over cuts of one matrix at a time
  diagnose  spectra, importance, predicted and measured loss of every matrix, head and tail, intruder dimensions
  doctor    versions, device and who answers to `lightning`

RECIPE is a path or one of: {recipes}
Every setting of a recipe is an option: --trainer.max_steps=20 --LowRankCompression.keep_ratio=0.8
`lowrank-lit run --help` lists them; `lowrank-lit COMMAND --help` explains a command. --debug shows tracebacks.
`lightning run RECIPE` is the same as `lowrank-lit run RECIPE`."""


def _axis(default: str, remark: str = "") -> dict[str, Any]:
    text = f"one or several, separated by commas or the option repeated{remark and f'; {remark}'} (default: {default})"
    return {"action": "append", "metavar": "NAMES", "help": text}


_COMMANDS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "run": ("Runs a recipe.", {}),
    "compress": (
        "Calibrates, allocates, factors and exports; RankPreservingLoRA is left out, nothing is trained.",
        {},
    ),
    "evaluate": (
        "Measures the recipe's dense model and an exported folder alike: perplexity and divergence, "
        "accuracy and speed where asked for. Prints both in one table and writes evaluation.json and evaluation.md to "
        "trainer.default_root_dir. What the figures count: docs/evaluation.md.",
        {
            "--path": {"help": "exported folder (default: where the recipe's ExportOnFitEnd writes)"},
            "--text": _axis("the recipe's data.sources.test", "files or hub:NAME:SPLIT to measure perplexity on"),
            "--protocol": {
                "choices": ("blocks", "sliding"),
                "default": "blocks",
                "help": "of the perplexity: blocks of data.block_size, or a window of that size that slides "
                "(default: blocks)",
            },
            "--stride": {
                "type": int,
                "metavar": "N",
                "help": "with --protocol sliding: tokens from one window to the next (default: half of a window)",
            },
            "--bos": {
                "choices": ("none", "prepend"),
                "default": "none",
                "help": "whether the tokenizer's BOS comes before every window and every query (default: none)",
            },
            "--no-divergence --no_divergence": {
                "action": "store_true",
                "help": "leave out the divergence from the dense model, for which both models are held at once",
            },
            "--multiple_choice --multiple-choice": _axis("none", "files of lines with query, choices, gold"),
            "--delimiter": {
                "default": " ",
                "metavar": "TEXT",
                "help": "between query and choice where no white space stands there (default: a space)",
            },
            "--throughput": {
                "nargs": "?",
                "const": "1,8",
                "metavar": "BATCH_SIZES",
                "help": "time prefill and decode at these batch sizes (without a value: 1,8)",
            },
            "--tasks": _axis("none", "tasks of lm-evaluation-harness, names or YAML files"),
            "--limit": {
                "type": int,
                "metavar": "N",
                "help": "questions of each file and examples of each task, from the start (default: all)",
            },
        },
    ),
    "export": (
        "Writes a Lightning checkpoint of the recipe as a Hugging Face folder.",
        {
            "--ckpt_path": {
                "help": "checkpoint (default: last.ckpt, else the newest, of the recipe's checkpoint folders)"
            },
            "--path": {
                "help": "folder to write (default: where the recipe's ExportOnFitEnd writes; for another format than "
                "lowrank that name with -FORMAT at its end)"
            },
            "--format": {
                "default": "lowrank",
                "metavar": "NAME",
                "help": "lowrank (default; loads after `import lowrank_lit`), dense (products multiplied out, an "
                "ordinary model), trust-remote-code (factored, with its own code: no package needed), lowrankarena "
                "(lowrank with a record of ratios and perplexities)",
            },
        },
    ),
    "plan": (
        "Calibrates and allocates, prints the rank of every matrix and the predicted loss against the keep ratio, and "
        "writes plan.json, prediction.json and prediction.png; the model stays as it is.",
        {
            "--dry-run": {
                "action": "store_true",
                "help": "reads no weights and no text: parameters, memory of each stage, disk, from the configuration",
            },
            "--config_json": {
                "metavar": "FILE_OR_NAME",
                "help": "with --dry-run: the model's config.json, where it is not on this machine, or the name of one "
                "that the package carries, such as llama-3-70b",
            },
            "--accelerator": {
                "metavar": "cuda|cpu",
                "help": "with --dry-run: what to count for, whatever is here (default: what the recipe takes here)",
            },
            "--gpus": {"metavar": "N,N", "help": "with --dry-run: numbers of GPUs to count for, such as 1,8,64"},
            "--measure-rate --measure_rate": {
                "action": "store_true",
                "help": "with --dry-run: multiply matrices here for four seconds, and show times at that rate",
            },
            "--path": {"help": "file to write (default: plan.json in trainer.default_root_dir)"},
        },
    ),
    "sweep": (
        "Measures one-shot compression over a grid: every metric with every allocator, feedback and storage in closed "
        "form, and whole presets, at every keep ratio. One calibration pass per draw of the calibration text serves "
        "all cells. Perplexities are measured with the truncated weights in the dense model's layers. Each finished "
        "cell is kept in cells.jsonl at once: a second run of the same command, or of a larger grid, measures what is "
        "missing. Writes sweep.csv, sweep.md and sweep.png. Targets, rank floor, damping and the like are the "
        "recipe's. The exit code is 1 if a cell failed.",
        {
            "--metric": _axis("input,two_sided"),
            "--allocator": _axis("uniform,unirank,knapsack"),
            "--keep-ratio --keep_ratio": _axis("0.8,0.6,0.4"),
            "--feedback": _axis("none"),
            "--storage": _axis("factored", "also of presets"),
            "--preset": _axis("best; none where a metric, allocator or feedback is named"),
            "--seeds": {
                "type": int,
                "default": 3,
                "metavar": "N",
                "help": "draws of the calibration text: the recipe's own, and N - 1 at random (default: 3)",
            },
            "--split": {
                "choices": ("test", "validation"),
                "default": "test",
                "help": "text to measure on: test to report, validation to choose settings by (default: test)",
            },
            "--laser": {
                "action": "store_true",
                "help": "instead of the grid: cut one matrix at a time to a share of its rank, by plain SVD or one "
                "--metric, all others dense (LASER); writes laser.json, laser.md and laser.png",
            },
            "--keep-share --keep_share": _axis("0.8,0.6,0.4,0.2,0.1,0.05", "with --laser: shares of the full rank"),
            "--path": {
                "help": "folder to write (default: sweep in trainer.default_root_dir, with --laser laser there)"
            },
        },
    ),
    "diagnose": (
        "Tells where a compression loses what it loses: of every matrix its spectrum, importance, kept energy, "
        "predicted loss, and the loss measured with it alone cut; outputs and losses of head and tail of the weights; "
        "with exported folders intruder dimensions, and where the update of the recovery lies. Writes "
        "diagnostics.json, diagnostics.md and pictures. What the figures are: docs/diagnostics.md.",
        {
            "--plan": {
                "metavar": "FILE",
                "help": "plan.json whose ranks to diagnose (default: those of --compressed, else a new plan by the "
                "recipe's settings)",
            },
            "--split": {
                "choices": ("validation", "calibration", "test"),
                "default": None,
                "help": "text to measure on (default: validation if the recipe has it, else calibration)",
            },
            "--head": {
                "type": float,
                "metavar": "SHARE",
                "help": "share of the full rank that is the head of every matrix (default: the plan's ranks)",
            },
            "--compressed": {"metavar": "FOLDER", "help": "exported folder of the compression, before recovery"},
            "--recovered": {
                "metavar": "FOLDER",
                "help": "with --compressed: exported folder after recovery, or the record of the merge (unmerge/)",
            },
            "--threshold": {
                "type": float,
                "default": 0.5,
                "metavar": "COSINE",
                "help": "an intruder's absolute cosine with every singular vector of the base is below this "
                "(default: 0.5)",
            },
            "--top": {
                "type": int,
                "default": 10,
                "metavar": "N",
                "help": "singular vectors of each matrix to look at for intruders (default: 10)",
            },
            "--path": {"help": "folder to write (default: diagnostics in trainer.default_root_dir)"},
        },
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """``lowrank-lit``; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        argv: Arguments without the program's name; the process's own by default.
    """
    return _guarded(_command, sys.argv[1:] if argv is None else argv)


def lightning_main(argv: Sequence[str] | None = None) -> int:
    """``lightning``: ``run RECIPE`` is ours, everything else goes to Lightning's own command line.

    The package ``lightning-sdk`` installs a script of the same name, and the one installed last wins; ``lowrank-lit run
    RECIPE`` works in either case, and ``lowrank-lit doctor`` says which it is. Arguments and exit codes as for
    :func:`main`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    plain = [argument for argument in arguments if argument != "--debug"]
    if _is_recipe_run(plain):
        return main(arguments)
    return _guarded(lambda rest: forward(rest), arguments)


def _is_recipe_run(arguments: Sequence[str]) -> bool:
    if len(arguments) < 2 or arguments[0] != "run":
        return False
    name = arguments[1]
    # A name that is no file and nearly that of a recipe is a slip, which the other command line would not understand.
    slip = not Path(name).exists() and nearest(name, list(carried_recipes())) is not None
    return name.endswith((".yaml", ".yml")) or carried(name) is not None or slip


def _guarded(command: Callable[[list[str]], int], argv: Sequence[str]) -> int:
    """Run a command; what the user can mend becomes one line on stderr and exit code 2."""
    debug = "--debug" in argv
    try:
        return command([argument for argument in argv if argument != "--debug"])
    except LowRankError as error:
        return _fail(str(error), debug)
    except OSError as error:
        return _fail(_explain(error), debug)
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's own way of stopping
            return _interrupted()
        if "SIGTERMException" in _kinds(stop):  # Lightning's too, and it has no code: it would pass for success
            print("terminated", file=sys.stderr)
            return 143
        if stop.code is None or isinstance(stop.code, int):  # who exits with a number has printed why
            return int(stop.code or 0)
        return _fail(str(stop.code), debug)
    except Exception as error:
        # Lightning's and torch's classes are looked up only now: the command may never have imported them.
        reason = _foreign(error)
        if reason is None:
            raise
        return _fail(reason, debug)


def _fail(message: str, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    rank = os.environ.get("LOCAL_RANK")
    prefix = f"[process {rank}] " if rank not in (None, "0") else ""
    print(f"{prefix}error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130


def _explain(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk{where}; free some, or set trainer.default_root_dir to another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}; set trainer.default_root_dir to a folder that you may write to"
    return f"{type(error).__name__}: {error}"


def _kinds(error: BaseException) -> set[str]:
    """Names of an error's classes, for those of libraries that may not be imported."""
    return {cls.__name__ for cls in type(error).__mro__}


def _foreign(error: Exception) -> str | None:
    """One line for an error of Lightning or torch that a setting can mend; None for a mistake in the program."""
    kinds = _kinds(error)
    if "MisconfigurationException" in kinds:
        return str(error)
    if kinds & {"DistNetworkError", "DistStoreError"}:  # while processes look for each other, by another strategy
        from lowrank_lit.distributed import unreached

        return str(unreached(error))
    if "OutOfMemoryError" in kinds or "not enough memory" in str(error) or isinstance(error, MemoryError):
        return f"out of memory; lower data.batch_size or data.block_size ({str(error).partition(chr(10))[0]})"
    return None


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE.format(recipes=", ".join(carried_recipes())))
        return 0
    if argv[0] == "--version":
        from lowrank_lit._version import __version__

        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name == "doctor":
        from lowrank_lit._stages import doctor

        return doctor()
    if name == "convert":
        return _convert(rest)
    if name == "report":
        return _report(rest)
    if name not in _COMMANDS:
        known = [*_COMMANDS, "convert", "doctor", "report"]
        close = nearest(name, known)
        hint = f"did you mean '{close}'?" if close else f"choose one of {', '.join(known)}"
        raise RecipeError(f"unknown command '{name}'; {hint}")
    return _recipe_command(name, rest)


def _recipe_command(name: str, arguments: list[str]) -> int:
    description, options = _COMMANDS[name]
    parser = _OneLineParser(
        prog=f"lowrank-lit {name}",
        usage=f"lowrank-lit {name} RECIPE [options] [--KEY=VALUE ...]",
        description=description,
        epilog="Settings that --KEY=VALUE overrides: lowrank-lit run --help",
        allow_abbrev=False,
        add_help=name != "run",  # the settings of a run are explained by the parser that reads them
    )
    for option, keywords in options.items():
        parser.add_argument(*option.split(), **keywords)
    recipe = arguments[0] if arguments and not arguments[0].startswith("-") else None
    known, rest = parser.parse_known_args(arguments[1:] if recipe else arguments)
    if recipe is None and not (name == "run" and set(rest) & {"-h", "--help"}):
        raise RecipeError(f"`lowrank-lit {name}` needs a recipe as its first argument: lowrank-lit {name} RECIPE.yaml")
    path = find_recipe(recipe) if recipe else None
    overrides, flags = _split(rest)
    from lowrank_lit import _stages

    return _stages.STAGES[name](path, overrides, flags, **vars(known))


def _convert(arguments: list[str]) -> int:
    parser = _OneLineParser(
        prog="lowrank-lit convert",
        description="Writes a checkpoint as a Hugging Face folder: adapters merged, a folder of DeepSpeed's gathered, "
        "whatever number of processes wrote it. Ranks and adapters are read from the checkpoint. The parts of a "
        "checkpoint of ZeRO stage 3 are pickles: convert none that you do not trust.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="file or folder that ModelCheckpoint wrote")
    parser.add_argument("--model", required=True, help="folder or hub name of the model that the run began with")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the stored weights (default: auto, that of the model)",
    )
    known = vars(parser.parse_args(arguments))
    from lowrank_lit._convert import convert

    return convert(known.pop("checkpoint"), **known)


def _report(arguments: list[str]) -> int:
    parser = _OneLineParser(
        prog="lowrank-lit report",
        description="Makes report.html again from the record.json of a run; nothing is measured.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="where RankReport wrote")
    folder = parser.parse_args(arguments).folder
    from lowrank_lit.html import page_of_folder

    print(page_of_folder(folder))
    return 0


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise RecipeError(f"{self.prog}: {message}")


def _split(arguments: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Overrides (name, text of the value), and the flags that Lightning's parser answers itself."""
    overrides: list[tuple[str, str]] = []
    flags: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument[2:].partition("=")
        if argument in ("-h", "--help"):
            flags.append("--help")
        elif not argument.startswith("--") or not name:
            raise RecipeError(f"unexpected argument '{argument}'; a setting is written --KEY=VALUE")
        elif name == "print_config":
            flags.append(argument)
        elif name in ("config", "c"):
            raise RecipeError("option '--config' is not used here: the recipe is the first argument")
        elif name.endswith(".help"):
            flags.append(argument if equals or not rest or rest[0].startswith("--") else f"{argument}={rest.pop(0)}")
        elif equals:
            overrides.append((name, value))
        elif rest and not rest[0].startswith("--"):
            overrides.append((name, rest.pop(0)))
        else:
            raise RecipeError(f"option '--{name}' needs a value: --{name}=VALUE")
    return overrides, flags


if __name__ == "__main__":
    sys.exit(main())
