"""Formats of an export beside the package's own: an ordinary dense model, a folder that carries its own code, and one
with a record for the benchmark LowRankArena.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from lowrank_lit._version import __version__
from lowrank_lit.errors import ExportError, LowRankError, NonFiniteError
from lowrank_lit.experts import fuse_experts
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.plan import RankPlan
from lowrank_lit.surgery import count_parameters, to_dense

OWN = "lowrank"
"""The package's own format, which loads after ``import lowrank_lit``."""
DENSE = "dense"
REMOTE_CODE = "trust-remote-code"
ARENA = "lowrankarena"
FORMATS = (OWN, DENSE, REMOTE_CODE, ARENA)

PLAN_KEY = "lowrank_plan"
"""Entry of ``config.json`` with the plan, in a folder that carries its own code."""
ARENA_RECORD = "lowrankarena.json"
_MODULE = "modeling_lowrank"

_CLASS = '''

from transformers import {base} as _Dense  # noqa: E402


class {name}(_Dense):
    """The model of its family with the layers of the plan in ``config.json``."""

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)
        use_plan(self, config.{key})
'''


@dataclass(frozen=True)
class Additions:
    """What a format adds to the folder."""

    config: dict[str, Any] = field(default_factory=dict)
    """Entries of ``config.json``."""
    files: dict[str, str] = field(default_factory=dict)
    """Texts by file name."""


def check_format(format: str, plan: RankPlan | None = None, evaluation: Mapping[str, Any] | None = None) -> None:
    """Refuse an unknown format, and one that does not go with the rest of the request.

    Raises:
        ExportError: If the format is unknown.
    """
    if format not in FORMATS:
        raise ExportError(f"format='{format}' is unknown; choose one of {', '.join(FORMATS)}")
    if evaluation is not None and format != ARENA:
        raise ExportError(f"evaluation is for format='{ARENA}', and format is '{format}'; leave it out")


def additions(
    format: str, model: PreTrainedModel, plan: RankPlan | None, evaluation: Mapping[str, Any] | None = None
) -> Additions:
    """What a folder of this format has beside the weights and the usual files.

    Raises:
        ExportError: If the format needs a plan and there is none; if it needs perplexities and they are not given; if
            transformers has no class of the model's name, or no auto class for it.
        NonFiniteError: If a perplexity is NaN.
    """
    if format in (REMOTE_CODE, ARENA) and plan is None:
        raise ExportError(f"format='{format}' needs a factored model, and this one is dense; choose '{DENSE}'")
    if format == REMOTE_CODE and plan is not None:
        return _remote_code(model, plan)
    if format == ARENA and plan is not None:
        record = arena_record(model, plan, evaluation or {})
        return Additions(files={ARENA_RECORD: json.dumps(record, indent=1, allow_nan=False) + "\n"})
    return Additions()


@contextmanager
def dense_again(model: nn.Module) -> Iterator[None]:
    """For the time of the context products stand in the places of factors and fused experts in those of separate ones;
    the factors themselves are put back. Takes the memory of the dense matrices beside that of the model.

    Raises:
        NonFiniteError: If a product is not finite in the factors' dtype.
    """
    named = list(model.named_modules(remove_duplicate=False))
    factored = {name: module for name, module in named if isinstance(module, FactoredLayer)}
    apart: dict[str, nn.Module] = {}
    try:
        to_dense(model)
        apart = fuse_experts(model)
        yield
    finally:
        for name, module in (*apart.items(), *factored.items()):  # outer ones first
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)


