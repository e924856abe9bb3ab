"""The memory of a run: estimated before it, and beside what was used after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lowrank_lit._tables import gibibytes, table
from lowrank_lit.callbacks._run_shape import measure_config, run_shape, settings_of_run
from lowrank_lit.errors import ModelError
from lowrank_lit.estimate import COMPRESSION, Item, Place, estimate, measured_peaks, on_host, totals
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.memory import Watch
from lowrank_lit.module import LowRankModule, model_of

_PLACES: tuple[Place, ...] = ("device", "host")
_COUNTS = {
    "estimated": "tensors alone, from shapes; libraries, fragmentation and work space come on top",
    "device": "largest sum of PyTorch's tensors on the device",
    "host": (
        "growth of this process's resident memory since the start of the fit, read 50 times a second; libraries loaded "
        "meanwhile and memory that was freed but not given back are in it"
    ),
}


class MemoryReport(pl.Callback):
    """Print the estimated peak of memory of each stage before a fit, and beside what was used after it.

    The estimate follows from shapes, see :mod:`lowrank_lit.estimate`; what the figures of use are: see
    :mod:`lowrank_lit.memory`. Stages are ``compress`` (calibration, feedback and factoring: the largest), ``refine``,
    ``reallocate``, ``recover`` (the training and its checkpoints), ``evaluate`` and ``export``. With several processes
    the figures are of the first.

    ``lightning run`` adds this callback to every recipe. In a list of callbacks it stands first, so that it sees the
    memory before the others do anything. Of a module that is no language model of transformers, or is compressed
    already, the training alone is estimated, without what it keeps for the backward pass. On a CUDA device PyTorch's
    peak (``torch.cuda.max_memory_allocated``) is reset where stages begin and end.

    Attributes:
        items: What was estimated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.items: list[Item] = []
        self._watch: Watch | None = None
        self._reported = False

    @property
    def largest(self) -> int:
        """Peak of PyTorch's tensors on a CUDA device since the fit began, 0 without one."""
        return 0 if self._watch is None else self._watch.largest

    def report_elsewhere(self) -> None:
        """Leave the end of the watch, and the table, to a callback that goes on when others are done: it calls
        :meth:`finish`."""
        self._reported = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to watch, and print the estimate."""
        if stage != "fit":
            return
        self._stop()
        self._reported = False
        self._watch = Watch(trainer.strategy.root_device)
        self._watch.start()
        self._say(trainer, _estimated(trainer, pl_module))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print what is known only now that there are optimizers, where nothing was known before."""
        if not self.items:
            self._say(trainer, training_items(pl_module.parameters(), pl_module.buffers(), trainer.optimizers))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The recovery begins."""
        if self._watch is not None:
            self._watch.enter("recover")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The recovery has ended, with all that is done when a training ends."""
        if self._watch is not None:
            self._watch.leave()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print what was used, unless it is reported elsewhere."""
        if stage == "fit" and not self._reported:
            self.finish(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Watch no longer."""
        self._stop()

    def record(self) -> dict[str, Any]:
        """Bytes so far, ready for JSON: ``stages`` {stage: {place: {``estimated``, ``used``}}}, null where there is
        none, and ``counts``, what is counted in words."""
        used: Mapping[tuple[str, str], int] = {} if self._watch is None else self._watch.used
        expected = measured_peaks(self.items)
        stages: dict[str, dict[str, dict[str, int | None]]] = {}
        for stage in (COMPRESSION, "reallocate", "refine", "recover", "evaluate", "export"):
            for place in _PLACES:
                pair = {"estimated": expected.get((stage, place)), "used": used.get((stage, place))}
                if any(value is not None for value in pair.values()):
                    stages.setdefault(stage, {})[place] = pair
        return {"stages": stages, "counts": dict(_COUNTS)}

    def finish(self, trainer: pl.Trainer) -> None:
        """Watch no longer, and print the table."""
        if self._watch is None:
            return
        self._stop()
        rows = [["stage", "where", "estimated", "used"]]
        for stage, places in self.record()["stages"].items():
            for place, pair in places.items():
                rows.append([stage, place, _size(pair["estimated"]), _size(pair["used"], "not measured")])
        if len(rows) > 1:
            places = [place for place in _PLACES if any(row[1] == place for row in rows)]
            counts = "; ".join(f"used, {place}: {_COUNTS[place]}" for place in places)
            trainer.print(f"\nMemory, estimated and used\n{table(rows)}\nestimated: {_COUNTS['estimated']}; {counts}.")

    def _say(self, trainer: pl.Trainer, items: Iterable[Item]) -> None:
        same = trainer.strategy.root_device.type == "cpu"
        self.items = on_host(items) if same else list(items)
        sums = totals(self.items)
        stages = dict.fromkeys(item.stage for item in self.items)
        places = [place for place in _PLACES if any(item.place == place for item in self.items)]
        rows = [["stage", *places]]
        rows += [[stage, *(_size(sums.get((stage, place))) for place in places)] for stage in stages]
        if len(rows) > 1:
            where = "the device is the host" if same else f"the device is {trainer.strategy.root_device}"
            trainer.print(f"Memory, estimated ({where})\n{table(rows)}\n{_COUNTS['estimated']}.")

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.stop()


def _estimated(trainer: pl.Trainer, module: pl.LightningModule) -> list[Item]:
    """Items of a run of a dense language model, none where it is something else."""
    config = _config(module)
    if config is None:
        return []
    weights = module.dtype_in_memory if isinstance(module, LowRankModule) else _dtype(module)
    settings = settings_of_run(trainer)
    data = getattr(trainer, "datamodule", None)
    shape = run_shape(trainer, module, data, weights=weights, stored=config.dtype or weights)
    try:
        return estimate(measure_config(config, None if settings is None else settings.targets), shape)
    except (ModelError, ValueError):  # said by the compression, in its own words; or a model that predicts no tokens
        return []


def _config(module: pl.LightningModule) -> Any:
    """The configuration of a dense language model, without loading it; None for anything else."""
    loaded: Any = model_of(module)
    if loaded is not module:
        config = loaded.config
    elif isinstance(module, LowRankModule):
        config = _source_config(module.source)
    else:
        return None
    dense = not any(isinstance(part, FactoredLayer) for part in loaded.modules())
    return config if dense and getattr(config, "quantization_config", None) is None else None


def _source_config(source: str | dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source) if isinstance(source, str) else AutoConfig.for_model(**source)
    except Exception:  # of many kinds; the module says in its own words what is wrong, when it is loaded
        return None


def _dtype(module: pl.LightningModule) -> torch.dtype:
    return next(model_of(module).parameters()).dtype


def _size(count: int | None, missing: str = "") -> str:
    return missing if count is None else gibibytes(count)


def training_items(
    parameters: Iterable[Tensor], buffers: Iterable[Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> list[Item]:
    """What the training of any module takes, from the module itself: everything but what is kept for the backward pass.

    Args:
        parameters: Of the module, each once.
        buffers: Of the module.
        optimizers: Of them, those of Adam's kind are known to have two moments of each number; others count nothing.
    """
    own = list(parameters)
    weights = sum(tensor.nbytes for tensor in (*own, *buffers))
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    moments = sum(
        2 * parameter.nbytes for optimizer, group in groups if _is_adam(optimizer) for parameter in group["params"]
    )
    gradients = sum(parameter.nbytes for parameter in own if parameter.requires_grad)
    found = {"weights": weights, "gradients": gradients, "moments of Adam's kind": moments}
    return [Item("recover", "device", what, count) for what, count in found.items() if count]


def _is_adam(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam))
