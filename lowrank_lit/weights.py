"""Tensors of a model against those of a folder: no weight is left to chance when one is saved or loaded."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_lit.errors import ExportError, ModelError, NonFiniteError
from lowrank_lit.experts import SeparateExperts
from lowrank_lit.folders import read_shapes
from lowrank_lit.paging import DTYPES, release, save_tensors
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.surgery import apply_plan

_FACTOR = re.compile(r"\.(inner\.weight|outer\.(weight|bias)|positions)$")
_GUARD = (0,)


def fit_names(plan: RankPlan, model: PreTrainedModel) -> tuple[RankPlan, tuple[str, ...]]:
    """The plan with the names that its matrices have in this class of the model, and those that have no place in it.

    The decoder alone (``AutoModel``) has ``layers.0...`` where the language model has ``model.layers.0...``, and no
    output head.
    """
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    matrices: list[MatrixPlan] = []
    dropped: list[str] = []
    position: dict[int, int] = {}  # of the matrices that stay, for the order of a nested plan
    for number, matrix in enumerate(plan.matrices):
        candidates = (matrix.name, matrix.name.removeprefix(prefix), prefix + matrix.name)
        name = next((candidate for candidate in candidates if candidate in present), None)
        if name is None and not _is_exported_class(model) and not matrix.name.startswith(prefix):
            dropped.append(matrix.name)
        else:  # a name that is nowhere stays as it is: the plan's own check reports it
            position[number] = len(matrices)
            matrices.append(replace(matrix, name=name or matrix.name))
    order = tuple(position[number] for number in plan.order if number in position)
    return replace(plan, matrices=tuple(matrices), order=order), tuple(dropped)


def _is_exported_class(model: PreTrainedModel) -> bool:
    return type(model).__name__ in (model.config.architectures or [])


def check_weights(model: PreTrainedModel, plan: RankPlan, dropped: tuple[str, ...], files: list[str]) -> None:
    """Compare the weight files with a model of the plan's layout, so that no weight is left to random initialisation.

    Every tensor of a planned matrix must be there in its shape, and no other factor. Beside those, the exported class
    must find all its weights; another class may lack a head, which transformers initialises and reports.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, converted = _names_in_model(model, read_shapes(files), expected)
    names = {matrix.name for matrix in plan.matrices if matrix.form != "dense"}
    planned = tuple(f"{matrix.name}." for matrix in plan.matrices)
    again = f"in the weight files of '{os.path.dirname(files[0])}'; export the model again"
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    # The row order of a pivot form; other buffers are the model's affair.
    parameters |= {name: buffer for name, buffer in model.named_buffers() if name.startswith(planned)}
    missing = _missing(model, parameters, found.keys())
    if converted or not _is_exported_class(model):
        missing = [name for name in missing if name.startswith(planned)]
    if missing:
        raise ExportError(f"tensor '{missing[0]}' is missing ({len(missing)} of {len(parameters)} are) {again}")
    prefix, heads = f"{model.base_model_prefix}.", tuple(f"{name}." for name in dropped)
    for name, shape in found.items():
        if name in expected:
            if name.startswith(planned) and shape != expected[name]:
                raise ExportError(f"tensor '{name}' has shape {shape}, the plan needs {expected[name]}, {again}")
            continue
        candidates = (name, name.removeprefix(prefix), prefix + name)
        if shape == _GUARD and any(candidate.removesuffix(".weight") in names for candidate in candidates):
            continue
        belongs = _FACTOR.search(name) or any(candidate.startswith(planned) for candidate in candidates)
        if belongs and not name.startswith(heads):
            raise ExportError(f"tensor '{name}' has no place in the plan {again}")


def _missing(model: PreTrainedModel, parameters: Mapping[str, Tensor], found: Iterable[str]) -> list[str]:
    """Parameters that are in no file, neither by themselves nor through a tied weight or a shared module."""
    names = set(found)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    names |= {name for pair in tied.items() if names.intersection(pair) for name in pair}
    covered = {id(parameters[name]) for name in names if name in parameters}
    # Names that the class says are computed, not stored.
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or []) or r"(?!)")
    return [name for name, value in parameters.items() if id(value) not in covered and not optional.search(name)]


def _names_in_model(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], expected: dict[str, Any]
) -> tuple[dict[str, tuple[int, ...]], bool]:
    """Shapes by the name that each tensor is loaded under, and whether transformers merges or splits some of them."""
    rename = renaming_of(model, expected)
    found: dict[str, tuple[int, ...]] = {}
    converted = False
    for original, shape in shapes.items():
        name, merged = rename(original)
        converted |= merged
        if not merged:
            found[name] = shape
    return found, converted


