"""Fixtures for every test: nothing leaks, everything is seeded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

THREADS = int(os.environ.get("LOWRANK_LIT_TEST_THREADS", "2"))
# Set by pytest, torch or Lightning in the course of normal work, not by a test that forgot to clean up.
EXPECTED_CHANGES = {
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "CUBLAS_WORKSPACE_CONFIG",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "LOCAL_RANK",
    "RANK",
    "WORLD_SIZE",
}


@pytest.fixture(autouse=True)
def no_leaked_environment() -> Iterator[None]:
    """Fail a test that leaves environment variables changed, and put them back for the next one."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    for name in changed - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    leaked = sorted(changed - EXPECTED_CHANGES)
    assert not leaked, f"the test leaves environment variables changed: {leaked}; use monkeypatch.setenv"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch and fix its thread count, so that a test's numbers do not depend on the tests before it."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Folder with real small models (``models/``) and text (``text/``), named by LOWRANK_LIT_REFERENCE."""
    folder = os.environ.get("LOWRANK_LIT_REFERENCE")
    if not folder:
        pytest.skip("LOWRANK_LIT_REFERENCE is unset: no real models to measure on")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"LOWRANK_LIT_REFERENCE={folder} is not a folder")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE tokenizer with 300 tokens, trained on real text."""
    from lowrank_lit.corpus import embedded_text
    from lowrank_lit.data import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([embedded_text("validation")[:30_000]], 300, folder)
    return folder
