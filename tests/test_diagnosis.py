"""A diagnosis and a LASER sweep against the same figures by hand; what they refuse."""

from __future__ import annotations

import copy
import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_lit import compress, perplexity, plan_ranks
from lowrank_lit.cuts import LaserCell, LossMeter, laser
from lowrank_lit.diagnosis import Diagnosis, diagnose, spearman, summary_of
from lowrank_lit.errors import DataError, LowRankError, PlanError
from lowrank_lit.evaluation import token_losses
from lowrank_lit.head_tail import frequent_targets
from lowrank_lit.surgery import dense_weight
from tests.tiny import batches, tiny_model

FAST: dict[str, Any] = {"preset": "fast", "select": False, "min_rank": 2}


@pytest.fixture(autouse=True)
def _few_tokens_are_fine() -> None:
    warnings.filterwarnings("ignore", message="calibration has")


def text(n: int = 3) -> Tensor:
    return torch.cat([batch["input_ids"] for batch in batches(n=n, seed=9, structured=True)])


def calibration() -> list[dict[str, Tensor]]:
    return batches(n=4, structured=True)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Bit for bit, and in the same memory layout."""
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def loss_with(model: Any, weights: dict[str, Tensor]) -> float:
    """Mean next-token loss of a copy of the model with other weights ``(rows, columns)``."""
    other = copy.deepcopy(model)
    for name, weight in weights.items():
        layer = other.get_submodule(name)
        turned = type(layer).__name__ == "Conv1D"
        layer.weight.data = (weight.T if turned else weight).float().contiguous()
    ids = text()
    logits = other(input_ids=ids).logits.double()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def plain_cut(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


# --- LASER ---


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_laser_cell_is_that_cut_by_hand(family: str) -> None:
    model: Any = tiny_model(family)
    before = state(model)
    seen: list[LaserCell] = []

    def check(cell: LaserCell) -> None:
        assert same(model, before), "restored bit for bit between the cells"
        seen.append(cell)

    found = laser(model, text(), keep_shares=[0.1, 0.5], targets=["*.0.*mlp*"], after=check)
    assert list(found.cells) == seen
    assert found.dense_perplexity == pytest.approx(perplexity(model, text()), rel=1e-12)
    assert found.tokens == 6 * 15
    names = list(dict.fromkeys(cell.name for cell in seen))
    assert len(seen) == 2 * len(names) >= 4
    for cell in seen:
        assert (cell.rank, cell.full_rank) == ({0.5: 16, 0.1: 3}[cell.keep_share], 32)
        assert cell.block == 0
        expected = loss_with(model, {cell.name: plain_cut(dense_weight(model.get_submodule(cell.name)), cell.rank)})
        assert cell.change.loss == pytest.approx(expected, abs=1e-5)  # measured: 2e-7
        assert cell.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
        assert cell.change.rise == pytest.approx(expected - found.dense_loss, abs=1e-5)
        assert cell.improves == (cell.perplexity < found.dense_perplexity)
        assert abs(cell.change.rise) > 1e-5, "or any cut would agree"
    assert found.best.change.loss == min(cell.change.loss for cell in seen)
    assert {cell.improves for cell in seen} <= {True, False}


def test_laser_in_the_inputs_metric_is_another_cut() -> None:
    model: Any = tiny_model("llama")
    before = state(model)
    limits: dict[str, Any] = {"keep_shares": [0.5], "targets": ["*.1.mlp.down_proj"]}
    (plain,) = laser(model, text(), **limits).cells
    (aware,) = laser(model, text(), metric="input", batches=calibration(), **limits).cells
    assert same(model, before)
    assert aware.rank == plain.rank == 16
    assert abs(aware.change.loss - plain.change.loss) > 1e-5


@torch.no_grad()
def test_a_cut_that_takes_noise_away_is_flagged() -> None:
    """Text drawn from a model with a matrix of rank 8, measured with noise of full rank on that matrix."""
    model: Any = tiny_model("llama")
    layer = model.model.layers[1].mlp.down_proj
    layer.weight.copy_(6 * plain_cut(layer.weight, 8))
    ids = torch.randint(3, 96, (96, 1))
    for _ in range(15):
        ids = torch.cat([ids, torch.multinomial(model(input_ids=ids).logits[:, -1].softmax(-1), 1)], 1)
    clean = perplexity(model, ids)
    layer.weight.add_(0.3 * torch.randn_like(layer.weight))
    found = laser(model, ids, keep_shares=[0.25, 0.05], targets=["*.1.mlp.down_proj"])
    noisy, helped, worse = found.dense_perplexity, *found.cells
    assert clean < noisy
    assert helped.rank == 8
    assert helped.improves
    assert helped.clearly
    assert helped is found.best
    assert not worse.improves
    assert not worse.clearly


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_shares": []}, "keep_shares is empty"),
        ({"keep_shares": [1.0]}, r"keep share 1 is outside \(0, 1\)"),
        ({"metric": "inpt"}, "metric='inpt' is unknown"),
        ({"metric": "input"}, "metric='input' needs calibration batches"),
    ],
)
def test_what_laser_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        laser(tiny_model("llama"), text(), **options)


def test_the_error_of_a_rise_is_that_of_paired_blocks() -> None:
    model: Any = tiny_model("llama")
    meter = LossMeter(model, text())
    losses = meter.dense.clone()
    losses += torch.arange(6, dtype=torch.float64)[:, None]
    change = meter.change(losses)
    assert change.rise == pytest.approx(2.5)
    assert change.error == pytest.approx(torch.arange(6.0).std().item() / 6**0.5)
    assert meter.dense_loss == pytest.approx(math.log(perplexity(model, text())), rel=1e-12)
    assert torch.equal(torch.stack(token_losses(model, text(), batch_size=2)), torch.stack(token_losses(model, text())))


# --- diagnose ---


@pytest.fixture(scope="module")
def case() -> tuple[Any, Diagnosis]:
    model = tiny_model("llama")
    before = state(model)
    warnings.filterwarnings("ignore", message="calibration has")
    found = diagnose(model, calibration(), keep_ratio=0.6, blocks=text(), **FAST)
    assert same(model, before)
    return model, found


def test_the_plan_is_the_compressions(case: tuple[Any, Diagnosis]) -> None:
    model, found = case
    plan = plan_ranks(model, calibration(), keep_ratio=0.6, **FAST)
    assert found.plan.matrices == plan.matrices
    for entry, own in zip(found.matrices, plan.matrices, strict=True):
        assert (entry.name, entry.rank, entry.form) == (own.name, own.rank, own.form)
        assert entry.kept_energy == pytest.approx(own.kept_energy)
        assert (entry.measured is None) == (entry.parts is None) == (own.form == "dense")
    cut = [entry for entry in found.matrices if entry.measured is not None]
    assert sum(entry.predicted or 0.0 for entry in cut) == pytest.approx(plan.predicted_nats)


def test_spectra_and_cosines(case: tuple[Any, Diagnosis]) -> None:
    model, found = case
    for entry in found.matrices:
        s = torch.linalg.svdvals(dense_weight(model.get_submodule(entry.name)).detach().double())
        p = s.square() / s.square().sum()
        assert entry.plain.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-6)
        assert entry.plain.stable_rank == pytest.approx(float(1 / p[0]), rel=1e-6)
        for share, rank in ((0.9, entry.plain.rank_90), (0.95, entry.plain.rank_95), (0.99, entry.plain.rank_99)):
            assert float(p[:rank].sum()) >= share - 1e-9 > float(p[: rank - 1].sum()) - 2e-9
        assert entry.metric.stable_rank <= entry.metric.effective_rank + 1e-9
        assert entry.cosine is not None
        assert -1 <= entry.cosine <= 1
    assert summary_of(torch.zeros(4)).effective_rank == 0


def test_measured_losses_are_those_of_a_single_cut() -> None:
    """In plain SVD, whose cuts are known."""
    model: Any = tiny_model("llama")
    names = ["*.0.mlp.up_proj", "*.1.self_attn.o_proj"]
    settings = {**FAST, "preset": "unirank", "metric": "identity", "allocator": "uniform", "targets": names}
    found = diagnose(model, calibration(), keep_ratio=0.5, blocks=text(), **settings)
    heads = {}
    for entry in found.matrices:
        weight = dense_weight(model.get_submodule(entry.name)).detach().double()
        heads[entry.name] = plain_cut(weight, entry.rank)
        assert entry.measured is not None
        assert entry.measured.loss == pytest.approx(loss_with(model, {entry.name: heads[entry.name]}), abs=1e-5)
        assert abs(entry.measured.rise) > 1e-5
        assert entry.predicted is None
        assert entry.plain == entry.metric
    tails = {name: dense_weight(model.get_submodule(name)).double() - head for name, head in heads.items()}
    for part, weights in (("head", heads), ("tail", tails), ("both", {})):
        assert found.losses[part].change.loss == pytest.approx(loss_with(model, weights), abs=1e-5)
    assert found.rank_correlation is None
    assert found.losses["both"].change.rise == pytest.approx(0, abs=1e-6)


def test_head_and_tail_together_are_the_dense_model(case: tuple[Any, Diagnosis]) -> None:
    model, found = case
    assert found.dense_loss == pytest.approx(math.log(perplexity(model, text())), rel=1e-12)
    assert abs(found.losses["both"].change.rise) < 1e-4  # measured: 1e-8
    assert found.losses["tail"].change.loss != pytest.approx(found.losses["head"].change.loss, abs=1e-3)
    assert not found.notes or "head and tail together" not in " ".join(found.notes)
    for entry in found.matrices:
        if entry.parts is not None:
            both = entry.parts.both
            assert (both.cosine, both.variance, both.mean) == pytest.approx((1, 1, 1), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_part_outputs_by_hand(family: str) -> None:
    model: Any = tiny_model(family)
    name = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_fc"}[family]
    settings = {**FAST, "preset": "unirank", "metric": "identity", "targets": [name]}
    found = diagnose(model, calibration(), keep_ratio=0.9, blocks=text(), head=0.25, **settings)
    (entry,) = found.matrices
    assert entry.parts is not None
    assert (entry.parts.components, entry.parts.full_rank, entry.parts.tokens) == (8, 32, 6 * 16)
    inputs: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, given, __: inputs.append(given[0]))
    with torch.no_grad():
        model(input_ids=text())
    handle.remove()
    weight = dense_weight(model.get_submodule(name)).detach().double()
    head = plain_cut(weight, 8)
    x = inputs[0].flatten(0, 1).double()
    whole = x @ weight.T
    for part, own in ((entry.parts.head, x @ head.T), (entry.parts.tail, x @ (weight - head).T)):
        assert part.cosine == pytest.approx(float(F.cosine_similarity(own, whole, dim=1).mean()), abs=1e-5)
        variance = own.var(0, correction=0).sum() / whole.var(0, correction=0).sum()
        assert part.variance == pytest.approx(float(variance), rel=1e-4)
        assert part.mean == pytest.approx(float(own.mean(0).square().sum() / whole.mean(0).square().sum()), rel=1e-4)


def test_a_given_plan_and_the_calibration_text() -> None:
    model: Any = tiny_model("llama")
    plan = plan_ranks(model, calibration(), keep_ratio=0.6, **FAST)
    plain = [batch["input_ids"] for batch in calibration()]
    found = diagnose(model, plain, plan=plan, **FAST)
    assert found.plan is plan
    assert found.targets == 8 * 15
    assert json.loads(json.dumps(found.to_dict()))["matrices"][0]["name"] == plan.matrices[0].name


def test_frequent_targets_are_as_few_as_make_half() -> None:
    ids = torch.tensor([[9, 5, 5, 5, 4, 4, 3, 2]])
    assert frequent_targets(ids).tolist() == [[True, True, True, True, True, False, False]]


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)


def test_experts_one_by_one() -> None:
    model: Any = tiny_model("mixtral")
    before = state(model)
    settings = {**FAST, "preset": "unirank"}
    found = diagnose(model, calibration(), keep_ratio=0.7, blocks=text(), **settings)
    assert same(model, before)
    experts = [entry for entry in found.matrices if ".experts." in entry.name]
    assert len(experts) == 2 * 4 * 2
    assert {entry.kind for entry in experts} == {"mlp.experts.gate_up", "mlp.experts.down"}


def test_what_diagnose_refuses() -> None:
    model: Any = tiny_model("llama")
    plan = plan_ranks(model, calibration(), keep_ratio=0.6, **FAST)
    with pytest.raises(LowRankError, match=r"give keep_ratio, such as 0.6, or a plan"):
        diagnose(model, calibration())
    with pytest.raises(LowRankError, match=r"head=1.5 is outside \(0, 1\)"):
        diagnose(model, calibration(), keep_ratio=0.6, head=1.5)
    with pytest.raises(PlanError, match="the plan does not fit the model in"):
        diagnose(tiny_model("llama", hidden_size=16), calibration(), plan=plan)
    with pytest.raises(LowRankError, match="'presett' is no setting"):
        diagnose(model, calibration(), keep_ratio=0.6, presett="fast")
    with pytest.raises(LowRankError, match="leave targets out"):
        diagnose(model, calibration(), plan=plan, targets=["*.mlp.*"])
    with pytest.raises(DataError, match="measure no loss; give blocks"):
        diagnose(model, batches(n=4, padding=True), plan=plan, **FAST)
    with pytest.raises(DataError, match="length >= 2"):
        diagnose(model, calibration(), plan=plan, blocks=text()[:, :1], **FAST)
    result = compress(model, calibration(), keep_ratio=0.6, **FAST)
    with pytest.raises(LowRankError, match="is factored already"):
        diagnose(model, calibration(), plan=result.plan)
