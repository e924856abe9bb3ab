"""Stacked inner factors: which layers share, that nothing changes, and that it can be taken back."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowrank_lit
from lowrank_lit.acceleration import accelerate
from lowrank_lit.errors import LowRankError, ModelError
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.stacking import FEW
from lowrank_lit.surgery import count_parameters, stored_bytes
from tests.tiny import batches, tiny_model

DATA = batches(structured=True)


def compressed(storage: str = "factored", *, seed: int = 0, layers: int = 1) -> tuple[nn.Module, Any]:
    model = tiny_model("llama", seed=seed, num_hidden_layers=layers)
    result = lowrank_lit.compress(model, DATA, keep_ratio=0.7, metric="identity", allocator="uniform", storage=storage)
    return model, result.plan


def close(found: Any, expected: Any) -> None:
    # float32 sums in another order. Measured: below 2e-6 for values up to 4.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**DATA[0]).logits


def ends(groups: tuple[tuple[str, ...], ...]) -> set[tuple[str, ...]]:
    return {tuple(name.rpartition(".")[2] for name in group) for group in groups}


@pytest.mark.parametrize("storage", ["factored", "pivot"])
def test_a_llama_computes_the_same_and_generates(storage: str) -> None:
    model, _ = compressed(storage, layers=2)
    expected, written = logits(model), model.generate(DATA[0]["input_ids"], max_new_tokens=8, do_sample=False)
    names, state = list(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    sizes = count_parameters(model), stored_bytes(model)
    parameters = list(model.parameters())
    done = accelerate(model)
    assert ends(done.groups) == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
    assert len(done.groups) == 4
    assert calls(model) == 2 * (2 + 2)  # of seven inner products, q k v are one, and gate up
    close(logits(model), expected)
    assert torch.equal(model.generate(DATA[0]["input_ids"], max_new_tokens=8, do_sample=False), written)
    assert list(model.state_dict()) == names
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert (count_parameters(model), stored_bytes(model)) == sizes
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in model.parameters())
    done.undo()
    assert done.groups == ()
    assert calls(model) == 2 * 7
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(parameters)


def calls(model: nn.Module) -> int:
    """Products with inner factors in one forward."""
    seen = 0
    sizes = {layer.in_features for layer in model.modules() if isinstance(layer, (FactoredLinear, PivotLinear))}
    outer = {id(layer.outer.weight) for layer in model.modules() if isinstance(layer, (FactoredLinear, PivotLinear))}
    head = id(model.get_output_embeddings().weight)

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal seen
            if func is nn.functional.linear and id(args[1]) not in outer | {head} and args[1].shape[1] in sizes:
                seen += 1
            return func(*args, **(kwargs or {}))

    with Count():
        logits(model)
    return seen


@pytest.mark.parametrize("storage", ["factored", pytest.param("pivot", marks=pytest.mark.slow)])
def test_it_compiles_to_one_graph_and_trains_alike(storage: str) -> None:
    plain, _ = compressed(storage)
    model = copy.deepcopy(plain)
    accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(logits(compiled), logits(plain))
    for one in (plain, model):
        one(**DATA[0], labels=DATA[0]["input_ids"]).loss.backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None, name
        close(one.grad, other.grad)
    eager = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    compiled(**DATA[0], labels=DATA[0]["input_ids"]).loss.backward()
    close([parameter.grad for parameter in model.parameters()], eager)
    for one in (plain, model):  # an optimizer writes through the views
        torch.optim.SGD(one.parameters(), lr=0.1).step()
    close(logits(model), logits(plain))
    close(logits(compiled), logits(plain))


def test_save_pretrained_and_copies(tmp_path: Path) -> None:
    model, plan = compressed()
    expected = logits(model)
    accelerate(model)
    lowrank_lit.hub.attach(model, plan)
    model.save_pretrained(tmp_path / "saved")
    lowrank_lit.export(model, plan, tmp_path / "exported")
    size = sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors"))
    assert size < stored_bytes(model) + 20_000
    for folder in ("saved", "exported"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        close(logits(loaded), expected)
        assert accelerate(loaded).groups
        close(logits(loaded), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(getattr(layer, "stack", None) is None for layer in other.modules())
        close(logits(other), expected)
    fresh, _ = compressed(seed=1)
    model.load_state_dict(fresh.state_dict())
    close(logits(model), logits(fresh))


def test_it_follows_a_cast_and_lets_replaced_weights_be() -> None:
    model, _ = compressed()
    done = accelerate(model)
    expected, count = logits(model), calls(model)
    model.double()
    assert calls(model) == count
    close(logits(model).float(), expected)
    model.float()
    layer = model.get_submodule(done.groups[0][1])
    other = copy.deepcopy(model)
    for changed in (layer, other.get_submodule(done.groups[0][1])):
        changed.inner.weight.data = changed.inner.weight.data * 2  # past everything that could notice
    assert calls(model) == count + 2
    close(logits(model), logits(other))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(logits(compiled), logits(other))
    assert accelerate(model).groups == done.groups
    assert calls(model) == count
    layer.inner.weight = nn.Parameter(layer.inner.weight.detach() * 2)
    other.get_submodule(done.groups[0][1]).inner.weight.data *= 2
    close(logits(model), logits(other))
    layer.inner.register_forward_hook(lambda module, args, output: output + 1)
    other.get_submodule(done.groups[0][1]).inner.register_forward_hook(lambda module, args, output: output + 1)
    close(logits(model), logits(other))


class Three(nn.Module):
    """Three layers fed as ``mode`` says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (FactoredLinear(8, 6, rank) for rank in (2, 3, 4))

    def forward(self, x: Tensor, mode: str = "same") -> Tensor:
        if mode == "other":
            return self.a(x) + self.b(x.clone() + 1) * self.c(x)
        if mode == "written":
            x = x.clone()
            return self.a(x) + self.b(x.mul_(2)) * self.c(x)
        if mode == "twice":
            return self.a(x) + self.a(x) * self.b(x)
        if mode == "modes":
            with torch.no_grad():
                first = self.a(x)
            return first + self.b(x) * self.c(x)
        return self.a(x) + self.b(x) * self.c(x)


