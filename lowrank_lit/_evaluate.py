"""``lowrank-lit evaluate RECIPE``: the dense and the exported model measured alike, in one table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_lit._session import RecipeCLI
from lowrank_lit._settings import several
from lowrank_lit._tables import gibibytes, markdown, table
from lowrank_lit.choices import Question, multiple_choice, read_questions
from lowrank_lit.data import tokenize_blocks
from lowrank_lit.errors import DataError, ModelError, RecipeError
from lowrank_lit.harness import check_tasks, harness_scores
from lowrank_lit.report import data_hash, plain_json, versions, write_text
from lowrank_lit.sources import read_documents
from lowrank_lit.timing import NEW_TOKENS, PROMPT_LENGTH, WARMUP, Throughput, context_of, throughput
from lowrank_lit.windows import Protocol, Windows, cut_windows

EVALUATION_VERSION = 1
"""Version of the keys of evaluation.json."""

_DIVERGENCE = (
    "KL: mean over the tokens scored of KL(dense || compressed) of their predictions, in nats; same top token: share "
    "of these tokens for which both models rank the same one first."
)

_Record = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What the options ask for; empty where they do not."""

    protocol: str = "blocks"
    stride: int | None = None
    bos: str = "none"
    divergence: bool = True
    texts: tuple[str, ...] = ()
    multiple_choice: tuple[str, ...] = ()
    delimiter: str = " "
    batch_sizes: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class _Inputs:
    """What both models are measured on: windows of each text, questions of each file."""

    texts: dict[str, Windows]
    questions: dict[str, list[Question]]


def wanted(
    protocol: str = "blocks",
    stride: int | None = None,
    bos: str = "none",
    throughput: str | None = None,
    limit: int | None = None,
    delimiter: str = " ",
    no_divergence: bool = False,
    **lists: Sequence[str] | None,
) -> Wanted:
    """The options of the command, checked as far as they can be before anything is loaded.

    Args:
        protocol: Of the perplexity, as :class:`~lowrank_lit.windows.Protocol` takes it.
        stride: Of the sliding window.
        bos: ``none`` or ``prepend``, for perplexity and choices.
        throughput: Batch sizes, separated by commas; ``None`` times nothing.
        limit: Questions of each file and examples of each task.
        delimiter: Between query and choice.
        no_divergence: Whether the two models are measured one after the other alone.
        **lists: ``text``, ``multiple_choice`` and ``tasks``: each option repeated, or separated by commas.

    Raises:
        LowRankError: Naming the option that cannot be met.
    """
    texts, files, tasks = (
        () if (given := lists.get(name)) is None else tuple(several(name, given))
        for name in ("text", "multiple_choice", "tasks")
    )
    Protocol(protocol, stride=stride, bos=bos, length=max(2, (stride or 0) + 1))  # the recipe's length comes later
    if limit is not None and not (files or tasks):
        raise RecipeError(f"option '--limit': {limit} limits nothing; it belongs to --multiple_choice and --tasks")
    if limit is not None and limit < 2:
        raise RecipeError(f"option '--limit': {limit} is too small; a standard error needs 2 questions or more")
    for name in files:
        if not name.startswith("hub:") and not Path(name).expanduser().is_file():
            raise RecipeError(f"option '--multiple_choice': file '{name}' does not exist; give a .jsonl file")
    if tasks:
        check_tasks(tasks)
    sizes = _batch_sizes(throughput)
    return Wanted(protocol, stride, bos, not no_divergence, texts, files, delimiter, sizes, tasks, limit)


def _batch_sizes(text: str | None) -> tuple[int, ...]:
    sizes = []
    for part in [] if text is None else text.split(","):
        if not part.strip().isdecimal() or int(part) < 1:
            raise RecipeError(f"option '--throughput': '{part}' is no batch size; give whole numbers such as 1,8")
        sizes.append(int(part))
    return tuple(dict.fromkeys(sizes))


