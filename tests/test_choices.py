"""Multiple choice: likelihoods against float64, a forward per choice; answers that are known; files that are wrong."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_lit
from lowrank_lit.choices import Question, multiple_choice, read_questions, standard_error
from lowrank_lit.data import load_tokenizer
from lowrank_lit.errors import DataError, ModelError, NonFiniteError
from tests.tiny import MAX_POSITIONS, tiny_model

TOKENS = 300


class Lookup(nn.Module):
    """Logits of the next token from a table (vocabulary, vocabulary)."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(str(tokenizer_folder))


def question(query: str, *choices: str, gold: int = 0) -> Question:
    return Question(query, choices, gold, f"question '{query}'")


QUESTIONS = [
    question("The function returns", "a list", "an iterator over the keys", "None", gold=1),
    question("Question: which module reads files?\n", "io", "math", gold=0),
    question("A", "b", "classmethod", "the quick brown fox jumps over the lazy dog", "é", gold=2),
    question("The value of the argument is ", "copied", "shared between all of the calls", gold=1),
    question("", "def", "class of its own", gold=0),
]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def brute_force(model: nn.Module, tokenizer: Any, asked: Question) -> list[float]:
    """A forward for every choice by itself, its tokens taken as the harness's documentation says."""
    found = []
    for choice in asked.choices:
        query = asked.query
        text = query + choice if not query or query[-1].isspace() else f"{query} {choice}"
        context, whole = ids_of(tokenizer, query.rstrip()), ids_of(tokenizer, text)
        if not query:
            context, whole = [tokenizer.bos_token_id], [tokenizer.bos_token_id, *whole]
        with torch.no_grad():
            rows = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0].double(), -1)
        found.append(math.fsum(float(rows[at - 1, whole[at]]) for at in range(len(context), len(whole))))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_log_likelihoods_are_the_definition(family: str, tokenizer: Any) -> None:
    model = tiny_model(family, vocab_size=TOKENS).double()
    expected = [brute_force(model, tokenizer, asked) for asked in QUESTIONS]
    found = multiple_choice(model, tokenizer, QUESTIONS, batch_size=3)
    for one, other in zip(found.log_likelihoods, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-12)
    best = [values.index(max(values)) == asked.gold for values, asked in zip(expected, QUESTIONS, strict=True)]
    assert found.acc == sum(best) / 5
    per_byte = [
        [value / len(choice.encode()) for value, choice in zip(values, asked.choices, strict=True)]
        for values, asked in zip(expected, QUESTIONS, strict=True)
    ]
    best = [values.index(max(values)) == asked.gold for values, asked in zip(per_byte, QUESTIONS, strict=True)]
    assert found.acc_norm == sum(best) / 5
    assert (found.questions, found.truncated) == (5, 0)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_size_changes_nothing(batch_size: int, tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=TOKENS)
    one = multiple_choice(model, tokenizer, QUESTIONS, batch_size=1)
    other = multiple_choice(model, tokenizer, QUESTIONS, batch_size=batch_size)
    for these, those in zip(one.log_likelihoods, other.log_likelihoods, strict=True):
        assert these == pytest.approx(those, rel=1e-6)  # measured: 2e-7 at most
    assert (one.acc, one.acc_norm) == (other.acc, other.acc_norm)


def test_a_uniform_model_counts_tokens(tokenizer: Any) -> None:
    """Every token costs ln 300, so fewer tokens win, and fewer tokens per byte under the norm."""
    short, long = "x", "function of the function"
    tokens = {text: len(ids_of(tokenizer, f" {text}")) for text in (short, long)}
    per_byte = {text: count / len(text) for text, count in tokens.items()}
    assert tokens[short] < tokens[long]
    assert per_byte[short] > per_byte[long], "or the two would agree"
    asked = [question("Which?", short, long, gold=0), question("Which?", long, short, gold=1)]
    found = multiple_choice(Lookup(torch.zeros(TOKENS, TOKENS)), tokenizer, asked)
    assert (found.acc, found.acc_norm) == (1.0, 0.0)
    assert (found.acc_stderr, found.acc_norm_stderr) == (0.0, 0.0)
    assert found.log_likelihoods[0] == pytest.approx([-count * math.log(TOKENS) for count in tokens.values()])


def test_a_model_that_knows_the_answer(tokenizer: Any) -> None:
    table = torch.zeros(TOKENS, TOKENS)
    chain = ids_of(tokenizer, "The sky is blue")
    for before, after in pairwise(chain):
        table[before, after] = 20.0
    asked = [question("The sky is", "green", "blue", gold=1), question("The sky is", "blue", "green", gold=1)]
    found = multiple_choice(Lookup(table), tokenizer, asked)
    assert found.acc == found.acc_norm == 0.5
    assert found.acc_stderr == pytest.approx(math.sqrt(0.25 / 1))


def test_white_space_before_the_choice(tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=TOKENS)
    pairs = [("The sky is", "blue"), ("The sky is ", "blue"), ("The sky is", " blue")]
    asked = [question(query, choice, choice + " now") for query, choice in pairs]
    one, two, three = multiple_choice(model, tokenizer, asked).log_likelihoods
    assert one == pytest.approx(two, rel=1e-6)
    assert one == pytest.approx(three, rel=1e-6)
    answer = multiple_choice(model, tokenizer, asked, delimiter="\nAnswer: ").log_likelihoods
    assert abs(answer[0][0] - one[0]) > 0.1
    assert answer[1] == pytest.approx(two, rel=1e-6), "a query that ends in white space needs no delimiter"


