"""Optional packages: imported where they are used, and missed with the name of the extra that installs them."""

from __future__ import annotations

from typing import Any

from lowrank_lit.errors import LowRankError


def load_bitsandbytes(setting: str) -> Any:
    """The package ``bitsandbytes``.

    Args:
        setting: What needs it, as the user wrote it, such as ``optimizer='lion8bit'``; for the error.

    Raises:
        LowRankError: If it is not installed, or does not load.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise LowRankError(
            f"{setting} needs bitsandbytes ({error}); install it with: pip install 'lowrank-lit[qlora]'"
        ) from error
    return bitsandbytes


def load_deepspeed(setting: str) -> Any:
    """The package ``deepspeed``.

    Args:
        setting: What needs it, as the user wrote it; for the error.

    Raises:
        LowRankError: If it is not installed, or does not load.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise LowRankError(
            f"{setting} needs DeepSpeed ({error}); install it with: pip install 'lowrank-lit[deepspeed]'"
        ) from error
    return deepspeed


def load_lm_eval(setting: str) -> Any:
    """The package ``lm_eval``, with its adapter for models of transformers.

    Args:
        setting: What needs it, as the user wrote it; for the error.

    Raises:
        LowRankError: If it is not installed, or does not load.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise LowRankError(
            f"{setting} needs lm-evaluation-harness ({error}); install it with: pip install 'lowrank-lit[eval]'"
        ) from error
    return lm_eval


def load_triton(setting: str) -> Any:
    """The package ``triton``.

    Args:
        setting: What needs it, as the user wrote it; for the error.

    Raises:
        LowRankError: If it is not installed, or does not load.
    """
    try:
        import triton
    except ImportError as error:
        raise LowRankError(
            f"{setting} needs Triton ({error}); install it with: pip install 'lowrank-lit[kernels]'"
        ) from error
    return triton