def renaming_of(model: PreTrainedModel, expected: dict[str, Any]) -> Callable[[str], tuple[str, bool]]:
    """What transformers does with the name of a tensor in a file: the name in the model, and whether the tensor is
    merged with others, or split.

    Args:
        model: May be on the meta device.
        expected: Its state dict, or one with the same names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]

    def rename(original: str) -> tuple[str, bool]:
        name, source = rename_source_key(original, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and original in expected:  # transformers then takes the name as it is
            name, source = original, None
        return name, source is not None

    return rename


def check_initialised(model: PreTrainedModel, plan: RankPlan) -> None:
    """For weights given as a dictionary, which only transformers sees: it marks what it loaded."""
    planned = tuple(f"{matrix.name}." for matrix in plan.matrices)
    for name, parameter in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if name.startswith(planned) and not getattr(parameter, "_is_hf_initialized", False):
            raise ExportError(f"tensor '{name}' is missing from state_dict; give every factor of the plan")


def weights_to_save(model: PreTrainedModel, plan: RankPlan | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict in the layout that loading will build, cast and checked; tied tensors stay tied.

    With the guard of a factored model, unless experts alone are factored: an empty tensor under the name that one
    weight had before it was factored. transformers without this package does not know the plan, builds the dense model
    and would leave that weight to chance with no more than a report; at a tensor of another shape it raises an error.
    """
    skeleton = _skeleton(model, plan)
    expected = skeleton.state_dict()
    weights: dict[str, Tensor] = model.state_dict()
    different = sorted(expected.keys() ^ weights.keys())
    if different:
        raise ModelError(
            f"'{different[0]}' is in the model or in its class and plan, not in both ({len(different)} are); "
            "give the plan the model was factored by, or None for a dense model"
        )
    linear = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear)}
    transposed = {
        f"{name}.weight"
        for name, module in skeleton.named_modules(remove_duplicate=False)
        if name in linear and type(module).__name__ == "Conv1D"
    }
    done: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in weights.items():
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), name in transposed)
        if key not in done or not tensor.numel():
            done[key] = _cast(name, tensor.T.contiguous() if name in transposed else tensor, dtype)
        weights[name] = done[key]
        if weights[name].shape != expected[name].shape:
            raise ModelError(
                f"'{name}' has shape {tuple(weights[name].shape)} in the model and {tuple(expected[name].shape)} "
                "by its config; make the two agree"
            )
    # Of an expert the unfactored model has no weight under that name.
    apart = tuple(f"{name}." for name, module in skeleton.named_modules() if isinstance(module, SeparateExperts))
    factored = [matrix.name for matrix in plan.matrices if matrix.form != "dense"] if plan else []
    guarded = next((name for name in factored if not name.startswith(apart)), None)
    if guarded is not None:
        weights[f"{guarded}.weight"] = torch.empty(_GUARD, dtype=weights[f"{guarded}.inner.weight"].dtype)
    return weights


def expect_guard(model: PreTrainedModel, plan: RankPlan) -> None:
    """Keep the guard of a folder out of the report of unexpected weights that transformers writes."""
    names = [re.escape(matrix.name) for matrix in plan.matrices if matrix.form != "dense"]
    if names:
        # An attribute of this model, not of its class.
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | {rf"(^|\.)({'|'.join(names)})\.weight$"}


def read_truncated(
    files: Iterable[str | os.PathLike[str]], plan: RankPlan, rename: Callable[[str], tuple[str, bool]]
) -> dict[str, Tensor]:
    """The tensors of weight files by their names there, of a factored matrix the components alone that ``plan`` keeps;
    reads no others.

    Args:
        files: safetensors files of an export in nested order.
        plan: A plan of ranks no larger than those in the files.
        rename: See :func:`renaming_of`.

    Raises:
        ExportError: If a factor has fewer components than the plan needs, or none is there.
    """
    ranks = {matrix.name: matrix.rank for matrix in plan.matrices if matrix.form == "factored"}
    wanted = {f"{name}.inner.weight": (slice(rank), slice(None)) for name, rank in ranks.items()}
    wanted |= {f"{name}.outer.weight": (slice(None), slice(rank)) for name, rank in ranks.items()}
    weights: dict[str, Tensor] = {}
    missing = set(wanted)
    for file in files:
        with safe_open(os.fspath(file), framework="pt") as opened:
            for stored in opened.keys():  # noqa: SIM118  (not a mapping)
                name, _ = rename(stored)
                if name not in wanted:
                    if name.removesuffix(".weight") not in ranks:  # the guard
                        weights[stored] = opened.get_tensor(stored)
                    continue
                missing.discard(name)
                weights[stored] = opened.get_slice(stored)[wanted[name]].contiguous()
                side = 0 if wanted[name][1] == slice(None) else 1
                if weights[stored].shape[side] != wanted[name][side].stop:
                    raise ExportError(
                        f"tensor '{stored}' in '{file}' has {weights[stored].shape[side]} components, the plan needs "
                        f"{wanted[name][side].stop}; export the model again"
                    )
    if missing:
        raise ExportError(f"tensor '{min(missing)}' is in no weight file; export the model again")
    return weights


def _skeleton(model: PreTrainedModel, plan: RankPlan | None) -> PreTrainedModel:
    """An empty model of the same class and plan, as loading builds it."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # the layout is the same, and this one needs no device
    with torch.device("meta"):
        skeleton = type(model)(config)
    if plan is not None:
        apply_plan(skeleton, plan)
    return skeleton


@contextmanager
def one_by_one() -> Iterator[None]:
    """For the time of the context transformers writes weight files one tensor at a time.

    Its own writer leaves all that it has read of mapped weights in memory, and it has no setting for another one.
    """
    from transformers import modeling_utils

    name = "safe_save_file"
    own: Any = getattr(modeling_utils, name, None)

    def write(tensors: Mapping[str, Tensor], file: str, metadata: Mapping[str, str] | None = None) -> None:
        if all(tensor.dtype in DTYPES for tensor in tensors.values()):
            save_tensors(file, tensors, metadata)
        else:
            own(tensors, file, metadata=metadata)

    if own is not None:  # where a later release writes in another way, nothing but memory is lost
        setattr(modeling_utils, name, write)
    try:
        yield
    finally:
        if own is not None:
            setattr(modeling_utils, name, own)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if tensor.is_meta:
        raise ModelError(f"'{name}' is on the meta device; load the weights before the export")
    if not tensor.is_floating_point():
        return tensor
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"'{name}' has a NaN or infinite entry; the model is not exported")
    if dtype is None or dtype == tensor.dtype:
        release([tensor])
        return tensor
    cast = tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise NonFiniteError(
            f"'{name}' reaches {float(tensor.abs().max()):.3g}, more than {dtype} holds; choose a wider dtype"
        )
    return cast
