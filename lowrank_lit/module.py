"""A LightningModule round a causal language model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lowrank_lit.errors import ExportError, LowRankError, ModelError, NonFiniteError, reason_of
from lowrank_lit.plan import RankPlan
from lowrank_lit.surgery import apply_plan

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class LowRankModule(pl.LightningModule):
    """Next-token training of a causal language model, dense or factored.

    The model is loaded in :meth:`configure_model`, so that a callback (or a strategy) decides when that happens; the
    attribute ``model`` is the plain transformers model. Only parameters that require a gradient are given to the
    optimizer.

    Args:
        model: Folder or hub name of a causal language model, or the fields of a configuration (with ``model_type``) for
            a new one with random weights.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of AdamW. Weight decay on balanced factors is a nuclear-norm penalty, so 0 unless a lower rank is
            wanted.
        warmup_steps: Steps of linear warm-up; a cosine to a tenth of the peak follows.
        dtype: Of the weights in memory: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        compile: Compile the model with ``torch.compile``; pays for long training alone.

    Raises:
        ModelError: If the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | dict[str, Any],
        *,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        dtype: str = "float32",
        compile: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            raise ModelError(f"model.dtype='{dtype}' is unknown; choose one of {', '.join(_DTYPES)}")
        self.source = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.dtype_in_memory = _DTYPES[dtype]
        self.compile_model = compile
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
        if self.compile_model:
            self.model.compile()

    def forward(self, **batch: Tensor) -> Any:
        """Outputs of the model for ``input_ids`` (batch, length) and whatever else it takes."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean next-token cross-entropy in nats; labels are shifted once, by the model.

        Raises:
            NonFiniteError: If the loss is NaN or infinite.
        """
        loss: Tensor = self.model(**batch, use_cache=False).loss
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the training loss is {loss.item()} at step {self.global_step}; lower model.learning_rate "
                f"(now {self.learning_rate}) or start again from the last checkpoint"
            )
        self.log("train_loss", loss, prog_bar=True)
        return loss

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
        """AdamW with linear warm-up and cosine decay to a tenth of the peak."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay, betas=(0.9, 0.95)
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
        path: Written by ``ModelCheckpoint`` in a fit with the callbacks of this package, or with none of them.

    Raises:
        ExportError: If the file cannot be read, or does not fit the module's model.
        PlanError: If its plan does not fit the module's model.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights, states = checkpoint["state_dict"], checkpoint.get("callbacks", {})
    except Exception as error:  # a missing, truncated or foreign file surfaces as many kinds of error
        raise ExportError(
            f"checkpoint '{path}' cannot be read ({reason_of(error)}); give a file of ModelCheckpoint"
        ) from error
    module.configure_model()
    plan = states.get("LowRankCompression", {}).get("plan")
    module.plan = None if plan is None else RankPlan.from_dict(plan)
    if module.plan is not None:
        apply_plan(module.model, module.plan)
    adapters = None
    if any(".lora_" in key for key in weights):
        from lowrank_lit.recovery import add_adapters

        if "RankPreservingLoRA" not in states:
            raise ExportError(f"checkpoint '{path}' holds adapters of another kind; merge them before it is saved")
        adapters = add_adapters(module, **states["RankPreservingLoRA"]["settings"])
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ExportError(
            f"checkpoint '{path}' does not fit model '{module.source}' ({reason}); give the recipe that made it"
        ) from error
    if adapters is not None:
        adapters.merge()


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
            return AutoConfig.from_pretrained(source)
        return AutoConfig.for_model(**source)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError by what is wrong
        remedy = "a folder with config.json or a hub name" if isinstance(source, str) else "model_type and its fields"
        raise ModelError(f"model '{source}' cannot be loaded ({reason_of(error)}); give {remedy}") from error


def _build_model(source: str | dict[str, Any], config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        if not isinstance(source, str):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except LowRankError:
        raise
    except Exception as error:  # a missing, truncated or mis-shaped weight file surfaces as many kinds of error
        raise ModelError(
            f"the weights of model '{source}' cannot be loaded ({reason_of(error)}); check that the folder is complete"
        ) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers and only warns
        raise ModelError(
            f"the weights of model '{source}' lack {len(missing)} tensors, first '{missing[0]}'; "
            "check that the folder is complete"
        )
    return model
