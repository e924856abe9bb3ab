"""Optional packages: imported where they are used, and missed with the name of the extra that installs them.

Each function returns a package. Its argument is what needs it, as the user wrote it, such as ``optimizer='lion8bit'``,
for the error: a ``LowRankError`` where the package is not installed, or does not load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowrank_lit.errors import LowRankError


@contextmanager
def _named(setting: str, package: str, extra: str) -> Iterator[None]:
    """Imports that tell, where they fail, what to install."""
    try:
        yield
    except ImportError as error:
        raise LowRankError(
            f"{setting} needs {package} ({error}); install it with: pip install 'lowrank-lit[{extra}]'"
        ) from error


def load_bitsandbytes(setting: str) -> Any:
    """The package ``bitsandbytes``."""
    with _named(setting, "bitsandbytes", "qlora"):
        import bitsandbytes
    return bitsandbytes


def load_deepspeed(setting: str) -> Any:
    """The package ``deepspeed``."""
    with _named(setting, "DeepSpeed", "deepspeed"):
        import deepspeed
    return deepspeed


def load_lm_eval(setting: str) -> Any:
    """The package ``lm_eval``, with its adapter for models of transformers."""
    with _named(setting, "lm-evaluation-harness", "eval"):
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    return lm_eval


def load_triton(setting: str) -> Any:
    """The package ``triton``."""
    with _named(setting, "Triton", "kernels"):
        import triton
    return triton
