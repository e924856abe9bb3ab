"""Convolutions of one position: the same outputs as linear layers, compressed, trained, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_lit
from lowrank_lit.errors import ModelError, PlanError
from lowrank_lit.pointwise import PointwiseLinear, is_pointwise
from lowrank_lit.surgery import count_parameters


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_the_convolution_s(dimensions: int, stride: int, bias: bool) -> None:
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    convolution = kind(5, 7, 1, stride=stride, bias=bias)
    weight, memory = convolution.weight, convolution.weight.data_ptr()
    x = torch.randn(2, 5, *range(4, 4 + dimensions))
    want = convolution(x)
    want.square().sum().backward()
    layer = PointwiseLinear(convolution)
    got = layer(x)
    got.square().sum().backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x[0]), want[0], rtol=1e-5, atol=1e-6)  # without a batch
    assert isinstance(layer.linear, nn.Linear)
    assert layer.linear.weight.data_ptr() == memory
    assert weight.grad is not None
    assert layer.linear.weight.grad is not None
    torch.testing.assert_close(layer.linear.weight.grad, weight.grad.flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1), nn.ConvTranspose2d(4, 4, 1)],
)
def test_what_is_no_matrix_stays(other: nn.Module) -> None:
    model = nn.Sequential(other)
    assert not is_pointwise(other)
    assert lowrank_lit.pointwise_as_linear(model) == []
    assert model[0] is other


class Net(nn.Module):
    """A 3 x 3 convolution, two pointwise ones, one of them under two names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.widen = nn.Conv2d(24, 64, 1)
        self.narrow = nn.Conv2d(64, 24, 1, stride=2, bias=False)
        self.again = self.widen
        self.head = nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor:
        states = F.relu(self.stem(images))
        states = F.relu(self.again(self.narrow(F.relu(self.widen(states)))))
        result: Tensor = self.head(states.mean((-2, -1)))
        return result


def test_a_network_is_compressed_trained_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Net(), torch.randn(16, 3, 8, 8)
    with pytest.raises(ModelError, match="pointwise_as_linear"):
        lowrank_lit.compress(nn.Sequential(nn.Conv2d(3, 4, 1)), [images], keep_ratio=0.5)
    want = model(images)
    assert lowrank_lit.pointwise_as_linear(model) == ["widen", "narrow"]
    assert model.again is model.widen
    torch.testing.assert_close(model(images), want, rtol=1e-5, atol=1e-5)
    before = count_parameters(model)
    batches = [(images, torch.randint(4, (16,)))] * 2
    result = lowrank_lit.compress(
        model, batches, keep_ratio=0.5, preset="fast", min_rank=1,
        loss=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], reduction="sum"),
    )  # fmt: skip
    assert {matrix.name for matrix in result.plan.matrices} == {"widen.linear", "narrow.linear", "head"}
    assert result.plan.keep_ratio <= 0.5
    assert count_parameters(model) < 0.7 * before
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    lowrank_lit.save_module(model, result.plan, tmp_path / "out")
    again = Net()
    with pytest.raises(PlanError, match=r"call lowrank_lit\.pointwise_as_linear\(model\) first"):
        lowrank_lit.load_module(again, tmp_path / "out")
    lowrank_lit.pointwise_as_linear(again)
    lowrank_lit.load_module(again, tmp_path / "out")
    assert torch.equal(again(images), model(images))


def test_the_truncation_is_that_of_the_matrix() -> None:
    """Plain SVD of a pointwise convolution, against the SVD of its matrix: 1e-5 of the output."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(16, 24, 1)
    model, images = nn.Sequential(convolution), torch.randn(64, 16, 3, 3)
    lowrank_lit.pointwise_as_linear(model)
    result = lowrank_lit.compress(
        model, [images], keep_ratio=0.5, preset="unirank", metric="identity", allocator="uniform", min_rank=1
    )
    rank = result.plan.matrices[0].rank
    left, values, right = torch.linalg.svd(convolution.weight.detach().flatten(1), full_matrices=False)
    truncated = (left[:, :rank] * values[:rank]) @ right[:rank]
    want = F.conv2d(images, truncated[:, :, None, None], convolution.bias)
    torch.testing.assert_close(model(images), want, rtol=1e-5, atol=1e-5)
