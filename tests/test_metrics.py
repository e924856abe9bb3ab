"""The table of metrics: every one works with exactly the moments that it declares."""

from __future__ import annotations

import pytest
import torch

from lowrank_lit.errors import LowRankError
from lowrank_lit.metrics import METRIC_MOMENTS, check_metric_settings, moments_of
from lowrank_lit.spectrum import compute_spectrum
from lowrank_lit.statistics import LayerStatistics


def statistics_with(moments: frozenset[str], weight: torch.Tensor) -> LayerStatistics:
    """Statistics of white inputs and gradients with the fields of these moments and no others."""
    rows, columns = weight.shape
    tall = columns < rows
    fields: dict[str, object] = {"tokens": 10}
    if moments & {"input", "input_full"}:
        fields["input_energy"] = float(columns)
        if columns <= rows or "input_full" in moments:
            fields["input_moment"] = torch.eye(columns, dtype=torch.float64)
        else:
            fields["output_moment"] = weight @ weight.mT
    if "magnitude" in moments:
        fields["input_magnitude"] = torch.ones(columns, dtype=torch.float64)
    if "gradient" in moments:
        fields["gradient_energy"] = float(rows)
        fields["pulled_moment" if tall else "gradient_moment"] = (
            weight.mT @ weight if tall else torch.eye(rows, dtype=torch.float64)
        )
    if "fisher" in moments:
        fields["fisher_rows"] = torch.full((rows,), 1.0 * columns, dtype=torch.float64)
        fields["fisher_columns"] = torch.full((columns,), 1.0 * rows, dtype=torch.float64)
    return LayerStatistics(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
@pytest.mark.parametrize("metric", METRIC_MOMENTS)
def test_white_statistics_make_every_metric_plain_svd(metric: str, shape: tuple[int, int]) -> None:
    """White inputs, white gradients and a Fisher of ones weigh every entry alike, at unit weight."""
    weight = torch.randn(*shape, dtype=torch.float64)
    spectrum = compute_spectrum(weight, statistics_with(moments_of(metric), weight), metric=metric, name="layer")
    torch.testing.assert_close(spectrum.singular_values, torch.linalg.svdvals(weight), rtol=1e-9, atol=1e-9)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    outer, inner = spectrum.factors(weight, 3)
    torch.testing.assert_close(outer @ inner, (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
@pytest.mark.parametrize("metric", [metric for metric, moments in METRIC_MOMENTS.items() if moments])
def test_no_declared_moment_is_superfluous(metric: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, dtype=torch.float64)
    for left_out in moments_of(metric):
        statistics = statistics_with(moments_of(metric) - {left_out}, weight)
        with pytest.raises(LowRankError, match=f"metric='{metric}' needs the moment '{left_out}' of layer 'layer'"):
            compute_spectrum(weight, statistics, metric=metric, name="layer")


def test_unknown_metric() -> None:
    with pytest.raises(LowRankError, match="metric='fisher' is unknown; choose one of identity, input, activation_sc"):
        moments_of("fisher")


def test_settings_out_of_range_are_named() -> None:
    check_metric_settings(damping=0.0, shrinkage=1.0, alpha=0.0)
    for setting, value in (("damping", 1.1), ("shrinkage", -0.1), ("alpha", -1.0)):
        with pytest.raises(LowRankError, match=f"{setting}={value} is"):
            check_metric_settings(**{setting: value})
    for value in (float("nan"), float("inf")):
        for setting in ("damping", "shrinkage", "alpha"):
            with pytest.raises(LowRankError, match=f"{setting}={value} is"):
                check_metric_settings(**{setting: value})
