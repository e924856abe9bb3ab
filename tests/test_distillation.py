"""Divergence from a teacher: against definitions, its coarse form, which positions count, predictions on disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_lit.compress import loaded_hash
from lowrank_lit.distillation import (
    PredictionCache,
    Predictions,
    Teacher,
    counted_positions,
    divergence,
)
from lowrank_lit.errors import LowRankError, ModelError, NonFiniteError
from tests.tiny import batches, tiny_model

GENERATOR = torch.Generator().manual_seed(0)
STUDENT = 3 * torch.randn(2, 5, 11, generator=GENERATOR)
TEACHER = 3 * torch.randn(2, 5, 11, generator=GENERATOR)
ALL = torch.ones(2, 5, dtype=torch.bool)


def top(logits: Tensor, k: int) -> Predictions:
    largest = torch.log_softmax(logits, -1).topk(k, -1)
    return Predictions(largest.values, largest.indices)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_divergence_is_its_definition(temperature: float) -> None:
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (TEACHER, STUDENT))
    counted = ALL.clone()
    counted[0, 2:] = False
    expected = temperature**2 * (p * (p / q).log()).sum(-1)[counted].mean()
    own = divergence(STUDENT, Predictions(torch.log_softmax(TEACHER, -1)), counted, temperature=temperature)
    assert own.item() == pytest.approx(expected.item(), rel=2e-6)  # 3e-7: float32
    same = divergence(TEACHER, Predictions(torch.log_softmax(TEACHER, -1)), counted, temperature=temperature)
    assert abs(same.item()) < 1e-5  # 2e-7


def test_its_gradient_is_the_difference_of_the_probabilities() -> None:
    student = STUDENT.clone().requires_grad_()
    divergence(student, Predictions(torch.log_softmax(TEACHER, -1)), ALL).backward()
    expected = (torch.softmax(STUDENT, -1) - torch.softmax(TEACHER, -1)) / 10
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-7)


def test_the_coarse_divergence_joins_what_is_not_listed() -> None:
    """KL of (k likeliest tokens, everything else), by its definition, and a lower bound that grows with k."""
    p, q = (torch.softmax(logits.double(), -1) for logits in (TEACHER, STUDENT))
    values = []
    for k in (1, 3, 10):
        listed = TEACHER.topk(k, -1).indices
        joined = [torch.cat([x.gather(-1, listed), 1 - x.gather(-1, listed).sum(-1, keepdim=True)], -1) for x in (p, q)]
        expected = (joined[0] * (joined[0] / joined[1]).log()).sum(-1).mean()
        values.append(divergence(STUDENT, top(TEACHER, k), ALL).item())
        assert values[-1] == pytest.approx(expected.item(), rel=1e-4), k  # 4e-7
    whole = divergence(STUDENT, Predictions(torch.log_softmax(TEACHER, -1)), ALL).item()
    assert values[0] < values[1] < values[2] <= whole * (1 + 1e-5)
    assert values[2] == pytest.approx(whole, rel=1e-4)  # ten of eleven, and one outcome for the last
    assert abs(divergence(TEACHER, top(TEACHER, 3), ALL).item()) < 1e-6


def test_the_coarse_divergence_has_finite_gradients_where_the_teacher_is_sure() -> None:
    sure = torch.zeros(1, 1, 11)
    sure[..., 0] = 200.0
    student = STUDENT[:1, :1].clone().requires_grad_()
    loss = divergence(student, top(sure, 2), ALL[:1, :1])
    loss.backward()
    assert loss.item() == pytest.approx(F.cross_entropy(student[0], torch.zeros(1, dtype=torch.long)).item(), rel=1e-3)
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())
    both = sure.clone().requires_grad_()
    divergence(both, top(sure, 2), ALL[:1, :1]).backward()
    assert both.grad is not None
    assert bool(torch.isfinite(both.grad).all())


def test_what_a_divergence_refuses() -> None:
    whole = Predictions(torch.log_softmax(TEACHER, -1))
    with pytest.raises(LowRankError, match="no position of the batch counts"):
        divergence(STUDENT, whole, ~ALL)
    with pytest.raises(ModelError, match="the teacher predicts 11 tokens and the student 10"):
        divergence(STUDENT[..., :10], whole, ALL)
    with pytest.raises(LowRankError, match=r"temperature=2\.0 needs all of the teacher's tokens"):
        divergence(STUDENT, top(TEACHER, 3), ALL, temperature=2.0)


def test_counted_positions() -> None:
    ids = torch.arange(10).reshape(2, 5)
    assert counted_positions({"input_ids": ids}).tolist() == [[True] * 4 + [False]] * 2
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    expected = [[True, True, False, False, False], [False, True, True, True, False]]
    assert counted_positions({"input_ids": ids, "attention_mask": mask}).tolist() == expected
    labels = torch.tensor([[-100, -100, 2, 3, -100], [5, 6, 7, 8, 9]])
    expected = [[False, True, True, False, False], [True] * 4 + [False]]
    assert counted_positions({"input_ids": ids, "attention_mask": mask, "labels": labels}).tolist() == expected


class Counted:
    """Gives a tiny model, and counts how often it is asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.calls = 0
        self.model = tiny_model("llama", seed=seed)

    def __call__(self) -> nn.Module:
        self.calls += 1
        return self.model


