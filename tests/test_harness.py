"""Tasks of lm-evaluation-harness: its figures against ours on one task, and what is said where it is missing."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_lit.choices import multiple_choice
from lowrank_lit.data import load_tokenizer
from lowrank_lit.errors import DataError, LowRankError
from lowrank_lit.harness import check_tasks, harness_scores
from tests.tiny import tiny_model

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (pip install 'lowrank-lit[eval]')"
)
TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WORDS = ("list", "dictionary of names", "iterator", "string that is read once", "number")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of 24 questions."""
    monkeypatch.setenv("HF_XET_HIGH_PERFORMANCE", "1")  # importing the harness sets it
    lines = [
        {
            "query": f"The function number {n} returns a",
            "choices": [WORDS[n % 5], WORDS[(n * 3 + 1) % 5]],
            "gold": n % 2,
        }
        for n in range(24)
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tiny_choices.yaml").write_text(TASK.format(file=tmp_path / "set.jsonl"))
    return tmp_path


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LowRankError, match=r"tasks=\['hellaswag'\] needs .* pip install 'lowrank-lit\[eval\]'"):
        check_tasks(["hellaswag"])


@installed
def test_its_accuracies_are_ours(folder: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness tokenises, scores and averages by itself: the same questions, the same shares and errors."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    tokenizer = load_tokenizer(str(tokenizer_folder))
    model = tiny_model("llama", vocab_size=300).train()
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # type: ignore[index,union-attr]
    scores = harness_scores(model, tokenizer, [str(folder / "tiny_choices.yaml")], limit=20, batch_size=3)
    ours = multiple_choice(model, tokenizer, folder / "set.jsonl", limit=20)
    found = scores["tiny_choices"]
    assert found["metrics"] == pytest.approx({"acc": ours.acc, "acc_norm": ours.acc_norm})
    assert found["stderr"] == pytest.approx({"acc": ours.acc_stderr, "acc_norm": ours.acc_norm_stderr})
    assert found["shots"] == 0
    assert 0.1 < ours.acc < 0.9
    assert model.training
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]  # type: ignore[index,union-attr]
    assert torch.equal(torch.get_rng_state(), before[2])


@installed
def test_unknown_tasks_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="task 'no_such_task' is unknown to lm-evaluation-harness"):
        check_tasks(["no_such_task"])
    (folder / "empty.yaml").write_text("output_type: multiple_choice")
    with pytest.raises(DataError, match="names no 'task' or 'group'"):
        check_tasks([str(folder / "empty.yaml")])
    with pytest.raises(DataError, match="cannot be read"):
        check_tasks([str(folder / "missing.yaml")])
