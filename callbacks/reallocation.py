"""Progressive re-allocation of ranks during a fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lowrank_lit.allocation import budget_of, check_keep_ratio
from lowrank_lit.cache import load_compression, save_compression
from lowrank_lit.callbacks._shared import calibration_of, callbacks_of, find_callback, forget
from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.callbacks.export import ExportOnFitEnd, refuse_sharded
from lowrank_lit.callbacks.recovery import FactorTuning, RankPreservingLoRA
from lowrank_lit.callbacks.refinement import Refinement
from lowrank_lit.collection import require_finite_weights
from lowrank_lit.compress import CompressionResult, fingerprint
from lowrank_lit.distillation import counted_positions
from lowrank_lit.errors import BudgetError, LowRankError, ModelError, PlanError
from lowrank_lit.experts import ExpertsApart
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.masks import MaskedModel, factor_fully, mask_layers, plan_of_cut, whole_plan
from lowrank_lit.memory import stage as memory_stage
from lowrank_lit.module import model_of
from lowrank_lit.plan import RankPlan
from lowrank_lit.reallocation import (
    check_schedule,
    choose_components,
    load_sums,
    scheduled_ratio,
    share_sums,
    sums_to_dict,
)
from lowrank_lit.settings import MIN_RANK, Settings
from lowrank_lit.streaming import real_positions
from lowrank_lit.surgery import count_parameters, find_targets

_OTHER_RUN = (
    "the checkpoint's re-allocation began from another model or calibration text; resume with the recipe that made it"
)


class RankReallocation(pl.Callback):
    """Lower the budget while the model trains, and share the ranks out anew each time.

    Every target matrix is factored at its whole rank (one that a LowRankCompression listed before has factored, at the
    rank that it has), and its components get a mask. From step ``begin`` to ``end``, every ``every`` steps, the budget
    follows the schedule from what the model stores down to ``keep_ratio``; all components are scored on the factors and
    the text of the last steps (:mod:`lowrank_lit.reallocation`), at no extra pass, and the best that the budget pays
    for are on. One that was off may come back. When the fit ends the model is cut to what is on; a matrix whose
    factors would store no less is one dense matrix again. Shapes never change before that, so the fit runs under DDP
    and DeepSpeed's ZeRO stages 1 and 2.

    List it after LowRankCompression, and before callbacks that choose what trains (RankPreservingLoRA) and those that
    want the final model (ExportOnFitEnd, RankReport). Adapters are merged before the model is cut. A Refinement chooses
    among the states after the last move of the masks.

    The factors of the whole matrices are kept in the trainer's root folder (``reallocation/``), so that a resumed run
    does not calibrate again. A checkpoint holds masks, averages and steps. With several processes it holds the averages
    of one, equal to the others' as of the last re-allocation.

    Args:
        keep_ratio: Share of the target matrices' parameters to keep in the end, in (0, 1].
        begin: Optimizer step at which the budget begins to fall.
        end: Optimizer step at which it reaches ``keep_ratio``; by default at 60 % of the run.
        every: Steps from one re-allocation to the next.
        schedule: ``cubic`` or ``linear``, see :func:`lowrank_lit.reallocation.scheduled_ratio`.
        decay: What of the running sums is left after a step, in [0, 1).
        min_rank: Least rank of a matrix.
        quantum: Ranks are multiples of this, or the matrix is dense.
        targets: Shell patterns of layer names; by default what LowRankCompression has chosen, or would choose.
        batches: Calibration batches for the first factors; by default those of LowRankCompression, else the
            datamodule's ``calibration_batches()``, else rows of what the fit trains on.

    Attributes:
        masked: The masked layers, from ``setup`` on.
        history: One entry per re-allocation: ``step``, ``keep_ratio`` as scheduled, ``stored``, ``removed``,
            ``returned``.
        plan: The ranks in the end, None before.

    Raises:
        LowRankError: A child of it at setup, for a schedule that does not fit the run, a target that is no smaller than
            what the model stores, a callback in the wrong place, or a strategy that splits the weights.
    """

    def __init__(
        self,
        keep_ratio: float = 0.6,
        *,
        begin: int = 0,
        end: int | None = None,
        every: int = 10,
        schedule: str = "cubic",
        decay: float = 0.9,
        min_rank: int = MIN_RANK,
        quantum: int = 1,
        targets: list[str] | None = None,
        batches: Sequence[Any] | None = None,
    ) -> None:
        super().__init__()
        check_keep_ratio(keep_ratio)
        if not 0 <= decay < 1:
            raise LowRankError(
                f"decay={decay} is outside [0, 1); it is what is left of a sum after a step, such as 0.9"
            )
        self.keep_ratio = keep_ratio
        self.begin = begin
        self.end = end
        self.every = every
        self.schedule = schedule
        self.decay = decay
        self.floors = {"min_rank": min_rank, "quantum": quantum}
        self.targets = targets
        self.batches = batches
        self.masked: MaskedModel | None = None
        self.history: list[dict[str, Any]] = []
        self.plan: RankPlan | None = None
        self._identity = ""
        self._first = 1.0
        self._last = 0
        self._seen = 0

    @property
    def state_key(self) -> str:
        """The same for every policy: a checkpoint is read by this name."""
        return "RankReallocation"

    def should_reallocate(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether to re-allocate after optimizer step ``step``; override it for another policy.

        Whatever it says, the budget is at the target from step ``end`` on. It has to say the same on every process.
        """
        return self.begin < step <= self._last and ((step - self.begin) % self.every == 0 or step == self._last)

    def check(self, trainer: pl.Trainer, fingerprint: str) -> None:
        """Refuse, before LowRankCompression computes anything, a schedule or a target that cannot be met."""
        _check_callbacks(trainer, self)
        _last_step(trainer, self)
        compression = find_callback(trainer, LowRankCompression)
        kept = 1.0 if compression is None else float(compression.settings()["keep_ratio"])
        if kept <= self.keep_ratio:
            raise _no_way_down(self.keep_ratio, kept)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Mask the model before the optimizers are made, unless an interrupted fit has left it masked."""
        if stage != "fit":
            return
        pl_module.configure_model()  # idempotent; Lightning calls it after this hook
        self._last = _last_step(trainer, self)
        model = model_of(pl_module)
        if self.masked is None or self.masked.model is not model or not self.masked.layers:
            _check_callbacks(trainer, self)
            with isolate_rng():  # what follows is the same whether the factors are computed or taken from disk
                self.masked, self.history, self.plan = _mask(trainer, model, self), [], None
            self._first = _first_ratio(self.masked, self.keep_ratio)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to watch, on the device that the model is on by now."""
        self._seen = trainer.global_step
        if self.masked is not None:
            self.masked.watch()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the sums decay, and tell them which tokens of the batch are padding."""
        assert self.masked is not None
        accumulated = trainer.accumulate_grad_batches
        mask, share = _counted(batch)
        for sums in self.masked.sums.values():
            sums.decay(self.decay ** (1 / accumulated))
            sums.mask, sums.scale = mask, accumulated * share

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Re-allocate after an optimizer step, where the policy says so."""
        step, before = trainer.global_step, self._seen
        self._seen = step
        due = before < self._last <= step and self._is_over()
        if step != before and (due or self.should_reallocate(trainer, step)):
            self._reallocate(trainer, self._scheduled(step))
            pl_module.log("lowrank/keep_ratio", self.history[-1]["stored"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that the budget is kept where training stopped early."""
        assert self.masked is not None
        if self._is_over():
            self._reallocate(trainer, self.keep_ratio)
        self.masked.unwatch()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the recovery end first, wherever it is listed, and cut the model."""
        for callback in callbacks_of(trainer):
            if isinstance(callback, (RankPreservingLoRA, FactorTuning, Refinement)):
                callback.on_fit_end(trainer, pl_module)  # merges what is left, and thaws; a second time does nothing
        if self.masked is not None and self.masked.layers:
            before, whole = _plan_before(trainer), list(self.masked.model.parameters())
            self.plan = plan_of_cut(self.masked.shrink(), self.keep_ratio, before, self.history)
            left = set(map(id, self.masked.model.parameters()))
            whole = [parameter for parameter in whole if id(parameter) not in left]
            forget(trainer, whole)
            _publish(trainer, pl_module, self, self.plan)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching; the masks stay, and the next fit goes on from them."""
        if self.masked is not None:
            self.masked.unwatch()

    def state_dict(self) -> dict[str, Any]:
        """What the masks in the model's weights do not tell: ``layout`` (rank by layer), ``floors`` and ``keep_ratio``
        to make the masked model again, ``fingerprint`` of what it was made of, ``sums``, ``first`` and ``history`` to
        go on; ``plan`` alone once the model has been cut."""
        if self.plan is not None:
            return {"plan": self.plan.to_dict()}
        if self.masked is None:
            return {}
        return {
            "fingerprint": self._identity,
            "layout": {name: layer.rank for name, layer in self.masked.layers.items()},
            "floors": self.floors,
            "keep_ratio": self.keep_ratio,
            "sums": sums_to_dict(self.masked.sums),
            "first": self._first,
            "history": self.history,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take sums and history of the run that is resumed.

        Raises:
            PlanError: If they are of another target, model or calibration text, other layers or ranks.
        """
        if self.masked is None or "sums" not in state_dict:
            return
        if state_dict["fingerprint"] != self._identity:
            raise PlanError(_OTHER_RUN)
        if state_dict["keep_ratio"] != self.keep_ratio:
            raise PlanError(
                f"the checkpoint is on its way to keep_ratio={state_dict['keep_ratio']} and RankReallocation to "
                f"{self.keep_ratio}; resume with the recipe that made it"
            )
        load_sums(self.masked.sums, state_dict["sums"])
        self.history, self._first = list(state_dict["history"]), state_dict["first"]

    def _is_over(self) -> bool:
        assert self.masked is not None
        return self.masked.stored > budget_of(self.masked.specs, self.keep_ratio)

    def _scheduled(self, step: int) -> float:
        return scheduled_ratio(
            step, begin=self.begin, end=self._last, first=self._first, last=self.keep_ratio, schedule=self.schedule
        )

    def _reallocate(self, trainer: pl.Trainer, keep_ratio: float) -> None:
        assert self.masked is not None
        share_sums(
            list(self.masked.sums.values()),
            lambda total: trainer.strategy.reduce(total, reduce_op="sum"),
            trainer.world_size,
        )
        moved = self.masked.move(choose_components(self.masked.specs, self.masked.scores(), keep_ratio))
        for callback in callbacks_of(trainer):
            if isinstance(callback, Refinement):
                callback.forget(trainer.global_step)
        entry = {"step": trainer.global_step, "keep_ratio": keep_ratio, "stored": self.masked.keep_ratio, **moved}
        self.history.append(entry)


def _check_callbacks(trainer: pl.Trainer, own: RankReallocation) -> None:
    refuse_sharded(trainer, "RankReallocation")
    callbacks = callbacks_of(trainer)
    place = callbacks.index(own)
    for callback in callbacks:
        if isinstance(callback, RankPreservingLoRA) and callback.quantize is not None:
            raise ModelError(
                f"RankPreservingLoRA.quantize='{callback.quantize}' rotates the components, which RankReallocation "
                "scores one by one; leave quantize out, or quantise in a run of its own"
            )
    for callback in callbacks[:place]:
        if isinstance(callback, ExportOnFitEnd):
            raise ModelError("ExportOnFitEnd writes the model before it is cut; list it after RankReallocation")
    for callback in callbacks[place:]:
        if isinstance(callback, LowRankCompression):
            raise ModelError("RankReallocation starts from the compressed model; list LowRankCompression before it")


def _last_step(trainer: pl.Trainer, own: RankReallocation) -> int:
    """The step at which the budget has fallen, after a check of the schedule against the run."""
    steps = float(trainer.estimated_stepping_batches)
    if own.end is None and steps == float("inf"):
        raise LowRankError("end is not set and the run has no end; set end, or trainer.max_steps")
    end = max(own.begin + 1, int(0.6 * steps)) if own.end is None else own.end
    check_schedule(own.begin, end, own.every, own.schedule, steps)
    return end


def _first_ratio(masked: MaskedModel, target: float) -> float:
    """What the schedule starts from, after a check that there is a way down."""
    budget_of(masked.specs, target)
    first = masked.keep_ratio
    if first <= target:
        raise _no_way_down(target, first)
    return first


def _no_way_down(target: float, first: float) -> BudgetError:
    return BudgetError(
        f"keep_ratio={target} of RankReallocation is no less than the {first:.4f} that the model stores when the fit "
        "begins; choose a smaller one, or compress less before"
    )


def _mask(trainer: pl.Trainer, model: nn.Module, own: RankReallocation) -> MaskedModel:
    """Factor every target at its whole rank, from disk where an earlier run has done so, and mask it."""
    with ExpertsApart(model) as apart:
        names = _names(trainer, model, own)
        masked = _mask_names(trainer, model, own, names)
        apart.keep(names)
    return masked


def _mask_names(trainer: pl.Trainer, model: nn.Module, own: RankReallocation, names: list[str]) -> MaskedModel:
    require_finite_weights(model)
    compression = find_callback(trainer, LowRankCompression)
    given = (own.batches, None if compression is None else compression.batches)
    batches, loss = calibration_of(trainer, "RankReallocation", *given, targets=own.targets)
    before = {name: model.get_submodule(name) for name in names}
    identity = own._identity = fingerprint(model, batches, Settings(1.0, preset="fast", targets=names), loss)
    _refuse_checkpoint(trainer.ckpt_path, identity)
    folder = Path(trainer.default_root_dir) / "reallocation"
    if load_compression(folder, model, identity) is not None:
        trainer.print(f"Factors of the whole matrices taken from {folder} (same weights, calibration text and targets)")
    else:
        with memory_stage("reallocate"):
            factor_fully(model, batches, names, device=trainer.strategy.root_device, loss=loss)
        if trainer.is_global_zero:
            layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
            plan = whole_plan(model, {name: layer.rank for name, layer in layers.items()}, fingerprint=identity)
            save_compression(folder, model, CompressionResult(plan, {}))
    dense = {name: layer for name, layer in before.items() if not isinstance(layer, FactoredLinear)}
    return mask_layers(model, names, dense=dense, **own.floors)


def _refuse_checkpoint(path: Any, identity: str) -> None:
    """Refuse a checkpoint of another run before the factors kept for that run are replaced by this one's."""
    if path is None or not Path(path).is_file():  # DeepSpeed's checkpoints are folders: refused when they are loaded
        return
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    stored = checkpoint.get("callbacks", {}).get("RankReallocation", {}).get("fingerprint")
    if stored is not None and stored != identity:
        raise PlanError(_OTHER_RUN)


def _plan_before(trainer: pl.Trainer) -> RankPlan | None:
    compression = find_callback(trainer, LowRankCompression)
    return None if compression is None or compression.result is None else compression.result.plan


def _names(trainer: pl.Trainer, model: nn.Module, own: RankReallocation) -> list[str]:
    plan = _plan_before(trainer) or getattr(trainer.lightning_module, "plan", None)
    if own.targets is None and isinstance(plan, RankPlan):
        return [matrix.name for matrix in plan.matrices]
    return list(find_targets(model, own.targets))


def _counted(batch: Any) -> tuple[Tensor | None, float]:
    """Real tokens of a batch, ``(batch, length)``, ``None`` where there is no padding; and how many of its predictions
    the loss is the mean of, by its real tokens."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None, 1.0
    mask = real_positions(batch)
    real = ids.numel() if mask is None else int(mask.sum())
    return None if real == ids.numel() else mask, int(counted_positions(batch).sum()) / max(1, real)


def _publish(trainer: pl.Trainer, pl_module: pl.LightningModule, own: RankReallocation, plan: RankPlan) -> None:
    """Leave the plan where the callbacks that come after look for one."""
    model = model_of(pl_module)
    module: Any = pl_module
    if hasattr(module, "plan"):
        module.plan = plan
    if hasattr(model, "save_pretrained") and any(entry.form != "dense" for entry in plan.matrices):
        from lowrank_lit.hub import attach

        attach(model, plan)
    compression = find_callback(trainer, LowRankCompression)
    if compression is not None and compression.result is not None:
        compression.result = CompressionResult(plan, _record(compression.result.record, model, own, plan))


def _record(before: dict[str, Any], model: nn.Module, own: RankReallocation, plan: RankPlan) -> dict[str, Any]:
    """The compression's record with the sizes of the model as it is now."""
    sizes, size = before["parameters"], count_parameters(model)
    itemsize = before["bytes"]["dense"] / sizes["model_dense"]
    return {
        **before,
        "keep_ratio": {
            "requested": plan.requested_keep_ratio,
            "achieved": plan.keep_ratio,
            "whole_model": size / sizes["model_dense"],
        },
        "parameters": {**sizes, "targets": plan.parameters, "model": size},
        "bytes": {**before["bytes"], "compressed": round(size * itemsize)},
        "reallocation": own.history,
        "notes": list(plan.notes),
    }
