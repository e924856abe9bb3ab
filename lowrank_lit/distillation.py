"""Knowledge distillation: a compressed model is trained towards what the dense one predicts.

The loss is the divergence of the student's predictions from the teacher's, ``KL(p || q)`` with ``p = softmax(t / T)``
of the teacher's logits ``t`` and ``q`` of the student's, in nats per token, times ``T^2`` so that its gradient keeps
its size (Hinton et al., arXiv 1503.02531). No label enters it: any text that the teacher can read will do.

What the teacher predicts can be kept on disk, one file per sequence, named by a hash of its tokens, in a folder named
by a hash of the teacher's weights: what is stale is never read. Where only the ``k`` likeliest tokens of a position are
kept, all others count as one further outcome; the divergence of the two coarser distributions is a lower bound of the
whole one, is zero only where they agree, and needs no renormalisation, which would teach the student that everything
else is impossible.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_lit.compress import batches_hash, loaded_hash
from lowrank_lit.errors import LowRankError, ModelError, NonFiniteError
from lowrank_lit.gradients import predicted_positions
from lowrank_lit.streaming import run_model

_IGNORED = -100
# What decides the predictions of a causal language model; positions keep samples apart that were packed in one block.
_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Predictions:
    """What a teacher predicts for a batch.

    Attributes:
        log_probabilities: Natural logarithms, float32, ``(batch, length, vocabulary)``, or ``(batch, length, k)``.
        tokens: Ids of the ``k`` likeliest tokens, int64 ``(batch, length, k)``; ``None`` where all of them are there.
    """

    log_probabilities: Tensor
    tokens: Tensor | None = None


def divergence(student: Tensor, teacher: Predictions, counted: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(teacher || student)``, mean over the positions that count, in nats per token; a 0-d float32 tensor.

    Args:
        student: Logits ``(batch, length, vocabulary)``, of any dtype; computed with in float32.
        teacher: Predictions for the same batch.
        counted: Bool ``(batch, length)``: positions that count.
        temperature: ``T``; other than 1 only with all of the teacher's tokens.

    Raises:
        ModelError: If the two have vocabularies of different sizes.
        LowRankError: If no position counts, or the temperature does not go with the predictions.
    """
    if not bool(counted.any()):
        raise LowRankError("no position of the batch counts for the divergence; give text with labels or real tokens")
    if teacher.tokens is not None:
        if temperature != 1.0:
            raise LowRankError(f"temperature={temperature} needs all of the teacher's tokens; leave teacher_top_k out")
        return _coarse(student[counted], teacher.log_probabilities[counted], teacher.tokens[counted])
    if teacher.log_probabilities.shape != student.shape:
        raise ModelError(
            f"the teacher predicts {teacher.log_probabilities.shape[-1]} tokens and the student {student.shape[-1]}; "
            "both need the same tokenizer and vocabulary"
        )
    target = teacher.log_probabilities[counted]
    if temperature != 1.0:
        target = torch.log_softmax(target / temperature, -1)
    scaled = student[counted].float() / temperature
    # Only the cross-entropy has a gradient; the teacher's entropy makes it a divergence, which 0 is the least of.
    probabilities = target.exp()
    entropy = torch.special.entr(probabilities).sum(-1).mean()
    loss: Tensor = F.cross_entropy(scaled, probabilities) - entropy
    return loss * temperature**2


def _coarse(student: Tensor, target: Tensor, tokens: Tensor) -> Tensor:
    """KL over the listed tokens and one outcome for all others; ``(n, vocabulary)``, ``(n, k)``, ``(n, k)``."""
    own = torch.log_softmax(student.float(), -1)
    listed = own.gather(-1, tokens)
    loss = (target.exp() * (target - listed)).sum(-1)
    rest = _rest(target)
    loss = loss + rest.exp() * (rest - _rest(listed))
    return loss.mean()


def _rest(logarithms: Tensor) -> Tensor:
    """log(1 - sum exp) over the last dimension, of at least the rounding of the sum."""
    total = logarithms.exp().sum(-1)
    return torch.log1p(-total.clamp_max(1 - torch.finfo(total.dtype).eps))