def evaluate_recipe(cli: RecipeCLI, folder: Path, wanted: Wanted) -> int:
    """Measure both models, print the tables, and write ``evaluation.json`` and ``evaluation.md`` to the run's folder.

    Raises:
        LowRankError: If a text, a file of questions or a model cannot be used.
    """
    cli.datamodule.prepare_data()
    protocol = _protocol(cli, wanted)
    inputs = _Inputs(_texts(cli, wanted, protocol), {name: read_questions(name) for name in wanted.multiple_choice})
    sources = {"dense": cli.model.source, "compressed": str(folder)}
    models = _both(cli, sources, inputs, wanted)
    labels = ("dense", str(folder))
    measures = measure_rows(labels, models.values())
    tables = [_size_rows(labels, models.values()), *([measures] if len(measures) > 1 else [])]
    notes = [*_perplexity_notes(cli, inputs, protocol, wanted.divergence), *_notes(models["dense"], wanted)]
    for rows in tables:
        print(table(rows))
    print("\n".join(notes))
    record = {
        "evaluation_version": EVALUATION_VERSION,
        "protocol": {
            "perplexity": {"name": protocol.name, "length": protocol.length, "stride": protocol.step}
            | {"bos": protocol.bos, "words": protocol.describe()},
            "multiple_choice": {"delimiter": wanted.delimiter, "bos": wanted.bos, "limit": wanted.limit},
            "tasks": {"limit": wanted.limit},
        },
        "device": str(cli.trainer.strategy.root_device),
        "dtype": _dtype(cli),
        "models": models,
        "versions": versions(),
    }
    _write(Path(cli.trainer.default_root_dir), record, "\n\n".join([*map(markdown, tables), *notes]) + "\n")
    return 0


def _protocol(cli: RecipeCLI, wanted: Wanted) -> Protocol:
    try:
        return Protocol(wanted.protocol, cli.datamodule.block_size, wanted.stride, wanted.bos)
    except DataError as error:
        raise DataError(f"{error} (data.block_size)") from error


def _texts(cli: RecipeCLI, wanted: Wanted, protocol: Protocol) -> dict[str, Windows]:
    """Windows of each text: of the recipe's split test, or of the sources that the options name."""
    data = cli.datamodule
    blocks: dict[str, Tensor] = {}
    if not wanted.texts:
        blocks[data.sources.get("test", "test")] = data.evaluation("test")
    for source in wanted.texts:
        found = tokenize_blocks(read_documents(source), data.tokenizer, data.block_size)[: data.evaluation_blocks]
        if len(found) == 0:
            raise DataError(
                f"option '--text': '{source}' is shorter than one block of {data.block_size} tokens; give a longer "
                "text or a smaller data.block_size"
            )
        blocks[source] = found
    # Every protocol reads the tokens of the same blocks, so that figures of several are of one text.
    bos = data.tokenizer.bos_token_id
    return {source: cut_windows(found.flatten(), protocol, bos) for source, found in blocks.items()}


def _both(cli: RecipeCLI, sources: dict[str, Any], inputs: _Inputs, wanted: Wanted) -> dict[str, _Record]:
    """The record of each model; without a divergence the first is out of memory before the second is loaded."""
    if not wanted.divergence:
        return {name: _measured(cli, _loaded(cli, source), source, inputs, wanted) for name, source in sources.items()}
    models = {name: _loaded(cli, source) for name, source in sources.items()}
    apart = _divergences(cli, models["dense"], models["compressed"], inputs)  # first: it needs the most memory
    records = {name: _measured(cli, model, sources[name], inputs, wanted) for name, model in models.items()}
    records["compressed"]["divergence"] = apart
    return records


def _loaded(cli: RecipeCLI, source: Any) -> Any:
    from lowrank_lit.module import LowRankModule

    module = LowRankModule(source, dtype=_dtype(cli))
    module.configure_model()
    return module.model


def _divergences(cli: RecipeCLI, dense: Any, compressed: Any, inputs: _Inputs) -> _Record:
    from lowrank_lit.evaluation import divergence

    device, size, records = cli.trainer.strategy.root_device, cli.datamodule.batch_size, {}
    try:
        for name, text in inputs.texts.items():
            apart = divergence(dense, compressed, text.ids, batch_size=size, device=device, first=text.first)
            records[name] = {"kl_nats": apart.kl, "top1_agreement": apart.agreement, "tokens": apart.tokens}
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"dense and compressed model do not fit on {device} together; lower data.batch_size, or give "
            "--no-divergence, which holds one at a time"
        ) from error
    return records


