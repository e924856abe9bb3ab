"""What running a model on one calibration text tells about it, kept for all plans that are made from it.

A round of evidence is statistics of the model and the spectra of its dense weights in them. The first is of the dense
model; a later one is of the model on the way to its compressed weights. Beside the rounds there are the measurements
that some allocators take, and the refit of the factors to the inputs that they really get.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit import distributed
from lowrank_lit.allocation import MatrixSpec
from lowrank_lit.batches import as_batches, check_tokens, split_single
from lowrank_lit.calibration import calibrate
from lowrank_lit.collector import Calibration
from lowrank_lit.errors import DataError, GradientError, ModelError, reason_of, warn_caller
from lowrank_lit.evidence import component_changes, places_of, specs_of
from lowrank_lit.gradients import Loss, SampledTokenLoss, name_of, next_token_loss
from lowrank_lit.kept import CALIBRATION_FILE, load_calibration, save_calibration
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.linalg import require_finite
from lowrank_lit.metrics import moments_of
from lowrank_lit.paging import Workspace, release
from lowrank_lit.probes import divergences, loss_tables
from lowrank_lit.refit import anchored_refit, substituted
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.settings import Settings
from lowrank_lit.spectrum import Spectrum, compute_spectrum
from lowrank_lit.statistics import BACKWARD_MOMENTS, LayerStatistics, stored_statistics, tensors_of
from lowrank_lit.streaming import POSITIONAL, Batch, each_in_one_block, moved, refuses
from lowrank_lit.surgery import Target, dense_weight, find_targets


@dataclass(frozen=True)
class Evidence:
    """One round.

    Attributes:
        calibration: Statistics of a model.
        spectra: Of the dense weights in them, by layer name, on the CPU.
        first_order: First-order changes of the loss by the components, where an allocator needs them.
        curve_spectra: Where the ranks are taken from other curves than the factors.
    """

    calibration: Calibration
    spectra: dict[str, Spectrum]
    first_order: dict[str, Tensor] | None
    curve_spectra: dict[str, Spectrum] | None = None


@dataclass
class Costs:
    """What a plan costs.

    Attributes:
        seconds: By stage.
        passes: Forward and backward passes over the calibration text, of which probes may use a part only.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0})

    def spend(self, stage: str, started: float) -> None:
        """Count the time since ``started``, of ``time.perf_counter()``."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


class Collection:
    """Statistics, spectra and measurements of one model on one calibration text; the model is left as it is.

    Args:
        model: Any module made of ``nn.Linear`` (or transformers' ``Conv1D``) layers.
        batches: Calibration batches, see :func:`lowrank_lit.compress`.
        targets: Shell patterns of layer names, or ``None``.
        device: Where to compute; ``None`` is where the model is.
        workspace: Where what waits for the plan is kept; ``None`` is in memory.
        loss: Whose gradients are taken, see :func:`lowrank_lit.compress`; ``None`` is that of next tokens.

    Attributes:
        refused: Why the model's forward does not run on the batches, so that only the loss does; empty where it runs,
            or where there is no loss of the caller's to stand in for it.
        targets: The matrices by layer name.
        layers: Their layers.
        places: See :func:`lowrank_lit.evidence.places_of`.
        mode: How the dense model was calibrated, see :class:`lowrank_lit.collector.Calibration`.
        resume: Folder in which the statistics of the dense model wait for the end of the compression, and its
            fingerprint; a run that was interrupted goes on from them. ``None`` keeps none.
        costs: So far; whoever makes a plan puts a new one here.

    Raises:
        ModelError: If a pattern matches nothing, or nothing can be factored.
        DataError: If the batches are malformed.
        NonFiniteError: If a weight is NaN or infinite; names the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        targets: Sequence[str] | None,
        device: torch.device | str | None,
        workspace: Workspace | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.model = model
        self.workspace = workspace
        self.loss = loss
        _check_model(model, loss)
        self.batches = split_single(as_batches(batches, model), whole=loss is not None)
        _check_ids(model, self.batches)
        self.targets: dict[str, Target] = find_targets(model, targets)
        self.device = device if device is None else usable_device(device)
        self.layers = {name: target.module for name, target in self.targets.items()}
        self.places = places_of(model, list(self.targets))
        require_finite_weights(model)
        self.refused = "" if loss is None else refuses(model, self.batches[0])
        self.mode = "none"
        self.resume: tuple[Path, str] | None = None
        self.costs = Costs()
        self._calibrations: list[tuple[frozenset[str], bool, str, Calibration]] = []
        self._evidence: dict[tuple[Any, ...], Evidence] = {}
        self._measured: dict[tuple[Any, ...], Any] = {}

    def calibration(self, moments: frozenset[str], *, importance: bool, labels: str) -> Calibration:
        """Statistics of the dense model, at least these; a later plan that needs a part of them takes it from here."""
        for had, watched, drawn, found in self._calibrations:
            if moments <= had and (watched or not importance) and (drawn == labels or not moments & BACKWARD_MOMENTS):
                return found
        found = self._resumed(moments, importance, labels)
        self._calibrations.append((moments, importance, labels, found))
        return found

    def _resumed(self, moments: frozenset[str], importance: bool, labels: str) -> Calibration:
        """Statistics of the dense model that an interrupted run has left, or new ones."""
        if self.resume is None:
            return self._calibrate(moments, importance, labels, None)
        folder, run = self.resume
        identity = f"{run} {sorted(moments)} {importance} {labels}"
        found = load_calibration(folder / CALIBRATION_FILE, identity)
        everywhere = all(distributed.gather("kept statistics", found is not None))
        if found is None or not everywhere:
            found = self._calibrate(moments, importance, labels, None)
            if distributed.rank() == 0:
                save_calibration(folder / CALIBRATION_FILE, identity, found)
        elif self.workspace is not None:
            found = replace(found, statistics=stored_statistics(found.statistics, self.workspace.keep))
        self.mode = found.mode
        return found

    def dense(self, settings: Settings) -> Evidence:
        """The round of the dense model.

        Raises:
            GradientError: If the settings need gradients, and there are none.
        """
        importance = bool(settings.needs & {"importance", "nats"})
        calibration = self.calibration(settings.moments, importance=importance, labels=settings.labels)
        key = _identity(settings)
        found = self._evidence.get(key)
        if found is None or ("first_order" in settings.needs and found.first_order is None):
            found = self._evidence[key] = self._decompose(settings, calibration)
        if not settings.moments & BACKWARD_MOMENTS:  # what an earlier plan needed must not change this one
            calibration = replace(calibration, statistics=_without_gradients(calibration.statistics))
        return replace(found, calibration=calibration)

    def first(self, settings: Settings) -> tuple[Settings, Evidence, tuple[str, ...]]:
        """The round of the dense model, of its activations alone where there are no gradients.

        Returns:
            The settings as used, the evidence, and notes.

        Raises:
            DataError: If there are fewer tokens than the rank floor.
            GradientError: If the allocator cannot do without gradients.
        """
        notes: tuple[str, ...] = ()
        if self.loss is not None:
            notes = (f"gradients are those of {name_of(self.loss)}",) if settings.moments & BACKWARD_MOMENTS else ()
        elif "first_order" in settings.needs:  # whatever labels were asked for
            notes = (f"labels='text' is used, for allocator='{settings.allocator}' needs gradients of the text itself",)
        try:
            evidence = self.dense(settings)
        except GradientError as error:
            reason = str(error).rpartition(";")[0]  # without the remedy
            notes = notes if self.loss is None else ()
            if self.refused:
                raise ModelError(
                    f"{type(self.model).__name__} does not run on the calibration batches ({self.refused}), and "
                    f"{reason}; give batches of what its forward takes"
                ) from error
            if "first_order" in settings.needs:
                raise GradientError(
                    f"allocator='{settings.allocator}' needs gradients, but {reason}; choose another allocator, such "
                    "as knapsack"
                ) from error
            if moments_of(str(settings.metric)) & BACKWARD_MOMENTS:
                notes += (f"no gradients: {reason}; metric='input' is used instead of '{settings.metric}'",)
                settings = replace(settings, metric="input", labels="none")
            else:
                notes += (f"no gradients: {reason}; ranks are shared out by energy x module importance",)
                settings = replace(settings, labels="none")
            evidence = self.dense(settings)
        notes += evidence.calibration.notes
        if evidence.calibration.statistics:
            widest = max(self.targets.values(), key=lambda target: target.columns)
            # Of images, or of what a head pools, no count of the batch's own numbers says what reaches a layer.
            seen = max(entry.tokens for entry in evidence.calibration.statistics.values())
            tokens = min(seen, evidence.calibration.tokens)
            notes += check_tokens(tokens, widest.columns, widest.name, settings.min_rank)
        return settings, evidence, notes

    def recollected(self, settings: Settings, weights: Mapping[str, Tensor], path: float) -> Evidence:
        """A round of the model on the way to compressed weights.

        Args:
            settings: Of the plan.
            weights: The compressed weights ``(rows, columns)`` by layer name.
            path: How far on the straight line from the dense weights, 0, to the compressed ones, 1.
        """
        originals = {id(layer): dense_weight(layer).detach() for layer in self.layers.values()}
        between = {}
        for name, weight in weights.items():
            own = originals[id(self.layers[name])]
            between[name] = self._put_weight(name, torch.lerp(own.to(weight), weight, path))
            self._release(own, weight)
        with substituted(self.layers, between):
            calibration = self._calibrate(settings.moments, "importance" in settings.needs, settings.labels, originals)
        found = self._decompose(settings, calibration)
        # A refit replaces the inputs' moments, and nothing else needs them any more.
        lean = {
            name: replace(entry, input_moment=None, output_moment=None)
            for name, entry in calibration.statistics.items()
        }
        return replace(found, calibration=replace(calibration, statistics=lean))

    @torch.no_grad()
    def weights(
        self, specs: Sequence[MatrixSpec], spectra: Mapping[str, Spectrum], ranks: Sequence[int]
    ) -> dict[str, Tensor]:
        """The compressed weight ``(rows, columns)`` of every matrix that gets smaller, in the layer's dtype."""
        found = {}
        for spec, rank in zip(specs, ranks, strict=True):
            if rank < spec.break_even:
                own = dense_weight(self.layers[spec.name])
                # All matrices at once, as many bytes as the model has: computed in float64, kept in its dtype.
                cut = spectra[spec.name].truncated(own.to(self.device), rank).to(own)
                found[spec.name] = self._put_weight(spec.name, cut)
                self._release(own, *spectra[spec.name].tensors().values())
        return found

    def refitted(
        self, settings: Settings, specs: Sequence[MatrixSpec], evidence: Evidence, ranks: Sequence[int]
    ) -> tuple[dict[str, Spectrum] | None, str]:
        """Spectra that hold the factors of an anchored refit, and a note; ``None`` where no block was fitted."""
        started = time.perf_counter()
        rank_of = {spec.name: rank for spec, rank in zip(specs, ranks, strict=True)}
        statistics = evidence.calibration.statistics
        if not statistics:  # a metric without moments: the refit brings the inputs' own
            statistics = {name: LayerStatistics(tokens=0) for name in self.layers}

        def fit(name: str, target: Tensor, own: LayerStatistics) -> tuple[Tensor, Tensor]:
            return spectrum_of(settings, name, target, own, rank_of[name]).factors(target, rank_of[name], nested=True)

        weights = self.weights(specs, evidence.spectra, ranks)
        # Blocks are fitted one after the other: where processes cooperate, each does it all, from the same numbers.
        with distributed.together("refitting"):
            found = None
            if not self.refused:
                found = anchored_refit(
                    self.model,
                    self.batches,
                    self.layers,
                    weights,
                    statistics,
                    fit,
                    device=self.device,
                    workspace=self.workspace,
                )
        if found is None:
            note = f"feedback='anchored' was left out: {self._no_refit()}"
            warn_caller(note)
            return None, note
        self.costs.passes["forward"] += found.passes
        self.costs.spend("feedback", started)
        chosen = [beta for beta in found.betas.values() if beta is not None]
        if not chosen:
            return None, f"anchored refit: no block of {len(found.betas)} gained by it"
        spectra = dict(evidence.spectra)
        for name, (outer, inner) in found.factors.items():
            spectra[name] = Spectrum(spectra[name].singular_values, outer, inner)
        mean = sum(chosen) / len(chosen)
        return spectra, f"anchored refit: {len(chosen)} of {len(found.betas)} blocks fitted, mean beta {mean:.2f}"

    def _no_refit(self) -> str:
        """Why blocks cannot be fitted one after the other, and the remedy."""
        if self.refused:
            return f"the model's forward does not run on the batches ({self.refused}); choose feedback='recollect'"
        if len(self.batches) < 2:
            return "a part of the text has to be held out, and there is a single sequence; give two batches or more"
        blocks = find_repeating_blocks(self.model)
        alone = (name for name, layer in self.layers.items() if not each_in_one_block({name: layer}, blocks))
        outside = next(alone, None)
        if blocks and outside is not None:
            return f"layer '{outside}' is in none of the model's repeating blocks; leave it out of targets"
        return "the model has no chain of repeating blocks; choose feedback='recollect' or 'none'"

    def measured(self, settings: Settings, kind: str, specs: Sequence[MatrixSpec], evidence: Evidence) -> Any:
        """What happens to the model when one matrix alone is cut, for each matrix, see :mod:`lowrank_lit.probes`.

        Args:
            settings: Of the plan.
            kind: ``table`` (losses at some keep ratios) or ``probe`` (divergence at one rank).
            specs: The matrices.
            evidence: Whose spectra cut.
        """
        key = (kind, *_identity(settings))
        if key not in self._measured:
            started = time.perf_counter()

            def cut(name: str, rank: int) -> Tensor:
                return evidence.spectra[name].truncated(dense_weight(self.layers[name]), rank)

            measure = loss_tables if kind == "table" else divergences
            # Each process cuts its share of the matrices, and reads all the sequences.
            measurers = distributed.owners([1.0] * len(specs))
            own = [spec for spec, number in zip(specs, measurers, strict=True) if number == distributed.rank()]
            with distributed.together("measuring"):
                values, passes = measure(self.model, self.batches, self.layers, own, cut, device=self.device)
            parts = distributed.gather("what was measured", (values, passes))
            whole: dict[str, Any] = {name: value for part, _ in parts for name, value in part.items()}
            self._measured[key] = {spec.name: whole[spec.name] for spec in specs if spec.name in whole}
            self.costs.passes["forward"] += sum(spent for _, spent in parts)
            self.costs.spend("measure", started)
        return self._measured[key]

    def _calibrate(
        self, moments: frozenset[str], importance: bool, labels: str, originals: Mapping[int, Tensor] | None
    ) -> Calibration:
        """Statistics of the model as it is at present; ``originals`` are its dense weights, by the layer's id."""
        started = time.perf_counter()

        asked: list[Tensor] = []

        def weight_of(layer: nn.Module) -> Tensor:
            if originals is None:
                return dense_weight(layer)
            own = originals[id(layer)]
            if not asked or asked[0] is not own:  # layers are asked for in turn; that of before was read
                self._release(*asked)
                asked[:] = [own]
            return own.to(next(layer.parameters()).device)

        found = calibrate(
            self.model,
            self.batches,
            self.layers,
            weight_of=weight_of,
            moments=moments,
            importance=importance,
            device=self.device,
            loss=self.loss or (SampledTokenLoss() if labels == "model" else next_token_loss),
            workspace=self.workspace,
        )
        if originals is None:
            self.mode = found.mode
        self.costs.passes["forward"] += 1 if moments or importance else 0
        self.costs.passes["backward"] += 1 if moments & BACKWARD_MOMENTS else 0
        self.costs.spend("calibrate" if originals is None else "feedback", started)
        return found

    def _put(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Where tensors wait: in the workspace, if there is one."""
        return tensors if self.workspace is None else self.workspace.keep(tensors)

    def _put_weight(self, name: str, weight: Tensor) -> Tensor:
        """A weight ``(rows, columns)`` of a layer, where it waits; it lies there as the layer stores its own, so that
        it can stand in for that without a copy."""
        if self.workspace is None:
            return weight
        turned = dense_weight(self.layers[name]) is not self.layers[name].weight
        kept = self.workspace.keep({"weight": weight.mT if turned else weight})["weight"]
        return kept.mT if turned else kept

    def _release(self, *tensors: Tensor) -> None:
        """Drop from memory what is mapped from files, where memory is short."""
        if self.workspace is not None:
            release(tensors)

    def _decompose(self, settings: Settings, calibration: Calibration) -> Evidence:
        """Spectra in these statistics; each process decomposes its share of the matrices, and all get all of them."""
        started = time.perf_counter()
        found: dict[str, Mapping[str, Tensor]] = {}
        specs = specs_of(self.targets, settings)
        owner_of = dict(zip(self.layers, distributed.owners([_effort(spec) for spec in specs]), strict=True))
        own = [name for name in self.layers if owner_of[name] == distributed.rank()]
        kept = {spec.name: spec.break_even for spec in specs}
        with distributed.together("decomposing"):
            for name in tqdm(own, desc="decomposing", unit="matrix", disable=None, leave=False):
                statistics = calibration.statistics.get(name)
                found[name] = self._put(self._decomposed(settings, name, statistics, kept[name]))
                moments = [] if statistics is None else tensors_of(statistics).values()
                self._release(*self.layers[name].parameters(), *moments)
        spectra: dict[str, Spectrum] = {}
        changes: dict[str, Tensor] = {}
        for name, owner in owner_of.items():
            tensors = distributed.handed_out("decomposing", owner, found.pop(name, None))
            with distributed.together("decomposing"):
                tensors = dict(tensors if owner == distributed.rank() else self._put(tensors))
            if "changes" in tensors:
                changes[name] = tensors.pop("changes")
            spectra[name] = Spectrum(**tensors)
        self.costs.spend("decompose", started)
        return Evidence(calibration, spectra, changes or None)

    def _decomposed(
        self, settings: Settings, name: str, statistics: LayerStatistics | None, components: int
    ) -> dict[str, Tensor]:
        """Tensors of a matrix's spectrum, and ``changes`` where the gradient of the weight is known."""
        layer = self.layers[name]
        with moved(layer, self.device), torch.no_grad():
            weight = dense_weight(layer)
            gradient = None if statistics is None else statistics.weight_gradient
            # A first-order change is known of every component, also of those that no rank may keep.
            wanted = components if gradient is None else None
            spectrum = spectrum_of(settings, name, weight, statistics, wanted)
            changes = {} if gradient is None else {"changes": component_changes(spectrum, weight, gradient).cpu()}
        # The vectors of all matrices wait for the allocation together: in the weight's precision, float32 at least,
        # and those that a rank below the break-even may keep.
        precision = torch.promote_types(weight.dtype, torch.float32)
        return {**spectrum.to("cpu", precision, components=components).tensors(), **changes}


def _effort(spec: MatrixSpec) -> float:
    """What decomposing a matrix costs, in a unit of its own: the moment's eigenvectors and the products around it."""
    short, long = sorted((spec.rows, spec.columns))
    return float(short) ** 2 * (10 * short + long)


def _check_model(model: nn.Module, loss: Loss | None) -> None:
    """Refuse what is no dense model."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}; give a torch.nn.Module, such as a loaded language model")
    if loss is None and type(model).forward is nn.Module.forward:
        raise ModelError(
            f"{type(model).__name__} has no forward to run the calibration text through; give it one, or, in a "
            "LightningModule round a transformers model, name that self.model"
        )
    name = next((name for name, module in model.named_modules() if isinstance(module, FactoredLayer)), None)
    if name is not None:
        raise ModelError(
            f"layer '{name}' is factored already; compress the dense model again, or load it with another keep_ratio"
        )


def _check_ids(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Refuse token ids that the model has no embedding for, which would end in an index error, or worse on a GPU."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        words = None if find is None else getattr(find(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # a model of features has none
        return
    reads_ids = getattr(model, "main_input_name", "input_ids") == "input_ids"  # what comes first, such as features
    for number, batch in enumerate(batches):
        ids = batch.get("input_ids", batch.get(POSITIONAL))
        if words is None or ids is None or (ids.is_floating_point() and not reads_ids):
            continue
        if ids.dtype not in (torch.int32, torch.int64):
            raise DataError(
                f"calibration batch {number} is of type {ids.dtype}, and the model reads token ids; give whole numbers "
                "(torch.long)"
            )
        worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
        if not 0 <= worst < words:
            raise DataError(
                f"calibration batch {number} has token {worst}, and the model has {words} words; give text of its own "
                "tokenizer"
            )


def usable_device(device: torch.device | str) -> torch.device:
    """The device, checked to be there.

    Raises:
        ModelError: If it is not.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ModelError(f"device={device!r} cannot be used ({reason_of(error)}); give one such as 'cpu'") from error
    return found


def require_finite_weights(model: nn.Module) -> None:
    """Check every parameter of a model before anything is computed from them.

    Raises:
        NonFiniteError: Naming the first layer with a NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            require_finite(parameter.detach(), f"the weight of layer '{name.removesuffix('.weight')}'")
            release([parameter])


def _without_gradients(statistics: Mapping[str, LayerStatistics]) -> dict[str, LayerStatistics]:
    kept = ("tokens", "input_energy", "input_moment", "output_moment", "input_magnitude", "frequency")
    return {name: LayerStatistics(**{key: getattr(entry, key) for key in kept}) for name, entry in statistics.items()}


def _identity(settings: Settings) -> tuple[Any, ...]:
    """Settings that spectra depend on, and how much of them is kept."""
    return (
        settings.metric,
        settings.damping,
        settings.shrinkage,
        settings.alpha,
        settings.labels,
        settings.storage,
    )


def spectrum_of(
    settings: Settings, name: str, weight: Tensor, statistics: LayerStatistics | None, components: int | None = None
) -> Spectrum:
    """:func:`lowrank_lit.spectrum.compute_spectrum` as the settings have it."""
    return compute_spectrum(
        weight,
        statistics,
        metric=str(settings.metric),
        name=name,
        damping=settings.damping,
        shrinkage=settings.shrinkage,
        alpha=settings.alpha,
        components=components,
    )
