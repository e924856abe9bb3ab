"""The hooks and sums of one calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lit import distributed
from lowrank_lit.batches import count_tokens
from lowrank_lit.errors import DataError
from lowrank_lit.experts import Side, routed_mask
from lowrank_lit.gradients import (
    GradientCollector,
    WeightOf,
)
from lowrank_lit.paging import Workspace
from lowrank_lit.pooling import pool_experts
from lowrank_lit.residual import BlockCosine, ImportanceResult, ResidualWatcher, resolve_importance
from lowrank_lit.sharing import Sharing
from lowrank_lit.statistics import (
    BACKWARD_MOMENTS,
    FORWARD_MOMENTS,
    GradientSums,
    InputSums,
    LayerStatistics,
    MomentSum,
    full_float32,
    real_tokens,
    stored_statistics,
    widen,
)
from lowrank_lit.streaming import (
    Batch,
    real_positions,
)


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration.

    Attributes:
        statistics: Second moments by layer name; empty where the metric needs none.
        importance: ``1 - cos`` of the sub-block of each layer, by layer name; empty where not asked for.
        tokens: Tokens seen, padding left out.
        mode: ``blocks`` (one block at a time on the device), ``whole``, or ``none`` where nothing had to be collected.
        notes: What a user should know, one sentence each.
    """

    statistics: dict[str, LayerStatistics] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    mode: str = "none"
    notes: tuple[str, ...] = ()


