"""Saving factored models as transformers folders, and loading them with ``AutoModelForCausalLM.from_pretrained``.

A folder is an ordinary transformers one: safetensors, ``config.json``, ``generation_config.json``, the tokenizer. What
makes it factored is the rank plan, which stands in ``config.json`` as a ``quantization_config`` with ``quant_method``
"lowrank": transformers hands it to :class:`LowRankQuantizer`, which gives the empty model the plan's layout before the
weights are read. A loaded model carries no mark of a quantised one: it trains, casts, takes adapters and is saved again
like any other.

An export also holds one empty tensor under the name of a weight that was factored and is no expert's. transformers
without this package skips a plan that it does not know, builds the dense model and would leave its weights to chance;
that tensor makes it an error. ``save_pretrained`` of a model in memory writes no such tensor: it takes the state dict
as it is, where a tensor that is none of the model's would fail every strict ``load_state_dict``, or asks a quantizer on
the model, in whose presence it drops a state dict that the caller gives (sharded training does) and treats the model as
quantised.

``lowrank_lit.json`` beside it, with or without a plan, says which run wrote the folder, so that nothing else is ever
overwritten.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowrank_lit._version import __version__
from lowrank_lit.adapter_config import is_quantised
from lowrank_lit.errors import ExportError, LowRankError, ModelError
from lowrank_lit.extras import load_bitsandbytes
from lowrank_lit.folders import (
    FORMAT_VERSION,
    MARKER,
    atomic_folder,
    check_version,
    files_in,
    from_hub,
    read_json,
    read_shapes,
    refuse_foreign,
    restore_interrupted,
    unwritable,
    weight_files,
)
from lowrank_lit.formats import DENSE, OWN, PLAN_KEY, REMOTE_CODE, Additions, additions, check_format, dense_again
from lowrank_lit.plan import RankPlan, truncated_plan
from lowrank_lit.quantize import quantize_loaded, require_quantum
from lowrank_lit.surgery import apply_plan, check_applied
from lowrank_lit.weights import (
    check_initialised,
    check_weights,
    expect_guard,
    fit_names,
    one_by_one,
    read_truncated,
    renaming_of,
    weights_to_save,
)

__all__ = [
    "LowRankConfig",
    "LowRankQuantizer",
    "attach",
    "export",
    "export_fingerprint",
    "load",
    "refuse_foreign",
    "register",
]

METHOD = "lowrank"
"""``quant_method`` in ``config.json``."""

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
        check_version(format_version, "config.json")
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
        config = _read_entry(config_dict)
        return (config, kwargs) if return_unused_kwargs else config


def _read_entry(entry: dict[str, Any]) -> LowRankConfig:
    # The version decides first: a newer entry may have keys that this release does not know.
    check_version(entry.get("format_version"), "config.json")
    return LowRankConfig(entry.get("plan"))


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
        plan, dropped = fit_names(self.quantization_config.rank_plan(), model)
        apply_plan(model, plan)
        # A loaded model is saved again with the names that it has.
        self.quantization_config = LowRankConfig(plan)
        self._checked = bool(checkpoint_files)
        if checkpoint_files:
            check_weights(model, plan, dropped, checkpoint_files)
            expect_guard(model, plan)
        return model

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Leave an ordinary model behind: only its config remembers the plan."""
        if not self._checked:
            check_initialised(model, self.quantization_config.rank_plan())
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


def attach(model: nn.Module, plan: RankPlan) -> None:
    """Write the plan into the model's config, so that ``model.save_pretrained`` gives a folder that loads.

    It loads where this package is imported. Elsewhere transformers warns of an unknown quantization type, lists the
    missing weights and leaves them to chance; write folders for others with :func:`export`, which makes that an error.

    Raises:
        ModelError: If the model is no transformers model, or is not factored yet.
        PlanError: If the plan does not fit the model.
    """
    checked = _require_transformers(model)
    check_applied(checked, plan)
    checked.config.quantization_config = LowRankConfig(plan)


def export_fingerprint(plan: RankPlan | None, fingerprint: str | None = None) -> str:
    """What tells one run's folder from another's: the one given, else the plan's, else the digest of the plan.

    Empty for no plan and no fingerprint: such a folder is never replaced.
    """
    if fingerprint or plan is None:
        return fingerprint or ""
    return plan.fingerprint or plan.digest()


