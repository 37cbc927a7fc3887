"""Fusions and heads of one's own, registered in the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clustered import MakeCache
from torch import Tensor, nn

from llmembed.common.errors import ConfigError, RunFormatError
from llmembed.train import FitConfig, Fusion, fit, load_run, register_fusion, register_head
from llmembed.train.fusions import FUSIONS, HEADS


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (FUSIONS, HEADS):
        monkeypatch.setattr(registry, "_specs", dict(registry._specs))


class Scaled(Fusion):
    """The first feature, times a weight that is learned."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.fused_width, self.factor = widths[0], nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.fused_width] * self.factor


@pytest.mark.parametrize("facts", [{"learns": True}, {"learns": True, "completes_base": True}])
def test_a_fusion_that_learns(
    make_cache: MakeCache, tmp_path: Path, facts: dict[str, bool]
) -> None:
    """A registered class is trained by gradient, on a solved base where its facts say so."""
    register_fusion("scaled", **facts)(Scaled)
    config = FitConfig(cache=str(make_cache()), fusion="scaled", output=str(tmp_path / "r"))
    run = fit(config)
    assert run.metrics["accuracy"] > 0.8
    assert (run.classifier.base is not None) == facts.get("completes_base", False)
    assert isinstance(load_run(run.path).classifier.fusion, Scaled)


def test_facts_are_heeded(make_cache: MakeCache, tmp_path: Path) -> None:
    """A registered fusion is refused what its facts exclude, and a name is registered once."""
    register_fusion("scaled", learns=True, takes_one_feature=True)(Scaled)
    config = FitConfig(cache=str(make_cache()), fusion="scaled", output=str(tmp_path / "r"))
    with pytest.raises(ConfigError, match="fusion 'scaled' takes one feature and was given 2"):
        fit(config)
    with pytest.raises(ConfigError, match="head 'lda' is solved in closed form"):
        FitConfig(cache="a.zarr", fusion="scaled", head="lda")
    with pytest.raises(ConfigError, match="fusion 'concat' is registered already"):
        register_fusion("concat")(Scaled)


def test_a_head(make_cache: MakeCache, tmp_path: Path) -> None:
    """A registered head is trained by gradient on any fusion, and its run needs it."""

    @register_head("deep")
    class Deep(nn.Sequential):
        def __init__(self, fused_width: int, n_classes: int, dropout: float) -> None:
            super().__init__(
                nn.Linear(fused_width, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, n_classes)
            )

    config = FitConfig(
        cache=str(make_cache()), fusion="mean", head="deep", lr=0.01, output=str(tmp_path / "r")
    )
    assert fit(config).metrics["accuracy"] > 0.8
    del HEADS._specs["deep"]
    with pytest.raises(RunFormatError, match="has the head 'deep', which nothing registers here"):
        load_run(tmp_path / "r")


def test_names_and_facts_need_no_torch() -> None:
    """The registries are read without importing torch."""
    code = (
        "import sys; from llmembed.train.fusions import FUSIONS, HEADS\n"
        "assert FUSIONS['cooc'].learns and not HEADS['lda'].is_trained\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-Pc", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
