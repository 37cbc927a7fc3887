"""What fits draw, on which device: GPUs that a fit does not use are left alone, and MPS can."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from clustered import MakeCache, load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmembed.train import FitConfig
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.fusions.tricks import Dropout
from llmembed.train.gradient.fit import train_by_gradient
from llmembed.train.gradient.module import ClassifierModule
from llmembed.train.inputs import Batch

OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 32, "accelerator": "cpu"}


class Seen(TorchDispatchMode):
    """What operations gave, as (name, device, dtype)."""

    def __init__(self) -> None:
        super().__init__()
        self.given: set[tuple[str, str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                name = func.overloadpacket.__name__
                self.given.add((name, one.device.type, one.dtype))
        return result


@pytest.mark.parametrize("fusion", ["cooc", "attention", "gated", "scalar-mix"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_step_is_one_that_mps_can_do(make_cache: MakeCache, fusion: str, head: str) -> None:
    """Off the CPU nothing is drawn, and nothing is float64, which MPS refuses."""
    config = FitConfig(cache=str(make_cache()), fusion=fusion)
    data, plan = load(config), config.plan()
    classifier = Classifier(data.architecture(fusion, head))
    module = ClassifierModule(classifier, plan.training, data.class_weights(), 0).to("meta")
    batch = Batch(*(one[:8].to("meta") for one in (data.x, data.y, torch.ones(len(data.x)))))
    with Seen() as seen:
        module.loss_of(batch).backward()
    assert ("random_", "cpu", torch.int64) in seen.given
    elsewhere = {one for one in seen.given if one[1] != "cpu"}
    assert len(elsewhere) > 10
    assert not [name for name, _, _ in elsewhere if name == "random_"]
    assert torch.float64 not in {dtype for _, _, dtype in elsewhere}


def test_dropout_draws_what_it_drew() -> None:
    """A seed zeroes the entries that it zeroed in earlier versions."""
    torch.manual_seed(7)
    dropped = Dropout(0.3).train()(torch.ones(3, 50))
    assert hashlib.sha256(dropped.numpy().tobytes()).hexdigest()[:16] == "ae299e2d35e45414"


def test_a_fit_seeds_no_gpu_that_it_does_not_use(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit on the CPU looks at no GPU's numbers, and the caller's own go on as they were."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a GPU was touched")

    for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    if not torch.backends.cuda.is_built():  # a build for GPUs would look for its driver
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = FitConfig(cache=str(make_cache()), fusion="attention", **OPTIONS)
    data, before = load(config), torch.get_rng_state()
    train_by_gradient(config.plan(), data)
    assert torch.equal(torch.get_rng_state(), before)