@pytest.mark.parametrize("mode", ["same", "other", "written", "twice", "modes"])
def test_layers_that_are_handed_other_tensors(mode: str) -> None:
    plain, x = Three(), torch.randn(2, FEW, 8)
    model = copy.deepcopy(plain)
    assert accelerate(model, inputs={"x": x}).groups == (("a", "b", "c"),)
    for _ in range(2):
        values, expected = model(x, mode), plain(x, mode)
        close(values, expected)
        if mode != "written":
            for one, loss in ((model, values), (plain, expected)):
                one.zero_grad()
                loss.square().sum().backward()
            for left, right in zip(model.parameters(), plain.parameters(), strict=True):
                assert (left.grad is None) == (right.grad is None)
                if left.grad is not None:
                    close(left.grad, right.grad)
    with torch.no_grad():  # a product that waits is not handed out once the weights are others
        model.a(x)
        assert model.a.stack is not None
        assert model.a.stack.stack.held is not None
        for one in (model, plain):
            one.c.inner.weight.mul_(3)
        close(model.c(x), plain.c(x))
        model.b(x)
        few = x[:, : FEW // 2 - 1].reshape(-1, 8)  # alone: nothing waits for the others
        close(model.a(few), plain.a(few))
        assert model.a.stack.stack.held is None or model.a.stack.stack.held[0] is not few


def test_layers_whose_input_is_written_to_are_no_group() -> None:
    model, x = Three(), torch.randn(2, FEW, 8)
    groups = accelerate(model, inputs={"x": x, "mode": "written"}).groups
    assert groups == (("b", "c"),)
    assert accelerate(model, inputs={"x": x, "mode": "other"}).groups == ()


def test_recompute_is_set_and_taken_back() -> None:
    model, _ = compressed()
    done = accelerate(model, recompute=True)
    assert len(done.recomputing) == 7
    plain = copy.deepcopy(model)
    for one in (plain, model):
        one(**DATA[0], labels=DATA[0]["input_ids"]).loss.backward()
    close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    accelerate(model)
    assert not any(layer.recompute for layer in model.modules() if isinstance(layer, FactoredLinear))


def test_adapters_on_the_factors() -> None:
    model, _ = compressed()
    accelerate(model)
    expected = logits(model)
    adapters = lowrank_lit.add_adapters(model, rank=1)
    close(logits(model), expected)
    model(**DATA[0], labels=DATA[0]["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    adapted = logits(model)
    assert float((adapted - expected).abs().max()) > 0.01
    adapters.merge()
    close(logits(model), adapted)
    assert accelerate(model).groups
    close(logits(model), adapted)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no factored layer to accelerate"):
        accelerate(nn.Linear(3, 3))
    with pytest.raises(ModelError, match=r"does not run on inputs=\['input_ids'\].*give inputs"):
        accelerate(Three())
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    with pytest.raises(LowRankError, match=r"kernels=True needs Triton.*lowrank-lit\[kernels\]"):
        accelerate(Three(), kernels=True)
