from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from clustered import LABELS, MakeCache
from torch import Tensor, nn

from llmembed.cache_format import open_cache
from llmembed.common.errors import ConfigError
from llmembed.train import FitConfig, load_run
from llmembed.train.cli.fit import fit_main
from llmembed.train.fusions import FUSIONS, choices
from llmembed.train.fusions.classifier import Architecture, Classifier
from llmembed.train.inputs.data import read_features
from llmembed.train.runs.export import to_onnx


class Everything(nn.Module):
    """Every fusion, and every head, on the same three features of width 16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = [(fusion, "linear") for fusion in choices(FUSIONS) if fusion != "single"]
        self.classifiers = nn.ModuleList(randomised(*pair) for pair in (*pairs, ("concat", "mlp")))

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([one(features).softmax(dim=1) for one in self.classifiers], dim=1)


def randomised(fusion: str, head: str) -> Classifier:
    classifier = Classifier(
        Architecture(fusion=fusion, head=head, widths=(16,) * 3, n_classes=3, dropout=0.5)
    )
    for weight in classifier.parameters():
        nn.init.normal_(weight, std=0.3)
    classifier.standardise.mean.normal_()
    classifier.standardise.scale.uniform_(0.5, 2)
    classifier.temperature.fill_(1.7)
    return classifier


def run_onnx(model: bytes, features: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (output,) = session.run(["probabilities"], {"features": features})
    return np.asarray(output)


@pytest.mark.slow
def test_every_fusion_and_head_gives_what_torch_gives() -> None:
    """ONNX Runtime agrees with torch on all fusions and heads, for any number of rows."""
    module = Everything().eval()
    model = to_onnx(module, 48).SerializeToString()
    for n_rows in (1, 7):
        features = torch.randn(n_rows, 48)
        with torch.inference_mode():
            expected = module(features).numpy()
        assert expected.std() > 0.1
        np.testing.assert_allclose(run_onnx(model, features.numpy()), expected, atol=1e-5)


def test_a_fit_leaves_a_graph_beside_its_weights(make_cache: MakeCache, tmp_path: Path) -> None:
    """`--export onnx` writes model.onnx: it repeats the run's predictions and names its classes."""
    cache, output = make_cache(), tmp_path / "r"
    options = ["--cache", str(cache), "--fusion", "single", "--layers", "2", "--export", "onnx"]
    result = CliRunner().invoke(fit_main, [*options, "--output", str(output)])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("head ")
    content = (output / "model.onnx").read_bytes()
    model, run = onnx.load_from_string(content), load_run(output)
    onnx.checker.check_model(model)
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata == {"labels": list(LABELS), "features": run.config["features"]}
    features = read_features(open_cache(cache)["test"], run.features)
    with torch.inference_mode():
        expected = run.classifier(features).softmax(dim=1).numpy()
    np.testing.assert_allclose(run_onnx(content, features.numpy()), expected, atol=1e-5)


def test_a_format_that_does_not_exist() -> None:
    """Another format than onnx is refused by name."""
    with pytest.raises(ConfigError, match=r"export 'tflite' does not exist. Known: onnx\."):
        FitConfig(cache="a.zarr", export="tflite")


def test_the_package_is_asked_for_before_anything_is_trained(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """Without onnx the fit ends at once and says what to install."""
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "from llmembed.train.cli.fit import fit_main\n"
        f"fit_main(['--cache', {str(make_cache())!r}, '--fusion', 'mean', '--export', 'onnx',"
        f" '--output', {str(tmp_path / 'r')!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-Pc", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: --export onnx needs onnx, which is not installed. "
        "Run pip install 'llmembed-cache[onnx]'.\n"
    )
