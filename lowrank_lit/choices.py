"""Accuracy on multiple-choice questions, by the log-likelihood of each choice after its query.

Tokens are those of lm-evaluation-harness: query and query with choice are tokenised apart, and the tokens of the latter
beyond the number of the former are the choice's. White space at the end of the query goes to the choice, because most
tokenizers write a space into the token that follows it. Where the two together exceed the model's context, the query
loses tokens at its start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lit.errors import DataError, NonFiniteError
from lowrank_lit.evaluation import causal_logits, check_places
from lowrank_lit.sources import Row, read_rows
from lowrank_lit.streaming import evaluating, moved
from lowrank_lit.windows import BOS_POLICIES


@dataclass(frozen=True)
class Question:
    """A query, its possible continuations, and the index of the right one; ``place`` is for error messages."""

    query: str
    choices: tuple[str, ...]
    gold: int
    place: str


@dataclass(frozen=True)
class MultipleChoice:
    """Accuracies over a set of questions.

    Attributes:
        questions: How many, at least 2.
        acc: Share of questions whose right choice has the largest log-likelihood.
        acc_stderr: Its standard error, ``sqrt(acc (1 - acc) / (questions - 1))``.
        acc_norm: The same with each log-likelihood divided by the choice's length in UTF-8 bytes.
        acc_norm_stderr: Its standard error.
        truncated: Questions of which a choice did not fit into the context with all of the query.
        log_likelihoods: Of every choice of every question, in nats.
    """

    questions: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    truncated: int
    log_likelihoods: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class _Request:
    """Tokens of a query with one choice; those from ``start`` on are the choice's."""

    ids: list[int]
    start: int
    truncated: bool
    place: str


def read_questions(source: str | Path) -> list[Question]:
    """Questions of a table of objects ``{"query": text, "choices": [text, ...], "gold": index}``; other keys are free.

    Args:
        source: A local ``.jsonl``, ``.json`` or ``.parquet`` file, or ``hub:NAME:SPLIT``.

    Raises:
        DataError: If the source cannot be read, or an object lacks a key or has a wrong value; with file and line.
    """
    return [_question(row, str(source)) for row in read_rows(str(source))]


def _question(row: Row, source: str) -> Question:
    place = f"file '{source}', {row.place}"
    for key in ("query", "choices", "gold"):
        if key not in row.fields:
            raise DataError(f"{place}: key '{key}' is missing; a question has 'query', 'choices' and 'gold'")
    query, choices, gold = (row.fields[key] for key in ("query", "choices", "gold"))
    if not isinstance(query, str):
        raise DataError(f"{place}: 'query' is a {type(query).__name__}; it must be a string")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{place}: 'choices' must be a list of at least two strings that are not blank")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise DataError(f"{place}: 'gold' is {gold!r}; it must be the index of a choice, 0 to {len(choices) - 1}")
    return Question(query, tuple(choices), gold, place)


def multiple_choice(
    model: nn.Module,
    tokenizer: Any,
    questions: str | Path | Sequence[Question],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    delimiter: str = " ",
    bos: str = "none",
) -> MultipleChoice:
    """Accuracy of a causal language model on multiple-choice questions, without examples before them.

    Args:
        model: As :func:`lowrank_lit.perplexity` takes it.
        tokenizer: Of transformers, the model's own.
        questions: A source as :func:`read_questions` takes it, or what that gave.
        limit: Only so many questions, from the start.
        batch_size: Choices per forward pass; it does not change what a choice gets.
        device: Where to evaluate; the model moves there and back. None stays where the model is.
        delimiter: Between query and choice, unless the query is empty or white space stands there already.
        bos: ``prepend`` puts the tokenizer's BOS first; ``none`` does so only where the query is empty, because a first
            token has no likelihood.

    Raises:
        DataError: For a malformed source, fewer than two questions, or a choice longer than the model's context.
        ModelError: If the model gives no logits.
        NonFiniteError: If a log-likelihood is NaN; the message names the question.
    """
    asked = read_questions(questions) if isinstance(questions, (str, Path)) else list(questions)
    asked = asked[:limit]
    _check(asked, limit, batch_size, bos)
    check_places(model, device)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    requests = _requests(asked, tokenizer, delimiter, bos, longest if isinstance(longest, int) else None)
    flat = [request for group in requests for request in group]
    with torch.no_grad(), evaluating(model), moved(model, device) as place:
        found = iter(_log_likelihoods(model, flat, batch_size, place))
    scores = tuple(tuple(next(found) for _ in group) for group in requests)
    truncated = sum(any(request.truncated for request in group) for group in requests)
    return _accuracies(asked, scores, truncated)