def _measured(cli: RecipeCLI, model: Any, source: Any, inputs: _Inputs, wanted: Wanted) -> _Record:
    from lowrank_lit.evaluation import perplexity
    from lowrank_lit.streaming import evaluating, moved
    from lowrank_lit.surgery import count_parameters, stored_bytes

    size = cli.datamodule.batch_size
    record: _Record = {"source": str(source), "parameters": count_parameters(model), "bytes": stored_bytes(model)}
    with evaluating(model), moved(model, cli.trainer.strategy.root_device):
        record["perplexity"] = {
            name: {
                "value": perplexity(model, text.ids, batch_size=size, first=text.first),
                "windows": len(text.ids),
                "targets": text.targets,
                "data_hash": data_hash([text.ids, text.first]),
            }
            for name, text in inputs.texts.items()
        }
        record["divergence"] = {}
        record["multiple_choice"] = {
            name: _choice_record(cli, model, questions, wanted) for name, questions in inputs.questions.items()
        }
        record["throughput"] = [_timing_record(_timed(model, batch)) for batch in wanted.batch_sizes]
        record["tasks"] = (
            harness_scores(model, cli.datamodule.tokenizer, wanted.tasks, limit=wanted.limit, batch_size=size)
            if wanted.tasks
            else {}
        )
    return record


def _choice_record(cli: RecipeCLI, model: Any, questions: list[Question], wanted: Wanted) -> _Record:
    found = multiple_choice(
        model,
        cli.datamodule.tokenizer,
        questions,
        limit=wanted.limit,
        batch_size=cli.datamodule.batch_size,
        delimiter=wanted.delimiter,
        bos=wanted.bos,
    )
    names = ("questions", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "truncated")
    return {name: getattr(found, name) for name in names}


