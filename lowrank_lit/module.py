"""A LightningModule round a causal language model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lowrank_lit._checkpoints import gather_shards
from lowrank_lit.compress import loaded_hash
from lowrank_lit.distillation import Teacher, counted_positions, divergence
from lowrank_lit.errors import ExportError, LowRankError, ModelError, NonFiniteError, reason_of
from lowrank_lit.folders import damaged_file, hub_settings
from lowrank_lit.masks import MaskedModel, masked_layout, plan_of_cut
from lowrank_lit.optimizers import build_optimizer
from lowrank_lit.plan import RankPlan
from lowrank_lit.strategies import LowRankDeepSpeed
from lowrank_lit.surgery import apply_plan

if TYPE_CHECKING:
    from lowrank_lit.recovery import Adapters

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_LOSSES = ("ce", "kd", "mixed")


class LowRankModule(pl.LightningModule):
    """Next-token training of a causal language model, dense or factored, on a text or on what a teacher predicts.

    The model is loaded in :meth:`configure_model`, so that a callback (or a strategy) decides when that happens; the
    attribute ``model`` is the plain transformers model. Only parameters that require a gradient are given to the
    optimizer. The teacher of a distillation is no part of the module: it is not in checkpoints and never trains.

    Args:
        model: Folder or hub name of a causal language model, or the fields of a configuration (with ``model_type``) for
            a new one with random weights.
        learning_rate: Peak learning rate.
        optimizer: By name, as :func:`lowrank_lit.optimizers.build_optimizer` takes it: ``adamw``, ``paged_adamw8bit``,
            ``lion8bit`` and others.
        weight_decay: Weight decay on balanced factors is a nuclear-norm penalty, so 0 unless a lower rank is wanted.
        warmup_steps: Steps of linear warm-up; a cosine to a tenth of the peak follows.
        dtype: Of the weights in memory: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        compile: Compile the model with ``torch.compile``; pays for long training alone.
        loss: ``ce``, the cross-entropy of the next token; ``kd``, the divergence from the teacher's predictions
            (:mod:`lowrank_lit.distillation`), which needs no labels; ``mixed``, the mean of both by ``kd_weight``.
        kd_weight: Weight of the divergence in ``mixed``, in [0, 1]; the cross-entropy has the rest.
        temperature: Of both predictions in the divergence.
        teacher: Folder or hub name of the teacher; by default the dense model that ``model`` names.
        teacher_cache: Folder for the teacher's predictions: each sequence is computed once, in this run or an earlier
            one. By default they are computed at every step, with the teacher in memory.
        teacher_top_k: Keep the predictions of this many tokens per position instead of all.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.

    Raises:
        ModelError: If a setting is unknown, or the model or the teacher cannot be loaded.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        *,
        learning_rate: float = 1e-4,
        optimizer: str = "adamw",
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        dtype: str = "float32",
        compile: bool = False,
        loss: str = "ce",
        kd_weight: float = 0.5,
        temperature: float = 1.0,
        teacher: str | None = None,
        teacher_cache: str | None = None,
        teacher_top_k: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for setting, value, choices in (("dtype", dtype, _DTYPES), ("loss", loss, _LOSSES)):
            if value not in choices:
                raise ModelError(f"model.{setting}='{value}' is unknown; choose one of {', '.join(choices)}")
        # What is wrong with these is said now, and not when everything has been compressed.
        build_optimizer(
            optimizer, [nn.Parameter(torch.zeros(1))], learning_rate=learning_rate, weight_decay=weight_decay
        )
        _check_distillation(loss, kd_weight, temperature, teacher_cache, teacher_top_k)
        self.source = model
        self.teacher_source = model if teacher is None else teacher
        self.learning_rate = learning_rate
        self.optimizer_name = optimizer
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.dtype_in_memory = _DTYPES[dtype]
        self.compile_model = compile
        self.loss = loss
        self.kd_weight = {"ce": 0.0, "kd": 1.0, "mixed": kd_weight}[loss]
        self.temperature = temperature
        self.teacher_cache = teacher_cache
        self.teacher_top_k = teacher_top_k
        self.gradient_checkpointing = gradient_checkpointing
        self.teacher: Teacher | None = None
        self.storage_dtype: torch.dtype | None = None
        self.model: Any = None
        self.plan: RankPlan | None = None
        self.validation_loss = MeanMetric()

    def configure_model(self) -> None:
        """Load or build the model; does nothing on a second call."""
        if self.model is not None:
            return
        config = _load_config(self.source)
        self.storage_dtype = config.dtype or self.dtype_in_memory
        # from_pretrained gives evaluation mode, in which dropout would stay off while training.
        self.model = _build_model(self.source, config, self.dtype_in_memory).train()
        if self.gradient_checkpointing:
            # The reentrant kind has no gradient where the embeddings are frozen, as they are in every recovery.
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.compile_model:
            self.model.compile()
        if self.kd_weight:
            self.teacher = self._make_teacher()

    def load_teacher(self) -> nn.Module:
        """The dense model, loaded anew: frozen, in eval mode, with weights of the module's dtype, on the CPU.

        Raises:
            ModelError: If it cannot be loaded, or the module's model is made of a configuration and has no weights yet.
        """
        if not isinstance(self.teacher_source, str):
            raise ModelError(
                "a model of random weights has nothing to teach: give model.teacher=FOLDER, or model.model=FOLDER"
            )
        with isolate_rng():  # the same run, whether and whenever the teacher is loaded
            model: nn.Module = _build_model(
                self.teacher_source, _load_config(self.teacher_source), self.dtype_in_memory
            )
        return model.requires_grad_(False).eval()

    def _make_teacher(self) -> Teacher:
        if not isinstance(self.teacher_source, str):
            self.load_teacher()  # says what is wrong with it
        cache = None if self.teacher_cache is None else Path(self.teacher_cache)
        # The model is still the dense one: its hash spares loading the teacher where every prediction is on disk.
        identity = loaded_hash(self.model) if cache is not None and self.teacher_source == self.source else None
        return Teacher(self.load_teacher, cache=cache, identity=identity, top_k=self.teacher_top_k)

    def forward(self, **batch: Tensor) -> Any:
        """Outputs of the model for ``input_ids`` (batch, length) and whatever else it takes."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss in nats per token; labels are shifted once, by the model.

        Raises:
            NonFiniteError: If the loss is NaN or infinite, in any process.
        """
        loss = self._training_loss(batch)
        self._require_finite(bool(torch.isfinite(loss)), f"the training loss is {loss.item()}")
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _training_loss(self, batch: dict[str, Tensor]) -> Tensor:
        if self.teacher is None:
            plain: Tensor = self.model(**batch, use_cache=False).loss
            return plain
        # Without labels the model takes no loss of its own.
        own = batch if self.kd_weight < 1 else {key: value for key, value in batch.items() if key != "labels"}
        output = self.model(**own, use_cache=False)
        loss = self.kd_weight * divergence(
            output.logits, self.teacher.predict(batch), counted_positions(batch), temperature=self.temperature
        )
        return loss if self.kd_weight == 1 else loss + (1 - self.kd_weight) * output.loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Refuse a step by gradients that are not finite: the weights, and every checkpoint, stay good.

        Raises:
            NonFiniteError: If one is NaN or infinite; not in float16, whose loss scaling skips such a step.
        """
        if str(self.trainer.precision).startswith("16"):
            return
        if isinstance(self.trainer.strategy, LowRankDeepSpeed):  # which has them, in pieces
            self._require_finite(self.trainer.strategy.gradients_are_finite(), "a gradient is NaN or infinite")
            return
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
            self._require_finite(bool(torch.isfinite(norm)), f"the norm of the gradients is {norm.item()}")

    def _require_finite(self, finite: bool, what: str) -> None:
        trainer = self._trainer
        if trainer is not None:  # one process alone would leave the others waiting for it
            finite = trainer.strategy.reduce_boolean_decision(finite)
        if not finite:
            raise NonFiniteError(
                f"{what} at step {self.global_step}; {_last_checkpoint(trainer)}; lower model.learning_rate "
                f"(now {self.learning_rate})"
            )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to ``val_loss``, the mean next-token cross-entropy in nats over all targets."""
        loss = self.model(**batch, use_cache=False).loss
        targets = batch["labels"][:, 1:]
        self.validation_loss.update(loss, weight=int((targets != -100).sum()))

    def on_validation_epoch_end(self) -> None:
        """Logs ``val_loss`` and ``val_perplexity``, its exponential; all-reduced where there are several processes."""
        loss = self.validation_loss.compute()
        self.validation_loss.reset()
        self.log_dict({"val_loss": loss, "val_perplexity": loss.exp()}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """The chosen optimizer with linear warm-up and cosine decay to a tenth of the peak; a group for each factor."""
        from lowrank_lit.recovery import factor_groups  # loads PEFT

        optimizer = build_optimizer(
            self.optimizer_name,
            factor_groups(self),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
        )
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, self.warmup_steps, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def model_of(module: pl.LightningModule) -> nn.Module:
    """What a callback compresses and exports: the module's transformers model (``model``), else the module itself."""
    inner: Any = getattr(module, "model", None)
    return inner if hasattr(inner, "save_pretrained") else module


def load_checkpoint(module: LowRankModule, path: str | Path) -> None:
    """Load a Lightning checkpoint of a fit into ``module`` as a plain model: factored by its plan, adapters merged.

    Args:
        module: Takes the weights; ``module.plan`` becomes the checkpoint's plan, or ``None`` for a dense model.
        path: Written by ``ModelCheckpoint`` in a fit with the callbacks of this package, or with none of them; with
            DeepSpeed it is a folder, of any number of processes.

    The model is that of the checkpoint's step: with the components that the masks of a RankReallocation had on, and not
    the best that a Refinement had seen.

    Raises:
        ExportError: If the file cannot be read, or does not fit the module's model.
        PlanError: If its plan or its masks do not fit the module's model.
    """
    try:
        whole = Path(path).is_dir()
        checkpoint = gather_shards(Path(path)) if whole else torch.load(path, map_location="cpu", weights_only=True)
        weights, states = checkpoint["state_dict"], checkpoint.get("callbacks", {})
    except Exception as error:  # a missing, truncated or foreign file surfaces as many kinds of error
        if type(error) is LowRankError:  # a package that is missing
            raise
        raise ExportError(
            f"checkpoint '{path}' cannot be read ({reason_of(error)}); give a file, or a whole folder, of "
            "ModelCheckpoint"
        ) from error
    module.configure_model()
    reallocation = states.get("RankReallocation", {})
    plan = reallocation.get("plan") or states.get("LowRankCompression", {}).get("plan")
    module.plan = None if plan is None else RankPlan.from_dict(plan)
    if module.plan is not None:
        apply_plan(module.model, module.plan)
    masked = None
    if reallocation.get("layout"):
        masked = masked_layout(module.model, reallocation["layout"], **reallocation["floors"])
    adapters = None
    if any(".base_layer." in key for key in weights):  # PEFT's name, whatever the method
        if "RankPreservingLoRA" not in states:
            raise ExportError(f"checkpoint '{path}' holds adapters of another kind; merge them before it is saved")
        adapters = _adapted(module, states["RankPreservingLoRA"])
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ExportError(
            f"checkpoint '{path}' does not fit model '{module.source}' ({reason}); give the recipe that made it"
        ) from error
    if adapters is not None:
        adapters.merge()
    if masked is not None:
        _cut(module, masked, reallocation["history"])


def _adapted(module: LowRankModule, made: dict[str, Any]) -> Adapters:
    """Adapters, and 4-bit factors below them, to load the weights of a checkpoint into."""
    from lowrank_lit.recovery import add_adapters

    if made.get("quantization"):
        from lowrank_lit.quantize import apply_quantization

        apply_quantization(module, made["quantization"])
    return add_adapters(module, **made["settings"])


def _cut(module: LowRankModule, masked: MaskedModel, history: list[dict[str, Any]]) -> None:
    """Leave out what the masks had off; the ratio that was asked for is the schedule's at the time."""
    before = module.plan
    asked = history[-1]["keep_ratio"] if history else 1.0 if before is None else before.requested_keep_ratio
    plan = plan_of_cut(masked.shrink(), asked, before, history)
    module.plan = plan if any(matrix.form != "dense" for matrix in plan.matrices) else None


def _check_distillation(loss: str, kd_weight: float, temperature: float, cache: str | None, top_k: int | None) -> None:
    if not 0 <= kd_weight <= 1:
        raise ModelError(f"model.kd_weight={kd_weight} is no share; give a number from 0 to 1")
    if not 0 < temperature < math.inf:
        raise ModelError(f"model.temperature={temperature} is no temperature; give a positive number, such as 1")
    if top_k is not None and (top_k < 1 or temperature != 1.0):
        raise ModelError(f"model.teacher_top_k={top_k} needs at least 1, and model.temperature=1 (now {temperature})")
    if loss == "ce" and (cache is not None or top_k is not None):
        raise ModelError("model.loss='ce' has no teacher; choose 'kd' or 'mixed', or leave teacher_* out")


def _last_checkpoint(trainer: pl.Trainer | None) -> str:
    """Where to go on from: the newest checkpoint of the run; every step before it had a finite loss and gradient."""
    callbacks: list[Any] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    named = [getattr(c, key, "") for c in callbacks for key in ("last_model_path", "best_model_path")]
    named.append(getattr(trainer, "ckpt_path", None))  # what the run itself went on from
    saved = [Path(path) for path in named if path and Path(path).exists()]  # DeepSpeed's are folders
    if not saved:
        return "no checkpoint has been written, so start again"
    return f"the last good checkpoint is '{max(saved, key=lambda path: path.stat().st_mtime)}'"


def _schedule(step: int, warmup: int, total: float) -> float:
    """Multiplier of the learning rate: linear to 1 over ``warmup`` steps, then a cosine to 0.1 at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _load_config(source: str | dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        if isinstance(source, str):
            return AutoConfig.from_pretrained(source, **hub_settings(source))
        return AutoConfig.for_model(**source)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError by what is wrong
        remedy = "a folder with config.json or a hub name" if isinstance(source, str) else "model_type and its fields"
        raise ModelError(f"model '{source}' cannot be loaded ({reason_of(error)}); give {remedy}") from error


def _build_model(source: str | dict[str, Any], config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        if not isinstance(source, str):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **hub_settings(source)
        )
    except LowRankError:
        raise
    except Exception as error:  # a missing, truncated or mis-shaped weight file surfaces as many kinds of error
        damaged = damaged_file(Path(source)) if isinstance(source, str) else None
        raise ModelError(
            f"the weights of model '{source}' cannot be loaded ({damaged or reason_of(error)}); check that the folder "
            "is complete"
        ) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers and only warns
        raise ModelError(
            f"the weights of model '{source}' lack {len(missing)} tensors, first '{missing[0]}'; "
            "check that the folder is complete"
        )
    return model
