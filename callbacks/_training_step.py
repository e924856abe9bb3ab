"""A project's own ``training_step`` outside of training: a loss to differentiate, and what the forward is given."""

from __future__ import annotations

import hashlib
import inspect
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowrank_lit.errors import GradientError, LowRankError, reason_of
from lowrank_lit.gradients import frozen
from lowrank_lit.streaming import POSITIONAL, evaluating, moved_around

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_OF_TORCH = frozenset(nn.Module().__dict__)
_REMEDY = "use metric='input' (preset='unirank')"


class TrainingStepLoss:
    """The loss of a module's ``training_step``, as :func:`lowrank_lit.compress` takes it.

    A training step returns a mean, which is multiplied by the rows of the batch. The step runs in evaluation mode, with
    random numbers that depend on the batch alone; logging and optimizers do nothing in it, and afterwards the module
    has the state that it had: mode, buffers, attributes, metrics of torchmetrics. What a step writes into parameters by
    itself (a moving average of the weights) is not put back.

    Args:
        trainer: Of the fit.
        module: Of the project.

    Attributes:
        identity: Hash of the step's source, which counts for the fingerprint of a compression.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self.__name__ = f"{type(module).__name__}.training_step, a mean times the rows of the batch"
        try:
            source = inspect.getsource(type(module).training_step)
        except (OSError, TypeError):  # typed into an interpreter
            source = ""
        self.identity = hashlib.sha256(source.encode()).hexdigest()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss summed over the rows of ``batch``, which is what the project's loader gives.

        Raises:
            GradientError: If the step does not run, or returns no loss.
        """
        name = type(self._module).__name__
        if not self._module.automatic_optimization:
            raise GradientError(f"{name} optimises by hand, so that its training_step returns no loss; {_REMEDY}")
        place = next(model.parameters()).device
        with guarded(self._trainer, self._module, batch), frozen(self._module), ExitStack() as stack:
            if model is not self._module:  # a head beside the model that is compressed
                stack.enter_context(moved_around(self._module, [("", model)], place))
            try:
                output = self._module.training_step(*_arguments(self._trainer, self._module, batch, place))
            except (LowRankError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the step is the user's, and may raise anything
                raise GradientError(
                    f"training_step of {name} does not run on the calibration batches ({type(error).__name__}: "
                    f"{reason_of(error)}); {_REMEDY}"
                ) from error
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise GradientError(f"training_step of {name} returns no loss; {_REMEDY}")
        return loss * rows_of(batch)


class _Reached(BaseException):
    """Ends a step at the forward; no handler of the user's may take it for an error of his own."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = (args, kwargs)


def forward_arguments(
    trainer: pl.Trainer, module: pl.LightningModule, model: nn.Module, batch: Any
) -> dict[str, Tensor]:
    """The tensors that ``training_step`` hands to the model's forward for a batch; nothing is computed in the model.

    Returns:
        By the name of the argument, the first positional one by :data:`~lowrank_lit.streaming.POSITIONAL`, labels left
        out; empty where the step does not call the forward, or not with tensors.
    """
    signature = inspect.signature(model.forward)
    if not is_overridden("training_step", module):
        return {}
    own = model.__dict__.get("forward")

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(args, kwargs)

    place = next(model.parameters()).device
    with guarded(trainer, module, batch), torch.no_grad():
        model.forward = reached
        try:
            module.training_step(*_arguments(trainer, module, batch, place))
        except _Reached as call:
            return _named(signature, *call.arguments)
        except Exception:  # the step is the user's; whoever needs its loss says what is wrong with it
            return {}
        finally:
            del model.__dict__["forward"]
            if own is not None:
                model.forward = own
    return {}


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError:  # the step calls it wrongly, and will say so in training
        return {}
    found: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found |= {POSITIONAL: value[0]} if value and not found else {}
        else:
            first = args and not found and name != "input_ids" and isinstance(value, Tensor) and value.ndim > 1
            found[POSITIONAL if first else name] = value
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and name != "labels"}


def rows_of(batch: Any) -> int:
    """Rows of a batch: the length of its first tensor."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _arguments(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, place: torch.device) -> tuple[Any, ...]:
    """What Lightning would call ``training_step`` with, for the first batch of an epoch."""
    known = list(inspect.signature(module.training_step).parameters)
    if "dataloader_iter" in known:
        raise GradientError(f"training_step of {type(module).__name__} reads the loader itself; {_REMEDY}")
    whole = trainer.strategy.batch_to_device(batch, device=place)  # with the project's own hooks on a batch
    return (whole, 0) if len(known) > 1 else (whole,)


@contextmanager
def guarded(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Iterator[None]:
    """The context of a step outside of training: it logs nothing, steps no optimizer, and leaves no trace."""
    loggers, results = trainer.loggers, _Silenced(module, trainer.world_size)
    with isolate_rng(), evaluating(module), _unchanged(module), results:
        torch.manual_seed(_seed_of(batch))  # whatever process reads it, and in whatever order
        trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            yield
        finally:
            trainer.loggers = loggers


def _seed_of(batch: Any) -> int:
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()), None)
    if first is None:
        return 0
    return zlib.crc32(first.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


class _Silenced:
    """Replaces what a module asks its trainer for, for the time of the context."""

    def __init__(self, module: pl.LightningModule, processes: int) -> None:
        self._modules = [part for part in module.modules() if isinstance(part, pl.LightningModule)]
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)  # of nothing that anyone has

        def nothing(*args: Any, **kwargs: Any) -> None:
            return None

        def refused(*args: Any, **kwargs: Any) -> Any:
            raise GradientError(f"training_step gathers over processes, which read other batches; {_REMEDY}")

        names = ("log", "log_dict", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
        self._stubs: dict[str, Any] = dict.fromkeys((*names, "lr_schedulers", "print"), nothing)
        self._stubs["optimizers"] = lambda *args, **kwargs: optimizer
        if processes > 1:
            self._stubs["all_gather"] = refused

    def __enter__(self) -> None:
        self._own = [
            {name: part.__dict__[name] for name in self._stubs if name in part.__dict__} for part in self._modules
        ]
        for part in self._modules:
            part.__dict__.update(self._stubs)

    def __exit__(self, *error: object) -> None:
        for part, own in zip(self._modules, self._own, strict=True):
            for name in self._stubs:
                part.__dict__.pop(name, None)
            part.__dict__.update(own)


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Buffers and attributes of all parts of a module come back as they were, what torch keeps of them aside."""
    kept = [_Kept(part) for part in module.modules()]
    try:
        yield
    finally:
        for part in kept:
            part.restore()


class _Kept:
    """State of one module: its attributes, the contents of tensors and containers among them, and its buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = {name: value for name, value in module.__dict__.items() if name not in _OF_TORCH}
        self._buffers = dict(module._buffers)
        values = [*self._attributes.values(), *self._buffers.values()]
        self._tensors = [(value, value.detach().clone()) for value in values if isinstance(value, Tensor)]
        self._containers = [(value, value.copy()) for value in values if type(value) in _CONTAINERS]

    def restore(self) -> None:
        own = self._module.__dict__
        for name in [name for name in own if name not in _OF_TORCH and name not in self._attributes]:
            del own[name]
        own.update(self._attributes)
        self._module._buffers.clear()
        self._module._buffers.update(self._buffers)
        for tensor, content in self._tensors:
            tensor.data.copy_(content)  # unseen by autograd: a loss may wait for its backward
        for container, content in self._containers:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)