def _check(questions: Sequence[Question], limit: int | None, batch_size: int, bos: str) -> None:
    if limit is not None and limit < 2:
        raise DataError(f"limit={limit} is too small; a standard error needs at least 2 questions")
    if len(questions) < 2:
        raise DataError(f"{len(questions)} question(s) are too few; a standard error needs at least 2")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is too small; give at least 1")
    if bos not in BOS_POLICIES:
        raise DataError(f"bos='{bos}' is unknown; choose one of {', '.join(BOS_POLICIES)}")


def _requests(
    questions: Sequence[Question], tokenizer: Any, delimiter: str, bos: str, longest: int | None
) -> list[list[_Request]]:
    requests = []
    for question in questions:
        query = question.query.rstrip()
        space = question.query[len(query) :]
        tails = [
            (space or ("" if choice[0].isspace() else delimiter) if query else "") + choice
            for choice in question.choices
        ]
        # One by one, query and whole: no tokenizer merges over the end of a text.
        encoded = tokenizer(
            [query, *(query + tail for tail in tails)],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        context, wholes = list(encoded[0]), encoded[1:]
        begin = _beginning(tokenizer, bos, empty=not context, place=question.place)
        requests.append([_request(begin, len(context), list(whole), longest, question.place) for whole in wholes])
    return requests


def _beginning(tokenizer: Any, bos: str, *, empty: bool, place: str) -> list[int]:
    if bos == "none" and not empty:
        return []
    chosen = tokenizer.bos_token_id
    if chosen is None and bos == "none":
        chosen = tokenizer.eos_token_id  # what a text begins with where there is no BOS
    if chosen is None:
        why = "bos='prepend'" if bos == "prepend" else f"{place}: the query is empty"
        raise DataError(f"{why}, and the tokenizer has no BOS token; choose bos='none' and give every query a text")
    return [int(chosen)]


def _request(begin: list[int], context: int, whole: list[int], longest: int | None, place: str) -> _Request:
    ids = begin + whole
    # A tokenizer may merge the end of the query with all of a short choice: one token at least is the choice's.
    start = max(1, min(len(begin) + context, len(ids) - 1))
    surplus = 0 if longest is None else max(0, len(ids) - 1 - longest)  # the last token is scored and not read
    if surplus >= start:
        raise DataError(
            f"{place}: a choice has {len(ids) - start} tokens, the model's max_position_embeddings is {longest}; "
            "shorten it"
        )
    return _Request(ids[surplus:], start - surplus, surplus > 0, place)


def _log_likelihoods(
    model: nn.Module, requests: Sequence[_Request], batch_size: int, place: torch.device | None
) -> list[float]:
    """Sum of the log-probabilities of each choice's tokens, in nats; losses in float32 or wider, summed in float64.

    Padding stands on the right, where no token before it can see it, so places and attention are those of a sequence
    read alone.
    """
    # Sequences of like length together; the longest first, so that memory that is too small shows at once.
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].ids))
    found = [0.0] * len(requests)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        rows = [torch.tensor(requests[index].ids) for index in chosen]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(place)
        logits = causal_logits(model, ids[:, :-1])
        for row, index in enumerate(chosen):
            found[index] = _log_likelihood(logits[row], ids[row], requests[index])
    return found


def _log_likelihood(logits: Tensor, ids: Tensor, request: _Request) -> float:
    """Of one request; logits ``(length - 1, vocabulary)``, ids ``(length,)``, both padded on the right."""
    end = len(request.ids)
    chosen = logits[request.start - 1 : end - 1]
    wide = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    losses = nn.functional.cross_entropy(wide, ids[request.start : end], reduction="none")
    total = float(losses.cpu().double().sum())
    if math.isnan(total):
        raise NonFiniteError(
            f"{request.place}: the logits hold a NaN or infinity; check the weights, or evaluate in float32 or bfloat16"
        )
    return -total


def _accuracies(questions: Sequence[Question], scores: tuple[tuple[float, ...], ...], truncated: int) -> MultipleChoice:
    plain, norm = 0, 0
    for question, score in zip(questions, scores, strict=True):
        per_byte = [value / len(text.encode()) for value, text in zip(score, question.choices, strict=True)]
        plain += score.index(max(score)) == question.gold  # of equal ones the first, whichever is right
        norm += per_byte.index(max(per_byte)) == question.gold
    count = len(questions)
    acc, acc_norm = plain / count, norm / count
    return MultipleChoice(
        count, acc, standard_error(acc, count), acc_norm, standard_error(acc_norm, count), truncated, scores
    )


def standard_error(share: float, count: int) -> float:
    """Of a share of ``count`` independent yes-or-no outcomes, by the sample variance: ``sqrt(p (1 - p) / (n - 1))``.

    Examples:
        >>> standard_error(0.5, 101)
        0.05
    """
    return math.sqrt(share * (1 - share) / (count - 1))
