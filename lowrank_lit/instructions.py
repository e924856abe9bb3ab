"""Instruction data: prompts with responses, of which the responses alone are learnt."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowrank_lit.errors import DataError, reason_of
from lowrank_lit.sources import Row, read_rows

IGNORED = -100
"""Label of a token that is no target, as in ``torch.nn.functional.cross_entropy``."""

# The two prompts of Stanford's Alpaca.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a chat template that says itself what the assistant wrote


@dataclass(frozen=True)
class Sample:
    """Tokens of one conversation.

    Attributes:
        ids: Token ids.
        targets: Whether each token is learnt.
        place: Line or row of its source.
    """

    ids: list[int]
    targets: list[bool]
    place: str


def is_instructions(source: str) -> bool:
    """Whether a source holds instructions: ``alpaca:...`` or ``chat:...``."""
    return source.partition(":")[0] in _KINDS


def read_samples(source: str, tokenizer: Any) -> list[Sample]:
    """Samples of one instruction source.

    Args:
        source: ``alpaca:TABLE`` with the fields ``instruction``, ``input`` (may be empty) and ``output``, put into
            Alpaca's prompt and ended by the end-of-text token; or ``chat:TABLE`` with the field ``messages``, a list of
            ``{"role", "content"}``, put into the tokenizer's chat template. TABLE is a file (``.json``, ``.jsonl``,
            ``.parquet``) or ``hub:NAME[:CONFIG]:SPLIT``.
        tokenizer: A fast tokenizer, for ``chat`` with a chat template. What the assistant wrote is what the template
            marks by ``{% generation %}``; in any other template it is what each assistant message adds to the text.

    Raises:
        DataError: For a malformed row, with its line; for a tokenizer that does not serve.
    """
    kind, _, table = source.partition(":")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"'{kind}:' needs a fast tokenizer, which tells where in the text a token begins")
    if kind == "chat" and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give an instruct model's tokenizer, or an alpaca: source")
    if kind == "alpaca" and tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token, which ends a response; give one that has")
    samples = []
    for row in read_rows(table):
        try:
            samples += _KINDS[kind](row, tokenizer)
        except DataError as error:
            raise DataError(f"'{source}', {row.place}: {error}") from error
    return samples


def _alpaca(row: Row, tokenizer: Any) -> list[Sample]:
    fields: dict[str, str] = {}
    for key in ("instruction", "input", "output"):
        value = row.fields.get(key)
        if value is None and key == "input":
            value = ""
        if not isinstance(value, str):
            found = "is missing" if value is None else f"is a {type(value).__name__}"
            raise DataError(f"'{key}' {found}; a row has the strings instruction, input and output")
        if key != "input" and not value.strip():
            raise DataError(f"'{key}' is empty; complete the row or take it out")
        fields[key] = value
    prompt = (_WITH_INPUT if fields["input"].strip() else _WITHOUT_INPUT).format(**fields)
    text = prompt + fields["output"]
    ids, targets = _encode(tokenizer, text, [(len(prompt), len(text))])
    first = [tokenizer.bos_token_id] if _begins_with_bos(tokenizer) else []
    return [Sample([*first, *ids, tokenizer.eos_token_id], [*(False for _ in first), *targets, True], row.place)]


def _begins_with_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _chat(row: Row, tokenizer: Any) -> list[Sample]:
    messages = _messages(row)
    try:
        if _MARKED.search(tokenizer.get_chat_template()):
            encoded = tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            learnt = [bool(mask) for mask in encoded["assistant_masks"]]
            return [Sample(list(encoded["input_ids"]), learnt, row.place)]
        return _by_difference(messages, tokenizer, row.place)
    except DataError:
        raise
    except Exception as error:  # a template is a program: it raises by its own rules, and jinja has many errors
        raise DataError(f"the chat template refuses the messages ({reason_of(error)})") from error


def _messages(row: Row) -> list[dict[str, str]]:
    messages = row.fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' is missing or empty; a row has a list of objects with role and content")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"message {number} is no object with the strings role and content")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError("no message of the role assistant has content, so there is nothing to learn")
    return messages


def _by_difference(messages: list[dict[str, str]], tokenizer: Any, place: str) -> list[Sample]:
    """The conversation as one sample, or, where the template changes earlier turns once later ones follow, a sample
    for each turn of the assistant, of which that turn alone is learnt."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    whole = _render(messages[: turns[-1] + 1], tokenizer)
    added = [
        (_render(messages[:turn], tokenizer, prompt=True), _render(messages[: turn + 1], tokenizer)) for turn in turns
    ]
    for before, after in added:
        if not after.startswith(before):
            raise DataError(
                "the chat template does not begin an answer as it begins a prompt; mark it {% generation %}"
            )
    if all(whole.startswith(after) for _, after in added):
        return [Sample(*_encode(tokenizer, whole, [(len(before), len(after)) for before, after in added]), place)]
    return [Sample(*_encode(tokenizer, after, [(len(before), len(after))]), place) for before, after in added]


