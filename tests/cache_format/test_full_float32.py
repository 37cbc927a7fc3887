"""Products in float32 are in full float32, whatever the process or the environment was told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llmembed.common.errors import ConfigError
from llmembed.common.process import full_float32

BACKENDS: Any = torch.backends
GPU, CPU = BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul


def set_each() -> None:
    GPU.fp32_precision, CPU.fp32_precision = "tf32", "bf16"


RELAXED: dict[str, Callable[[], None]] = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "allow_tf32": lambda: setattr(GPU, "allow_tf32", True),
    "each": set_each,
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def told() -> tuple[str, ...]:
    try:
        whole = torch.get_float32_matmul_precision()
    except RuntimeError:  # each device was told something else
        whole = "mixed"
    return whole, GPU.fp32_precision, CPU.fp32_precision


def product() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(256, 256, generator=generator)
    return matrix @ matrix


@pytest.mark.parametrize("relax", RELAXED.values(), ids=RELAXED)
def test_a_relaxed_process_multiplies_in_full_meanwhile(relax: Callable[[], None]) -> None:
    """TF32 and bfloat16 are off on every device, and afterwards as the user set them.

    Where oneDNN has products in bfloat16 the product itself shows it too.
    """
    exact = product()
    relax()
    before, rough = told(), product()
    with full_float32():
        assert told() == ("highest", "ieee", "ieee")
        assert torch.equal(product(), exact)
    assert told() == before
    assert torch.equal(product(), rough)


def test_it_lasts_until_the_last_of_several_threads_leaves() -> None:
    """One thread that leaves does not take it from another, and an error leaves too."""
    set_each()
    before, entered, leave = told(), threading.Event(), threading.Event()

    def other() -> None:
        with full_float32():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    with pytest.raises(ZeroDivisionError), full_float32(), full_float32():
        _ = 1 / 0
    assert told() == ("highest", "ieee", "ieee")
    leave.set()
    thread.join()
    assert told() == before


def test_an_override_that_no_program_can_take_back_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NVIDIA_TF32_OVERRIDE=1 beats every setting of torch; where no CUDA runs it means nothing."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with full_float32():
        pass
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    message = r"NVIDIA_TF32_OVERRIDE is '1' in the environment.*0 is allowed\. Unset it\."
    with pytest.raises(ConfigError, match=message), full_float32():
        pass
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with full_float32():
        pass
