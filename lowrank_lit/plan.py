"""The rank plan: which matrix is stored in which form and at which rank."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from torch import nn

from lowrank_lit.errors import ExportError, PlanError

FORMAT_VERSION = 2
"""Version of the dictionary and the file; a reader refuses a newer one, and reads every older one.

Version 2 added the pivot form, and of a plan ``preset``, ``feedback``, ``storage``, ``predicted_nats``, ``nested``,
``order`` and ``quantum``.
"""

_FORMS = ("factored", "dense", "pivot")
_LAYERS = {"FactoredLinear": "factored", "PivotLinear": "pivot"}
_Entry = TypeVar("_Entry", "MatrixPlan", "RankPlan")


@dataclass(frozen=True)
class MatrixPlan:
    """How one weight matrix is stored.

    Raises:
        PlanError: If a field is out of its range.
    """

    name: str
    """Dotted module name, as in ``model.named_modules()``."""
    rows: int
    """Rows m of the weight: output features."""
    columns: int
    """Columns n of the weight: input features."""
    form: Literal["factored", "dense", "pivot"]
    """Two factors (m, r) and (r, n), the matrix itself, or r of its rows and the (m - r, r) coefficients of the
    others."""
    rank: int
    """Rank r, from 1 to min(m, n), below m in pivot form; for the dense form the rank that the matrix may have."""
    importance: float | None = None
    """Importance of the module that the allocator used, if any."""
    kept_energy: float | None = None
    """Share of the squared singular values that the rank keeps, in the plan's metric, if known."""

    def __post_init__(self) -> None:
        where = f"matrix '{self.name}'"
        if not _is_text(self.name) or not self.name:
            raise PlanError(f"name={self.name!r} is no module name; give the dotted name of the module")
        for field, value in (("rows", self.rows), ("columns", self.columns), ("rank", self.rank)):
            if not _is_count(value):
                raise PlanError(f"{field}={value!r} of {where} must be a whole number of 1 or more")
        if self.form not in _FORMS:
            raise PlanError(f"form={self.form!r} of {where} is unknown; choose one of {', '.join(_FORMS)}")
        if self.rank > min(self.rows, self.columns):
            raise PlanError(
                f"rank={self.rank} of {where} is more than a matrix of {self.rows} x {self.columns} can have; "
                f"choose at most {min(self.rows, self.columns)}"
            )
        if self.form == "pivot" and self.rank == self.rows:
            raise PlanError(
                f"rank={self.rank} of {where} leaves no row to express by others in pivot form; store it dense or "
                f"choose a rank below {self.rows}"
            )
        for field, number in (("importance", self.importance), ("kept_energy", self.kept_energy)):
            if number is not None and not _is_number(number):
                raise PlanError(f"{field}={number!r} of {where} must be a finite number or null")

    @property
    def parameters(self) -> int:
        """Numbers stored: r (m + n) factored, r (m + n - r) in pivot form, m n dense.

        Neither biases are counted nor the m indices of the pivot form, which are no parameters.
        """
        if self.form == "dense":
            return self.dense_parameters
        return self.rank * (self.rows + self.columns - (self.rank if self.form == "pivot" else 0))

    @property
    def dense_parameters(self) -> int:
        """Numbers of the matrix itself, m n."""
        return self.rows * self.columns


