"""One-shot compression at the start of a fit."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank_lit import distributed
from lowrank_lit.cache import kept_record, load_compression, save_compression
from lowrank_lit.callbacks._shared import calibration_of, callbacks_of
from lowrank_lit.collection import require_finite_weights
from lowrank_lit.compress import CompressionResult, compress, fingerprint, working_in
from lowrank_lit.errors import ExportError, ModelError, PlanError
from lowrank_lit.evaluation import perplexity
from lowrank_lit.gradients import Loss
from lowrank_lit.memory import stage as memory_stage
from lowrank_lit.metrics import DAMPING, GRADIENT_SHRINKAGE, SCALE_EXPONENT
from lowrank_lit.module import model_of
from lowrank_lit.plan import RankPlan
from lowrank_lit.report import data_hash
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.settings import DEFAULT_PRESET, MIN_RANK, Settings
from lowrank_lit.streaming import paged
from lowrank_lit.surgery import stored_bytes

_OTHER_PLAN = (
    "the checkpoint belongs to another plan (other weights, calibration text or settings); "
    "resume with the recipe that made it"
)


@runtime_checkable
class ChecksFolder(Protocol):
    """A callback that wants to refuse a run before anything is computed, such as ``ExportOnFitEnd``."""

    def check(self, trainer: pl.Trainer, fingerprint: str) -> None:
        """Raise if a run with this fingerprint could not be written at its end."""


class LowRankCompression(pl.Callback):
    """Calibrate, allocate ranks and factor the model, before the optimizers are made: the transformers model in the
    module's ``model``, else the module itself.

    Any LightningModule will do. Where it predicts no next tokens, gradients are those of its own ``training_step``,
    run as in training but for logging, optimizers and whatever else would leave a trace; a step that does not run so
    (one that optimises by hand) leaves the metric ``input``, and a note says why. Layers have to be there before
    ``setup``: made in ``__init__`` or ``configure_model``.

    This happens in ``setup("fit")``: a layer replaced any later would be missing from the optimizer and silently never
    train. The compression is kept in the trainer's root folder (``compressed/``), and a later run with the same
    weights, calibration text and settings takes it from there. One that was interrupted goes on from the statistics of
    the dense model, which wait in the same folder until then.

    The processes of a job share the work: each calibrates on its share of the batches and factors its share of the
    matrices; plan and factors are the same in all, and those of one process. Process 0 alone writes. An error in one
    process ends all of them with the same message.

    Args:
        keep_ratio: Share of the target matrices' parameters to keep, in (0, 1].
        preset: ``best``, ``fast`` or ``unirank``; it fills in what is left out of the next five.
        metric: In which norm components are large, such as ``two_sided``, ``input`` (SVD-LLM), ``identity``.
        allocator: How the budget is shared out, such as ``knapsack``, ``unirank``, ``uniform``.
        feedback: What is learnt from the compressed model: ``none``, ``recollect`` or ``anchored``.
        rounds: Rounds of statistics and allocation.
        select: Whether candidate plans are measured on held-out calibration sequences.
        storage: Form of a matrix that is not dense: ``factored`` or ``pivot``.
        targets: Shell patterns of layer names such as ``*.mlp.*``; by default every linear layer but the output
            embedding.
        min_rank: Least rank of a matrix.
        quantum: Ranks are multiples of this.
        damping: Relative damping of the inputs' second moments.
        shrinkage: The same for the gradients'.
        alpha: Exponent of the metric ``activation_scale``.
        labels: Whose labels gradients are of: ``model`` or ``text``.
        importance_of: ``unirank``: importance of a matrix's ``branch`` or ``block``.
        cost_aware: ``unirank``: score per parameter.
        nested: Whether the saved model can be loaded at smaller keep ratios.
        batches: Calibration batches as :func:`lowrank_lit.compress` takes them, or as ``training_step`` does; by
            default the datamodule's ``calibration_batches()``, else rows of what the fit trains on, evenly over it: as
            many as give the widest matrix four tokens for each input, 128 at least, 1 GiB at most. The loader draws
            nothing for it.
        workspace: Folder on a disk for what waits between the stages, so that memory holds one block at a time of a
            model whose weights are mapped from their files, see :func:`lowrank_lit.compress`; None keeps all in
            memory. The result is the same. A relative path is relative to the current folder.

    Attributes:
        result: Plan and record, once ``setup`` has run.
        started: When it began, on the clock of ``time.perf_counter``.

    Raises:
        LowRankError: A child of it for bad settings, batches or weights; the model is then as it was.
    """

    def __init__(
        self,
        keep_ratio: float = 0.6,
        *,
        preset: str = DEFAULT_PRESET,
        metric: str | None = None,
        allocator: str | None = None,
        feedback: str | None = None,
        rounds: int | None = None,
        select: bool | None = None,
        storage: str = "factored",
        targets: list[str] | None = None,
        min_rank: int = MIN_RANK,
        quantum: int = 1,
        damping: float = DAMPING,
        shrinkage: float = GRADIENT_SHRINKAGE,
        alpha: float = SCALE_EXPONENT,
        labels: str = "model",
        importance_of: str = "branch",
        cost_aware: bool = False,
        nested: bool = False,
        batches: Sequence[Any] | None = None,
        workspace: str | None = None,
    ) -> None:
        super().__init__()
        self._settings = Settings(
            keep_ratio,
            preset=preset,
            metric=metric,
            allocator=allocator,
            feedback=feedback,
            rounds=rounds,
            select=select,
            storage=storage,
            targets=targets,
            min_rank=min_rank,
            quantum=quantum,
            damping=damping,
            shrinkage=shrinkage,
            alpha=alpha,
            labels=labels,
            importance_of=importance_of,
            cost_aware=cost_aware,
            nested=nested,
        )
        self.batches = batches
        self.workspace = workspace
        self.result: CompressionResult | None = None
        self.started: float | None = None
        self._model: nn.Module | None = None
        self._guard: RemovableHandle | None = None

    def settings(self) -> dict[str, Any]:
        """The keyword arguments for :func:`lowrank_lit.compress` and :func:`lowrank_lit.plan_ranks`."""
        return dict(vars(self._settings))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compress the module's model, unless this callback has done so already."""
        if stage != "fit":
            return
        self.started = time.perf_counter()
        with distributed.cooperating("loading the model"):  # a file may be missing on one machine alone
            pl_module.configure_model()  # Lightning calls it after this hook; it does nothing the second time
        model = model_of(pl_module)
        if self._model is not model:
            # What follows the seed is the same whether the compression is computed or taken from disk.
            with isolate_rng(), distributed.cooperating():
                self._compress_at(trainer, pl_module, model)
        assert self.result is not None
        # Lightning loads the weights of a checkpoint before it asks the callbacks, and torch only speaks of shapes.
        guarded: Any = model  # torch leaves this method without annotations
        self._guard = guarded.register_load_state_dict_pre_hook(partial(_check_ranks, self.result.plan))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching what is loaded into the model."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching what is loaded into the model."""
        self._release()

    def _release(self) -> None:
        if self._guard is not None:
            self._guard.remove()
        self._guard = None

    def _compress_at(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> None:
        with distributed.together("the workspace"), working_in(self.workspace, model):
            pass  # one that cannot be written to is refused before anything is computed
        batches, loss = self._calibration(trainer)
        require_finite_weights(model)  # before the perplexity, which could only say that its logits are not finite
        identity = fingerprint(model, batches, self._settings, loss)
        if len(set(distributed.gather("the fingerprint", identity))) > 1:
            raise ModelError(
                "the processes of the job have different weights, calibration text or settings; give all the same "
                "checkpoint, text and seed"
            )
        _refuse_checkpoint(trainer.ckpt_path, identity)
        for callback in callbacks_of(trainer):
            if isinstance(callback, ChecksFolder):
                callback.check(trainer, identity)
        # Weights that are bfloat16 on disk may be float32 while they are trained: the type of the files counts.
        stored = getattr(pl_module, "storage_dtype", None)
        dense = stored_bytes(model, stored)
        self.result, self._model = self._compress(trainer, model, batches, identity, loss), model
        self.result.record["bytes"] = {"dense": dense, "compressed": stored_bytes(model, stored)}

    def state_dict(self) -> dict[str, Any]:
        """Key ``plan``: the plan as a dictionary, so that a checkpoint tells the shape of its own model."""
        return {} if self.result is None else {"plan": self.result.plan.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another plan.

        Raises:
            PlanError: If the plan in the checkpoint is not the one of this run.
        """
        if self.result is not None and state_dict.get("plan", {}).get("fingerprint") != self.result.plan.fingerprint:
            raise PlanError(_OTHER_PLAN)

    def _calibration(self, trainer: pl.Trainer) -> tuple[Sequence[Any], Loss | None]:
        return calibration_of(trainer, "LowRankCompression", self.batches, targets=self._settings.targets)

    def _compress(
        self, trainer: pl.Trainer, model: nn.Module, batches: Sequence[Any], identity: str, loss: Loss | None
    ) -> CompressionResult:
        root = Path(trainer.default_root_dir)
        text = evaluation_hash(trainer)
        kept = distributed.agreed("the kept record", kept_record(root / "compressed", identity) or {})
        same_text = "perplexity" in kept and kept.get("evaluation_hash") == text
        # Before the factors are taken from disk, for they replace the dense model.
        dense, first = (kept["perplexity"]["dense"], 0.0) if same_text else self._measured(trainer, model)
        result = load_compression(root / "compressed", model, identity)
        if result is None:
            _say(trainer, f"Compressing to keep_ratio={self._settings.keep_ratio} ({len(batches)} calibration batches)")
            started = time.perf_counter()
            with memory_stage("compress"):
                result = compress(
                    model,
                    batches,
                    device=trainer.strategy.root_device,
                    resume=root / "compressed",
                    workspace=self.workspace,
                    loss=loss,
                    **self.settings(),
                )
            seconds = time.perf_counter() - started
            _say(trainer, f"Compressed in {seconds:.0f} s: keep_ratio={result.plan.keep_ratio:.4f}")
        else:
            _say(trainer, f"Compression taken from {root / 'compressed'} (same weights, calibration text and settings)")
            result.record["from_cache"] = True  # its seconds are those of the run that computed it
            if same_text:
                return result
        compressed, second = self._measured(trainer, model)
        if compressed is not None and dense is not None:
            _say(trainer, f"Perplexity {compressed:.5g} before any training, dense {dense:.5g}")
        result.record["perplexity"] = {"dense": dense, "compressed": compressed}
        result.record["evaluation_hash"] = text
        result.record["seconds"]["evaluate"] = first + second
        self._keep(trainer, model, result, root)
        return result

    def _measured(self, trainer: pl.Trainer, model: nn.Module) -> tuple[float | None, float]:
        """:func:`measure`, with one block of mapped weights in memory at a time where there is a workspace."""
        with paged([] if self.workspace is None else find_repeating_blocks(model)):
            return measure(trainer, model)

    def _keep(self, trainer: pl.Trainer, model: nn.Module, result: CompressionResult, root: Path) -> None:
        """Write what was computed, so that a later run, or this one after an accident, need not compute it again."""
        if trainer.is_global_zero:
            save_compression(root / "compressed", model, result)
            try:
                result.plan.save(root / "plan.json")
            except ExportError as error:  # not worth losing a compression for
                warnings.warn(str(error), stacklevel=2)


def _say(trainer: pl.Trainer, text: str) -> None:
    """Print a line at once, also where the output goes to a file and no progress bar does."""
    trainer.print(text)
    sys.stdout.flush()


def evaluation_hash(trainer: pl.Trainer) -> str | None:
    """Identity of the text that perplexities are measured on."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    has_text = hasattr(datamodule, "evaluation") and hasattr(datamodule, "has") and datamodule.has("test")
    return data_hash([datamodule.evaluation("test")]) if has_text else None


def measure(trainer: pl.Trainer, model: nn.Module) -> tuple[float | None, float]:
    """Perplexity on the datamodule's test blocks and the seconds it took; None without any, or without next-token
    logits."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    head = getattr(model, "get_output_embeddings", None)
    if evaluation_hash(trainer) is None or head is None or head() is None:
        return None, 0.0
    started = time.perf_counter()
    with memory_stage("evaluate"):
        value = perplexity(
            model, datamodule.evaluation("test"), batch_size=datamodule.batch_size, device=trainer.strategy.root_device
        )
    return value, time.perf_counter() - started


def _refuse_checkpoint(path: Any, identity: str) -> None:
    """Refuse a checkpoint of another plan before the compression kept for that plan is replaced by this run's.

    Lightning tells the path this early where it was set as ``trainer.ckpt_path``, as ``lightning run`` does.
    """
    if path is None or not Path(path).is_file():  # DeepSpeed's checkpoints are folders: refused when they are loaded
        return
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    plan = checkpoint.get("callbacks", {}).get("LowRankCompression", {}).get("plan")
    if plan is not None and plan.get("fingerprint") != identity:
        raise PlanError(_OTHER_PLAN)


def _check_ranks(plan: RankPlan, model: nn.Module, weights: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse weights in which a matrix of the plan has another form or rank than in the model."""
    own = model.state_dict()
    for matrix in plan.matrices:
        stored, expected = _layout(weights, f"{prefix}{matrix.name}"), _layout(own, matrix.name)
        if stored is not None and expected is not None and stored != expected:
            raise PlanError(f"'{matrix.name}' is {tuple(stored)} and not {tuple(expected)}: {_OTHER_PLAN}")


def _layout(weights: Mapping[str, Tensor], name: str) -> torch.Size | None:
    """Shape of a matrix, or of its inner factor where it is factored, with or without an adapter."""
    found = (weights.get(f"{name}.{key}") for key in ("weight", "inner.weight", "inner.base_layer.weight"))
    # What is in 4 bits is packed: its shape says nothing.
    return next((value.shape for value in found if value is not None and value.is_floating_point()), None)