def _timed(model: Any, batch_size: int) -> Throughput:
    """128 + 32 tokens, in the same proportion less where the model's context is shorter."""
    longest = context_of(model)
    total = min(PROMPT_LENGTH + NEW_TOKENS, longest or PROMPT_LENGTH + NEW_TOKENS)
    new = max(1, total * NEW_TOKENS // (PROMPT_LENGTH + NEW_TOKENS))
    return throughput(model, batch_size=batch_size, prompt_length=total - new, new_tokens=new)


def _timing_record(found: Throughput) -> _Record:
    rates = {
        f"{name}_tokens_per_second": {"median": rate.median, "slowest": rate.slowest, "fastest": rate.fastest}
        for name, rate in (("prefill", found.prefill), ("decode", found.decode))
    }
    return {
        "batch_size": found.batch_size,
        "prompt_length": found.prompt_length,
        "new_tokens": found.new_tokens,
        "runs": len(found.prefill_seconds),
        **rates,
        "first_token_seconds": found.first_token_seconds,
        "token_seconds": found.token_seconds,
        "peak_memory_bytes": found.peak_memory_bytes,
        "device": found.device,
        "dtype": found.dtype,
        "threads": found.threads,
    }


def _size_rows(labels: Sequence[str], models: Collection[_Record]) -> list[list[str]]:
    """A row to a model; the dense one has no divergence from itself to show."""
    measured = any(record["divergence"] for record in models)
    texts = list(next(iter(models))["perplexity"])
    rows = [["model", "parameters", "weights in memory"]]
    for text in texts:
        names = ["perplexity", *(["KL, nats", "same top token"] if measured else [])]
        rows[0] += names if len(texts) == 1 else [f"{name}, {text}" for name in names]
    for label, record in zip(labels, models, strict=True):
        rows.append([label, f"{record['parameters']:,}", gibibytes(record["bytes"])])
        for text in texts:
            apart = record["divergence"].get(text)
            figures = [f"{apart['kl_nats']:.4g}", f"{apart['top1_agreement']:.4f}"] if apart else ["", ""]
            rows[-1] += [f"{record['perplexity'][text]['value']:.3f}", *(figures if measured else [])]
    return rows


def measure_rows(labels: Sequence[str], models: Iterable[_Record]) -> list[list[str]]:
    """What was measured beside size and perplexity, a measure to a row: a column for each of the two models, and the
    second's figure as a share of the first's."""
    rows = [["measure", *labels, "ratio"]]
    for (name, one, dense), (_, other, compressed) in zip(*map(_measures, models), strict=True):
        rows.append([name, one, other, f"{compressed / dense:.3f}" if dense and compressed else "–"])
    return rows


def _measures(record: _Record) -> Iterator[tuple[str, str, float | None]]:
    """Name, text and number of each measure."""
    names = short_names(record["multiple_choice"])
    for file, found in record["multiple_choice"].items():
        for name in ("acc", "acc_norm"):
            yield f"{names[file]}, {name}", _share(found[name], found[f"{name}_stderr"]), found[name]
    for task, found in record["tasks"].items():
        for name, value in found["metrics"].items():
            yield f"{task}, {name}", _share(value, found["stderr"].get(name)), value
    for timed in record["throughput"]:
        batch = f"batch {timed['batch_size']}"
        for name in ("prefill", "decode"):
            rate = timed[f"{name}_tokens_per_second"]
            spread = f"({rate['slowest']:,.0f} to {rate['fastest']:,.0f})"
            yield f"{name}, tokens/s, {batch}", f"{rate['median']:,.0f} {spread}", rate["median"]
        for name, key in (("first", "first_token_seconds"), ("next", "token_seconds")):
            yield f"{name} token, ms, {batch}", f"{1e3 * timed[key]:.2f}", timed[key]
        memory = timed["peak_memory_bytes"]
        yield f"memory beside the weights, {batch}", "–" if memory is None else gibibytes(memory), memory


def short_names(files: Iterable[str]) -> dict[str, str]:
    """Files by what a table calls them: their names alone, where these differ."""
    names = {file: Path(file).name for file in files}
    counts = Counter(names.values())
    return {file: name if counts[name] == 1 else file for file, name in names.items()}


def _share(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _perplexity_notes(cli: RecipeCLI, inputs: _Inputs, protocol: Protocol, divergence: bool) -> list[str]:
    split = f"split test ({cli.datamodule.sources.get('test')})"
    notes = []
    for source, windows in inputs.texts.items():
        where = split if source == cli.datamodule.sources.get("test") else source
        notes.append(
            f"Perplexity on {where}: {len(windows.ids)} {protocol.describe()}, from the start of the text, "
            f"{windows.targets:,} tokens scored, weights in {_dtype(cli)}."
        )
    if divergence:
        notes.append(_DIVERGENCE)
    return notes


def _notes(record: _Record, wanted: Wanted) -> list[str]:
    """What the figures of the second table count."""
    notes = []
    names = short_names(record["multiple_choice"])
    for file, found in record["multiple_choice"].items():
        cut = f", {found['truncated']} of them cut to the context" if found["truncated"] else ""
        notes.append(
            f"{names[file]}: {found['questions']} questions from the start of {file}{cut}, no examples, "
            f"{'BOS first' if wanted.bos == 'prepend' else 'no BOS'}."
        )
    if record["multiple_choice"]:
        notes.append(
            "acc: largest log-likelihood of the choice after the query; acc_norm: of that per byte of the choice; "
            "± standard error."
        )
    if record["tasks"]:
        shots = ", ".join(f"{found['shots']} in {task}" for task, found in record["tasks"].items())
        notes.append(f"lm-evaluation-harness: examples before each question {shots}; ± its standard error.")
    if record["throughput"]:
        timed = record["throughput"][0]
        threads = f", torch threads: {timed['threads']}" if timed["device"] == "cpu" else ""
        notes.append(
            f"Prefill: one forward over {timed['prompt_length']} random tokens per sequence; decode: "
            f"{timed['new_tokens']} greedy tokens after it, one forward each with the KV cache; median of "
            f"{timed['runs']} runs (slowest to fastest) after {WARMUP} that warm up; {timed['device']}{threads}, "
            f"{timed['dtype']}, one model after the other in one process."
        )
    return notes


def _write(folder: Path, record: _Record, text: str) -> None:
    content = json.dumps(plain_json(record, "evaluation"), indent=2, allow_nan=False) + "\n"
    contents = {"evaluation.json": content, "evaluation.md": text}
    for name, written in contents.items():
        write_text(folder / name, written)
    print(f"Written to {folder}: {', '.join(contents)}")


def _dtype(cli: RecipeCLI) -> str:
    return str(cli.model.dtype_in_memory).removeprefix("torch.")
