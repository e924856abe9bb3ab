"""The judge of compressed models, against KL divergences taken by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit import selection
from lowrank_lit.batches import as_batches
from lowrank_lit.errors import DataError, NonFiniteError
from lowrank_lit.refit import held_out
from lowrank_lit.selection import Judge, log_probabilities
from lowrank_lit.surgery import dense_weight, find_targets
from tests.tiny import batches, tiny_model


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: target.module for name, target in find_targets(model).items()}


def disturbed(model: nn.Module, size: float = 0.1) -> dict[str, Tensor]:
    """Other weights ``(rows, columns)`` for all layers."""
    generator = torch.Generator().manual_seed(1)
    weights = {name: dense_weight(layer).detach() for name, layer in layers_of(model).items()}
    return {
        name: weight * (1 + size * torch.randn(weight.shape, generator=generator)).to(weight)
        for name, weight in weights.items()
    }


def with_weights(model: Any, weights: dict[str, Tensor]) -> Any:
    other = copy.deepcopy(model)
    for name, layer in layers_of(other).items():
        turned = type(layer).__name__ == "Conv1D"
        layer.weight.data = (weights[name].T if turned else weights[name]).contiguous()
    return other


@torch.no_grad()
def kl(model: Any, other: Any, data: list[dict[str, Tensor]]) -> float:
    total, count = 0.0, 0
    for batch in data:
        p, q = (m(**batch).logits.double().log_softmax(-1) for m in (model, other))
        values = (p.exp() * (p - q)).sum(-1)[batch["attention_mask"].bool()]
        total, count = total + float(values.sum()), count + len(values)
    return total / count


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_divergence_is_that_of_the_held_out_batches(family: str) -> None:
    model = tiny_model(family)
    data = batches(n=6, padding=True)
    judge, weights = Judge(model, data, layers_of(model)), disturbed(model)
    expected = kl(model, with_weights(model, weights), data[-1:])
    assert expected > 1e-3
    assert judge.divergence(weights) == pytest.approx(expected, rel=5e-3)  # half precision of the dense predictions
    dense = {name: dense_weight(layer) for name, layer in layers_of(model).items()}
    assert abs(judge.divergence(dense)) < 1e-5
    assert abs(judge.divergence({})) < 1e-5


def test_a_bfloat16_model() -> None:
    model = tiny_model("llama").bfloat16()
    data = batches(n=2)
    weights = disturbed(model)
    expected = kl(model, with_weights(model, weights), data[-1:])
    assert Judge(model, data, layers_of(model)).divergence(weights) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, []), (2, [1]), (5, [4]), (7, [6]), (8, [6, 7]), (20, [16, 17, 18, 19])]
)
def test_which_batches_are_held_out(count: int, expected: list[int]) -> None:
    assert list(held_out(count)) == expected


def test_one_batch_judges_itself() -> None:
    model, data = tiny_model("llama"), batches(n=1)
    weights = disturbed(model)
    expected = kl(model, with_weights(model, weights), data)
    assert Judge(model, data, layers_of(model)).divergence(weights) == pytest.approx(expected, rel=5e-3)


def test_passes_are_counted_in_sequences() -> None:
    model = tiny_model("llama")
    data = [*batches(n=4, batch=3), *batches(n=1, batch=2)]
    judge = Judge(model, data, layers_of(model))
    assert judge.passes == pytest.approx(2 / 14)
    judge.divergence({})
    assert judge.passes == pytest.approx(4 / 14)


def test_there_is_an_end_to_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense predictions of a large calibration text would fill the memory."""
    model, data = tiny_model("llama"), batches(n=20)
    monkeypatch.setattr(selection, "TOKENS", 40)  # batches of 32
    judge = Judge(model, data, layers_of(model))
    assert judge.passes == pytest.approx(2 / 20)
    weights = disturbed(model)
    assert judge.divergence(weights) == pytest.approx(kl(model, with_weights(model, weights), data[16:18]), rel=5e-3)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gpt2")
    model.transformer.h[0].train()
    next(model.parameters()).requires_grad_(False)
    parameters = list(model.parameters())
    storages = [parameter.data_ptr() for parameter in parameters]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    judge = Judge(model, batches(n=2), layers_of(model))
    judge.divergence(disturbed(model))
    bad = disturbed(model)
    bad[list(bad)[3]][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=f"the compressed weight of layer '{list(bad)[3]}'"):
        judge.divergence(bad)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert [parameter.data_ptr() for parameter in parameters] == storages
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert model.transformer.h[0].training
    assert not model.transformer.h[1].training


def test_predictions_that_are_not_finite_are_infinitely_far() -> None:
    model = tiny_model("llama")
    judge = Judge(model, batches(n=2), layers_of(model))
    weights = disturbed(model)
    name = next(iter(weights))
    assert judge.divergence({name: torch.full_like(weights[name], 1e38)}) == math.inf


class Classes(nn.Module):
    """Logits in a tuple, some of them ruled out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        logits = self.head(self.embedding(ids))
        return logits.masked_fill(torch.arange(20) > 15, -math.inf), None


def test_classes_that_are_ruled_out() -> None:
    model = Classes()
    data = as_batches([torch.randint(20, (2, 5)) for _ in range(2)])
    judge = Judge(model, data, {"head": model.head})
    assert abs(judge.divergence({})) < 1e-5
    weight = model.head.weight.detach() + 0.1 * torch.randn(20, 6)
    with torch.no_grad():
        x = model.embedding(data[1][""])
        p, q = ((x @ w.T + model.head.bias)[..., :16].double().log_softmax(-1) for w in (model.head.weight, weight))
    assert judge.divergence({"head": weight}) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)


def test_a_model_without_logits() -> None:
    for model, data in ((tiny_model("bert"), batches(n=2)), (nn.Sequential(nn.Linear(4, 3)), [{"": torch.ones(2, 4)}])):
        with pytest.raises(DataError, match=r"needs logits .* does not give; choose preset='unirank', or select=False"):
            Judge(model, data, {})


def test_log_probabilities_are_float32_and_sum_to_one() -> None:
    model = tiny_model("llama").bfloat16()
    (batch,) = batches(n=1)
    with torch.no_grad():
        found = log_probabilities(model, batch, None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2, 16), rtol=1e-5, atol=0)
