"""Runs written by past versions are read forever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clustered import LABELS, clustered

from llmembed.train import load_run

GOLDEN = Path(__file__).parent.parent / "golden/run_format_1"


@pytest.mark.parametrize("name", ["cooc", "auto"])
def test_golden_runs_are_read(name: str) -> None:
    """A run of an old version gives the features it was evaluated on the probabilities of then."""
    run = load_run(GOLDEN / name)
    table = pq.read_table(GOLDEN / name / "predictions.parquet")
    features, labels = clustered(60, 1)
    stored = torch.from_numpy(np.concatenate(list(features), axis=1)).float()
    with torch.inference_mode():
        probabilities = run.classifier(stored).double().softmax(dim=1).numpy()
    written = np.stack([table[f"p_{label}"].to_numpy() for label in LABELS], axis=1)
    np.testing.assert_allclose(probabilities, written, atol=1e-6)
    accuracy = (probabilities.argmax(axis=1) == labels).mean()
    assert accuracy == pytest.approx(run.metrics["accuracy"])
