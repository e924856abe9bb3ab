"""Recovery of a compressed model by LoRA on its factors, with the rank kept."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lowrank_lit.errors import ModelError
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.recovery import Adapters, MergeRecord, add_adapters


class RankPreservingLoRA(pl.Callback):
    """Train LoRA adapters on both factors of every factored layer, and merge them when the fit ends.

    List it after the callback that compresses the model. Everything but the adapters is frozen during the fit;
    afterwards the module is the plain factored model again, with its names, shapes and ``requires_grad`` flags.

    A checkpoint written during the fit holds the adapters: it resumes the fit, and
    ``lowrank_lit.module.load_checkpoint`` reads it as a plain model; into the merged model it does not load as it is.
    One that ``ModelCheckpoint(save_last=True)`` writes at the end of training, where it has written none before, holds
    the merged model: it loads into that, and does not resume. A fit that ends by an exception leaves the adapters in
    place; the next fit of the module with this callback trains them on.

    Args:
        rank: Adapter rank l, kept below the rank of each layer.
        alpha: Updates are scaled by alpha / l.
        dropout: Probability of dropping an entry of an adapter's input.
        use_rslora: Scale by alpha / sqrt(l) instead.

    Attributes:
        adapters: The adapters of the last fit, None before the first.
        record: What the last merge did, None before.

    Raises:
        ModelError: At setup, if the model has no factored layer, or the strategy is DeepSpeed's ZeRO stage 3.

    Example:
        >>> callbacks = [LowRankCompression(keep_ratio=0.6), RankPreservingLoRA(rank=8)]  # doctest: +SKIP
        >>> pl.Trainer(callbacks=callbacks, max_steps=500).fit(module, datamodule)  # doctest: +SKIP
    """

    def __init__(self, rank: int = 8, *, alpha: float = 16.0, dropout: float = 0.0, use_rslora: bool = False) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "use_rslora": use_rslora}
        self.adapters: Adapters | None = None
        self.record: MergeRecord | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adapt the model before the optimizers are made."""
        if stage != "fit":
            return
        pl_module.configure_model()  # idempotent; Lightning calls it after this hook
        if self.adapters is not None and self.adapters.merged is None and self.adapters.model is pl_module:
            return
        _check(trainer, pl_module)
        self.adapters, self.record = add_adapters(pl_module, **self.settings), None

    def state_dict(self) -> dict[str, Any]:
        """Key ``settings``: how the adapters in the checkpoint were made, to make them again before it is loaded."""
        return {"settings": self.settings}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge while the model is still on its device."""
        self._merge()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge after a fit without a step, which has no end of training."""
        self._merge()

    def _merge(self) -> None:
        if self.adapters is not None and self.adapters.merged is None:
            self.record = self.adapters.merge()


def _check(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse what would fail only after the training."""
    if not any(isinstance(module, FactoredLinear) for module in pl_module.modules()):
        raise ModelError(
            f"{type(pl_module).__name__} has no factored layer when RankPreservingLoRA is set up; "
            "list LowRankCompression before RankPreservingLoRA"
        )
    if getattr(trainer.strategy, "zero_stage_3", False):
        raise ModelError("strategy DeepSpeed ZeRO stage 3 has no whole factor to merge into; use stage 2 for recovery")
