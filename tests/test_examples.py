"""The example projects reach the accuracies that they state, dense and compressed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"mlp", "text_classifier", "image_classifier"}


@pytest.mark.parametrize(("name", "parameters"), [("mlp", 0.5), ("text_classifier", 0.8), ("image_classifier", 0.6)])
def test_an_example(name: str, parameters: float, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main()
    assert found["dense"] > 0.9  # 0.997, 0.961, 1.000
    assert found["compressed"] > 0.9  # 0.997, 0.957, 1.000
    assert found["parameters"] < parameters
    assert "compressed" in capsys.readouterr().out