class Collector:
    """Owns the hooks and sums of one calibration.

    Args:
        layers: To collect from, by name.
        weight_of: See :func:`lowrank_lit.calibration.calibrate`.
        moments: What to collect.
        watch: Whether to measure the importance of the layers' sub-blocks.
        sides: Of the layers that are experts', see :func:`lowrank_lit.experts.sides_of`.
        workspace: Where statistics wait; ``None`` is in memory.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        weight_of: WeightOf,
        moments: frozenset[str],
        *,
        watch: bool,
        sides: Mapping[str, tuple[str, Side]],
        workspace: Workspace | None = None,
    ) -> None:
        self.layers = layers
        self.workspace = workspace
        self.sides = sides
        self.wanted = moments
        self.weight_of = weight_of
        self.moments = moments & FORWARD_MOMENTS
        self.gradients = GradientCollector(moments, weight_of) if moments & BACKWARD_MOMENTS else None
        self.watcher = (
            ResidualWatcher({name: list(layer.parameters()) for name, layer in layers.items()}) if watch else None
        )
        self.cosines: BlockCosine | None = None
        self.mask: Tensor | None = None
        self.tokens = 0
        self._in_forward = False
        self._sums: dict[str, InputSums] = {}
        self._pools: dict[str, MomentSum] = {}  # of the inputs of all experts of a block, by the experts' name
        self._results: dict[str, LayerStatistics] = {}
        self._sharing = Sharing()  # layers fed the same tensor share one sum, that of its owner
        # Layers whose inputs were added, and whose outputs are to follow.
        self._awaited: set[str] = set()

    def count(self, batch: Batch) -> None:
        """Count the tokens of a batch, padding left out."""
        self.tokens += count_tokens(batch)

    @contextmanager
    def on(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hooks on ``layers`` for the time of the context; their sums are turned into statistics at its end."""
        with ExitStack() as hooks:
            for name, layer in layers.items() if self.moments else ():
                hooks.callback(layer.register_forward_pre_hook(self._hook(name)).remove)
                # Before any hook of the model's own, which may change what the layer computed.
                hooks.callback(layer.register_forward_hook(self._output_hook(name), prepend=True).remove)
            if self.gradients is not None:  # after the inputs' hooks, which are to see what the model hands over
                hooks.enter_context(self.gradients.on(layers))
            yield
            self._close(layers)

    @contextmanager
    def batch(self, batch: Batch, device: torch.device | None) -> Iterator[None]:
        """The context of one forward; a backward comes after it."""
        mask = real_positions(batch)
        self.mask = None if mask is None or bool(mask.all()) else mask.to(device)
        self._in_forward = True
        try:
            with ExitStack() as stack:
                if self.gradients is not None:
                    stack.enter_context(self.gradients.batch(batch, self.mask))
                for watcher in (self.watcher, self.cosines):
                    if watcher is not None:
                        stack.enter_context(watcher.batch(self.mask))
                yield
        finally:
            self._in_forward = False
            self._sharing.forget()
            self._awaited.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            # Gradient checkpointing runs forwards again in the backward, whose inputs have been counted. And the
            # watcher follows the model's own operations; those of the statistics are none of its business.
            if self._in_forward:
                with torch._C.DisableTorchFunction(), torch.no_grad(), full_float32():
                    self._add(name, layer, args[0])

        return hook

    def _output_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if name not in self._awaited:
                return
            self._awaited.remove(name)
            with torch._C.DisableTorchFunction(), torch.no_grad():
                x, weight, mask = args[0], self.weight_of(layer).detach(), routed_mask(self.mask)
                own = _is_product(output, layer, x, weight)
                with full_float32():
                    tokens = widen(real_tokens(output if own else x, mask))
                    self._sums[name].add_outputs(tokens if own else tokens @ weight.to(tokens).mT)

        return hook

    def _add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        shared = self._sharing.meet(name, x)
        owner = self._sharing.owners[name]
        if owner != name:
            if not shared:  # adding nothing here would leave these tokens out of the sum
                _check_owner(name, owner, name)
            return
        if name not in self._sums:
            self._sums[name] = InputSums(self.moments, lambda: self.weight_of(layer).shape[0], x.shape[-1], x.device)
        sums, tokens = self._sums[name], real_tokens(x, routed_mask(self.mask))
        sums.add(tokens)
        if sums.outputs is not None:
            self._awaited.add(name)
        if sums.outputs is None:  # a moment of the outputs is the layer's own
            self._sharing.own(name, x)
        elif name in self.sides and self.sides[name][1] == "up":
            pool = self._pools.setdefault(self.sides[name][0], MomentSum(x.shape[-1], x.device))
            pool.add(tokens)

    def _merge(self, layers: Mapping[str, nn.Module]) -> None:
        """Add up the sums of ``layers`` over all processes. One whose share does not reach a layer, such as an expert,
        adds zeros."""
        if distributed.size() == 1:
            return
        gradients = {} if self.gradients is None else self.gradients.sums
        owners = {name: owner for name, owner in self._sharing.owners.items() if name in layers}
        columns = {name: sums.columns for name, sums in self._sums.items()}
        shapes = {name: sums.shape for name, sums in gradients.items()}
        pools = {name: (pool.size, str(pool.device)) for name, pool in self._pools.items()}
        found = distributed.gather("the sums of calibration", (owners, columns, shapes, pools))
        seen = [part[:3] for part in found]
        for owners, _, _ in seen:
            for name, owner in owners.items():
                _check_owner(name, owner, self._sharing.owners.setdefault(name, owner))
        for name, (size, place) in {name: made for part in found for name, made in part[3].items()}.items():
            self._pools.setdefault(name, MomentSum(size, place)).reduce(distributed.add_up)
        # In the same order everywhere: for the sums, and for the layer that an error names.
        for name, size in {name: size for _, found, _ in seen for name, size in found.items()}.items():
            inputs = self._sums.pop(name, None) or _no_inputs(self, layers[name], size)
            inputs.reduce(distributed.add_up)
            self._sums[name] = inputs
        for name, shape in {name: shape for _, _, found in seen for name, shape in found.items()}.items():
            sums = gradients.pop(name, None) or GradientSums(self.wanted, *shape, _place(layers[name]))
            sums.reduce(distributed.add_up)
            gradients[name] = sums

    def _close(self, layers: Mapping[str, nn.Module]) -> None:
        """Turn the sums of ``layers`` into statistics and let the sums go."""
        self._merge(layers)
        own = {name: LayerStatistics(sums.tokens, **sums.means()) for name, sums in self._sums.items()}
        self._sums.clear()
        called = () if self.gradients is None else tuple(self.gradients.sums)
        gradients = {name: self.gradients.take(name) for name in called} if self.gradients is not None else {}
        for name in layers if self.moments or self.gradients is not None else ():
            sums = gradients.get(name)
            if self.moments:
                statistics = own.get(self._sharing.owners.get(name, ""), LayerStatistics(0))
            else:
                statistics = LayerStatistics(0 if sums is None else sums.tokens)
            if statistics.tokens == 0 and name not in self.sides:
                raise _unreached(name)
            statistics.check(name)
            self._results[name] = statistics
        # After all inputs: a NaN in one layer's outputs is one in every layer's gradients.
        for name, sums in gradients.items():
            if sums is not None:
                self._results[name] = replace(self._results[name], **sums.means())
                self._results[name].check(name)
        self._pool(layers)
        if self.workspace is not None:
            self._results |= stored_statistics({name: self._results[name] for name in layers}, self.workspace.keep)

    def _pool(self, layers: Mapping[str, nn.Module]) -> None:
        """Shrink the statistics of experts to those of all experts of their block."""
        groups: dict[tuple[str, Side], list[str]] = {}
        for name in layers:
            if name in self.sides and name in self._results:
                groups.setdefault(self.sides[name], []).append(name)
        for (experts, side), names in groups.items():
            own = {name: self._results[name] for name in names}
            if not any(entry.tokens for entry in own.values()):
                raise _unreached(names[0])
            pool = self._pools.get(experts) if side == "up" else None

            def weight(name: str) -> Tensor:
                return self.weight_of(layers[name]).detach()

            self._results |= pool_experts(
                own,
                side,
                {name: (weight(name).shape[0], weight(name).shape[1]) for name in names},
                weight,
                inputs=None if pool is None else pool.mean().cpu().double(),
                tokens=self.tokens,
            )
            if side == "up":
                self._pools.pop(experts, None)

    def _importance(self, measured: ImportanceResult) -> ImportanceResult:
        """The same for all experts of a block: the mean over those that were seen."""
        groups: dict[str, list[str]] = {}
        for name, (experts, _) in self.sides.items():
            groups.setdefault(experts, []).append(name)
        values = dict(measured.values)
        for names in groups.values():
            known = [values[name] for name in names if name in values]
            values |= dict.fromkeys(names if known else (), sum(known) / max(1, len(known)))
        missing = tuple(name for name in measured.missing if name not in values)
        return replace(measured, values=values, missing=missing)

    def finish(self, mode: str) -> Calibration:
        if self.gradients is not None:
            self.gradients.check_gradients()
        results = {name: self._results[name] for name in self.layers if name in self._results}
        notes: tuple[str, ...] = ()
        importance: dict[str, float] = {}
        if self.watcher is not None:
            watcher, cosines = _merged(self.watcher, self.cosines)
            fallback = {} if cosines is None else cosines.importance()
            measured = self._importance(watcher.importance())
            importance, notes = resolve_importance(list(self.layers), measured, fallback)
        experts = [name for name in results if name in self.sides]
        few = [name for name in experts if results[name].tokens < self.weight_of(self.layers[name]).shape[1]]
        if few:
            notes += (
                f"{len(few)} of {len(experts)} matrices of experts saw fewer tokens than they have inputs "
                f"('{few[0]}': {results[few[0]].tokens}); their statistics lean on those of all experts",
            )
        return Calibration(results, importance, self.tokens, mode, notes)


