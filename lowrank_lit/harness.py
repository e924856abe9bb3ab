"""Tasks of lm-evaluation-harness (the optional package ``lm_eval``) on a model in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lowrank_lit.errors import DataError, reason_of
from lowrank_lit.extras import load_lm_eval
from lowrank_lit.streaming import evaluating, moved


def check_tasks(tasks: Sequence[str]) -> list[str]:
    """Names of tasks, those in YAML files by what the file calls them.

    Args:
        tasks: Names of tasks, groups or tags that the installed harness knows, or paths of YAML files.

    Raises:
        LowRankError: If the package is missing.
        DataError: If a task is unknown or a file names none.
    """
    return _known(tasks)[1]


def harness_scores(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
) -> dict[str, dict[str, Any]]:
    """Run tasks through ``lm_eval.simple_evaluate``.

    Python's, NumPy's and torch's random states, which the harness seeds, come back as they were.

    Args:
        model: A causal language model of transformers.
        tokenizer: The model's own.
        tasks: As :func:`check_tasks` takes them.
        limit: Only so many examples of each task, from the start.
        batch_size: Sequences per forward pass.
        device: Where to evaluate; the model moves there and back. None stays where the model is.

    Returns:
        By task: ``metrics`` (the harness's, named ``metric`` or ``metric (filter)``), ``stderr`` by the same names
        where the harness gives one, and ``shots``, the number of examples before each question.

    Raises:
        LowRankError: If the package is missing.
        DataError: If a task is unknown, or the harness cannot run it, such as for want of its data.
    """
    manager, names = _known(tasks)
    lm_eval = load_lm_eval(f"tasks={list(tasks)}")
    with torch.no_grad(), evaluating(model), moved(model, device), _random_states():
        try:
            wrapped = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = lm_eval.simple_evaluate(
                wrapped, tasks=names, limit=limit, task_manager=manager, log_samples=False, batch_size=batch_size
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise DataError(f"tasks={names}: lm-evaluation-harness fails ({reason_of(error)})") from error
    shots = found.get("n-shot", {})
    return {task: _scores(values) | {"shots": shots.get(task)} for task, values in found["results"].items()}


def _known(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's index of tasks, and names in it."""
    lm_eval = load_lm_eval(f"tasks={list(tasks)}")
    files = {task: Path(task).expanduser() for task in tasks if task.endswith((".yaml", ".yml"))}
    names = [_name_in(files[task]) if task in files else task for task in tasks]
    folders = sorted({str(file.resolve().parent) for file in files.values()})
    manager = lm_eval.tasks.TaskManager(include_path=folders or None)
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            raise DataError(
                f"task '{name}' is unknown to lm-evaluation-harness; `lm-eval ls tasks` lists its tasks, "
                "or give a YAML file"
            )
    return manager, names


def _name_in(file: Path) -> str:
    """What a YAML file calls its task or group."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads over tags such as ``!function``, which name code that only the harness runs."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"task file '{file}' cannot be read ({reason_of(error)}); give a task's YAML file") from error
    name = (content.get("task") or content.get("group")) if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise DataError(f"task file '{file}' names no 'task' or 'group'; give a task's YAML file")
    return name


def _scores(values: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics and their errors of ``{"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}``."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue  # the task's name, or a standard error that is "N/A"
        error = metric.endswith("_stderr")
        name = metric.removesuffix("_stderr") + ("" if kind == "none" else f" ({kind})")
        (errors if error else metrics)[name] = float(value)
    return {"metrics": metrics, "stderr": errors}


@contextmanager
def _random_states() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch back after the context."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
