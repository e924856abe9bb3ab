"""A checkpoint of any strategy as a Hugging Face folder, without the recipe that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowrank_lit import hub
from lowrank_lit.callbacks.export import own_fingerprint, plan_of, round_weights
from lowrank_lit.data import load_tokenizer
from lowrank_lit.errors import DataError, ExportError
from lowrank_lit.module import LowRankModule, load_checkpoint


def convert(checkpoint: str, *, model: str, output: str, dtype: str = "auto") -> int:
    """Write the model of a checkpoint as ``ExportOnFitEnd`` would: adapters merged, 4-bit factors dequantised.

    The plan, the adapters' settings and the quantisation are read from the checkpoint.

    Args:
        checkpoint: A file of Lightning's, or a folder of DeepSpeed's of any number of processes.
        model: Folder or hub name of the model that the run began with; its tokenizer is copied where it has one.
        output: Folder to write.
        dtype: Type of the stored weights; ``auto`` is that of ``model``.

    Raises:
        ExportError: If the checkpoint cannot be read or does not fit the model, or the folder cannot be written.
        ModelError: If the model cannot be loaded.
    """
    if not Path(checkpoint).exists():
        raise ExportError(f"checkpoint '{checkpoint}' does not exist; give a file or a folder of ModelCheckpoint")
    stored = None if dtype == "auto" else getattr(torch, dtype)
    module = LowRankModule(model)
    load_checkpoint(module, checkpoint)
    stored = module.storage_dtype if stored is None else stored
    if stored is not None:
        round_weights(module.model, stored)
    plan = plan_of(module, module.model)
    fingerprint = own_fingerprint(module) if module.plan is None else None
    hub.export(module.model, plan, output, dtype=stored, tokenizer=_tokenizer(model), fingerprint=fingerprint)
    print(f"{checkpoint} -> {output}")
    return 0


def _tokenizer(model: str) -> Any:
    try:
        return load_tokenizer(model)
    except DataError:
        print(f"note: '{model}' has no tokenizer, so the export has none")
        return None