def export(
    model: PreTrainedModel,
    plan: RankPlan | None,
    path: _PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    fingerprint: str | None = None,
    format: str = OWN,
    evaluation: Mapping[str, Any] | None = None,
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
        fingerprint: Identity of the run, see :func:`export_fingerprint`. An export in another format counts as that of
            another run.
        format: ``lowrank``, which loads after ``import lowrank_lit``; ``dense``, an ordinary model with the products
            multiplied out and experts fused; ``trust-remote-code``, factored, with a file of code that transformers
            loads without this package; ``lowrankarena``, as ``lowrank`` with a record of
            :func:`lowrank_lit.formats.arena_record`.
        evaluation: For ``lowrankarena``: perplexities ``dense`` and ``compressed``, and their ``protocol``.

    Raises:
        ExportError: If ``path`` holds something else, or cannot be written (full disk); if the format is unknown or
            does not go with the model.
        ModelError: If the model has unmerged adapters or layers in 4 bits, or its layers are not those of its class and
            plan.
        NonFiniteError: If a weight is NaN or infinite, or becomes so in ``dtype``.
        PlanError: If the plan does not fit the model.
    """
    check_format(format, plan, evaluation)
    target = Path(path).resolve()
    identity = export_fingerprint(plan, fingerprint)
    identity = f"{format}-{identity}" if identity and format != OWN else identity
    try:
        restore_interrupted(target)
    except OSError as error:
        raise unwritable(path, error) from error
    refuse_foreign(target, identity)
    model = getattr(model, "_orig_mod", model)  # a model wrapped by torch.compile
    _require_transformers(model)
    refuse_unmerged(model)
    if plan is not None:
        check_applied(model, plan)
    stored = _resolve_dtype(dtype)
    added = additions(format, model, plan, evaluation)
    if format == DENSE:
        plan = None
    with dense_again(model) if format == DENSE else nullcontext():
        weights = weights_to_save(model, plan, stored)
        config = _config_to_save(model, None if format == REMOTE_CODE else plan, stored, added.config)
        _write_folder(target, model, weights, config, tokenizer, identity, added)


def _write_folder(
    target: Path,
    model: PreTrainedModel,
    weights: dict[str, Any],
    config: Any,
    tokenizer: Any,
    identity: str,
    added: Additions,
) -> None:
    with atomic_folder(target) as partial, _unchanged_config(model):
        with one_by_one():
            model.save_pretrained(partial, state_dict=weights)
        config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, text in added.files.items():
            (partial / name).write_text(text, encoding="utf-8")
        marker = {
            "format_version": FORMAT_VERSION,
            "fingerprint": identity,
            "versions": {
                "lowrank_lit": __version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
            },
            "files": [*files_in(partial), MARKER],
        }
        (partial / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
        mode = (partial / MARKER).stat().st_mode  # by the umask, where safetensors lets nobody but the owner read
        for name in files_in(partial):
            (partial / name).chmod(mode)


def load(
    path: _PathLike,
    *,
    keep_ratio: float | None = None,
    load_in_4bit: bool = False,
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> Any:
    """Load a folder with ``auto_class.from_pretrained``, after checks that give errors of one line.

    ``from_pretrained`` itself does the checks of the factors; this adds a missing or garbled ``config.json`` and
    missing weight files, which transformers meets before it asks this package.

    Args:
        path: Folder of an export, with a plan or without, or the name of one on the hub, such as ``user/model``.
        keep_ratio: Load a smaller model out of a nested export: the leading components of every factored matrix, of
            ranks that its saved order gives for this budget (:func:`lowrank_lit.plan.truncated_plan`). Nothing else is
            read from the files, and the model's config holds the smaller plan. None loads all there is.
        load_in_4bit: Hold the factors in NF4, as :func:`lowrank_lit.quantize.quantize_factors` does by default: one
            layer after the other, once the model is read in ``dtype``. They are frozen: train adapters, of PEFT or
            ours. Their ranks are multiples of 64. Needs ``pip install "lowrank-lit[qlora]"``.
        auto_class: A class with ``from_pretrained``, such as ``AutoModel``.
        kwargs: For ``from_pretrained``, such as ``dtype`` or ``device_map``.

    Raises:
        ExportError: If a file is missing, truncated, of a newer format or does not hold the weights of the plan; if the
            hub has no such model or cannot be reached.
        LowRankError: If bitsandbytes is missing, or a rank does not fit 4 bits.
        PlanError: If the plan in ``config.json`` is malformed; if ``keep_ratio`` is given and the plan is not nested,
            or it holds less, or its floors need more.
    """
    register()
    if load_in_4bit:
        load_bitsandbytes("load_in_4bit=True")  # before anything is read
    folder = Path(path) if Path(path).exists() else from_hub(os.fspath(path), kwargs)
    plan, files = _read_folder(folder, path, kwargs)
    if plan is None and (keep_ratio is not None or load_in_4bit):
        asked, remedy = (
            (f"keep_ratio={keep_ratio} cannot cut", "export a nested compression, or leave keep_ratio out")
            if keep_ratio is not None
            else ("load_in_4bit=True has no factors of", "give transformers' BitsAndBytesConfig as quantization_config")
        )
        raise ExportError(f"path='{path}' holds a dense model, which {asked}; {remedy}")
    if plan is not None and kwargs.get("quantization_config") is not None:
        raise ExportError(
            f"path='{path}' has a plan, beside which transformers takes no quantization_config; set load_in_4bit=True"
        )
    smaller = plan if plan is None or keep_ratio is None else truncated_plan(plan, keep_ratio)
    if load_in_4bit and smaller is not None:
        require_quantum({matrix.name: matrix.rank for matrix in smaller.matrices if matrix.form != "dense"})
    try:
        if smaller is plan or smaller is None:
            loaded = auto_class.from_pretrained(folder, **kwargs)
        else:
            loaded = _load_truncated(folder, files, smaller, auto_class, kwargs)
    except LowRankError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"path='{path}' cannot be loaded ({reason}); export the model again") from error
    if load_in_4bit:
        quantize_loaded(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def _read_folder(folder: Path, path: _PathLike, kwargs: Mapping[str, Any]) -> tuple[RankPlan | None, list[Path]]:
    """The plan of a folder, if it has one, and its weight files, checked; ``path`` is what an error calls it."""
    if not folder.is_dir():
        raise ExportError(f"path='{path}' is no folder; give the folder of an export")
    if not (folder / "config.json").exists():
        raise ExportError(f"path='{path}' is no model folder: it has no config.json; give the folder of an export")
    config = read_json(folder / "config.json")
    entry = config.get("quantization_config")
    if PLAN_KEY in config and not kwargs.get("trust_remote_code"):
        raise ExportError(f"path='{path}' carries its own code; load it with trust_remote_code=True")
    plan = None
    if isinstance(entry, dict) and entry.get("quant_method") == METHOD:
        plan = _read_entry(entry).rank_plan()
    if (folder / MARKER).exists():
        check_version(read_json(folder / MARKER).get("format_version"), MARKER)
    files = weight_files(folder)
    read_shapes(files)
    return plan, files


def _load_truncated(folder: Path, files: list[Path], plan: RankPlan, auto_class: Any, kwargs: dict[str, Any]) -> Any:
    """What ``from_pretrained`` does with a folder, for the part of its weights that a smaller plan keeps."""
    # transformers takes a dictionary of weights in the place of a folder, not beside one.
    later = {key: kwargs[key] for key in ("dtype", "torch_dtype") if key in kwargs}
    report = kwargs.get("output_loading_info", False)
    now = {key: value for key, value in kwargs.items() if key not in later and key != "output_loading_info"}
    config, rest = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **now)
    model_class = _class_for(auto_class, config)
    skeleton = _empty(model_class, config)
    fitted, _ = fit_names(plan, skeleton)
    apply_plan(skeleton, fitted)
    weights = read_truncated(files, fitted, renaming_of(skeleton, skeleton.state_dict()))
    config.quantization_config = LowRankConfig(plan)
    model, loaded = model_class.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, **rest, **later
    )
    if loaded["missing_keys"] and type(model).__name__ in (config.architectures or []):
        raise ExportError(f"tensor '{min(loaded['missing_keys'])}' is missing in '{folder}'; export the model again")
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return (model, loaded) if report else model


def _class_for(auto_class: Any, config: Any) -> Any:
    """The class that an auto class loads a config with; a model class is itself."""
    if isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel):
        return auto_class
    return type(_empty(auto_class.from_config, config))


def _empty(build: Any, config: Any) -> Any:
    """The dense model of a config, on the meta device."""
    plain = copy.deepcopy(config)
    del plain.quantization_config
    with torch.device("meta"):
        return build(plain)


def _require_transformers(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is no transformers model; save its state_dict and the plan instead")
    return model


def refuse_unmerged(model: nn.Module) -> None:
    """Refuse adapters and layers in 4 bits, which no export holds.

    Raises:
        ModelError: Naming the layer.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ModelError(f"'{name}' is a {type(module).__name__} of PEFT; merge the adapters first")
        if isinstance(module, nn.Linear) and is_quantised(module):
            raise ModelError(
                f"'{name}' is in 4 bits, which an export does not hold; call dequantize_model(model) first"
            )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            "transformers would save the model's adapters alone; merge the adapters first, then delete them"
        )


def _resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        raise ExportError(f"dtype={dtype!r} is no floating-point type; choose float32, bfloat16 or float16")
    return resolved


def _config_to_save(
    model: PreTrainedModel, plan: RankPlan | None, dtype: torch.dtype | None, added: Mapping[str, Any]
) -> Any:
    config = copy.deepcopy(model.config)
    if plan is not None:
        config.quantization_config = LowRankConfig(plan)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    for key, value in added.items():
        setattr(config, key, value)
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