@dataclass(frozen=True)
class RankPlan:
    """The forms and ranks of every target matrix of a model, with where they come from.

    Raises:
        PlanError: If there is no matrix, two have one name, or a field is out of its range.
    """

    matrices: tuple[MatrixPlan, ...]
    """Every target, those that stay dense too, in the order of the model's modules."""
    requested_keep_ratio: float
    """Stored / original numbers of the target matrices that was asked for, in (0, 1]."""
    metric: str
    """Name of the metric the singular values were taken in."""
    allocator: str
    """Name of the allocator."""
    fingerprint: str = ""
    """Hash of the model, data and settings behind the plan; empty for a plan made by hand."""
    notes: tuple[str, ...] = ()
    """Remarks for the reader, such as a fallback that was taken."""
    preset: str = ""
    """Name of the preset that chose the settings, if any."""
    feedback: str = "none"
    """Name of the error feedback that the factors were fitted with."""
    storage: str = "factored"
    """Form that was asked for: of every matrix that is not dense."""
    predicted_nats: float | None = None
    """Predicted rise of the loss in nats per token, if the metric gives one."""
    nested: bool = False
    """Whether the factors keep the order of their components, so that leading parts of them are smaller models."""
    order: tuple[int, ...] = ()
    """For a nested plan, the components beyond the floors, the most worth keeping first: each entry is the index in
    ``matrices`` of the matrix whose next component it is. The floor of a factored matrix is its rank less its entries.
    In the file, base64 of zlib of little-endian 16-bit numbers."""
    quantum: int = 1
    """What the ranks of matrices that are not dense are multiples of; an order names each matrix this many times in a
    row, and is cut between such runs only."""

    def __post_init__(self) -> None:
        if not self.matrices:
            raise PlanError("the plan has no matrices; list every target, those that stay dense too")
        seen: set[str] = set()
        for matrix in self.matrices:
            if matrix.name in seen:
                raise PlanError(f"matrix '{matrix.name}' stands in the plan twice; keep one entry")
            seen.add(matrix.name)
        if not _is_number(self.requested_keep_ratio) or not 0 < self.requested_keep_ratio <= 1:
            raise PlanError(f"requested_keep_ratio={self.requested_keep_ratio!r} must lie in (0, 1]")
        for field in ("metric", "allocator", "fingerprint", "preset", "feedback", "storage"):
            if not _is_text(getattr(self, field)):
                raise PlanError(f"{field}={getattr(self, field)!r} must be a string")
        if not all(_is_text(note) for note in self.notes):
            raise PlanError(f"notes={self.notes!r} must be strings")
        if self.predicted_nats is not None and not _is_number(self.predicted_nats):
            raise PlanError(f"predicted_nats={self.predicted_nats!r} must be a finite number or null")
        if not _is_count(self.quantum):
            raise PlanError(f"quantum={self.quantum!r} must be a whole number of 1 or more")
        if not isinstance(self.nested, bool):
            raise PlanError(f"nested={self.nested!r} must be true or false")
        self._check_order()

    def _check_order(self) -> None:
        if self.order and not self.nested:
            raise PlanError("order is given for a plan that is not nested; set nested, or leave the order out")
        pivot = next((matrix.name for matrix in self.matrices if matrix.form == "pivot"), None)
        if self.nested and pivot is not None:
            raise PlanError(
                f"matrix '{pivot}' is in pivot form in a nested plan, and a part of that form is no smaller model; "
                "store nested plans factored"
            )
        for index, count in Counter(self.order).items():
            if not _is_index(index, len(self.matrices)):
                raise PlanError(f"order names matrix {index!r} of {len(self.matrices)}; give indices of matrices")
            matrix = self.matrices[index]
            if matrix.form == "dense" or count >= matrix.rank:
                raise PlanError(
                    f"order has {count} components of matrix '{matrix.name}' ({matrix.form}, rank {matrix.rank}); list "
                    "the components of factored matrices beyond a floor of 1 or more"
                )
            if matrix.rank % self.quantum:
                raise PlanError(
                    f"rank={matrix.rank} of matrix '{matrix.name}' is no multiple of quantum={self.quantum}; give the "
                    "quantum that the ranks were chosen with, or 1"
                )
        # Whole runs of one matrix each; with the ranks above, the floors are multiples too.
        runs = [self.order[start :: self.quantum] for start in range(self.quantum)]
        if any(run != runs[0] for run in runs):
            raise PlanError(
                f"order does not name each matrix quantum={self.quantum} times in a row; give the quantum that it was "
                "made with, or 1"
            )

    @property
    def parameters(self) -> int:
        """Numbers stored for all matrices; biases are not counted."""
        return sum(matrix.parameters for matrix in self.matrices)

    @property
    def dense_parameters(self) -> int:
        """Numbers of all matrices before factoring."""
        return sum(matrix.dense_parameters for matrix in self.matrices)

    @property
    def keep_ratio(self) -> float:
        """Stored / original numbers that the plan really reaches."""
        return self.parameters / self.dense_parameters

    def __repr__(self) -> str:
        smaller = sum(matrix.form != "dense" for matrix in self.matrices)
        return (
            f"RankPlan({len(self.matrices)} matrices, {smaller} of them {self.storage}, "
            f"keep_ratio={self.keep_ratio:.4f} of {self.requested_keep_ratio}, "
            f"metric={self.metric!r}, allocator={self.allocator!r})"
        )

    def digest(self) -> str:
        """SHA-256 of the plan's content, 64 hexadecimal digits; the same for equal plans."""
        content = self.to_dict() | {"order": self.order}  # not packed: other versions of zlib pack in other ways
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types, with ``format_version``."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        matrices = [{field.name: getattr(matrix, field.name) for field in fields(matrix)} for matrix in self.matrices]
        lists = {"matrices": matrices, "notes": list(self.notes), "order": _pack(self.order)}
        return {"format_version": FORMAT_VERSION, **own, **lists}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RankPlan:
        """Read what :meth:`to_dict` gave.

        Raises:
            PlanError: If a key is missing or unknown, a value is out of range or the format is newer than this release.
        """
        if not isinstance(values, dict):
            raise PlanError(f"a plan is a JSON object, not {type(values).__name__}; save it with RankPlan.save")
        content = dict(values)
        version = content.pop("format_version", None)
        if not isinstance(version, int) or version < 1:
            raise PlanError(f"format_version={version!r} is none of a rank plan; save the plan with RankPlan.save")
        if version > FORMAT_VERSION:
            raise PlanError(
                f"format_version={version} of the plan is newer than this release reads ({FORMAT_VERSION}); "
                "upgrade lowrank-lit"
            )
        entries, notes = content.get("matrices"), content.get("notes", [])
        if not isinstance(entries, list) or not isinstance(notes, list):
            raise PlanError("matrices and notes of a plan must be lists; save the plan with RankPlan.save")
        matrices = tuple(
            _construct(MatrixPlan, entry, f"entry {index} of matrices") for index, entry in enumerate(entries)
        )
        order = _unpack(content.get("order", ""))
        return _construct(cls, {**content, "matrices": matrices, "notes": tuple(notes), "order": order}, "the plan")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON; the file is complete or is not there.

        Raises:
            ExportError: If the file cannot be written.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ExportError(
                f"plan file '{target}' cannot be written ({reason}); free space or choose another path"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankPlan:
        """Read a file that :meth:`save` wrote.

        Raises:
            PlanError: If the file is missing, truncated, or holds no plan.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            reason = error.strerror or str(error)
            raise PlanError(f"plan file '{path}' cannot be read ({reason}); check the path") from error
        except ValueError as error:  # not JSON, or not text
            raise PlanError(f"plan file '{path}' is truncated or no JSON ({error}); write it again") from error
        try:
            return cls.from_dict(values)
        except PlanError as error:
            raise PlanError(f"plan file '{path}': {error}") from error

    def check(self, model: nn.Module) -> None:
        """Compare names, shapes and ranks with a model, dense or factored by this plan.

        A matrix may be an ``nn.Linear`` or a transformers ``Conv1D``, whether it is still to be factored or stays
        dense, or a ``FactoredLinear`` or ``PivotLinear``, by its form, of the plan's rank.

        Raises:
            PlanError: If a matrix does not fit; the message names the first one and how many there are.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        misfits = [reason for matrix in self.matrices if (reason := _misfit(matrix, modules.get(matrix.name)))]
        if misfits:
            raise PlanError(
                f"the plan does not fit the model in {len(misfits)} of {len(self.matrices)} matrices, "
                f"first: {misfits[0]}; {_remedy(self.matrices, modules)}"
            )


def truncated_plan(plan: RankPlan, keep_ratio: float) -> RankPlan:
    """The plan of a smaller model inside a nested one: the longest beginning of its order that the budget allows.

    Dense matrices stay dense, and ranks stay multiples of the plan's quantum. The result is nested too, so that it can
    be truncated further, and smaller budgets give ranks that are nowhere larger.

    Args:
        plan: A nested plan.
        keep_ratio: Stored / original numbers of the target matrices, in (0, 1]; what the plan was made for, or what it
            reaches, gives the plan itself.

    Raises:
        PlanError: If the plan is not nested, or ``keep_ratio`` is more than it holds or less than its floors need.
    """
    if not plan.nested:
        raise PlanError(
            f"keep_ratio={keep_ratio} needs a nested plan, and this one is not; compress again with "
            "nested=True, or leave keep_ratio out"
        )
    if not _is_number(keep_ratio) or not 0 < keep_ratio <= 1:
        raise PlanError(f"keep_ratio={keep_ratio!r} must lie in (0, 1]")
    if keep_ratio > max(plan.requested_keep_ratio, plan.keep_ratio):
        raise PlanError(
            f"keep_ratio={keep_ratio} is more than the plan holds ({plan.keep_ratio:.4f}, made for "
            f"keep_ratio={plan.requested_keep_ratio}); choose at most that, or compress the dense model again"
        )
    budget = math.floor(keep_ratio * plan.dense_parameters + 1e-9)
    if keep_ratio == plan.keep_ratio or budget >= plan.parameters:
        return plan
    above = Counter(plan.order)
    ranks = [matrix.rank - above[index] for index, matrix in enumerate(plan.matrices)]
    spent = sum(replace(matrix, rank=rank).parameters for matrix, rank in zip(plan.matrices, ranks, strict=True))
    if spent > budget:
        raise PlanError(
            f"keep_ratio={keep_ratio} allows {budget} numbers, and the floors and dense matrices of the plan alone "
            f"need {spent}; choose at least {spent / plan.dense_parameters:.4f}"
        )
    kept = 0
    for index in plan.order[:: plan.quantum]:
        spent += plan.quantum * (plan.matrices[index].rows + plan.matrices[index].columns)
        if spent > budget:
            break
        ranks[index] += plan.quantum
        kept += plan.quantum
    matrices = tuple(
        matrix if rank == matrix.rank else replace(matrix, rank=rank, kept_energy=None)
        for matrix, rank in zip(plan.matrices, ranks, strict=True)
    )
    # Another identity than the whole plan's: a folder of the one is not to be replaced by the other.
    identity = plan.fingerprint and hashlib.sha256(f"{plan.fingerprint} {kept}".encode()).hexdigest()[:32]
    return replace(
        plan,
        matrices=matrices,
        requested_keep_ratio=keep_ratio,
        fingerprint=identity,
        predicted_nats=None,
        order=plan.order[:kept],
    )


def _pack(order: Sequence[int]) -> str:
    """Indices as text: a model of 7 billion parameters has half a million, at most 0.9 MB this way."""
    numbers = array("H", order)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(zlib.compress(numbers.tobytes(), 9)).decode() if order else ""


def _unpack(text: object) -> tuple[int, ...]:
    numbers = array("H")
    try:
        if text:
            numbers.frombytes(zlib.decompress(base64.b64decode(cast(str, text), validate=True)))
    except (TypeError, ValueError, zlib.error) as error:  # binascii.Error is a ValueError
        raise PlanError(f"order of the plan is garbled ({error}); save the plan with RankPlan.save") from error
    if sys.byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)


