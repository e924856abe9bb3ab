"""Recovery of a compressed model with the rank kept: LoRA on its factors, or training of the factors themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank_lit.adapter_config import FACTORS, config_of, find_pairs, is_quantised, spec_of
from lowrank_lit.adapter_starts import adapter_starts, starts_from_data
from lowrank_lit.callbacks._shared import calibration_text, find_callback, forget
from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.callbacks.export import refuse_sharded
from lowrank_lit.errors import ExportError, LowRankError, ModelError
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.merging import MergeRecord
from lowrank_lit.module import model_of
from lowrank_lit.recovery import Adapters, Turns, add_adapters, pause

SCHEDULES = ("joint", "sequential")
_STARTS = "adapter_starts.safetensors"


class RankPreservingLoRA(pl.Callback):
    """Train LoRA adapters on both factors of every factored layer, and merge them when the fit ends.

    List it after the callback that compresses the model. Everything but the adapters is frozen during the fit;
    afterwards the module is the plain factored model again, with its names, shapes and ``requires_grad`` flags.

    A checkpoint written during the fit holds the adapters: it resumes the fit, and
    ``lowrank_lit.module.load_checkpoint`` reads it as a plain model; into the merged model it does not load as it is.
    One that ``ModelCheckpoint(save_last=True)`` writes at the end of training, where it has written none before, holds
    the merged model: it loads into that, and does not resume. Under DeepSpeed's ZeRO stage 3 the merge waits until the
    weights are whole again, so that this one holds the adapters, too. A fit that ends by an exception leaves the
    adapters in place; the next fit of the module with this callback trains them on.

    The schedule ``sequential`` is SVD-LLM's: the first half of the optimizer steps moves the adapters of the outer
    factors, the second half those of the inner ones. Both are there from the start, and one that has not moved changes
    nothing, so this is the same as merging in between, while shapes, ``requires_grad`` and optimizer stay as they are.
    Gradients of the paused half are dropped before they are clipped and before the optimizer sees them. DeepSpeed keeps
    its gradients to itself: there they are zero as they arise and the step leaves the paused half out, which takes
    parameter groups from :func:`lowrank_lit.recovery.factor_groups`. The module's learning-rate schedule spans both
    halves.

    EVA and CorDA start from the second moments of the factors' inputs: those that the compression collected where it
    kept them, else of one forward pass over its calibration text, see
    :func:`lowrank_lit.adapter_starts.adapter_starts`. The start values are kept beside the compression, in
    ``<default_root_dir>/compressed``, so that a later run of the same recipe, or one that resumes, has the same ones.

    Args:
        rank: Adapter rank l, kept below the rank of each layer; None is 8.
        alpha: Updates are scaled by alpha / l.
        dropout: Probability of dropping an entry of an adapter's input.
        use_rslora: Scale by alpha / sqrt(l) instead.
        schedule: ``joint`` or ``sequential``.
        config: A PEFT configuration instead of the four settings above, as ``{"class_path": "peft.LoraConfig",
            "init_args": {"r": 8, "use_dora": true}}``, or the object itself.
        quantize: ``nf4`` holds the factors in 4 bits while the adapters train (QLoRA); they are merged into the
            dequantised factors. Their ranks must be multiples of 64: ``LowRankCompression.quantum=64``. Matrices that
            the plan leaves dense, and the embeddings, keep their type. What it saves is printed.
        quantize_factors: Which factors are quantised: ``both``, ``inner`` or ``outer``.
        unmerge: Whether to write to ``<default_root_dir>/unmerge`` what takes the merge back, see
            :func:`lowrank_lit.unmerging.unmerge`; that of the last fit. Somewhat more than the adapters in size, and
            for methods that are no sum as much as the factors.

    Attributes:
        adapters: The adapters of the last fit, None before the first.
        record: What the last merge did, None before.
        quantization: What quantising did, None without.

    Raises:
        LowRankError: If a setting is unknown; before the compression, if its ranks will not do for ``nf4`` or
            bitsandbytes is missing; at setup, if the adapter rank is below the rank of no factor.
        ModelError: At setup, if the model has no factored layer, or the strategy splits the weights (FSDP, tensor
            parallelism, Lightning's own DeepSpeedStrategy in ZeRO stage 3); on resuming, if the checkpoint's adapters
            or 4-bit factors are not those of this run.

    Example:
        >>> callbacks = [LowRankCompression(keep_ratio=0.6), RankPreservingLoRA(rank=8)]  # doctest: +SKIP
        >>> pl.Trainer(callbacks=callbacks, max_steps=500).fit(module, datamodule)  # doctest: +SKIP
    """

    def __init__(
        self,
        rank: int | None = None,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
        schedule: str = "joint",
        config: dict[str, Any] | Any | None = None,
        quantize: str | None = None,
        quantize_factors: str = "both",
        unmerge: bool = True,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise LowRankError(f"schedule='{schedule}' is unknown; choose one of {', '.join(SCHEDULES)}")
        if quantize not in (None, "nf4"):
            raise LowRankError(f"quantize='{quantize}' is unknown; choose nf4, or leave it out")
        if quantize_factors not in ("both", "inner", "outer"):
            raise LowRankError(f"quantize_factors='{quantize_factors}' is unknown; choose both, inner or outer")
        if config is not None and (rank, alpha, dropout, use_rslora) != (None, 16.0, 0.0, False):
            raise LowRankError("config stands in for rank, alpha, dropout and use_rslora; set them inside it")
        self.settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "use_rslora": use_rslora}
        if config is not None:
            self.settings = {"config": spec_of(config_of(config))}
        self.schedule = schedule
        self.quantize = quantize
        self.quantize_factors = quantize_factors
        self.unmerge = unmerge
        self.adapters: Adapters | None = None
        self.record: MergeRecord | None = None
        self.quantization: dict[str, Any] | None = None
        self._guard: RemovableHandle | None = None
        self._turns: Turns | None = None
        self._merged: list[nn.Parameter] = []

    @property
    def needs_statistics(self) -> bool:
        """Whether the compression is to hand on the moments of its inputs."""
        return starts_from_data(self.settings.get("config"))

    def check(self, trainer: pl.Trainer, fingerprint: str) -> None:
        """Refuse before the calibration a compression whose factors could not be quantised."""
        if self.quantize is None:
            return
        from lowrank_lit.extras import load_bitsandbytes
        from lowrank_lit.quantize import RANK_QUANTUM

        load_bitsandbytes(f"RankPreservingLoRA.quantize='{self.quantize}'")
        compression = find_callback(trainer, LowRankCompression)
        settings = {} if compression is None else compression.settings()
        if settings.get("quantum", RANK_QUANTUM) % RANK_QUANTUM:
            raise LowRankError(
                f"RankPreservingLoRA.quantize='{self.quantize}' needs ranks that are multiples of {RANK_QUANTUM}: set "
                f"LowRankCompression.quantum={RANK_QUANTUM} (now {settings['quantum']})"
            )
        if settings.get("storage", "factored") != "factored":
            raise LowRankError(
                f"RankPreservingLoRA.quantize='{self.quantize}' needs two factors to rotate: set "
                f"LowRankCompression.storage='factored' (now '{settings['storage']}')"
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adapt the model before the optimizers are made."""
        if stage != "fit":
            return
        pl_module.configure_model()  # idempotent; Lightning calls it after this hook
        if self.adapters is not None and self.adapters.merged is None and self.adapters.model is pl_module:
            return
        _check(trainer, pl_module)
        if self.quantize is not None:
            from lowrank_lit.quantize import quantize_factors

            self.quantization = quantize_factors(pl_module, which=self.quantize_factors)
            trainer.print(_saving(self.quantization))
        starts = self._starts(trainer, pl_module)
        self.adapters, self.record = add_adapters(pl_module, **self.settings, starts=starts), None
        if clamped := self.adapters.record["clamped"]:
            name = min(clamped, key=lambda layer: clamped[layer])
            trainer.print(
                f"Adapter rank {self.adapters.rank} is not below the rank of {len(clamped)} of "
                f"{self.adapters.record['pairs']} layers, which have smaller adapters, the least of rank "
                f"{clamped[name]} in '{name}'"
            )
        # Lightning loads a checkpoint's weights after this, and torch only speaks of keys and shapes.
        guarded: Any = model_of(pl_module)  # torch leaves this method without annotations
        self._guard = guarded.register_load_state_dict_pre_hook(_check_adapters)

    def state_dict(self) -> dict[str, Any]:
        """Keys ``settings`` and ``quantization``: how the adapters and the layers below them in the checkpoint were
        made, to make them again before it is loaded."""
        settings = self.settings if self.adapters is None else self.adapters.settings
        made = None
        if self.quantization is not None and self.adapters is not None and self.adapters.merged is None:
            made = {key: self.quantization[key] for key in ("settings", "quantized")}
        return {"settings": settings, "quantization": made}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the hooks away."""
        self._release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the hooks away."""
        self._release()

    def _release(self) -> None:
        if self._guard is not None:
            self._guard.remove()
        if self._turns is not None:
            self._turns.end()
        self._guard = self._turns = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a sequential schedule without an end, or without groups where it needs them."""
        self._release()
        if self.schedule == "joint":
            return
        if trainer.estimated_stepping_batches == float("inf"):
            raise LowRankError("schedule='sequential' needs the number of steps; set trainer.max_steps or max_epochs")
        if not _is_deepspeed(trainer):
            return
        (optimizer,) = trainer.optimizers
        assert self.adapters is not None  # made in setup
        if not any("factor" in group for group in optimizer.param_groups):
            raise ModelError(
                "schedule='sequential' under DeepSpeed needs an optimizer with the parameter groups of "
                "lowrank_lit.recovery.factor_groups(module); LowRankModule has them"
            )
        self._turns = Turns(optimizer, {factor: self.adapters.parameters(factor) for factor in FACTORS})

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Tell DeepSpeed's optimizer whose turn it is."""
        if self._turns is not None:
            self._turns.paused = _paused(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Pause the factor whose turn it is not."""
        if self.schedule == "sequential" and self.adapters is not None and self._turns is None:
            pause(self.adapters.parameters(_paused(trainer)))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge while the model is still on its device, unless it is still in pieces."""
        if not getattr(trainer.strategy, "zero_stage_3", False):
            self._merge(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Merge after ZeRO stage 3, and after a fit without a step, which has no end of training, and let go of the
        adapters."""
        self._merge(trainer, pl_module)
        forget(trainer, self._merged)

    def _merge(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.adapters is None or self.adapters.merged is not None:
            return
        self._merged = [parameter for factor in ("inner", "outer") for parameter in self.adapters.parameters(factor)]
        folder = Path(trainer.default_root_dir) / "unmerge" if self.unmerge and trainer.is_global_zero else None
        try:
            self.record = self.adapters.merge(unmerge_record=folder, root=_root(pl_module))
        except ExportError as error:  # not worth losing a recovery for
            rank_zero_warn(str(error))
            self.record = self.adapters.merge()

    def _starts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor] | None:
        config = self.settings.get("config")
        if config is None or not self.needs_statistics:
            return None
        compression = find_callback(trainer, LowRankCompression)
        result = None if compression is None else compression.result
        file = Path(trainer.default_root_dir) / "compressed" / _STARTS
        made_by = [None if result is None else result.plan.fingerprint, config, self.quantize and self.quantize_factors]
        key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()
        if result is not None and (kept := _load_starts(file, key)) is not None:
            return kept
        model, root = model_of(pl_module), _root(pl_module)
        with isolate_rng():  # the run is the same whether the values are computed or taken from disk
            found = adapter_starts(
                model,
                config,
                statistics=getattr(result, "statistics", None),
                batches=calibration_text(
                    trainer, "RankPreservingLoRA", None if compression is None else compression.batches
                ),
                device=trainer.strategy.root_device,
            )
        starts = {f"{root}.{name}" if root else name: value for name, value in found.items()}
        if result is not None and trainer.is_global_zero:
            _save_starts(file, key, starts)
        return starts


class FactorTuning(pl.Callback):
    """Train the factors themselves, all of their numbers, with everything else frozen.

    The rank stays what it is. Against LoRA on the factors it takes an optimizer state for every number of them, and
    recovers a little more; use a learning rate 5 to 10 times smaller, such as 1e-5 to 3e-5 for a model of 7B
    parameters, and no weight decay, which on balanced factors is a penalty on the nuclear norm. List it after the
    callback that compresses the model.

    Args:
        factors: ``both``, ``inner`` or ``outer``.

    Attributes:
        trainable_parameters: How many numbers train, None before the first fit.

    Raises:
        LowRankError: If ``factors`` is unknown.
        ModelError: At setup, if the model has no factored layer, or the factors have adapters or are quantised.
    """

    def __init__(self, factors: str = "both") -> None:
        super().__init__()
        if factors not in ("both", "inner", "outer"):
            raise LowRankError(f"factors='{factors}' is unknown; choose both, inner or outer")
        self.factors = factors
        self.trainable_parameters: int | None = None
        self._flags: list[tuple[nn.Parameter, bool]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze all but the factors before the optimizers are made."""
        if stage != "fit":
            return
        pl_module.configure_model()
        self._restore()
        _refuse_two(trainer)
        _require_factored(pl_module, "FactorTuning")
        trained: list[nn.Parameter] = []
        for name, layer in find_pairs(pl_module)[1].items():
            if is_quantised(layer):
                raise ModelError(f"layer '{name}' is quantised, so it cannot train; use RankPreservingLoRA for it")
            if self.factors in ("both", name.rpartition(".")[2]):
                trained.append(layer.get_parameter("weight"))
        if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in trained):
            rank_zero_warn(
                "FactorTuning: a small step is lost in 16-bit weights; load the model in float32 and train with "
                "trainer.precision=bf16-mixed"
            )
        self._flags = [(parameter, parameter.requires_grad) for parameter in pl_module.parameters()]
        pl_module.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_()
        self.trainable_parameters = sum(parameter.numel() for parameter in trained)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of weight decay."""
        decays = [group.get("weight_decay", 0) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if any(decays):
            rank_zero_warn(f"FactorTuning: weight decay {max(decays)} on factors lowers their rank; set it to 0")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give every parameter its ``requires_grad`` back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give every parameter its ``requires_grad`` back; the weights stay as they are."""
        self._restore()

    def _restore(self) -> None:
        for parameter, requires_grad in self._flags:
            parameter.requires_grad_(requires_grad)
        self._flags = []


def _check(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse what would fail only after the training."""
    _refuse_two(trainer)
    _require_factored(pl_module, "RankPreservingLoRA")
    refuse_sharded(trainer, "RankPreservingLoRA", at_end=True)


def _refuse_two(trainer: pl.Trainer) -> None:
    if find_callback(trainer, RankPreservingLoRA) and find_callback(trainer, FactorTuning):
        raise ModelError(
            "RankPreservingLoRA trains adapters beside frozen factors, and FactorTuning the factors themselves; list "
            "one of them"
        )


def _require_factored(pl_module: pl.LightningModule, callback: str) -> None:
    if not any(isinstance(module, FactoredLayer) for module in pl_module.modules()):
        raise ModelError(
            f"{type(pl_module).__name__} has no factored layer when {callback} is set up; "
            f"list LowRankCompression before {callback}"
        )


def _root(pl_module: pl.LightningModule) -> str:
    """Name of the model in the module."""
    names: dict[nn.Module, str] = {module: name for name, module in pl_module.named_modules()}
    return names[model_of(pl_module)]


def _paused(trainer: pl.Trainer) -> str:
    """The factor that the sequential schedule does not move in the coming step."""
    return "inner" if trainer.global_step < trainer.estimated_stepping_batches // 2 else "outer"


def _is_deepspeed(trainer: pl.Trainer) -> bool:
    return isinstance(trainer.strategy, pl.strategies.DeepSpeedStrategy)


def _saving(record: Mapping[str, Any]) -> str:
    """What quantising did, in two sentences."""
    factors, others = len(record["quantized"]), len(record["unquantized"])
    worst = f"{record['largest_product_error']:.3f} at most ({record['error_law']:.3f} by the law)"
    return (
        f"{factors} factors in NF4: {record['parameters']:,} numbers in {record['bytes'] / 2**20:.1f} MiB, "
        f"{8 * record['bytes'] / record['parameters']:.2f} bits each, {record['bits_per_weight']:.2f} bits for each "
        f"weight of the dense matrices; relative error of a product {worst}. {others} other linear layers (matrices "
        "that the plan leaves dense, the output embedding) keep their type."
    )


def _check_adapters(model: nn.Module, weights: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse weights whose factored layers hold other adapters, or other 4-bit factors, than the model's."""
    pairs = tuple(f"{name}." if name else "" for name, m in model.named_modules() if isinstance(m, FactoredLayer))
    own = {key: value.shape for key, value in model.state_dict().items() if key.startswith(pairs)}
    stored = {key.removeprefix(prefix): value.shape for key, value in weights.items() if key.startswith(prefix)}
    stored = {key: shape for key, shape in stored.items() if key.startswith(pairs)}
    different = sorted(key for key in own.keys() | stored.keys() if own.get(key) != stored.get(key))
    if different:
        key = different[0]
        has, wants = (None if key not in found else tuple(found[key]) for found in (stored, own))
        raise ModelError(
            f"'{key}' is {has} in the checkpoint and {wants} in this run: its adapters or 4-bit factors are others, or "
            "are merged; resume with the recipe that made it, from a checkpoint of before the end"
        )


def _load_starts(file: Path, key: str) -> dict[str, Tensor] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get("key") != key:
                return None
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):  # there is none yet, or it is damaged
        return None


def _save_starts(file: Path, key: str, starts: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with suppress(OSError, SafetensorError):  # a later run computes them again
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        save_file(dict(starts), partial, metadata={"key": key})
        partial.replace(file)
