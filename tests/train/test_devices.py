"""Devices that are not there, and memory that does not suffice: one sentence each."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from little_memory import MIB, only

from llmembed.common.errors import ConfigError
from llmembed.common.process import memory_told
from llmembed.train import FitConfig, LLMEmbedClassifier
from llmembed.train.cli.fit import fit_main
from llmembed.train.inputs import Feature, data_in_memory
from llmembed.train.linear.devices import choose_device
from llmembed.train.verbs.fitting import train


@pytest.mark.parametrize(
    ("options", "machine", "expected"),
    [
        (("auto", "1"), (2, False), "cuda:0"),
        (("gpu", "1,"), (2, False), "cuda:1"),
        (("auto", "1"), (0, True), "mps"),
        (("gpu", "0,"), (0, True), "mps:0"),
        (("auto", "1"), (0, False), "cpu"),
        (("cpu", "1"), (2, True), "cpu"),
    ],
)
def test_the_device_is_the_one_that_lightning_takes(
    options: tuple[str, str], machine: tuple[int, bool], expected: str
) -> None:
    """Of a machine with so many GPUs of CUDA, and with MPS or without."""
    n_gpus, has_mps = machine
    assert str(choose_device(*options, n_gpus, has_mps=has_mps)) == expected


@pytest.mark.parametrize(
    ("options", "machine", "message"),
    [
        (("gpu", "1"), (0, False), "--accelerator gpu needs a GPU, and torch sees no such GPU"),
        (("mps", "1"), (1, False), "--accelerator mps needs a GPU, and torch sees no such GPU"),
        (("auto", "3,"), (1, False), "--devices 3, names the GPU of number 3, .*is 1 of cuda"),
        (("gpu", "3,"), (1, False), "--devices 3, names the GPU of number 3, .*is 1 of cuda"),
        (("auto", "1,"), (0, True), "--devices 1, .*there is 1 of mps, from 0 on"),
        (("auto", "3,"), (0, False), "--devices 3, .*there is no GPU in use. Pass --devices 1,"),
        (("cpu", "0,"), (1, False), "--devices 0, .*with --accelerator cpu there is no GPU in use"),
    ],
)
def test_a_device_that_is_not_there_is_told(
    options: tuple[str, str], machine: tuple[int, bool], message: str
) -> None:
    """The options, what there is, and what to pass."""
    n_gpus, has_mps = machine
    with pytest.raises(ConfigError, match=message):
        choose_device(*options, n_gpus, has_mps=has_mps)


@pytest.mark.parametrize("fusion", ["cooc", "mean", "auto", "attention"])
@pytest.mark.parametrize("options", [["--devices", "99,"], ["--accelerator", "gpu"]])
def test_it_is_told_before_anything_is_read(
    tmp_path: Path, fusion: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that are solved or trained alike: one line, exit code 1, though there is no cache."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    where = ["--cache", str(tmp_path / "none.zarr"), "--output", str(tmp_path / "r")]
    result = CliRunner().invoke(fit_main, [*where, "--fusion", fusion, *options])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(f"error: {' '.join(options)}")


def test_the_estimator_tells_it_before_it_extracts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is looked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--accelerator gpu needs a GPU"):
        LLMEmbedClassifier("no/model", accelerator="gpu").fit(["a", "b"], [0, 1])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
            "the memory of the device does not suffice (it was asked for 20.00 GiB). Do this.",
        ),
        (
            torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
            "the memory of the device does not suffice. Do this.",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "the memory of the device does not suffice. Do this.",
        ),
        (
            RuntimeError("MPS backend out of memory (MPS allocated: 8.88 GB)"),
            "the memory of the device does not suffice. Do this.",
        ),
    ],
)
def test_memory_of_a_device_that_runs_out_is_one_sentence(error: RuntimeError, told: str) -> None:
    """Whichever library says it; other errors stay what they are."""
    with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"), memory_told("Do this."):
        raise error
    with pytest.raises(RuntimeError, match=r"^CUDA error: device-side"), memory_told("Do this."):
        raise RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("head", ["ridge", "linear"])
def test_a_fit_without_memory_says_what_to_pass(head: str) -> None:
    """A Gram matrix of 64 MiB does not fit into 16."""
    config: dict[str, Any] = {"cache": "none", "fusion": "single", "accelerator": "cpu"}
    plan = FitConfig(**config, head=head).plan()
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2100, 4096)).astype(np.float32))
    y = (np.arange(2100) % 2).astype(np.int64)
    data = data_in_memory(plan.reading, x, y, ["a", "b"], [Feature("s", "mean", 1, 4096)])
    message = r"the memory of this machine does not suffice.*Pass fewer --layers\.$"
    with only(16 * MIB), pytest.raises(ConfigError, match=message):
        train(plan, data)
