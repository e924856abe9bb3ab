"""Saving factored models as transformers folders, and loading them with ``AutoModelForCausalLM.from_pretrained``.

A folder is an ordinary transformers one: safetensors, ``config.json``, ``generation_config.json``, the tokenizer. What
makes it factored is the rank plan, which stands in ``config.json`` as a ``quantization_config`` with ``quant_method``
"lowrank": transformers hands it to :class:`LowRankQuantizer`, which gives the empty model the plan's layout before the
weights are read. A loaded model carries no mark of a quantised one: it trains, casts, takes adapters and is saved again
like any other.

``lowrank_lit.json`` beside it, with or without a plan, says which run wrote the folder, so that nothing else is ever
overwritten.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_lit._version import __version__
from lowrank_lit.errors import ExportError, LowRankError, ModelError, NonFiniteError
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.surgery import apply_plan, check_applied

METHOD = "lowrank"
"""``quant_method`` in ``config.json``."""
FORMAT_VERSION = 1
"""Version of the entry in ``config.json`` and of ``lowrank_lit.json``; a newer one is refused."""
MARKER = "lowrank_lit.json"
"""File that marks a folder as an export of this package."""

_FACTOR = re.compile(r"\.(inner\.weight|outer\.(weight|bias))$")

_PathLike = str | os.PathLike[str]


class LowRankConfig(QuantizationConfigMixin):
    """The entry of ``config.json`` that describes a factored model.

    Args:
        plan: The rank plan, or its dictionary.
        format_version: Of the entry.
        quant_method: Always "lowrank".

    Raises:
        ExportError: If the entry is of a newer format or has no plan.
        PlanError: If the plan is malformed.
    """

    def __init__(
        self,
        plan: RankPlan | dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
    ) -> None:
        _check_version(format_version, "config.json")
        if plan is None:
            raise ExportError("quantization_config of config.json has no plan; export the model again")
        checked = plan if isinstance(plan, RankPlan) else RankPlan.from_dict(plan)
        # transformers writes the attributes as they are into config.json, so they are plain JSON types.
        self.quant_method: Any = quant_method
        self.format_version = format_version
        self.plan = checked.to_dict()

    def get(self, key: str, default: Any = None) -> Any:
        """An attribute by name: transformers asks for ``quant_method`` this way when a config is used a second time."""
        return getattr(self, key, default)

    def rank_plan(self) -> RankPlan:
        """The plan as an object."""
        return RankPlan.from_dict(self.plan)

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> LowRankConfig | tuple[LowRankConfig, dict[str, Any]]:
        """Read the entry; called by transformers.

        Raises:
            ExportError: If the entry is of a newer format or has no plan.
            PlanError: If the plan is malformed.
        """
        # The version decides first: a newer entry may have keys that this release does not know.
        _check_version(config_dict.get("format_version"), "config.json")
        config = cls(plan=config_dict.get("plan"))
        return (config, kwargs) if return_unused_kwargs else config


class LowRankQuantizer(HfQuantizer):
    """What transformers calls while it loads a folder whose ``quant_method`` is "lowrank"."""

    quantization_config: LowRankConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to factor a dense model while loading it.

        Raises:
            ModelError: If the folder has no plan of its own and one was given as an argument.
        """
        if not self.pre_quantized:
            raise ModelError(
                "a dense model is not factored by quantization_config; load it and use lowrank_lit.compress"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Give the model, on the meta device, the plan's layout and compare it with the weight files."""
        plan, dropped = _fit_names(self.quantization_config.rank_plan(), model)
        apply_plan(model, plan)
        # A loaded model is saved again with the names that it has.
        self.quantization_config = LowRankConfig(plan)
        self._checked = bool(checkpoint_files)
        if checkpoint_files:
            _check_weights(model, plan, dropped, checkpoint_files)
        return model

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Leave an ordinary model behind: only its config remembers the plan."""
        if not self._checked:
            _check_initialised(model, self.quantization_config.rank_plan())
        model.config.quantization_config = self.quantization_config
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            if mark in vars(model):
                delattr(model, mark)
        return model

    def is_serializable(self) -> bool:
        """A factored model is saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are plain floating-point parameters."""
        return True


def register() -> None:
    """Make ``from_pretrained`` of transformers know factored folders; a second call does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(LowRankConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(LowRankQuantizer)


def attach(model: PreTrainedModel, plan: RankPlan) -> None:
    """Write the plan into the model's config, so that ``model.save_pretrained`` gives a folder that loads.

    Raises:
        ModelError: If the model is no transformers model, or is not factored yet.
        PlanError: If the plan does not fit the model.
    """
    _require_transformers(model)
    check_applied(model, plan)
    model.config.quantization_config = LowRankConfig(plan)


def export_fingerprint(plan: RankPlan | None, fingerprint: str | None = None) -> str:
    """What tells one run's folder from another's: the one given, else the plan's, else the digest of the plan.

    Empty for no plan and no fingerprint: such a folder is never replaced.
    """
    if fingerprint or plan is None:
        return fingerprint or ""
    return plan.fingerprint or plan.digest()


def refuse_foreign(path: _PathLike, fingerprint: str) -> None:
    """Check that an export may go to ``path``; cheap, so that a run asks before it starts.

    Allowed are a path that does not exist, an empty folder, and an export with the same fingerprint in which nobody put
    a file.

    Args:
        path: Folder of the export.
        fingerprint: Of the export to be written, see :func:`export_fingerprint`.

    Raises:
        ExportError: If something else is there; the message names it.
    """
    folder = Path(path)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"path='{path}' is a file; choose a folder")
    files = _files(folder)
    if not files:
        return
    if MARKER not in files:
        raise ExportError(f"path='{path}' holds '{files[0]}', which is no export of this run; choose an empty folder")
    marker = _read_json(folder / MARKER)
    found = marker.get("fingerprint")
    if not fingerprint or found != fingerprint:
        raise ExportError(
            f"path='{path}' holds the export of another run (fingerprint '{str(found)[:12]}', this one "
            f"'{fingerprint[:12]}'); choose another folder or delete it"
        )
    added = [name for name in files if name not in marker.get("files", [])]
    if added:
        raise ExportError(f"path='{path}' holds '{added[0]}' beside an earlier export; move the file away")


def export(
    model: PreTrainedModel,
    plan: RankPlan | None,
    path: _PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    fingerprint: str | None = None,
) -> None:
    """Write a model as a transformers folder that is complete or is not there.

    The folder is written beside ``path`` and renamed; an earlier export with the same fingerprint is replaced, and what
    a killed export left behind is removed. The model in memory, its config included, stays as it is.

    Args:
        model: A transformers model, factored by ``plan``, without adapters.
        plan: Its plan, or None for a dense model.
        path: Folder to write.
        dtype: Floating-point weights are cast to this type while saving; None keeps theirs.
        tokenizer: A transformers tokenizer to save with it, or None.
        fingerprint: Identity of the run, see :func:`export_fingerprint`.

    Raises:
        ExportError: If ``path`` holds something else, or cannot be written (full disk).
        ModelError: If the model has unmerged adapters, or its layers are not those of its class and plan.
        NonFiniteError: If a weight is NaN or infinite, or becomes so in ``dtype``.
        PlanError: If the plan does not fit the model.
    """
    target = Path(path).resolve()
    identity = export_fingerprint(plan, fingerprint)
    try:
        _restore_interrupted(target)
    except OSError as error:
        raise _unwritable(path, error) from error
    refuse_foreign(target, identity)
    model = getattr(model, "_orig_mod", model)  # a model wrapped by torch.compile
    _require_transformers(model)
    _refuse_adapters(model)
    if plan is not None:
        check_applied(model, plan)
    stored = _resolve_dtype(dtype)
    weights = _weights_to_save(model, plan, stored)
    config = _config_to_save(model, plan, stored)
    with _atomic_folder(target) as partial, _unchanged_config(model):
        model.save_pretrained(partial, state_dict=weights)
        config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        marker = {
            "format_version": FORMAT_VERSION,
            "fingerprint": identity,
            "versions": {
                "lowrank_lit": __version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
            "files": [*_files(partial), MARKER],
        }
        (partial / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def load(path: _PathLike, *, auto_class: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    """Load a folder with ``auto_class.from_pretrained``, after checks that give errors of one line.

    ``from_pretrained`` itself does the checks of the factors; this adds a missing or garbled ``config.json`` and
    missing weight files, which transformers meets before it asks this package.

    Args:
        path: Folder of an export, with a plan or without.
        auto_class: A class with ``from_pretrained``, such as ``AutoModel``.
        kwargs: For ``from_pretrained``, such as ``dtype`` or ``device_map``.

    Raises:
        ExportError: If a file is missing, truncated, of a newer format or does not hold the weights of the plan.
        PlanError: If the plan in ``config.json`` is malformed.
    """
    register()
    folder = Path(path)
    if not folder.is_dir():
        raise ExportError(f"path='{path}' is no folder; give the folder of an export")
    config = _read_json(folder / "config.json")
    entry = config.get("quantization_config")
    if isinstance(entry, dict) and entry.get("quant_method") == METHOD:
        LowRankConfig.from_dict(entry)
    if (folder / MARKER).exists():
        _check_version(_read_json(folder / MARKER).get("format_version"), MARKER)
    read_shapes(_weight_files(folder))
    try:
        return auto_class.from_pretrained(folder, **kwargs)
    except LowRankError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"path='{path}' cannot be loaded ({reason}); export the model again") from error


def read_shapes(files: Iterable[_PathLike]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in safetensors files; reads the headers alone.

    Raises:
        ExportError: If a file is missing, truncated, or no safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            # Opening compares the length that the header promises with the length of the file.
            with safe_open(os.fspath(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"weight file '{file}' is missing, truncated or no safetensors file ({error}); export the model again"
            ) from error
    return shapes


def _check_version(version: object, where: str) -> None:
    if not isinstance(version, int) or version < 1:
        raise ExportError(f"format_version={version!r} in {where} is none of lowrank-lit; export the model again")
    if version > FORMAT_VERSION:
        raise ExportError(
            f"format_version={version} in {where} is newer than this release reads ({FORMAT_VERSION}); "
            "upgrade lowrank-lit"
        )


def _fit_names(plan: RankPlan, model: PreTrainedModel) -> tuple[RankPlan, tuple[str, ...]]:
    """The plan with the names that its matrices have in this class of the model, and those that have no place in it.

    The decoder alone (``AutoModel``) has ``layers.0...`` where the language model has ``model.layers.0...``, and no
    output head.
    """
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."
    matrices: list[MatrixPlan] = []
    dropped: list[str] = []
    for matrix in plan.matrices:
        candidates = (matrix.name, matrix.name.removeprefix(prefix), prefix + matrix.name)
        name = next((candidate for candidate in candidates if candidate in present), None)
        if name is None and not _is_exported_class(model) and not matrix.name.startswith(prefix):
            dropped.append(matrix.name)
        else:  # a name that is nowhere stays as it is: the plan's own check reports it
            matrices.append(replace(matrix, name=name or matrix.name))
    return replace(plan, matrices=tuple(matrices)), tuple(dropped)


def _is_exported_class(model: PreTrainedModel) -> bool:
    return type(model).__name__ in (model.config.architectures or [])


def _check_weights(model: PreTrainedModel, plan: RankPlan, dropped: tuple[str, ...], files: list[str]) -> None:
    """Compare the weight files with a model of the plan's layout, so that no weight is left to random initialisation.

    Every tensor of a planned matrix must be there in its shape, and no other factor. Beside those, the exported class
    must find all its weights; another class may lack a head, which transformers initialises and reports.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, converted = _names_in_model(model, read_shapes(files), expected)
    planned = tuple(f"{matrix.name}." for matrix in plan.matrices)
    again = f"in the weight files of '{os.path.dirname(files[0])}'; export the model again"
    parameters = dict(model.named_parameters(remove_duplicate=False))
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
        belongs = _FACTOR.search(name) or any(candidate.startswith(planned) for candidate in candidates)
        if belongs and not name.startswith(heads):
            raise ExportError(f"tensor '{name}' has no place in the plan {again}")


def _missing(model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], found: Iterable[str]) -> list[str]:
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
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found: dict[str, tuple[int, ...]] = {}
    converted = False
    for original, shape in shapes.items():
        name, source = rename_source_key(original, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and original in expected:  # transformers then takes the name as it is
            name, source = original, None
        converted |= source is not None
        if source is None:
            found[name] = shape
    return found, converted


def _check_initialised(model: PreTrainedModel, plan: RankPlan) -> None:
    """For weights given as a dictionary, which only transformers sees: it marks what it loaded."""
    planned = tuple(f"{matrix.name}." for matrix in plan.matrices)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(planned) and not getattr(parameter, "_is_hf_initialized", False):
            raise ExportError(f"tensor '{name}' is missing from state_dict; give every factor of the plan")


def _require_transformers(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is no transformers model; save its state_dict and the plan instead")


def _refuse_adapters(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ModelError(f"'{name}' is a {type(module).__name__} of PEFT; merge the adapters first")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "transformers would save the model's adapters alone; merge the adapters first, then delete them"
        )


def _resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise ExportError(f"dtype={dtype!r} is no floating-point type; choose float32, bfloat16 or float16")
    return resolved


def _weights_to_save(model: PreTrainedModel, plan: RankPlan | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict in the layout that loading will build, cast and checked; tied tensors stay tied."""
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


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if tensor.is_meta:
        raise ModelError(f"'{name}' is on the meta device; load the weights before the export")
    if not tensor.is_floating_point():
        return tensor
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"'{name}' has a NaN or infinite entry; the model is not exported")
    cast = tensor if dtype is None else tensor.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise NonFiniteError(
            f"'{name}' reaches {float(tensor.abs().max()):.3g}, more than {dtype} holds; choose a wider dtype"
        )
    return cast


def _config_to_save(model: PreTrainedModel, plan: RankPlan | None, dtype: torch.dtype | None) -> Any:
    config = copy.deepcopy(model.config)
    if plan is not None:
        config.quantization_config = LowRankConfig(plan)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        if part is not None:
            part.dtype = model.dtype if dtype is None else dtype
    return config


@contextmanager
def _unchanged_config(model: PreTrainedModel) -> Iterator[None]:
    """``save_pretrained`` writes the dtype and the class into the model's own config; put back what was there."""
    before = {name: vars(model.config).get(name) for name in ("dtype", "architectures")}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


def _siblings(target: Path) -> tuple[Path, Path]:
    """Where a folder is written before it is renamed, and where the one it replaces waits until then."""
    return (
        target.with_name(f".{target.name}.lowrank-lit-partial"),
        target.with_name(f".{target.name}.lowrank-lit-previous"),
    )


def _restore_interrupted(target: Path) -> None:
    """Undo what a killed export left: its partial folder, and an earlier export that it had moved aside."""
    partial, previous = _siblings(target)
    if partial.exists():
        shutil.rmtree(partial)
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(target)


@contextmanager
def _atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of ``target`` when the block ends without an error."""
    partial, previous = _siblings(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rename(previous)
        partial.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _unwritable(target, error) from error
    except (RuntimeError, ValueError) as error:
        if isinstance(error, LowRankError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"transformers refuses to save the model ({reason}); mend that and export again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(path: _PathLike, error: Exception) -> ExportError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
    return ExportError(f"path='{path}' cannot be written ({reason}); free space or choose another folder")


def _files(folder: Path) -> list[str]:
    """Files under a folder, as relative paths with forward slashes, sorted."""
    return sorted(item.relative_to(folder).as_posix() for item in folder.rglob("*") if not item.is_dir())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"'{file}' cannot be read ({error.strerror}); export the model again") from error
    except ValueError as error:
        raise ExportError(f"'{file}' is truncated or no JSON ({error}); export the model again") from error
    if not isinstance(values, dict):
        raise ExportError(f"'{file}' holds no JSON object; export the model again")
    return values


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ExportError(f"'{index}' names no weight file; export the model again")
    return [folder / str(name) for name in sorted(set(shards.values()))]