def test_a_teacher_predicts_its_own_logits_without_gradients() -> None:
    (batch,) = batches(n=1, padding=True)
    source = Counted()
    teacher = Teacher(source)
    assert not teacher.loaded
    own = teacher.predict({**batch, "labels": batch["input_ids"]})
    with torch.no_grad():
        expected = torch.log_softmax(tiny_model("llama")(**batch).logits, -1)
    torch.testing.assert_close(own.log_probabilities, expected)
    assert own.tokens is None
    assert not own.log_probabilities.requires_grad
    assert not any(parameter.requires_grad for parameter in source.model.parameters())
    assert source.calls == 1
    assert teacher.loaded


@pytest.mark.parametrize("top_k", [None, 7])
def test_predictions_on_disk_are_those_computed(top_k: int | None, tmp_path: Path) -> None:
    one, two = batches(n=2, padding=True)
    identity = loaded_hash(tiny_model("llama"))
    first = Counted()
    computed = Teacher(first, cache=tmp_path, top_k=top_k).predict(one)
    assert first.calls == 1
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2  # one per sequence

    second = Counted()
    known = Teacher(second, cache=tmp_path, identity=identity, top_k=top_k)
    flipped = {key: value.flip(0) for key, value in one.items()}
    found = known.predict(flipped)
    assert second.calls == 0  # nothing was computed
    torch.testing.assert_close(found.log_probabilities.flip(0), computed.log_probabilities, rtol=0, atol=0)
    if top_k is not None:
        assert found.tokens is not None
        assert computed.tokens is not None
        assert found.tokens.shape == (2, 16, 7)
        assert torch.equal(found.tokens.flip(0), computed.tokens)

    mixed = {key: torch.cat([one[key][:1], two[key][:1]]) for key in one}
    both = known.predict(mixed)
    assert second.calls == 1
    fresh = Teacher(Counted(), top_k=top_k).predict(mixed)
    torch.testing.assert_close(both.log_probabilities, fresh.log_probabilities)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_another_teacher_or_another_mask_finds_nothing(tmp_path: Path) -> None:
    (batch,) = batches(n=1)
    Teacher(Counted(), cache=tmp_path).predict(batch)
    other = Counted(seed=1)
    own = Teacher(other, cache=tmp_path).predict(batch)
    with torch.no_grad():
        torch.testing.assert_close(own.log_probabilities, torch.log_softmax(other.model(**batch).logits, -1))
    assert len(list(tmp_path.iterdir())) == 2
    again = Counted()
    masked = {**batch, "attention_mask": batch["attention_mask"].clone()}
    masked["attention_mask"][:, 8:] = 0
    Teacher(again, cache=tmp_path, identity=loaded_hash(again.model)).predict(masked)
    assert again.calls == 1


def test_the_teacher_keeps_packed_samples_apart_as_the_student_does(tmp_path: Path) -> None:
    ids = torch.arange(10, 26).reshape(1, 16)
    packed = {"input_ids": ids, "position_ids": torch.cat([torch.arange(6), torch.arange(10)])[None]}
    for cache in (None, tmp_path):
        joined = Teacher(Counted(), cache=cache).predict({"input_ids": ids}).log_probabilities
        apart = Teacher(Counted(), cache=cache).predict(packed).log_probabilities
        alone = Teacher(Counted()).predict({"input_ids": ids[:, 6:]}).log_probabilities
        torch.testing.assert_close(apart[:, 6:], alone)
        assert (joined[:, 6:] - alone).abs().max() > 1e-3
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_a_run_cut_off_between_two_sequences_has_the_same_numbers(tmp_path: Path) -> None:
    (batch,) = batches(n=1)
    whole = Teacher(Counted(), cache=tmp_path).predict(batch).log_probabilities
    first, *_ = tmp_path.rglob("*.safetensors")
    first.unlink()
    assert torch.equal(Teacher(Counted(), cache=tmp_path).predict(batch).log_probabilities, whole)


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    (batch,) = batches(n=1)
    first = Teacher(Counted(), cache=tmp_path).predict(batch)
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    again = Teacher(Counted(), cache=tmp_path).predict(batch)
    assert torch.equal(first.log_probabilities, again.log_probabilities)
    assert all(load_file(file) for file in tmp_path.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = PredictionCache(tmp_path / "file", "identity", None)
    with pytest.warns(UserWarning, match=r"the teacher's predictions cannot be kept in .*; they are computed anew"):
        cache.write("a", {"log_probabilities": torch.zeros(2)})
    cache.write("b", {"log_probabilities": torch.zeros(2)})
    assert cache.read("a") is None


def test_bad_teachers() -> None:
    (batch,) = batches(n=1)
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.get_input_embeddings().weight[5:] = math.nan
    with pytest.raises(NonFiniteError, match="the teacher's logits hold a NaN"):
        Teacher(lambda: broken).predict(batch)
    with pytest.raises(ModelError, match="BertModel gives no logits per token"):
        Teacher(lambda: tiny_model("bert")).predict(batch)
    with pytest.raises(LowRankError, match="teacher_top_k=0 is too small"):
        Teacher(lambda: broken, top_k=0)
