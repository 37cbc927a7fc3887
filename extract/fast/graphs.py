"""Passes of a small model recorded as CUDA graphs: one launch in place of hundreds.

Launching a block takes Python some 0.3 ms, however small it is. A whole pass is recorded, attention
included: inductor's own graphs would end at each attention, which is left out of compiled blocks,
and cost at each piece about what they save. What a recording computes lies in memory that the
next pass writes to, so hidden states are lent, and only while nobody else may begin.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmembed.common.errors import LLMEmbedWarning

MOST_GRAPHS = 16
"""Recordings kept; each keeps the hidden states that it gives. Other passes are launched."""

States = dict[int, Tensor]
"""Layer -> hidden states `[1, T, H]`."""
Pass = Callable[[Mapping[str, Tensor]], States]
_Result = TypeVar("_Result")


class Recorder:
    """Runs passes, and records each kind of pass the second time that it comes.

    Args:
        device: where they run.
        tolerance: largest ||a - e|| / ||e|| of a token's hidden states between a recording and the
            launched pass that it was made of; beyond it none is used.
    """

    def __init__(self, device: torch.device, tolerance: float) -> None:
        self._device, self._tolerance, self._failed = device, tolerance, False
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[Mapping[str, Tensor], Callable[[], None], States]] = {}
        self._pool: Any = None
        self._lock = threading.Lock()

    @property
    def n_recorded(self) -> int:
        """Kinds of passes that are replayed."""
        return len(self._graphs)

    def run(
        self,
        kind: Hashable,
        inputs: Mapping[str, Tensor],
        run: Pass,
        use: Callable[[States], _Result],
    ) -> _Result:
        """Have `use` take what `run` gives for these inputs; it must keep none of it.

        Passes of one `kind` have inputs of the same shapes, and `run` depends on nothing else.
        """
        with self._lock:
            if kind not in self._graphs:
                states = run(inputs)
                if kind in self._seen and len(self._graphs) < MOST_GRAPHS and not self._failed:
                    self._record(kind, inputs, run, states)
                self._seen.add(kind)
                return use(states)
            static, replay, states = self._graphs[kind]
            for name, values in inputs.items():
                static[name].copy_(values)
            replay()
            return use(states)

    def forget(self) -> None:
        """Give back the memory of all recordings."""
        self._graphs.clear()
        self._seen.clear()
        self._pool = None

    def _record(
        self, kind: Hashable, inputs: Mapping[str, Tensor], run: Pass, expected: States
    ) -> None:
        try:
            with torch.inference_mode():
                replay, states, self._pool = record(lambda: run(inputs), self._device, self._pool)
                replay()
                differences = [_difference(states[key], expected[key]) for key in expected]
            reason = "" if max(differences) <= self._tolerance else "it gave other hidden states"
        except RuntimeError as error:
            reason = type(error).__name__
        if not reason:
            self._graphs[kind] = (inputs, replay, states)
            return
        self._failed = True
        self.forget()
        tell_launched(reason)


def tell_launched(reason: str) -> None:
    """Say why nothing is recorded."""
    warnings.warn(
        f"a pass could not be recorded as a CUDA graph ({reason}): its kernels are launched "
        "one by one, slower. If memory is short, pass a smaller --token-budget; else report this "
        "architecture.",
        LLMEmbedWarning,
        stacklevel=2,
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest ||a - e|| / ||e|| of a token; infinite where one of them is not finite."""
    found, expected = found.float(), expected.float()
    apart = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-12)
    return float(apart.nan_to_num(torch.inf).max())


def record(
    run: Callable[[], States], device: torch.device, pool: Any
) -> tuple[Callable[[], None], States, Any]:
    """Record what a pass launches: how to replay it, what it then gives, and its pool of memory.

    All recordings share the pool: whatever one computes may be overwritten by the next.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may wait for copies and take pinned memory meanwhile.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(
            graph,
            pool=pool,
            stream=torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
            capture_error_mode="thread_local",
        ),
    ):
        states = run()
    return graph.replay, states, graph.pool()
