"""Instruction data: what is learnt and what is not, blocks, and every kind of bad row with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from lowrank_lit.compress import compress
from lowrank_lit.data import TextDataModule, load_tokenizer
from lowrank_lit.errors import DataError
from lowrank_lit.instructions import IGNORED, Sample, instruction_blocks, read_samples
from tests.tiny import tiny_model

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue {is} one."},
    {"instruction": "Add the numbers.", "input": "3, 4", "output": "Seven."},
]
# In the manner of ChatML. The second marks what the assistant wrote; the third has a thought in the last turn alone.
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you."},
]


@pytest.fixture
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(str(tokenizer_folder))


def save(path: Path, rows: list[Any], **layout: Any) -> str:
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, **layout), encoding="utf-8")
    return str(path)


def learnt(tokenizer: Any, sample: Sample) -> str:
    return str(tokenizer.decode([token for token, target in zip(sample.ids, sample.targets, strict=True) if target]))


def test_alpaca_rows_become_prompts_with_learnt_responses(tokenizer: Any, tmp_path: Path) -> None:
    first, second = read_samples(f"alpaca:{save(tmp_path / 'a.json', ROWS, indent=1)}", tokenizer)
    assert tokenizer.decode(first.ids) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\nBlue {is} one.<|endoftext|>"
    )
    assert "paired with an input that provides further context" in tokenizer.decode(second.ids)
    assert "### Input:\n3, 4\n\n### Response:\n" in tokenizer.decode(second.ids)
    assert learnt(tokenizer, first) == "Blue {is} one.<|endoftext|>"
    assert learnt(tokenizer, second) == "Seven.<|endoftext|>"
    assert first.targets == sorted(first.targets)  # the response follows the prompt


def test_every_form_of_table_gives_the_same_samples(tokenizer: Any, tmp_path: Path) -> None:
    def ids(table: str) -> list[list[int]]:
        return [sample.ids for sample in read_samples(f"alpaca:{table}", tokenizer)]

    expected = ids(save(tmp_path / "a.json", ROWS))
    assert ids(save(tmp_path / "a.jsonl", ROWS)) == expected
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert ids(str(tmp_path / "a.parquet")) == expected
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(str(folder / "train.parquet"))
    assert ids(f"hub:{folder}:train") == expected
    without = [{key: value for key, value in row.items() if value} for row in ROWS]  # `input` may be left out
    assert ids(save(tmp_path / "b.jsonl", without)) == expected


def test_a_tokenizer_that_begins_with_a_token_begins_a_prompt_with_it(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    (sample,) = read_samples(f"alpaca:{save(tmp_path / 'a.json', ROWS[:1])}", tokenizer)
    assert tokenizer.decode(sample.ids).startswith("<|endoftext|>Below is")
    assert not sample.targets[0]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["difference", "marked"])
def test_a_chat_is_learnt_where_the_assistant_speaks(template: str, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = template
    path = save(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": [*TALK, {"role": "user", "content": "?"}]}])
    first, second = read_samples(f"chat:{path}", tokenizer)
    assert tokenizer.decode(first.ids) == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello.<|end|><|user|>Bye<|end|>"
        "<|assistant|>See you.<|end|>"
    )
    assert learnt(tokenizer, first) == learnt(tokenizer, second) == "Hello.<|end|>See you.<|end|>"


def test_a_template_that_changes_earlier_turns_gives_a_sample_for_each(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = THINKING
    first, second = read_samples(f"chat:{save(tmp_path / 'a.jsonl', [{'messages': TALK}])}", tokenizer)
    assert learnt(tokenizer, first) == "<think></think>Hello.<|end|>"
    assert tokenizer.decode(second.ids).startswith(
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello.<|end|>"
    )
    assert learnt(tokenizer, second) == "<think></think>See you.<|end|>"


def sample(length: int, answer: int, start: int = 10) -> Sample:
    return Sample(list(range(start, start + length)), [index >= length - answer for index in range(length)], "line 1")


def test_packed_blocks_hold_whole_samples() -> None:
    data = instruction_blocks([sample(3, 1), sample(4, 2, 20), sample(5, 1, 30)], 8, padding=0, packing=True)
    assert len(data) == 2
    assert data[0]["input_ids"].tolist() == [10, 11, 12, 20, 21, 22, 23, 0]
    assert data[0]["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert data[0]["labels"].tolist() == [IGNORED, IGNORED, 12, IGNORED, IGNORED, 22, 23, IGNORED]
    assert data[1]["labels"].tolist() == [IGNORED] * 4 + [34] + [IGNORED] * 3
    padded = instruction_blocks([sample(3, 1), sample(4, 2)], 4, padding=0, packing=False)
    assert padded[0]["attention_mask"].tolist() == [1, 1, 1, 0]
    assert padded[0]["labels"].tolist() == [IGNORED, IGNORED, 12, IGNORED]
    first = instruction_blocks([sample(3, 3)], 4, padding=0, packing=True)[0]
    assert first["labels"].tolist() == [IGNORED, 11, 12, IGNORED]  # nothing comes before the first token


def test_samples_that_lose_their_end_are_counted() -> None:
    with pytest.warns(UserWarning, match="1 of 2 samples lose their end: they are longer than block_size=4"):
        data = instruction_blocks([sample(6, 4), sample(3, 1)], 4, padding=0, packing=False)
    assert data[0]["labels"].tolist() == [IGNORED, IGNORED, 12, 13]
    with pytest.warns(UserWarning, match=r"2 of 3 samples lose .*; 1 of them are left out: nothing of their responses"):
        data = instruction_blocks([sample(6, 4), sample(6, 2), sample(3, 1)], 4, padding=0, packing=False)
    assert [data[row]["input_ids"].tolist() for row in range(len(data))] == [[10, 11, 12, 13], [10, 11, 12, 0]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_samples_in_one_block_do_not_see_each_other(attention: str) -> None:
    model = tiny_model("llama", attention=attention)
    samples = [sample(5, 3), sample(6, 4, 40), sample(4, 2, 70)]
    packed = instruction_blocks(samples, 20, padding=0, packing=True)[:]
    with torch.no_grad():
        together = model(**packed, use_cache=False).logits[0]
        alone = [model(torch.tensor([one.ids]), use_cache=False).logits[0] for one in samples]
    torch.testing.assert_close(together[:15], torch.cat(alone), rtol=0, atol=1e-5)  # measured 1e-6


def test_the_loss_of_packed_and_padded_samples_is_the_same() -> None:
    model, samples = tiny_model("llama"), [sample(5, 3), sample(6, 3, 40)]
    losses = []
    for packing in (True, False):
        data = instruction_blocks(samples, 12, padding=0, packing=packing)
        losses.append(model(**data[:], use_cache=False).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


GOOD = ROWS[0]
BAD: dict[str, tuple[str, str, str]] = {
    "missing": ("alpaca:none.json", "", "'none.json' does not exist; give an existing .json, .jsonl or .parquet file"),
    "empty": ("alpaca:a.json", "[]", "has no rows"),
    "blank": ("chat:a.jsonl", "\n", "has no rows"),
    "cut": ("alpaca:a.json", '[\n{"instruction": "a",\n', "a.json', line 3: not JSON"),
    "cut line": ("alpaca:a.jsonl", json.dumps(GOOD) + '\n{"a', "a.jsonl', line 2: not JSON"),
    "no list": ("alpaca:a.json", "{}", "holds a dict; it must hold a list of objects"),
    "no object": ("alpaca:a.json", json.dumps([GOOD, 3], indent=1), "line 7: a int; it must be a JSON object"),
    "no output": (
        "alpaca:a.jsonl",
        json.dumps(GOOD) + '\n\n{"instruction": "b"}',
        "line 3: 'output' is missing; a row",
    ),
    "number": ("alpaca:a.json", json.dumps([{**GOOD, "instruction": 3}]), "line 1: 'instruction' is a int; a row has"),
    "no answer": ("alpaca:a.json", json.dumps([GOOD, {**GOOD, "output": " "}], indent=0), "line 7: 'output' is empty"),
    "no messages": ("chat:a.jsonl", json.dumps(GOOD), "line 1: 'messages' is missing or empty"),
    "no role": ("chat:a.jsonl", '{"messages": [{"content": "a"}]}', "line 1: message 1 is no object with the strings"),
    "no assistant": ("chat:a.jsonl", json.dumps({"messages": TALK[:2]}), "line 1: no message of the role assistant"),
    "long prompt": (
        "alpaca:a.jsonl",
        json.dumps({**GOOD, "instruction": "long " * 200}),
        r"line 1 has no target within block_size=64 .*: their prompts fill it; give a larger data\.block_size",
    ),
}


@pytest.fixture
def module(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TextDataModule]:
    monkeypatch.chdir(tmp_path)

    def build(source: str, **settings: Any) -> TextDataModule:
        return TextDataModule(
            {"train": source}, str(tokenizer_folder), **{"block_size": 64, "batch_size": 2, **settings}
        )

    return build


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_one_line_that_names_its_own(
    kind: str, module: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    source, content, message = BAD[kind]
    if content:
        (tmp_path / source.partition(":")[2]).write_text(content)
    data = module(source)
    data.tokenizer.chat_template = CHATML
    with pytest.raises(DataError, match=message) as caught:
        data.setup("fit")
    assert str(caught.value).startswith("data.sources.train: ")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_or_template_that_does_not_serve(module: Callable[..., TextDataModule], tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", [{"messages": TALK}])
    data = module("chat:a.jsonl")
    with pytest.raises(DataError, match="the tokenizer has no chat template; give an instruct model's tokenizer"):
        data.setup("fit")
    data.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"line 1: the chat template refuses the messages \(roles must alternate\)"):
        data.setup("fit")
    data.tokenizer.chat_template = MARKED.replace("{% generation %}", "{% generation %}{% endgeneration %}").replace(
        "<|end|>{% endgeneration %}{% else %}", "<|end|>{% else %}"
    )
    with pytest.raises(DataError, match=r"line 1 has no target .*: the template marks nothing as written by the"):
        data.setup("fit")
    save(tmp_path / "b.jsonl", ROWS)
    data = module("alpaca:b.jsonl")
    data.tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        data.setup("fit")


def test_instructions_are_trained_on_and_nothing_else(module: Callable[..., TextDataModule], tmp_path: Path) -> None:
    save(tmp_path / "a.jsonl", ROWS * 10)
    data = module("alpaca:a.jsonl", block_size=512)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (2, 512)
    )
    assert len(data.training_data()) < 20  # type: ignore[arg-type]
    alone = module("alpaca:a.jsonl", block_size=512, packing=False)
    assert len(alone.training_data()) == 20  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"holds instructions and no text; give data\.sources\.calibration"):
        data.calibration_batches()
    with pytest.raises(DataError, match=r"data\.sources\.test='chat:a\.jsonl' holds instructions, which only train"):
        TextDataModule({"test": "chat:a.jsonl"}, data.tokenizer_path)


def test_conversations_serve_as_calibration_batches(tokenizer: Any, tmp_path: Path) -> None:
    """Samples in the chat template, padded to one batch: the ranks of the same samples one by one, unpadded."""
    tokenizer.chat_template = CHATML
    talks = [[*TALK[: 3 + 2 * (n % 2)], {"role": "user", "content": f"And {n}?"}, TALK[2]] for n in range(12)]
    samples = read_samples(f"chat:{save(tmp_path / 'a.jsonl', [{'messages': talk} for talk in talks])}", tokenizer)
    assert len({len(sample.ids) for sample in samples}) > 1
    padded = [tokenizer.pad({"input_ids": [sample.ids for sample in samples]}, return_tensors="pt")]
    alone = [{"input_ids": torch.tensor([sample.ids])} for sample in samples]
    plans = []
    for data in (padded, alone):
        model = tiny_model("llama", vocab_size=300, max_position_embeddings=256)
        result = compress(model, [dict(batch) for batch in data], keep_ratio=0.5, preset="unirank", min_rank=2)
        assert result.record["calibration"]["tokens"] == sum(len(sample.ids) for sample in samples)
        plans.append([(matrix.name, matrix.rank) for matrix in result.plan.matrices])
    assert plans[0] == plans[1]
