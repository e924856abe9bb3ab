"""Plain PEFT code on exported folders, as a user writes it; ``import lowrank_lit`` is all that is ours.

    python peft_on_export.py '[{"name": ..., "folder": ..., "auto": ...}, ...]'

Prints a JSON object: "works" or the reason by name. FOLDER.pt beside each folder is a batch.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import lowrank_lit  # noqa: F401  (registers the format)


def first(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        value: torch.Tensor = model(**batch)[0]
    return value


def adapt(folder: str, auto: str) -> str:
    def fresh() -> Any:
        return getattr(transformers, auto).from_pretrained(folder)

    batch = torch.load(f"{folder}.pt")
    before = first(fresh(), batch)
    model = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["inner", "outer"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained, "no parameter of an adapter"
    assert torch.equal(first(model, batch), before), "a new adapter changes the output"
    optimizer = torch.optim.AdamW(trained, lr=0.005)
    losses = []
    for _ in range(3):
        loss = model(**batch)[0].float().square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0], losses
    model.eval()
    after = first(model, batch)
    model.save_pretrained(f"{folder}-adapter")
    again = PeftModel.from_pretrained(fresh(), f"{folder}-adapter")
    torch.testing.assert_close(first(again, batch), after, rtol=0, atol=1e-6)
    merged = again.merge_and_unload()
    torch.testing.assert_close(first(merged, batch), after, rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 1e-4
    return "works"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {}
    for case in json.loads(sys.argv[1]):
        try:
            found[case["name"]] = adapt(case["folder"], case["auto"])
        except Exception as error:
            traceback.print_exc()
            found[case["name"]] = f"FAILS: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
