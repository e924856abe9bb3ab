"""What the allocators are told of every matrix, made from spectra and statistics.

Curves of predicted loss come from the spectra alone. Half the dropped squared singular values of ``two_sided`` is the
change of the loss in nats per token, in the Gauss-Newton approximation around the model that the statistics are of; in
``input`` the same holds with the gradients known by their mean size alone, and in the Fisher metrics in nats per
sequence. The other metrics have no common unit: there a curve is the share of the matrix's energy that is left out,
times the importance of its module, so that the curves of different matrices can still be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowrank_lit.allocation import MatrixProfile, MatrixSpec
from lowrank_lit.collector import Calibration
from lowrank_lit.experts import sides_of
from lowrank_lit.linalg import to_double
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.settings import Settings
from lowrank_lit.spectrum import Spectrum, scalar_gradient
from lowrank_lit.statistics import LayerStatistics
from lowrank_lit.surgery import Target

_PER_SEQUENCE = frozenset({"fisher_two_sided", "fisher_input"})
_IN_NATS = _PER_SEQUENCE | {"two_sided"}
"""Half the dropped energy is a change of the loss, in nats per token or sequence."""


def specs_of(targets: Mapping[str, Target], settings: Settings) -> list[MatrixSpec]:
    """Shape, floor, storage and quantum of every target."""
    return [
        MatrixSpec(
            target.name,
            target.rows,
            target.columns,
            min(settings.min_rank, target.rows, target.columns),
            "pivot" if settings.storage == "pivot" else "factored",
            settings.quantum,
        )
        for target in targets.values()
    ]


def places_of(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[str, int | None]]:
    """Projection type and block number of every layer: the name inside its repeating block, and which block that is.

    A layer outside of the repeating blocks has its whole name for a type and no block. The experts of a block are of
    one type.
    """
    blocks = [name for name, _ in find_repeating_blocks(model)]
    experts = sides_of(model, {name: model.get_submodule(name) for name in names})
    places: dict[str, tuple[str, int | None]] = {}
    for name in names:
        found = next((index for index, block in enumerate(blocks) if name.startswith(f"{block}.")), None)
        kind = name if found is None else name[len(blocks[found]) + 1 :]
        if name in experts:  # the number between the experts' name and the layer's
            stem, _, layer = kind.rpartition(".")
            kind = f"{stem.rpartition('.')[0]}.{layer}"
        places[name] = (kind, found)
    return places


def predicts_nats(metric: str, statistics: Mapping[str, LayerStatistics]) -> bool:
    """Whether spectra in this metric, with these statistics, predict a loss in nats per token."""
    sized = any(entry.gradient_energy > 0 for entry in statistics.values())
    return metric == "two_sided" or (metric == "input" and sized)


def loss_curve(spectrum: Spectrum, statistics: LayerStatistics | None, metric: str, importance: float) -> Tensor:
    """Predicted loss of one matrix at every rank ``0..p``, ``(p + 1,)`` float64; see the module's description.

    Args:
        spectrum: In the metric.
        statistics: Of the layer.
        metric: Of the spectrum.
        importance: Of the module; used where the metric has no unit of its own.
    """
    if metric == "input" and statistics is not None and _has_gradients(statistics):
        spectrum = scalar_gradient(spectrum, statistics)
        metric = "two_sided"
    energy = spectrum.energy().cpu().double()
    tail = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    if metric in _IN_NATS:
        return tail / 2
    return importance * tail / tail[0] if float(tail[0]) > 0 else tail


def _has_gradients(statistics: LayerStatistics) -> bool:
    """Whether gradients were collected; those of a layer that the loss does not depend on are zero."""
    return statistics.gradient_moment is not None or statistics.pulled_moment is not None


def component_changes(spectrum: Spectrum, weight: Tensor, gradient: Tensor) -> Tensor:
    """First-order change of the loss when one component is removed, for each, ``(p,)`` in nats per token.

    ``-<G, left_i inner_i>`` with ``G`` the mean gradient of the weight: ZS-SVD's ``-sigma_i u_i^T H v_i``.

    Args:
        spectrum: Of the weight.
        weight: ``(rows, columns)``.
        gradient: ``G`` ``(rows, columns)``.
    """
    left = to_double(spectrum.left.to(weight.device))
    inner = left.mT @ to_double(weight) if spectrum.inner is None else to_double(spectrum.inner.to(weight.device))
    return -((left.mT @ to_double(gradient.to(weight.device))) * inner).sum(1)


def block_importance(importance: Mapping[str, float], places: Mapping[str, tuple[str, int | None]]) -> dict[str, float]:
    """The mean importance of each block's branches, for every matrix in it.

    Each branch of a block counts once, by its value: the matrices of one branch share theirs.
    """
    values: dict[int | None, set[float]] = {}
    for name, value in importance.items():
        values.setdefault(places[name][1], set()).add(value)
    return {
        name: value if places[name][1] is None else float(np.mean(sorted(values[places[name][1]])))
        for name, value in importance.items()
    }


def profiles_of(
    specs: Sequence[MatrixSpec],
    spectra: Mapping[str, Spectrum],
    calibration: Calibration,
    places: Mapping[str, tuple[str, int | None]],
    *,
    metric: str,
    power: float,
    first_order: Mapping[str, Tensor] | None = None,
    tables: Mapping[str, Mapping[float, float]] | None = None,
    probes: Mapping[str, tuple[int, float]] | None = None,
) -> list[MatrixProfile]:
    """One profile per matrix.

    Args:
        specs: The matrices.
        spectra: In ``metric``.
        calibration: Statistics and importance. An expert's matrices have the importance of their module times the
            expert's frequency: what is lost of them is lost for its tokens alone.
        places: See :func:`places_of`.
        metric: Of the spectra.
        power: Exponent of the modules' importance, by which predicted losses are multiplied. Statistics of the dense
            model do not see how errors grow through the layers after them, and the importance tells a part of it;
            statistics of the compressed model see more of it.
        first_order: By name, for ``zero_sum``; a mean over the tokens that reach the layer, as the statistics are.
        tables: By name, for ``sensitivity``.
        probes: By name, for ``measured``.
    """
    profiles = []
    statistics = calibration.statistics
    nats = metric in _IN_NATS or predicts_nats(metric, statistics)
    most = max((entry.tokens for entry in statistics.values()), default=0)
    for spec in specs:
        name = spec.name
        module = calibration.importance.get(name, 1.0)
        # Moments are means over the tokens that reach a layer; a loss per token of the text counts the others as well.
        frequency = statistics[name].frequency if name in statistics else None
        share = frequency or (statistics[name].tokens / most if most else 1.0)
        importance = module if frequency is None else module * frequency
        curve = _array(loss_curve(spectra[name], statistics.get(name), metric, importance))
        if nats:
            curve = curve * module**power * (1.0 if metric in _PER_SEQUENCE else share)
        profiles.append(
            MatrixProfile(
                spec,
                _array(spectra[name].energy()),
                importance=importance,
                kind=places[name][0],
                block=places[name][1],
                first_order=None if first_order is None else _array(first_order[name]) * share,
                nats=curve,
                table=None if tables is None else tables[name],
                probe=None if probes is None else probes.get(name),
            )
        )
    return profiles


def _array(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().double().numpy()