# Values come from JSON files and from callers without a type checker, so the annotations above are checked too.
def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_index(value: object, length: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < length


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _construct(kind: type[_Entry], values: Any, where: str) -> _Entry:
    """An instance of ``kind`` from a dictionary, with unknown and missing keys refused by name."""
    if not isinstance(values, dict):
        raise PlanError(f"{where} is a {type(values).__name__}, not an object; save the plan with RankPlan.save")
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise PlanError(f"{where} has the unknown key '{unknown[0]}'; known are {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:  # a required field is missing
        raise PlanError(f"{where} is incomplete ({error}); save the plan with RankPlan.save") from error


def _remedy(matrices: Sequence[MatrixPlan], modules: Mapping[str, nn.Module]) -> str:
    """What to do with a plan that does not fit."""
    holders = (name.removesuffix(".linear") for matrix in matrices if (name := matrix.name) not in modules)
    if any(isinstance(modules.get(name), nn.Conv1d | nn.Conv2d | nn.Conv3d) for name in holders):
        return "call lowrank_lit.pointwise_as_linear(model) first, as was done before the compression"
    return "use the plan of this model"


def _misfit(matrix: MatrixPlan, module: nn.Module | None) -> str:
    """Why a module is not what the plan says, or an empty string."""
    if module is None:
        return f"'{matrix.name}' is not in the model"
    found = _layout(module)
    if found is None:
        return f"'{matrix.name}' is a {type(module).__name__}, not a linear layer"
    rows, columns, form, rank = found
    if (rows, columns) != (matrix.rows, matrix.columns):
        return f"'{matrix.name}' is {rows} x {columns} in the model and {matrix.rows} x {matrix.columns} in the plan"
    if form is not None and form != matrix.form:
        what = "factored" if form == "factored" else "in pivot form"
        planned = "in pivot form" if matrix.form == "pivot" else matrix.form
        return f"'{matrix.name}' is {what} at rank {rank} in the model and {planned} in the plan"
    if rank is not None and rank != matrix.rank:
        return f"'{matrix.name}' has rank {rank} in the model and {matrix.rank} in the plan"
    return ""


def _layout(module: nn.Module) -> tuple[int, int, str | None, int | None] | None:
    """(rows, columns, form, rank) of a linear layer, the last two None for a plain one; recognised by structure, for
    this module knows of no layer class."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features, None, None
    if kind in _LAYERS:
        return cast(int, module.out_features), cast(int, module.in_features), _LAYERS[kind], cast(int, module.rank)
    weight = getattr(module, "weight", None)
    if kind == "Conv1D" and isinstance(weight, nn.Parameter) and weight.ndim == 2:
        columns, rows = weight.shape  # Conv1D stores (in, out)
        return rows, columns, None, None
    return None
