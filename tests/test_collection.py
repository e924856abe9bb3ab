"""What a study knows of a model: fair to layers that see few tokens, and the same whatever was asked before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit import compress
from lowrank_lit.errors import BudgetError, DataError, LowRankError, ModelError
from lowrank_lit.evidence import specs_of
from lowrank_lit.refit import substituted
from lowrank_lit.selection import divergence, log_probabilities
from lowrank_lit.settings import Settings
from lowrank_lit.study import Study
from tests.tiny import batches, tiny_model


@pytest.fixture(autouse=True)
def _few_tokens_are_fine() -> None:
    import warnings

    warnings.filterwarnings("ignore", message=".*calibration tokens.*")


class Sparse(nn.Module):
    """Adds a linear map of every ``step``-th token to it, as a router that sends the others elsewhere would."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.step = step

    def forward(self, hidden: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        output[:, :: self.step] = self.linear(hidden[:, :: self.step])
        return hidden + output


class Toy(nn.Module):
    """A next-token model with one layer that sees all tokens and one that sees a tenth of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 16)
        self.every, self.some = Sparse(1), Sparse(10)
        self.head = nn.Linear(16, 50)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(2)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.some(self.every(self.words(input_ids))))
        return logits


def test_a_layer_that_sees_a_tenth_of_the_tokens_counts_for_a_tenth() -> None:
    torch.manual_seed(1)
    text = [{"input_ids": torch.randint(0, 50, (8, 40))} for _ in range(8)]
    model = Toy()
    study = Study(model, text, targets=["every.linear", "some.linear"])
    settings = Settings(0.9, preset="unirank", metric="two_sided", allocator="knapsack", min_rank=1)
    _, evidence, _ = study.collection.first(settings)
    specs = specs_of(study.targets, settings)
    with torch.no_grad():
        dense = [log_probabilities(model, batch, None) for batch in text]
    for spec, profile in zip(specs, study.profiles(settings, specs, evidence, 0.0), strict=True):
        weights = study.collection.weights([spec], evidence.spectra, [6])
        with torch.no_grad(), substituted(study.layers, weights):
            measured = divergence(model, text, dense, None)
        assert profile.nats is not None
        assert 0.7 < profile.nats[6] / measured < 1.4  # it was 12 times as much for the second layer


@pytest.mark.parametrize("labels", ["none", "model"])
def test_a_plan_does_not_depend_on_the_plans_before_it(labels: str) -> None:
    text = batches(n=4, structured=True)
    settings = Settings(
        0.6,
        preset="unirank",
        metric="input",
        allocator="knapsack" if labels == "none" else "unirank",
        labels=labels,
        min_rank=1,
    )
    fresh = Study(tiny_model("llama"), text).draft(settings)
    study = Study(tiny_model("llama"), text)
    study.draft(Settings(0.6, preset="unirank", metric="two_sided", allocator="knapsack", min_rank=1))
    later = study.draft(settings)
    assert [entry.rank for entry in later.plan.matrices] == [entry.rank for entry in fresh.plan.matrices]
    assert later.plan.predicted_nats == fresh.plan.predicted_nats


def test_spectra_are_decomposed_once_where_the_gradients_are_there() -> None:
    study = Study(tiny_model("llama"), batches(n=4, structured=True))
    plain: dict[str, Any] = {"preset": "unirank", "metric": "input", "labels": "text"}
    cells = [Settings(0.6, allocator=name, **plain) for name in ("uniform", "zero_sum", "knapsack")]
    moments = frozenset().union(*(cell.moments for cell in cells))
    study.collection.calibration(moments, importance=True, labels="text")
    decomposed = ["decompose" in study.draft(cell).seconds for cell in cells]
    assert decomposed == [True, False, False]


def test_a_matrix_of_one_row_is_no_obstacle() -> None:
    torch.manual_seed(0)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.gate = nn.Embedding(50, 16), nn.Linear(16, 1)
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 50)

        def forward(self, input_ids: Tensor) -> Tensor:
            hidden = self.words(input_ids)
            logits: Tensor = self.head(hidden + self.gate(hidden).sigmoid() * self.body(hidden))
            return logits

    text = [{"input_ids": torch.randint(0, 50, (4, 20))} for _ in range(3)]
    result = compress(
        Gated(), text, keep_ratio=0.8, preset="unirank", metric="input", allocator="measured", min_rank=1,
        targets=["gate", "body"],
    )  # fmt: skip
    assert [entry.form for entry in result.plan.matrices] == ["dense", "factored"]


def test_padding_in_front_of_everything() -> None:
    text = [dict(batch) for batch in batches(n=4, structured=True)]
    for batch in text:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0] = 0  # a sequence of padding alone
    result = compress(tiny_model("llama"), text, keep_ratio=0.6, preset="fast", min_rank=1)
    assert result.plan.metric == "two_sided"


IDS = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ([{"input_ids": IDS + 90}], DataError, "the model has 96 words"),
        ([{"input_ids": IDS - 90}], DataError, "token -"),
        ([{"input_ids": IDS[0]}], DataError, "(batch, length)"),
        ([{"input_ids": IDS.float()}], DataError, "whole numbers"),
        ([{"input_ids": IDS, "attention_mask": torch.ones(2, 11)}], DataError, "one number per token"),
        ([{"input_ids": IDS, "attention_mask": torch.zeros(2, 12)}], DataError, "all padding"),
        (None, DataError, "batches is a NoneType"),
        (IDS, DataError, "batches is a Tensor; give a list of calibration batches, such as [batches]"),
        ({"input_ids": IDS}, DataError, "batches is a dict; give a list of calibration batches, such as [batches]"),
        (list(IDS), DataError, "calibration batch 0 is a tensor of shape (12,)"),
        ([IDS.float()], DataError, "type torch.float32, and the model reads token ids"),
        ([IDS.to(torch.int16)], DataError, "type torch.int16, and the model reads token ids"),
    ],
)
def test_text_that_does_not_fit(text: Any, kind: type[LowRankError], words: str) -> None:
    with pytest.raises(kind) as error:
        compress(tiny_model("llama"), text, keep_ratio=0.6)
    assert words in str(error.value)


def test_a_model_or_device_that_is_none() -> None:
    model: Any = None
    with pytest.raises(ModelError, match="model is a NoneType"):
        compress(model, batches(), keep_ratio=0.6)
    with pytest.raises(ModelError, match="device='foo' cannot be used"):
        compress(tiny_model("llama"), batches(), keep_ratio=0.6, device="foo")


def test_a_factored_model_is_not_factored_again() -> None:
    model = tiny_model("llama")
    compress(model, batches(), keep_ratio=0.8, preset="unirank", min_rank=1)
    config = dict(model.config.to_dict())
    with pytest.raises(ModelError, match="factored already"):
        compress(model, batches(), keep_ratio=0.6)
    assert model.config.to_dict() == config


def test_packed_weights_are_named() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64))
    with pytest.raises(ModelError, match="before it is quantised"):
        compress(model, [torch.randn(4, 64)], keep_ratio=0.6)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"keep_ratio": "0.5"}, BudgetError, "keep_ratio='0.5' is no number"),
        ({"keep_ratio": None}, BudgetError, "keep_ratio=None is no number"),
        ({"damping": "x"}, BudgetError, "damping='x' is no number"),
        ({"select": "false"}, LowRankError, "select='false' is neither true nor false"),
        ({"cost_aware": "no"}, LowRankError, "cost_aware='no'"),
        ({"nested": "no"}, LowRankError, "nested='no'"),
        ({"targets": 5}, LowRankError, "targets=5 is no list"),
        ({"rounds": 2.5}, BudgetError, "rounds=2.5 is no whole number"),
        ({"rounds": "3"}, BudgetError, "rounds='3' is no whole number"),
        ({"min_rank": True}, BudgetError, "min_rank=True is no whole number"),
    ],
)
def test_settings_of_another_type(settings: dict[str, Any], kind: type[LowRankError], words: str) -> None:
    with pytest.raises(kind) as error:
        compress(tiny_model("llama"), batches(), **{"keep_ratio": 0.6, **settings})
    assert words in str(error.value)