def _is_product(output: Tensor, layer: nn.Module, x: Tensor, weight: Tensor) -> bool:
    """Whether what the layer computed is ``W x`` as the statistics would compute it once more: of the weight that is
    asked for, without a bias, in float32 or wider and without shortcuts all along. A half-precision layer's own output
    is rounded."""
    own = getattr(layer, "weight", None)
    return (
        isinstance(own, Tensor)
        and own.data_ptr() == weight.data_ptr()
        and getattr(layer, "bias", None) is None
        and output.dtype == x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and (x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest")
    )


def _unreached(name: str) -> DataError:
    return DataError(f"no calibration token reached layer '{name}'; leave it out of targets, or give text that uses it")


def _check_owner(name: str, owner: str, other: str) -> None:
    """Check that a layer shares its input with the same one always."""
    if owner != other:
        raise DataError(
            f"layer '{name}' shares its input with '{owner if owner != name else other}' in one forward and not in "
            "another; leave it out of targets"
        )


def _no_inputs(collector: Collector, layer: nn.Module, columns: int) -> InputSums:
    return InputSums(collector.moments, lambda: collector.weight_of(layer).shape[0], columns, _place(layer))


def _place(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _merged(watcher: ResidualWatcher, cosines: BlockCosine | None) -> tuple[ResidualWatcher, BlockCosine | None]:
    """Watchers with the sums of all processes, added in the order of the processes everywhere."""
    if distributed.size() == 1:
        return watcher, cosines
    own = [dict(sums) for sums in (watcher.sums, {} if cosines is None else cosines.sums)]
    whole, of_blocks = watcher.empty(), None if cosines is None else cosines.empty()
    for branches, blocks in distributed.gather("the importance of the modules", own):
        whole.merge(branches)
        if of_blocks is not None:
            of_blocks.merge(blocks)
    return whole, of_blocks
