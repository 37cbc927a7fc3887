from __future__ import annotations

import pytest
import torch

from llmembed.train.fusions.tricks import map_on_cores

CPU = torch.device("cpu")


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_and_from_one_thread_each() -> None:
    """Jobs see one thread of their own; the number from before is back afterwards."""
    assert list(map_on_cores(lambda n: (n, torch.get_num_threads()), range(5), CPU)) == [
        (n, 1) for n in range(5)
    ]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_ends_the_others_and_is_passed_on() -> None:
    """The first error is raised, what has not begun never does, and the threads are put back."""
    begun = []

    def fail(n: int) -> None:
        begun.append(n)
        raise ValueError(n)

    with pytest.raises(ValueError, match="0"):
        list(map_on_cores(fail, range(1000), CPU))
    assert len(begun) < 1000
    assert torch.get_num_threads() == 2
