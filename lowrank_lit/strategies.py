"""DeepSpeed's ZeRO for the recovery of a compressed model, on GPUs and on CPUs.

ZeRO (arXiv:1910.02054) splits over the processes what each of them would keep a copy of: stage 1 the optimizer's
moments, stage 2 also the gradients, stage 3 also the weights. The compression comes before that, with the whole model
in the memory of every process; DeepSpeed takes the factored and adapted model from there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import nn

from lowrank_lit._checkpoints import disk_reason, require_shards, unwritten
from lowrank_lit.distributed import unreached
from lowrank_lit.errors import LowRankError
from lowrank_lit.extras import load_deepspeed

STAGES = (1, 2, 3)
OFFLOADS = ("none", "optimizer", "all")
_TAG = "checkpoint"
_BUCKET = (
    50_000_000  # numbers that are sent at once; DeepSpeed's own half a billion costs 2 GiB, and adapters are small
)


class LowRankDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed with ZeRO stage 1, 2 or 3 under the callbacks of this package.

    Works with every optimizer of :func:`lowrank_lit.optimizers.build_optimizer` and with the parameter groups of
    :func:`lowrank_lit.recovery.factor_groups`; on a CPU (``trainer.accelerator=cpu``) processes speak by gloo. What is
    different from Lightning's own strategy beside that:

    - The model is built whole in every process, so that it can be compressed, and split when training begins.
    - When the fit has ended and before any ``on_fit_end``, the module is whole again in every process, on the CPU, as
      at its beginning: adapters are merged and the model is exported as without DeepSpeed. Of stage 3 this takes the
      host memory that the model took before.
    - A checkpoint is a folder, written beside its name and moved there when every process has written its part. It
      resumes with the same number of processes; ``lowrank-lit convert`` makes a model of it.

    Factors in NF4 work in every stage: stage 3 splits their packed bytes like any weight, while the scales of their
    blocks (a byte for 64 numbers, four without double quantisation) stay whole in every process.

    Args:
        stage: Of ZeRO, 1 to 3; None is the stage of ``config``, or 2.
        offload: What is kept in the host's memory: ``none``, ``optimizer`` (with its step), or ``all``, which is the
            optimizer and the split weights and needs stage 3. None is what ``config`` says.
        config: DeepSpeed's own configuration, a dictionary or the path of a JSON file, for what has no argument here.
        timeout: Seconds that a process waits for the others before it gives up.

    Raises:
        LowRankError: If DeepSpeed is not installed, a setting is out of its range, or ``config`` says otherwise.

    Example:
        >>> pl.Trainer(strategy=LowRankDeepSpeed(stage=3), devices=8)  # doctest: +SKIP
    """

    def __init__(
        self,
        stage: int | None = None,
        *,
        offload: str | None = None,
        config: dict[str, Any] | str | Path | None = None,
        timeout: float = 1800.0,
    ) -> None:
        load_deepspeed("LowRankDeepSpeed")
        if not 0 < timeout < float("inf"):
            raise LowRankError(f"LowRankDeepSpeed.timeout={timeout} is out of range; give seconds, more than 0")
        settings = _settings(stage, offload, _read(config))
        super().__init__(config=settings, timeout=timedelta(seconds=timeout))
        self._interrupted = False

    @property
    def root_device(self) -> torch.device:
        """The device of this process; a CPU has the index that DeepSpeed asks every device for."""
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        """Start the processes' communication.

        Raises:
            LowRankError: If the trainer's accelerator is neither a CPU nor a GPU of NVIDIA or AMD.
        """
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
            return
        if not isinstance(self.accelerator, CPUAccelerator):
            raise LowRankError(
                f"LowRankDeepSpeed does not run on {type(self.accelerator).__name__}; set trainer.accelerator to cuda "
                "or cpu"
            )
        from deepspeed.accelerator import get_accelerator, set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
        from deepspeed.ops import __compatible_ops__ as compatible_ops

        if get_accelerator().device_name() != "cpu":  # there is a GPU, and the trainer is not to use it
            set_accelerator(CPU_Accelerator())
        # Its collectives through shared memory are compiled on the spot, and wait for ever for a process that died.
        compatible_ops["deepspeed_shm_comm"] = False
        DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's own adds nothing but a check for CUDA

    def setup_distributed(self) -> None:
        """Start the communication; of CPUs there is no index to check.

        Raises:
            LowRankError: If the processes do not find each other in time; names the address.
        """
        try:
            if isinstance(self.accelerator, CUDAAccelerator):
                super().setup_distributed()
                return
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        except (OSError, RuntimeError) as error:  # torch's errors of stores and networks are RuntimeErrors
            raise unreached(error, self._timeout.total_seconds() if self._timeout else None) from error

    def setup(self, trainer: pl.Trainer) -> None:
        """Hand the model to DeepSpeed, with weights of the types that the module has given them."""
        plugin: Any = self.precision_plugin
        if plugin.precision == "32-true":  # Lightning's would make float32 of 16-bit weights, and of the adapters' base
            plugin.convert_module = lambda module: module
        super().setup(trainer)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing: a model is built whole, to be compressed."""
        with nullcontext():
            yield

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        """Let DeepSpeed split the model; in stage 3 one parameter after the other comes to the device, never all."""
        if not self.zero_stage_3:
            return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        _move_all_but_parameters(model, self.root_device)
        unmoved: Any = model
        unmoved.to = lambda *_, **__: model  # DeepSpeed would move the whole model before it splits it
        try:
            return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        finally:
            del unmoved.to

    def on_exception(self, exception: BaseException) -> None:
        """Remember that other processes may not answer any more."""
        self._interrupted = True
        super().on_exception(exception)

    def teardown(self) -> None:
        """Give every process the whole module back, unless the run has failed."""
        module = self.lightning_module
        engine: Any = self.model
        if hasattr(engine, "destroy"):  # DeepSpeed's, and not the module itself
            if module is not None and not self._interrupted:
                make_whole(module)
            engine.destroy()
            self.model = module
        super().teardown()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write every process's part of a checkpoint beside its name, and move the folder there when all have.

        Raises:
            ExportError: In every process, if one could not write its part (full disk): nothing is left of it, and an
                earlier checkpoint of that name is as it was.
        """
        target = Path(self.broadcast(filepath))
        engine: Any = self.deepspeed_engine
        if storage_options is not None or engine.use_node_local_storage():
            super().save_checkpoint(checkpoint, target, storage_options)
            return
        part, old = (target.with_name(f"{target.name}.{kind}") for kind in ("part", "old"))
        if self.is_global_zero:
            for left in (part, old):
                shutil.rmtree(left, ignore_errors=True)
        self.barrier("no part of an earlier attempt is left")
        # What an error kept a process from would leave the others waiting for it: DeepSpeed itself meets none.
        with _errors_kept(engine) as kept:
            state = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
            engine.save_checkpoint(
                str(part),
                client_state=state,
                tag=_TAG,
                save_latest=False,
                exclude_frozen_parameters=self.exclude_frozen_parameters,
            )
        if self.is_global_zero and not kept:
            with _kept(kept):
                (part / "latest").write_text(_TAG, encoding="utf-8")
        self._end_together(kept, part, target)
        if self.is_global_zero:
            with _kept(kept):
                if target.is_dir():
                    target.replace(old)
                part.replace(target)
            if not target.exists() and old.exists():
                old.replace(target)
            shutil.rmtree(old, ignore_errors=True)
        self._end_together(kept, part, target)

    def _end_together(self, kept: list[str], part: Path, target: Path) -> None:
        """Go on where no process has met an error, else remove the part and raise the first one in all."""
        found: list[Any] = [list(kept)]
        if dist.is_initialized():
            found *= self.world_size
            dist.all_gather_object(found, list(kept))
        met = [(number, errors[0]) for number, errors in enumerate(found) if errors]
        if not met:
            return
        if self.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
        raise unwritten(target, f"process {met[0][0]}: {met[0][1]}")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load this process's part.

        Raises:
            ExportError: If a part is missing, the path is no folder of DeepSpeed's, or it was written by another number
                of processes or in another stage.
        """
        require_shards(Path(checkpoint_path), processes=self.world_size, stage=self.stage)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def gradients_are_finite(self) -> bool:
        """Whether no gradient of the coming step is NaN or infinite, in any process; all of them call it."""
        engine = self.deepspeed_engine
        optimizer: Any = engine.optimizer
        if not engine.is_gradient_accumulation_boundary() or not hasattr(optimizer, "has_overflow"):
            return True
        return not optimizer.has_overflow()

    @property
    def stage(self) -> int:
        """Stage of ZeRO."""
        assert isinstance(self.config, dict)
        return int(self.config["zero_optimization"]["stage"])


@contextmanager
def _errors_kept(engine: Any) -> Iterator[list[str]]:
    """Write what an engine of DeepSpeed's saves; errors of the disk are listed, not raised."""
    found: list[str] = []
    writer = engine.checkpoint_engine
    places = [(writer, "save"), (writer, "makedirs"), (engine, "_copy_recovery_script")]

    def careful(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> None:
            with _kept(found):
                if not found:
                    function(*args, **kwargs)

        return called

    for owner, name in places:
        setattr(owner, name, careful(getattr(owner, name)))
    try:
        yield found
    finally:
        for owner, name in places:
            delattr(owner, name)  # what the class has is there again


@contextmanager
def _kept(found: list[str]) -> Iterator[None]:
    """Note what keeps a file from being written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        found.append(disk_reason(error))


def make_whole(module: nn.Module) -> None:
    """Undo ZeRO stage 3: every process has every parameter again, on the CPU; the Parameter objects stay the same.

    All processes call it. Does nothing to a module that is not split.
    """
    import deepspeed

    for parameter in dict.fromkeys(module.parameters()):  # one at a time: a GPU need not hold the whole model
        if not hasattr(parameter, "ds_id"):
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.data.detach().to("cpu", copy=True)
        parameter.data = whole
        for name in [name for name in vars(parameter) if name.startswith("ds_") or name in _OF_PARTITIONS]:
            delattr(parameter, name)
    for child in module.modules():
        if hasattr(child, "_original_parameters"):  # DeepSpeed's dictionary gathers what is looked up in it
            child._parameters = dict(child._parameters)
            del child._original_parameters


def _move_all_but_parameters(module: nn.Module, device: torch.device) -> None:
    """Move buffers, metrics and the scales of 4-bit weights."""
    children = list(module.modules())
    kept = [child._parameters for child in children]
    try:
        for child in children:
            child._parameters = {}
        module.to(device)
    finally:
        for child, parameters in zip(children, kept, strict=True):
            child._parameters = parameters
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.to(device)


# Methods and marks of DeepSpeed on a parameter that it has split, beside those that begin with ds_.
_OF_PARTITIONS = frozenset(
    (
        *("all_gather", "partition", "reduce_gradients_at_owner", "partition_gradients", "aligned_size"),
        *("padding_size", "partition_numel", "convert_to_zero_parameters", "all_gather_coalesced"),
        *("is_external_param", "nvme_swapper"),
    )
)


def _read(config: dict[str, Any] | str | Path | None) -> dict[str, Any]:
    """The raw configuration, a copy of it."""
    config = os.environ.get(DeepSpeedStrategy.DEEPSPEED_ENV_VAR) if config is None else config
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LowRankError(
                f"LowRankDeepSpeed.config='{config}' cannot be read ({error}); give a JSON file"
            ) from error
    if not isinstance(config, Mapping):
        raise LowRankError("LowRankDeepSpeed.config is no dictionary; see https://www.deepspeed.ai/docs/config-json")
    return json.loads(json.dumps(dict(config)))  # type: ignore[no-any-return]


def _settings(stage: int | None, offload: str | None, config: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration: what the user gave, and what it leaves open."""
    zero = config.setdefault("zero_optimization", {})
    given = zero.get("stage")
    if None not in (stage, given) and stage != given:
        raise LowRankError(
            f"LowRankDeepSpeed.stage={stage} and config['zero_optimization']['stage']={given} contradict each other; "
            "leave one out"
        )
    chosen = given if stage is None else stage
    zero["stage"] = 2 if chosen is None else chosen
    if zero["stage"] not in STAGES:
        raise LowRankError(f"LowRankDeepSpeed.stage={zero['stage']} is out of range; choose 1, 2 or 3, or strategy=ddp")
    for key, owner in (("optimizer", "model.optimizer"), ("scheduler", "model.warmup_steps")):
        if key in config:
            raise LowRankError(
                f"LowRankDeepSpeed.config['{key}'] would replace what the module trains with; leave it out and set "
                f"{owner}"
            )
    _set_offload(zero, offload)
    zero.setdefault("reduce_bucket_size", _BUCKET)
    zero.setdefault("allgather_bucket_size", _BUCKET)
    # DeepSpeed knows its own optimizers by name, and would rather compile one of them for the host's CPU.
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config


def _set_offload(zero: dict[str, Any], offload: str | None) -> None:
    if offload is None:
        return
    if offload not in OFFLOADS:
        raise LowRankError(f"LowRankDeepSpeed.offload='{offload}' is unknown; choose one of {', '.join(OFFLOADS)}")
    if offload == "all" and zero["stage"] != 3:
        raise LowRankError(
            f"LowRankDeepSpeed.offload='all' moves split weights to the host, and stage {zero['stage']} does not split "
            "them; set stage=3, or offload='optimizer'"
        )
    for key, wanted in (("offload_optimizer", offload != "none"), ("offload_param", offload == "all")):
        device = zero.get(key, {}).get("device", "none") if key in zero else None
        if device is not None and (device != "none") != wanted:
            raise LowRankError(
                f"LowRankDeepSpeed.offload='{offload}' and config['zero_optimization']['{key}'] contradict each other; "
                "leave one out"
            )
        if wanted:
            zero.setdefault(key, {"device": "cpu"})