def test_bos_is_read_and_not_scored(tokenizer: Any) -> None:
    model = tiny_model("gpt2", vocab_size=TOKENS)
    without = multiple_choice(model, tokenizer, QUESTIONS)
    found = multiple_choice(model, tokenizer, QUESTIONS, bos="prepend")
    assert abs(found.log_likelihoods[0][0] - without.log_likelihoods[0][0]) > 1e-3
    assert found.log_likelihoods[4] == pytest.approx(without.log_likelihoods[4]), "an empty query has it in any case"
    whole = [tokenizer.bos_token_id, *ids_of(tokenizer, "A b")]
    with torch.no_grad():
        rows = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0], -1)
    start = 1 + len(ids_of(tokenizer, "A"))
    expected = sum(float(rows[at - 1, whole[at]]) for at in range(start, len(whole)))
    assert found.log_likelihoods[2][0] == pytest.approx(expected, rel=1e-5)


def test_a_query_longer_than_the_context_loses_its_start(tokenizer: Any) -> None:
    model = tiny_model("gpt2", vocab_size=TOKENS)
    query = "; ".join(f"value {n} of the list" for n in range(40))
    whole, context = ids_of(tokenizer, f"{query} blue"), ids_of(tokenizer, query)
    assert len(whole) > MAX_POSITIONS + 1
    found = multiple_choice(model, tokenizer, [question(query, "blue", "green"), question("A", "b", "c")])
    assert found.truncated == 1
    kept = whole[-(MAX_POSITIONS + 1) :]
    with torch.no_grad():
        rows = torch.log_softmax(model(input_ids=torch.tensor([kept[:-1]])).logits[0], -1)
    places = range(len(kept) - (len(whole) - len(context)), len(kept))
    assert found.log_likelihoods[0][0] == pytest.approx(sum(float(rows[at - 1, kept[at]]) for at in places), rel=1e-5)
    with pytest.raises(DataError, match=f"question 'A': a choice has .* max_position_embeddings is {MAX_POSITIONS}"):
        multiple_choice(model, tokenizer, [question("A", query, "b"), question("A", "b", "c")])


def test_from_a_file_with_a_limit(tokenizer: Any, tmp_path: Path) -> None:
    lines = [{"query": q.query, "choices": list(q.choices), "gold": q.gold, "id": 7} for q in QUESTIONS]
    file = tmp_path / "set.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert [asked.query for asked in read_questions(file)] == [asked.query for asked in QUESTIONS]
    model = tiny_model("llama", vocab_size=TOKENS).train()
    found = lowrank_lit.multiple_choice(model, tokenizer, file, limit=3)
    assert found == multiple_choice(model, tokenizer, QUESTIONS[:3])
    assert found.questions == 3
    assert model.training


GOOD = {"query": "q", "choices": ["a", "b"], "gold": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": ', "not JSON"),
        ("[1]", "a list; it must be a JSON object"),
        (json.dumps({"query": "q", "choices": ["a", "b"]}), "key 'gold' is missing"),
        (json.dumps({"query": "q", "gold": 0}), "key 'choices' is missing"),
        (json.dumps({"choices": ["a", "b"], "gold": 0}), "key 'query' is missing"),
        (json.dumps(GOOD | {"gold": 2}), "'gold' is 2; it must be the index of a choice, 0 to 1"),
        (json.dumps(GOOD | {"gold": -1}), "'gold' is -1"),
        (json.dumps(GOOD | {"gold": True}), "'gold' is True"),
        (json.dumps(GOOD | {"gold": "0"}), "'gold' is '0'"),
        (json.dumps(GOOD | {"choices": ["a"]}), "at least two strings"),
        (json.dumps(GOOD | {"choices": ["a", " "]}), "not blank"),
        (json.dumps(GOOD | {"choices": "ab"}), "at least two strings"),
        (json.dumps(GOOD | {"query": 3}), "'query' is a int"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl', line 3: ") as caught:
        read_questions(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=TOKENS)
    with pytest.raises(DataError, match=r"'nowhere\.jsonl' does not exist"):
        multiple_choice(model, tokenizer, "nowhere.jsonl")
    with pytest.raises(DataError, match="limit=1 is too small"):
        multiple_choice(model, tokenizer, QUESTIONS, limit=1)
    with pytest.raises(DataError, match="a standard error needs at least 2"):
        multiple_choice(model, tokenizer, QUESTIONS[:1])
    with pytest.raises(DataError, match="batch_size=0"):
        multiple_choice(model, tokenizer, QUESTIONS, batch_size=0)
    with pytest.raises(DataError, match="bos='x' is unknown"):
        multiple_choice(model, tokenizer, QUESTIONS, bos="x")
    with pytest.raises(ModelError, match="causal language model"):
        multiple_choice(tiny_model("bert", vocab_size=TOKENS), tokenizer, QUESTIONS)
    table = torch.zeros(TOKENS, TOKENS)
    table[ids_of(tokenizer, "A")[-1]] = math.nan
    with pytest.raises(NonFiniteError, match="question 'A'"):
        multiple_choice(Lookup(table), tokenizer, [question("B", "c", "d"), question("A", "b", "c")])


def test_standard_error_is_that_of_the_sample() -> None:
    outcomes = torch.tensor([1.0] * 30 + [0.0] * 70, dtype=torch.float64)
    assert standard_error(0.3, 100) == pytest.approx(float(outcomes.std() / 10), rel=1e-12)
