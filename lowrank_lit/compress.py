"""From a dense model to a factored one: calibrate, take spectra, allocate ranks, learn from the compressed model,
factor."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowrank_lit import distributed
from lowrank_lit._version import __version__
from lowrank_lit.batches import as_batches, count_sequences, count_tokens, given_batch, split_single
from lowrank_lit.errors import LowRankError
from lowrank_lit.experts import ExpertsApart
from lowrank_lit.gradients import Loss, name_of
from lowrank_lit.overview import spectrum_cells
from lowrank_lit.paging import Workspace, release
from lowrank_lit.plan import RankPlan
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.settings import Settings
from lowrank_lit.streaming import Batch, paged
from lowrank_lit.study import Draft, Study
from lowrank_lit.surgery import count_parameters, stored_bytes, target_parameters

_NO_PART = frozenset(
    ("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "quantization_config")
)
"""What a configuration says of files, or of how a model is run, and not of what it computes; a plan is in the weights'
shapes already."""

_WIDENED = 2**22
"""Numbers of a tensor that are widened at a time, so that its hash needs no second copy of it."""


@dataclass(frozen=True)
class CompressionResult:
    """What a compression did.

    Attributes:
        plan: Rank and form of every target matrix.
        record: Figures, ready for JSON: ``keep_ratio`` {requested, achieved, whole_model}, ``parameters``
            {targets_dense, targets, model_dense, model}, ``bytes`` {dense, compressed} of the whole model in memory,
            ``seconds`` {calibrate, decompose, allocate, feedback, factor}, ``passes`` {forward, backward} over the
            calibration text, ``calibration`` {tokens, blocks, hash, mode}, ``predicted`` {nats, perplexity_ratio},
            ``settings``, ``notes``, ``weights_hash`` of the dense model (:func:`weights_hash`), and ``spectra``, a few
            singular values of every block and projection (:func:`lowrank_lit.overview.spectrum_cells`).
    """

    plan: RankPlan
    record: dict[str, Any]

    def __repr__(self) -> str:
        return f"CompressionResult({self.plan!r}, record of {', '.join(self.record)})"


def compress(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    keep_ratio: float,
    device: torch.device | str | None = None,
    workspace: str | Path | None = None,
    resume: str | Path | None = None,
    loss: Loss | None = None,
    **settings: Any,
) -> CompressionResult:
    """Factor the linear layers of ``model`` in place, within a budget of parameters.

    Each target weight ``W`` becomes two factors (or pivot rows and coefficients) of the rank that the allocator gave
    it, the best approximation of that rank in the metric; a matrix whose factors would store no less than the matrix
    itself stays dense. Experts of a mixture that transformers keeps as fused parameters are targets one by one, and
    layers of their own afterwards (:class:`lowrank_lit.experts.SeparateExperts`). Nothing is replaced before everything
    has been computed, so an error leaves the model as it was.
    The processes of a job share the work in :func:`lowrank_lit.distributed.cooperating`.

    Args:
        model: Any module made of ``nn.Linear`` (or transformers' ``Conv1D``) layers, or of transformers' fused experts.
        batches: Calibration batches: dictionaries of keyword arguments (``input_ids``, ``attention_mask``), or tensors
            for the first positional argument: token ids ``(batch, length)`` or features ``(batch, ..., columns)``.
            A single batch is split by its sequences, because ``feedback="anchored"`` holds a part of the text out.
            Entries of a dictionary that the model's forward does not take are for the ``loss``; of a tuple come as many
            arguments as the forward has without a default, see :func:`lowrank_lit.batches.as_batches`.
        keep_ratio: Share of the target matrices' parameters to keep, in (0, 1].
        device: Where to calibrate and factor; ``None`` is where the model is. Statistics of activations alone take one
            block at a time there, those of gradients the whole model (with a workspace, one block at a time too).
        workspace: Folder on a disk for what waits between the stages: statistics, spectra, candidates, predictions,
            factors, and hidden states between blocks beyond 1 GiB. Memory then holds one block at a time of a model
            whose weights are mapped from their files, which is what ``from_pretrained(..., dtype="auto")`` gives. The
            compressed model's factors are mapped from there too; the files vanish with them. ``None`` keeps all in
            memory.
        resume: Folder in which the statistics of the dense model are kept for a run that is interrupted after them: the
            next one with the same model, text and settings goes on from there. :func:`lowrank_lit.cache.
            save_compression` removes them. ``None`` keeps none.
        loss: Whose gradients the metrics ``two_sided``, ``fisher_*`` and the allocator ``zero_sum`` take, for a model
            that predicts no next tokens: called with the model and a batch as in ``batches``, targets included, its
            tensors on the model's device; returns the loss SUMMED over its targets (rows, tokens), with a gradient.
            The whole model runs at once then, and predicted losses, whose unit is not known, are left out of the
            record. ``None`` is the cross-entropy of next tokens.
        settings: Further fields of :class:`lowrank_lit.settings.Settings`: ``preset`` (``best``, ``fast``,
            ``unirank``), or ``metric``, ``allocator``, ``feedback``, ``rounds``, ``select``, ``storage``, ``targets``,
            ``min_rank``, ``quantum``, ``damping``, ``shrinkage``, ``alpha``, ``labels``, ``importance_of``,
            ``cost_aware``, ``nested``.

    Returns:
        The plan and the record.

    Raises:
        BudgetError: If the budget is outside (0, 1] or below the rank floor.
        LowRankError: If a setting is unknown or out of range.
        ModelError: If a pattern matches nothing, or nothing can be factored.
        DataError: If the batches are malformed, or hold fewer tokens than ``min_rank``.
        NonFiniteError: If weights or activations are NaN or infinite; names the layer.
    """
    chosen = settings_of(keep_ratio, settings)
    with working_in(workspace, model) as space, ExpertsApart(model) as apart:
        study = Study(model, batches, targets=chosen.targets, device=device, workspace=space, loss=loss)
        with apart.undone():
            weights = weights_hash(model)
            identity = fingerprint(model, study.batches, chosen, loss, weights=weights)
        study.collection.resume = None if resume is None else (Path(resume), identity)
        before = (count_parameters(model), stored_bytes(model))
        draft = study.draft(chosen)
        draft.plan = replace(draft.plan, fingerprint=identity)
        study.apply(draft)
        apart.keep(list(study.targets), mapped=space is not None)
    if hasattr(model, "save_pretrained") and any(entry.form != "dense" for entry in draft.plan.matrices):
        from lowrank_lit.hub import attach  # transformers is there, for the model is one of its own

        attach(model, draft.plan)  # the model's own save_pretrained then writes the plan
    return CompressionResult(draft.plan, distributed.agreed("the record", _record(study, draft, before, weights)))


@contextmanager
def working_in(workspace: str | Path | None, model: nn.Module) -> Iterator[Workspace | None]:
    """A workspace in a folder for the time of the context, in which a forward of the model holds one block of mapped
    weights at a time; ``None`` for ``None``.

    Raises:
        LowRankError: If the folder cannot be made or written to.
    """
    if workspace is None:
        yield None
        return
    with closing(Workspace(workspace)) as space, paged(find_repeating_blocks(model)):
        yield space


def settings_of(keep_ratio: float, settings: Mapping[str, Any]) -> Settings:
    """Settings from keyword arguments, with an unknown name refused by what was probably meant.

    Raises:
        LowRankError: If a name or value is no setting.
    """
    known = Settings.__dataclass_fields__
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"
            raise LowRankError(f"'{name}' is no setting of a compression{meant}")
    return Settings(keep_ratio, **settings)


def plan_ranks(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    keep_ratio: float,
    device: torch.device | str | None = None,
    workspace: str | Path | None = None,
    loss: Loss | None = None,
    **settings: Any,
) -> RankPlan:
    """The plan that :func:`compress` would follow, with the model left as it is; arguments and errors as there."""
    chosen = settings_of(keep_ratio, settings)
    with working_in(workspace, model) as space, ExpertsApart(model) as apart:
        study = Study(model, batches, targets=chosen.targets, device=device, workspace=space, loss=loss)
        plan = study.draft(chosen).plan
        with apart.undone():
            return replace(plan, fingerprint=fingerprint(model, study.batches, chosen, loss))


def weights_hash(model: nn.Module) -> str:
    """Identity of a model's weights alone, to tell two checkpoints apart: SHA-256 in 64 hexadecimal digits.

    Over name, shape and values of every parameter and stored buffer, in the order of their names. Types of fewer than
    32 bits are widened first, so that a checkpoint in bfloat16 has one hash, whether it is loaded so or in float32.
    Configuration, text and settings do not enter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        kind = "float" if tensor.is_floating_point() else str(tensor.dtype)
        narrow = tensor.is_floating_point() and tensor.element_size() < 4
        digest.update(f"{name} {kind} {tuple(tensor.shape)}\n".encode())
        for part in tensor.detach().reshape(-1).split(_WIDENED):
            digest.update(_raw(part.float() if narrow else part))
        release([tensor])
    return digest.hexdigest()


def loaded_hash(model: nn.Module, weights: str | None = None) -> str:
    """Identity of a model's weights as they are in memory, which decide what it computes: :func:`weights_hash`, given
    or taken, and their types; 32 hexadecimal digits."""
    types = {name: str(tensor.dtype) for name, tensor in sorted(model.state_dict().items())}
    return hashlib.sha256(f"{weights or weights_hash(model)} {types}".encode()).hexdigest()[:32]


def fingerprint(
    model: nn.Module,
    batches: Sequence[Any],
    settings: Settings,
    loss: Loss | None = None,
    *,
    weights: str | None = None,
) -> str:
    """Identity of a compression: hash of the model's weights and configuration, the calibration tokens, the settings
    and the version.

    The configuration says what no weight does, such as how positions are rotated or scaled. Where the model was loaded
    from and by which version of transformers does not count.

    Two compressions with the same fingerprint give the same result. Of a loss of the caller's, its targets count, its
    name and its ``identity``, an attribute that it may have; not its code. ``weights`` is the model's
    :func:`weights_hash`, where it is known.
    """
    digest = hashlib.sha256(f"{__version__} {settings}".encode())
    digest.update(_configuration(model).encode())
    digest.update(loaded_hash(model, weights).encode())
    own = split_single(as_batches(batches, model), whole=loss is not None)
    digest.update(batches_hash(own).encode())
    if loss is not None:
        digest.update(f"{name_of(loss)} {getattr(loss, 'identity', '')}".encode())
        digest.update(batches_hash([_leaves(batch) for batch in own]).encode())
    return digest.hexdigest()[:32]


def _configuration(model: nn.Module) -> str:
    """The model's configuration as JSON; empty where it has none."""
    describe = getattr(getattr(model, "config", None), "to_dict", None)
    if describe is None:
        return ""
    values = {key: value for key, value in describe().items() if key not in _NO_PART and not key.startswith("_")}
    return json.dumps(values, sort_keys=True, default=str)


def batches_hash(batches: Sequence[Batch]) -> str:
    """SHA-256 of the calibration batches, in hexadecimal."""
    digest = hashlib.sha256()
    for batch in batches:
        for key, value in sorted(batch.items()):
            digest.update(json.dumps([key, list(value.shape)]).encode())
            digest.update(_raw(value))
    return digest.hexdigest()


def _leaves(batch: Batch) -> dict[str, Tensor]:
    """All tensors of a batch as it was given, by their place in it."""
    leaves = tree_leaves(given_batch(batch))
    return {str(place): leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}


def _raw(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it lies on the CPU in one piece."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def _record(study: Study, draft: Draft, before: tuple[int, int], weights: str) -> dict[str, Any]:
    plan, model = draft.plan, study.model
    stored = target_parameters(model, plan)
    if stored != plan.parameters:
        raise AssertionError(f"the model stores {stored} target parameters, the plan says {plan.parameters}")
    parameters = count_parameters(model)
    nats = plan.predicted_nats
    return {
        "keep_ratio": {
            "requested": plan.requested_keep_ratio,
            "achieved": plan.keep_ratio,
            "whole_model": parameters / before[0],
        },
        "parameters": {
            "targets_dense": plan.dense_parameters,
            "targets": stored,
            "model_dense": before[0],
            "model": parameters,
        },
        "bytes": {"dense": before[1], "compressed": stored_bytes(model)},
        "seconds": draft.seconds,
        "passes": draft.passes,
        "calibration": {
            "tokens": sum(count_tokens(batch) for batch in study.batches),
            "blocks": count_sequences(study.batches),
            "hash": batches_hash(study.batches),
            "mode": study.collection.mode,
        },
        "predicted": None if nats is None else {"nats": nats, "perplexity_ratio": math.exp(min(nats, 700.0))},
        "settings": draft.settings.resolved(),
        "notes": list(plan.notes),
        "weights_hash": weights,
        "spectra": spectrum_cells({matrix.name: draft.spectra[matrix.name] for matrix in plan.matrices}),
    }
