"""Settings of a compression, and the presets that fill in those which are left open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from lowrank_lit.allocation import check_keep_ratio
from lowrank_lit.allocation.allocate import NEEDS, check_allocator
from lowrank_lit.errors import BudgetError, LowRankError
from lowrank_lit.metrics import DAMPING, GRADIENT_SHRINKAGE, SCALE_EXPONENT, check_metric_settings, moments_of
from lowrank_lit.statistics import BACKWARD_MOMENTS

MIN_RANK = 8
FEEDBACKS = ("none", "recollect", "anchored")
STORAGES = ("factored", "pivot")
LABELS = ("model", "text", "none")
IMPORTANCES = ("branch", "block")

# What a preset stands for; every one of these may be set by itself as well.
PRESETS: dict[str, dict[str, Any]] = {
    "best": {"metric": "two_sided", "allocator": "knapsack", "feedback": "anchored", "rounds": 3, "select": True},
    "fast": {"metric": "two_sided", "allocator": "knapsack", "feedback": "none", "rounds": 1, "select": True},
    "unirank": {"metric": "input", "allocator": "unirank", "feedback": "none", "rounds": 1, "select": False},
}
DEFAULT_PRESET = "best"

_NUMBERS = {"keep_ratio": 0.6, "damping": DAMPING, "shrinkage": GRADIENT_SHRINKAGE, "alpha": SCALE_EXPONENT}


@dataclass(frozen=True)
class Settings:
    """Settings of a compression; checked when made, and what is ``None`` is taken from the preset.

    Attributes:
        keep_ratio: Share of the target matrices' parameters to keep, in (0, 1].
        preset: ``best``, ``fast`` or ``unirank``, see :data:`PRESETS`.
        metric: In which norm components are large, see :mod:`lowrank_lit.metrics`.
        allocator: How ranks are shared out, see :mod:`lowrank_lit.allocation`.
        feedback: What is learnt from the compressed model: ``none``; ``recollect`` (statistics on it, ranks anew, for
            each round after the first); ``anchored`` (the same, then every block is fitted to the dense one's outputs
            on the inputs that it really gets).
        rounds: Rounds of statistics and allocation, at least 1; one where ``feedback`` is ``none``.
        select: ``knapsack``: measure candidate plans, which weight the predicted losses by powers of the modules'
            importance, on a fifth of the calibration sequences, and keep the best; otherwise one power is fixed.
        storage: Form of a matrix that is not dense: ``factored`` (two factors) or ``pivot``.
        targets: Shell patterns of layer names; ``None`` is every linear layer but the output embedding and tied ones.
        min_rank: Least rank of a matrix.
        quantum: Ranks are multiples of this, or the matrix is dense.
        damping: Relative damping of the inputs' second moments, in [0, 1].
        shrinkage: The same for the gradients' second moments.
        alpha: Exponent of ``activation_scale``.
        labels: What gradients are of: ``model`` (cross-entropy with labels drawn from the model's own predictions, the
            Fisher information), ``text`` (with the text's next tokens, the empirical Fisher; ``zero_sum`` takes these
            in any case) or ``none`` (there are none; what a model without a next-token loss falls back to).
        importance_of: ``unirank``: the importance is that of a matrix's ``branch`` (attention or MLP) or of its whole
            ``block``.
        cost_aware: ``unirank``: score per parameter instead of per component.
        nested: Keep components in order, so that the saved model can be loaded at any smaller keep ratio.

    Raises:
        LowRankError: If a setting is unknown or out of range, or two do not go together.
    """

    keep_ratio: float
    preset: str = DEFAULT_PRESET
    metric: str | None = None
    allocator: str | None = None
    feedback: str | None = None
    rounds: int | None = None
    select: bool | None = None
    storage: str = "factored"
    targets: Sequence[str] | None = None
    min_rank: int = MIN_RANK
    quantum: int = 1
    damping: float = DAMPING
    shrinkage: float = GRADIENT_SHRINKAGE
    alpha: float = SCALE_EXPONENT
    labels: str = "model"
    importance_of: str = "branch"
    cost_aware: bool = False
    nested: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", [self.targets])
        self._check_types()
        check_keep_ratio(self.keep_ratio)
        _choose("preset", self.preset, tuple(PRESETS))
        for field, value in PRESETS[self.preset].items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, self._filled(field, value))
        moments_of(str(self.metric))
        check_allocator(str(self.allocator))
        check_metric_settings(self.damping, self.shrinkage, self.alpha)
        _choose("feedback", self.feedback, FEEDBACKS)
        _choose("storage", self.storage, STORAGES)
        _choose("labels", self.labels, LABELS)
        _choose("importance_of", self.importance_of, IMPORTANCES)
        for field, such in (("min_rank", 8), ("quantum", 8), ("rounds", 3)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BudgetError(f"{field}={value!r} is no whole number of 1 or more; give one, such as {such}")
        if self.allocator == "zero_sum":  # the mean gradient for labels of the model's own is zero
            object.__setattr__(self, "labels", "text")
        self._check_pairs()

    def _check_types(self) -> None:
        """Refuse what Python would take for something else: the text "false" is true, and "0.5" is no number."""
        for field in ("keep_ratio", "damping", "shrinkage", "alpha"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise BudgetError(f"{field}={value!r} is no number; give one, such as {_NUMBERS[field]}")
        for field in ("cost_aware", "nested", "select"):
            value = getattr(self, field)
            if not isinstance(value, bool) and not (field == "select" and value is None):
                raise LowRankError(f"{field}={value!r} is neither true nor false; give one of them")
        patterns = self.targets
        listed = isinstance(patterns, Sequence) and all(isinstance(pattern, str) for pattern in patterns)
        if patterns is not None and not listed:
            raise LowRankError(f"targets={patterns!r} is no list of layer names; give one, such as ['*.mlp.*']")

    def _filled(self, field: str, value: Any) -> Any:
        # A preset's further rounds belong to its feedback, and its measured choice to its allocator.
        if field == "rounds":
            return 1 if self.feedback == "none" else max(value, 2 if self.feedback == "recollect" else 1)
        return value and self.allocator == "knapsack" and not self.nested if field == "select" else value

    def _check_pairs(self) -> None:
        if self.feedback == "none" and self.rounds != 1:
            raise LowRankError(f"rounds={self.rounds} needs feedback='recollect' or 'anchored'; without it there is 1")
        if self.feedback == "recollect" and self.rounds == 1:
            raise LowRankError("feedback='recollect' needs rounds=2 or more: the first is of the dense model")
        if self.labels == "none" and moments_of(str(self.metric)) & BACKWARD_MOMENTS:
            raise LowRankError(f"labels='none' leaves no gradients for metric='{self.metric}'; choose metric='input'")
        if self.select and (self.allocator != "knapsack" or self.nested):
            raise LowRankError("select=True needs allocator='knapsack' and a plan that is not nested; leave it out")
        if self.nested and self.storage != "factored":
            raise LowRankError("nested=True needs storage='factored': a part of the pivot form is no smaller model")
        if self.nested and self.allocator not in ("unirank", "knapsack"):
            raise LowRankError(
                f"nested=True needs an allocator that orders components (unirank, knapsack), not '{self.allocator}'"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What the allocator needs of each matrix beyond its spectrum."""
        return NEEDS[str(self.allocator)]

    @property
    def moments(self) -> frozenset[str]:
        """Moments that calibration has to collect."""
        found = moments_of(str(self.metric))
        if "first_order" in self.needs:
            found |= {"weight_gradient"}
        if "nats" in self.needs and self.metric == "input":
            found |= {"gradient"}  # for its size, which brings the metric's unit to nats
        return found if self.labels != "none" else found - BACKWARD_MOMENTS

    def resolved(self) -> dict[str, Any]:
        """All settings as plain JSON types, the preset's filled in."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["targets"] = None if self.targets is None else list(self.targets)
        return values


def _choose(setting: str, value: str | None, choices: Sequence[str]) -> None:
    if value not in choices:
        raise LowRankError(f"{setting}='{value}' is unknown; choose one of {', '.join(choices)}")
