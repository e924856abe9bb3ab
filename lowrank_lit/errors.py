"""Errors of the package.

Every message is one line that names the setting, its value and the remedy. All of them are ``ValueError`` so that a
caller who knows nothing of this package still catches what bad input raises; the command line prints them without a
traceback.
"""

from __future__ import annotations

import sys
import warnings

_BETWEEN = ("lowrank_lit", "torch", "lightning", "pytorch_lightning")
"""Packages that lie between a warning and the user's own line."""


class LowRankError(ValueError):
    """Base of everything that bad input to this package raises."""


class DataError(LowRankError):
    """A text, tokenizer or batch that cannot be used: missing, empty, too short, wrong shape."""


class ModelError(LowRankError):
    """A model that does not fit the request: no matching layer, a tied weight, an unsupported layer."""


class GradientError(LowRankError):
    """Statistics of gradients that cannot be had: no next-token loss, no gradient, or gradients that vanish.

    What needs only activations still works, so a caller may go on with the metric ``input``.
    """


class NonFiniteError(LowRankError):
    """A NaN or infinity in a weight, an activation, a statistic or a factor; the message names the layer."""


class BudgetError(LowRankError):
    """A parameter budget that cannot be met, such as a keep ratio outside (0, 1] or below the rank floor."""


class PlanError(LowRankError):
    """A rank plan that is malformed or does not fit the model it is applied to."""


class ExportError(LowRankError):
    """A folder that cannot be written or read: another run's result, a truncated file, a newer format."""


class RecipeError(LowRankError):
    """A recipe that cannot be found or parsed, or that holds an unknown key."""


def reason_of(error: BaseException) -> str:
    """What another library's error says, in one line of at most 200 characters, to be quoted in a message of ours."""
    lines = str(error).strip().splitlines()
    reason = lines[0].strip() if lines else type(error).__name__
    return reason if len(reason) <= 200 else reason[:197] + "..."


def warn_caller(message: str) -> None:
    """A warning at the line that called this package, however deep in it the reason was found."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
