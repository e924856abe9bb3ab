"""Trainer, model and data of a recipe, made by Lightning's own command line class."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lowrank_lit._settings import callback_entry, one_line, short
from lowrank_lit.callbacks.memory import MemoryReport
from lowrank_lit.callbacks.resume import ExactResume
from lowrank_lit.data import TextDataModule
from lowrank_lit.errors import LowRankError, RecipeError
from lowrank_lit.module import LowRankModule

_EPILOG = (
    "One argument of a callback in the recipe: --CALLBACK.ARGUMENT=VALUE, as in --LowRankCompression.keep_ratio=0.8; "
    "what a callback takes: RECIPE --CALLBACK.help. One more callback: --trainer.callbacks+=CALLBACK."
)


class RecipeCLI(LightningCLI):
    """Lightning's command line class for one recipe; nothing is run by it.

    Args:
        settings: Settings of a recipe, overrides applied and checked.
        flags: What the parser itself answers: ``--help``, ``--print_config``, ``--trainer.callbacks.help=CLASS``.
    """

    def __init__(self, settings: dict[str, Any], flags: Iterable[str] = ()) -> None:
        # JSON is YAML in which no string can be taken for a number.
        super().__init__(
            LowRankModule,
            TextDataModule,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={
                "exit_on_error": False,
                "prog": "lowrank-lit run RECIPE",
                "description": "Runs a recipe; every setting of it can be overridden.",
                "epilog": _EPILOG,
            },
            trainer_defaults={} if callback_entry(settings, "ExactResume") else {"callbacks": [ExactResume()]},
            args=["--config", json.dumps(settings, ensure_ascii=False), *flags],
            run=False,
            auto_configure_optimizers=False,
        )
        if not callback_entry(settings, "MemoryReport"):
            self.trainer.callbacks.insert(0, MemoryReport())  # type: ignore[attr-defined]  # before all others

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what belongs to the run and to none of its three parts."""
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Checkpoint to continue from: a file, or 'last'."
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses ``args`` alone: what stands on the command line of the process has been dealt with."""
        self.config = parser.parse_args(args)


def build(path: Path, settings: dict[str, Any], flags: Iterable[str] = ()) -> RecipeCLI:
    """Trainer, model and data of checked settings, with the seed set.

    Raises:
        RecipeError: For a value of the wrong type, or one that the class it belongs to refuses.
    """
    try:
        return RecipeCLI(settings, flags)
    except LowRankError:
        raise
    except argparse.ArgumentError as error:
        raise RecipeError(f"{path}: {short(error.message or str(error))}") from error
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{path}: {one_line(str(error))}") from error