def _remote_code(model: PreTrainedModel, plan: RankPlan) -> Additions:
    base = type(model).__name__
    if getattr(transformers, base, None) is not type(model):
        raise ExportError(
            f"format='{REMOTE_CODE}': {base} is no class that transformers exports, so a file cannot name it; choose "
            f"'{OWN}' or '{DENSE}'"
        )
    autos = [name for name in _AUTO if _is_loaded_by(getattr(transformers, name), model)]
    if not autos:
        raise ExportError(f"format='{REMOTE_CODE}': no auto class of transformers loads a {base}; choose '{OWN}'")
    name = f"LowRank{base}"
    code = resources.files("lowrank_lit").joinpath(f"{_MODULE}.py").read_text(encoding="utf-8")
    return Additions(
        config={
            "architectures": [name],
            "auto_map": dict.fromkeys(autos, f"{_MODULE}.{name}"),
            PLAN_KEY: plan.to_dict(),
        },
        files={f"{_MODULE}.py": code + _CLASS.format(base=base, name=name, key=PLAN_KEY)},
    )


_AUTO = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
)


def _is_loaded_by(auto: Any, model: PreTrainedModel) -> bool:
    """Whether an auto class makes a model of this class from its config."""
    mapping = auto._model_mapping
    if type(model.config) not in mapping:
        return False
    found = mapping[type(model.config)]
    return type(model) in (found if isinstance(found, (list, tuple)) else (found,))


def arena_record(model: nn.Module, plan: RankPlan, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The record that goes with a submission to LowRankArena: what was done, how much is kept, how well it predicts.

    The benchmark's public format is not settled; these are our fields, plain JSON:

    - ``record_version``, ``tool`` (name and version).
    - ``method``: ``metric``, ``allocator``, ``feedback``, ``storage``, ``preset``, and the ``plan`` fingerprint.
    - ``ratios``: ``requested`` and ``achieved`` of the target matrices, and ``whole_model``, stored / original numbers.
    - ``parameters``: the counts behind them: ``targets_dense``, ``targets``, ``model_dense``, ``model``.
    - ``plan``: of every target ``name``, ``rows``, ``columns``, ``form``, ``rank``.
    - ``perplexity``: ``dense``, ``compressed`` and the ``protocol`` they were measured by, as given. JSON has no
      infinity: it is the string ``"Infinity"``.

    Args:
        model: Factored by ``plan``.
        plan: Its plan.
        evaluation: ``dense``, ``compressed`` (numbers) and ``protocol`` (a text or a mapping of plain values).

    Raises:
        ExportError: If one of the three is missing.
        NonFiniteError: If a perplexity is NaN.
    """
    missing = [key for key in ("dense", "compressed", "protocol") if not evaluation.get(key)]
    if missing:
        raise ExportError(
            f"format='{ARENA}' needs evaluation['{missing[0]}']; give dense and compressed perplexity and the protocol "
            "that they were measured by"
        )
    stored = count_parameters(model)
    original = stored - plan.parameters + plan.dense_parameters
    return {
        "record_version": 1,
        "tool": {"name": "lowrank-lit", "version": __version__},
        "method": {
            **{key: getattr(plan, key) for key in ("metric", "allocator", "feedback", "storage", "preset")},
            "fingerprint": plan.fingerprint,
        },
        "ratios": {
            "requested": plan.requested_keep_ratio,
            "achieved": plan.keep_ratio,
            "whole_model": stored / original,
        },
        "parameters": {
            "targets_dense": plan.dense_parameters,
            "targets": plan.parameters,
            "model_dense": original,
            "model": stored,
        },
        "plan": [
            {key: getattr(matrix, key) for key in ("name", "rows", "columns", "form", "rank")}
            for matrix in plan.matrices
        ],
        "perplexity": {
            **{key: _perplexity(key, evaluation[key]) for key in ("dense", "compressed")},
            "protocol": evaluation["protocol"],
        },
    }


def _perplexity(key: str, value: Any) -> float | str:
    if not isinstance(value, (int, float)):
        raise LowRankError(f"evaluation['{key}']={value!r} is no number; give the perplexity")
    if math.isnan(value):
        raise NonFiniteError(f"evaluation['{key}'] is NaN; the record is not written")
    return "Infinity" if math.isinf(value) else float(value)
