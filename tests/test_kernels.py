"""The Triton kernel, in Triton's interpreter, and the choice between it and two products."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from lowrank_lit.kernels import most_tokens

SCRIPT = """
import torch
from lowrank_lit.acceleration import accelerate
from lowrank_lit.kernels import TOKENS, two_products
from lowrank_lit.layers import FactoredLinear

torch.manual_seed(0)
cases = 0
for tokens, columns, rows, rank in ((1, 40, 300, 21), (3, 129, 64, 16), (8, 200, 130, 33)):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        layer = FactoredLinear(columns, rows, rank, bias=cases % 2 == 0).to(dtype)
        x = torch.randn(1, tokens, columns).to(dtype)
        with torch.no_grad():
            expected = layer(x)
            found = two_products(x, layer.inner.weight, layer.outer.weight, layer.outer.bias)
        assert found.shape == expected.shape and found.dtype == dtype
        error = float((found - expected).abs().max() / expected.abs().max())
        assert error <= tolerance, (tokens, dtype, error)
        cases += 1
# On a CPU nothing takes it.
model = torch.nn.Sequential(FactoredLinear(8, 8, 2))
assert accelerate(model, kernels=True, stack=False).kernels == ()
print("cases", cases)
"""


def test_the_kernel_is_two_products() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install 'lowrank-lit[kernels]'")
    # A process of its own: the variable counts when Triton is imported.
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == ["cases", "6"]


def test_the_kernel_is_used_as_far_as_it_is_faster() -> None:
    assert most_tokens({1: (1.0, 2.0), 2: (1.0, 1.5), 4: (2.0, 2.0), 8: (1.0, 3.0)}) == 2
    assert most_tokens({1: (2.0, 1.0), 2: (1.0, 2.0)}) == 0
    assert most_tokens({4: (1.0, 2.0), 1: (1.0, 2.0)}) == 4