def counted_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions a next-token loss counts, bool ``(batch, length)``.

    Those whose next token is a label (not -100); without labels those that are real and followed by a real token.
    """
    ids = batch["input_ids"]
    counted = torch.zeros_like(ids, dtype=torch.bool)
    if "labels" in batch:
        counted[:, :-1] = batch["labels"][:, 1:] != _IGNORED
        return counted
    counted[:, :-1] = predicted_positions(batch)
    return counted


class PredictionCache:
    """A teacher's predictions on disk, by sequence.

    Args:
        folder: Created where it is missing; may be shared by processes, and by teachers.
        identity: Of the teacher, :func:`lowrank_lit.compress.loaded_hash`.
        top_k: Tokens that are kept of each position; ``None`` keeps all.
    """

    def __init__(self, folder: Path, identity: str, top_k: int | None) -> None:
        self.folder = folder / f"{identity}-{'all' if top_k is None else f'top{top_k}'}"
        self._writes = True

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Predictions of a sequence, or ``None`` where there are none that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / f"{key}.safetensors"
        try:
            return load_file(path) if path.is_file() else None
        except (OSError, ValueError, SafetensorError):
            return None  # cut off by a crash, say: it is computed and written again

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the predictions of a sequence; a disk that cannot be written costs one warning."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self._writes:
            return
        partial = self.folder / f"{key}.{os.getpid()}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial)
            os.replace(partial, self.folder / f"{key}.safetensors")
        except (OSError, SafetensorError) as error:
            self._writes = False
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            warnings.warn(
                f"the teacher's predictions cannot be kept in '{self.folder}' ({error}); they are computed anew",
                stacklevel=2,
            )


class Teacher:
    """A frozen model that says what to predict: computed at every call, or once and then read from disk.

    The model is loaded when it is first needed, which is never where everything is on disk.

    Args:
        load: Gives the model.
        cache: Folder for the predictions; ``None`` computes them every time.
        identity: :func:`lowrank_lit.compress.loaded_hash` of the model, where it is known; else the model is loaded for
            it.
        top_k: Tokens per position that are kept; ``None`` is all of them: 4 bytes times the vocabulary per token of
            text, against 8 ``k``.

    Raises:
        LowRankError: If ``top_k`` is no whole number of 1 or more.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        *,
        cache: Path | None = None,
        identity: str | None = None,
        top_k: int | None = None,
    ) -> None:
        if top_k is not None and top_k < 1:
            raise LowRankError(f"teacher_top_k={top_k} is too small; give at least 1, such as 64, or leave it out")
        self._load = load
        self._folder = cache
        self._identity = identity
        self._top_k = top_k
        self._model: nn.Module | None = None
        self._cache: PredictionCache | None = None

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    def predict(self, batch: Mapping[str, Tensor]) -> Predictions:
        """Predictions for a batch of token ids, on its device, without gradients.

        Args:
            batch: ``input_ids`` ``(batch, length)``, optionally ``attention_mask`` and ``position_ids``; other keys are
                not used.

        Raises:
            NonFiniteError: If the teacher's logits are not finite.
            ModelError: If it gives no logits.
        """
        own = {key: batch[key] for key in _INPUTS if key in batch}
        place = own["input_ids"].device
        if self._folder is None:
            return self._compute(own, place)
        cache = self._opened(self._folder, place)
        rows = [{key: value[index] for key, value in own.items()} for index in range(len(own["input_ids"]))]
        keys = [batches_hash([row])[:40] for row in rows]
        found = {key: cache.read(key) for key in keys}
        if any(entry is None for entry in found.values()):
            # All of the batch, though a part be known: rounding depends on the size of a batch, and a run that was cut
            # off between two sequences is to go on with the numbers that it would have had.
            computed = self._compute(own, place)
            for index, key in enumerate(keys):
                if found[key] is None:
                    found[key] = entry = _entry(computed, index)
                    cache.write(key, entry)
        return _joined([found[key] for key in keys], place)

    def _opened(self, folder: Path, place: torch.device) -> PredictionCache:
        if self._cache is None:
            if self._identity is None:
                self._identity = loaded_hash(self._model_on(place))
            self._cache = PredictionCache(folder, self._identity, self._top_k)
        return self._cache

    def _model_on(self, place: torch.device) -> nn.Module:
        if self._model is None:
            self._model = self._load().requires_grad_(False).eval()
        parameter = next(self._model.parameters(), None)
        if parameter is not None and parameter.device != place:
            self._model.to(place)
        return self._model

    @torch.no_grad()
    def _compute(self, batch: Mapping[str, Tensor], place: torch.device) -> Predictions:
        logits = getattr(run_model(self._model_on(place), batch), "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:2] != batch["input_ids"].shape:
            raise ModelError(f"{type(self._model).__name__} gives no logits per token; the teacher is a language model")
        values = torch.log_softmax(logits.float(), -1)
        if not bool(torch.isfinite(values.amax(-1)).all()):
            raise NonFiniteError("the teacher's logits hold a NaN or infinity; check its weights")
        if self._top_k is None or self._top_k >= values.shape[-1]:
            return Predictions(values)
        largest = values.topk(self._top_k, -1)
        return Predictions(largest.values, largest.indices)


def _entry(predictions: Predictions, index: int) -> dict[str, Tensor]:
    """Predictions of one sequence, as they are stored."""
    entry = {"log_probabilities": predictions.log_probabilities[index]}
    return entry if predictions.tokens is None else {**entry, "tokens": predictions.tokens[index].int()}


def _joined(entries: Sequence[Mapping[str, Tensor] | None], place: torch.device) -> Predictions:
    known = [entry for entry in entries if entry is not None]
    values = torch.stack([entry["log_probabilities"].to(place) for entry in known])
    if "tokens" not in known[0]:
        return Predictions(values)
    return Predictions(values, torch.stack([entry["tokens"].to(place) for entry in known]).long())
