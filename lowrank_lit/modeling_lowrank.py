"""Factored linear layers for a model of transformers, with torch alone.

An export of the format ``trust-remote-code`` holds a copy of this file, with a class at its end that has the plan of
``config.json`` (``lowrank_plan``) put these layers into a model of its family. What they compute is described in the
package lowrank-lit, which is not needed to load such a folder.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn


class FactoredLinear(nn.Module):
    """y = outer (inner x) + b, for a weight (rows, columns) of this rank."""

    def __init__(self, columns: int, rows: int, rank: int, bias: bool, **where: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(columns, rank, bias=False, **where)
        self.outer = nn.Linear(rank, rows, bias=bias, **where)

    @property
    def weight(self) -> Tensor:
        """The product, (rows, columns)."""
        return self.outer.weight @ self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        """Of ``outer``."""
        return self.outer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., columns) to (..., rows)."""
        return cast(Tensor, self.outer(self.inner(x)))


class PivotLinear(nn.Module):
    """z = inner x, y = (z, outer z) in the order of ``positions``, + b: rows of the weight and the others by them."""

    positions: Tensor
    bias: nn.Parameter | None

    def __init__(self, columns: int, rows: int, rank: int, bias: bool, **where: Any) -> None:
        super().__init__()
        self.inner = nn.Linear(columns, rank, bias=False, **where)
        self.outer = nn.Linear(rank, rows - rank, bias=False, **where)
        self.register_parameter("bias", nn.Parameter(torch.zeros(rows, **where)) if bias else None)
        self.register_buffer("positions", torch.arange(rows, dtype=torch.int32, device=where.get("device")))

    @property
    def weight(self) -> Tensor:
        """The weight, (rows, columns)."""
        return torch.cat([self.inner.weight, self.outer.weight @ self.inner.weight])[self.positions]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., columns) to (..., rows)."""
        pivots = self.inner(x)
        values = torch.cat([pivots, self.outer(pivots)], dim=-1)
        # As a matrix: on a CPU, index_select along the last of three dimensions takes ten times as long.
        result = values.reshape(-1, values.shape[-1]).index_select(1, self.positions).view(values.shape)
        return result if self.bias is None else result + self.bias


class Expert(nn.Module):
    """One expert of a mixture: ``down(gate(gate_up(x)))``, or ``down(act(up(x)))`` without a gate."""

    def __init__(self, up: nn.Module, down: nn.Module, gated: bool) -> None:
        super().__init__()
        self.first = "gate_up" if gated else "up"
        self.add_module(self.first, up)
        self.down = down

    def forward(self, x: Tensor, rest: Any) -> Tensor:
        """Map the expert's tokens; ``rest`` is what the fused module has beside its matrices."""
        activate = rest._apply_gate if self.first == "gate_up" else rest.act_fn
        result: Tensor = self.down(activate(cast(nn.Module, getattr(self, self.first))(x)))
        return rest.post_expert_norm(result) if getattr(rest, "has_post_expert_norm", False) else result


class SeparateExperts(nn.Module):
    """The experts of one block with a layer for each matrix, in the place of transformers' fused module."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        up = fused.gate_up_proj if fused.has_gate else fused.up_proj
        rest = copy.copy(fused)
        matrices = ("gate_up_proj", "up_proj", "down_proj")
        rest._parameters = {
            name: value for name, value in fused._parameters.items() if name.removesuffix("_bias") not in matrices
        }
        self.__dict__["rest"] = rest  # no child: transformers would look for the matrices in it
        for name, module in fused._modules.items():
            self.add_module(name, module)
        self.count = int(up.shape[0])
        for number in range(self.count):
            layers = []
            for name, weight in (("gate_up_proj" if fused.has_gate else "up_proj", up), ("down_proj", fused.down_proj)):
                rows, columns = weight.shape[:0:-1] if fused.is_transposed else weight.shape[1:]
                bias = getattr(fused, f"{name}_bias", None) is not None
                layers.append(nn.Linear(columns, rows, bias=bias, device=weight.device, dtype=weight.dtype))
            self.add_module(str(number), Expert(layers[0], layers[1], bool(fused.has_gate)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted."""
        result = torch.zeros_like(hidden_states)
        chosen = range(self.count) if self.training else torch.unique(top_k_index.detach()).tolist()
        for number in chosen:
            if number < self.count:
                tokens, places = torch.where(top_k_index == number)
                own = cast(nn.Module, self._modules[str(number)])(hidden_states[tokens], self.rest)
                result.index_add_(0, tokens, (own * top_k_weights[tokens, places, None]).to(result.dtype))
        return result


LAYERS = {"factored": FactoredLinear, "pivot": PivotLinear}


def use_plan(model: Any, plan: dict[str, Any]) -> None:
    """Give a new model the layout of a plan, to load factored weights into it."""
    factored = [matrix for matrix in plan["matrices"] if matrix["form"] != "dense"]
    every = [matrix["name"] for matrix in plan["matrices"]]
    for name, module in list(model.named_modules()):
        fused = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
        if fused and any(matrix.startswith(f"{name}.") for matrix in every):
            _put(model, name, SeparateExperts(module))
    for matrix in factored:
        old = model.get_submodule(matrix["name"])
        where = {"device": old.weight.device, "dtype": old.weight.dtype}
        sizes = (matrix["columns"], matrix["rows"], matrix["rank"])
        new = LAYERS[matrix["form"]](*sizes, old.bias is not None, **where)
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module is old:
                _put(model, name, new)
    # An export has one empty tensor under the name of a dense weight: without this file it makes loading an error.
    names = "|".join(matrix["name"].replace(".", r"\.") for matrix in factored)
    known = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = known | {rf"^({names})\.weight$"}


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