def _render(messages: list[dict[str, str]], tokenizer: Any, *, prompt: bool = False) -> str:
    if not messages:  # a conversation that the assistant begins
        return ""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def _encode(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Token ids of a text, and whether each token begins inside one of the spans of characters."""
    # verbose=False: what is longer than the model's context is cut later.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    targets = [any(first <= begin < last for first, last in spans) for begin, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), targets


_KINDS = {"alpaca": _alpaca, "chat": _chat}


def instruction_blocks(
    samples: Sequence[Sample], block_size: int, padding: int, *, packing: bool
) -> InstructionDataset:
    """Samples as blocks of one length.

    A sample longer than a block loses its end, and one whose prompt fills a block is left out. Packed, a block takes
    whole samples in order as long as they fit, and positions begin anew at each, by which transformers keeps them apart
    in the attention. Otherwise every sample has its own block.

    Args:
        samples: Not empty.
        block_size: Tokens per block.
        padding: Token id that fills a block; it is no target.
        packing: Several samples per block.

    Raises:
        DataError: If a sample has no target, or none has one within a block.
    """
    cut = [_cut(sample, block_size) for sample in samples if _has_target(sample, block_size)]
    if not cut:
        raise DataError(
            f"{samples[0].place} has no target within block_size={block_size} ({len(samples[0].ids)} tokens), nor has "
            "any other: their prompts fill it; give a larger data.block_size"
        )
    if shortened := sum(len(sample.ids) > block_size for sample in samples):
        warnings.warn(
            f"{shortened} of {len(samples)} samples lose their end: they are longer than block_size={block_size}; "
            f"{len(samples) - len(cut)} of them are left out: nothing of their responses is in it",
            stacklevel=2,
        )
    groups: list[list[Sample]] = []
    for sample in cut:
        if packing and groups and sum(len(other.ids) for other in groups[-1]) + len(sample.ids) <= block_size:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    ids = torch.full((len(groups), block_size), padding)
    labels = torch.full((len(groups), block_size), IGNORED)
    other = torch.zeros((len(groups), block_size), dtype=torch.long)  # positions, or the mask of real tokens
    for row, group in enumerate(groups):
        ends = torch.tensor([0, *(len(sample.ids) for sample in group)]).cumsum(0).tolist()
        for sample, (begin, end) in zip(group, pairwise(ends), strict=True):
            ids[row, begin:end] = torch.tensor(sample.ids)
            learnt = torch.tensor(sample.targets)
            learnt[0] = False  # its predecessor is another sample, or none
            labels[row, begin:end] = torch.where(learnt, ids[row, begin:end], IGNORED)
            other[row, begin:end] = torch.arange(end - begin) if packing else 1
        if packing:
            other[row, ends[-1] :] = torch.arange(block_size - ends[-1])
    return InstructionDataset(ids, labels, **{"position_ids" if packing else "attention_mask": other})


def _has_target(sample: Sample, block_size: int) -> bool:
    if not any(sample.targets[1:]):
        raise DataError(
            f"{sample.place} has no target ({len(sample.ids)} tokens): the template marks nothing as written by the "
            "assistant"
        )
    return any(sample.targets[1:block_size])


def _cut(sample: Sample, block_size: int) -> Sample:
    return Sample(sample.ids[:block_size], sample.targets[:block_size], sample.place)


class InstructionDataset(Dataset[dict[str, Tensor]]):
    """Blocks as samples ``{"input_ids", "labels", "position_ids" or "attention_mask"}``, LongTensor ``(block_size,)``.

    ``labels`` are -100 where a token is no target; the model shifts them.
    """

    def __init__(self, input_ids: Tensor, labels: Tensor, **extra: Tensor) -> None:
        self.tensors = {"input_ids": input_ids, "labels": labels, **extra}

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] for key, value in self.tensors.items()}
