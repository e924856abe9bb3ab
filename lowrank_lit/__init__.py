"""lowrank-lit: makes language models smaller by low-rank factorisation and wins their quality back, on PyTorch
Lightning.

``compress`` factors the linear layers of any torch model within a budget of parameters; ``lowrank_lit.callbacks`` does
the same, and the recovery, inside a Lightning fit. Importing this package registers its format with transformers, where
that is installed, so that ``AutoModelForCausalLM.from_pretrained`` loads an exported model.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from lowrank_lit._version import __version__
from lowrank_lit.compress import CompressionResult, compress, plan_ranks
from lowrank_lit.errors import LowRankError
from lowrank_lit.evaluation import divergence, perplexity
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.plan import MatrixPlan, RankPlan

# Names that need Lightning, PEFT or transformers are imported when they are first asked for.
_LAZY = {
    "LowRankModule": "lowrank_lit.module",
    "TextDataModule": "lowrank_lit.data",
    "accelerate": "lowrank_lit.acceleration",
    "add_adapters": "lowrank_lit.recovery",
    "compare_models": "lowrank_lit.intruders",
    "diagnose": "lowrank_lit.diagnosis",
    "intruder_dimensions": "lowrank_lit.intruders",
    "laser": "lowrank_lit.cuts",
    "export": "lowrank_lit.hub",
    "load": "lowrank_lit.hub",
    "multiple_choice": "lowrank_lit.choices",
    "throughput": "lowrank_lit.timing",
    "load_module": "lowrank_lit.plain",
    "pointwise_as_linear": "lowrank_lit.pointwise",
    "save_module": "lowrank_lit.plain",
    "quantize_factors": "lowrank_lit.quantize",
    "refine_blocks": "lowrank_lit.refinement",
    "unmerge": "lowrank_lit.unmerging",
    "dequantize_model": "lowrank_lit.quantize",
    "requantize_factors": "lowrank_lit.quantize",
    "callbacks": "",
    "recipes": "",
}

__all__ = [
    "CompressionResult",
    "FactoredLinear",
    "LowRankError",
    "LowRankModule",
    "MatrixPlan",
    "PivotLinear",
    "RankPlan",
    "TextDataModule",
    "__version__",
    "accelerate",
    "add_adapters",
    "compare_models",
    "compress",
    "dequantize_model",
    "diagnose",
    "divergence",
    "export",
    "intruder_dimensions",
    "laser",
    "load",
    "load_module",
    "multiple_choice",
    "perplexity",
    "plan_ranks",
    "pointwise_as_linear",
    "quantize_factors",
    "refine_blocks",
    "requantize_factors",
    "save_module",
    "throughput",
    "unmerge",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lowrank_lit' has no attribute '{name}'")
    return (
        getattr(importlib.import_module(_LAZY[name]), name)
        if _LAZY[name]
        else importlib.import_module(f"lowrank_lit.{name}")
    )


if importlib.util.find_spec("transformers") is not None:
    from lowrank_lit.hub import register

    register()
