"""Fold moments summed on Ray: every task reads a share of the rows itself and gives back its sums.

The Gram matrix grows with the rows and with the square of the width, so it is what is shared. Folds
and standardisation are the command's own, which reads all features too: it scores the rows held
out. Features never pass through Ray. Shares are added in their order, so that a result depends on
the number of workers alone, by the rounding of a sum. Ray does lost tasks again, three times.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmembed.cache_format import open_cache
from llmembed.common.cluster import absolute, joined
from llmembed.common.errors import DataError, EngineError, LLMEmbedError
from llmembed.common.process import full_float32
from llmembed.train.config import Method
from llmembed.train.fusions.classifier import Standardiser, make_fusion
from llmembed.train.inputs import Feature, FitData, columns_of, read_features, targets_of
from llmembed.train.inputs.data import GB, memory_limit
from llmembed.train.linear.moments import FoldMoments, Problem

_SHARE_ROWS = 1024  # shares are cut at multiples: no cache has chunks of more rows


@dataclass(frozen=True, kw_only=True)
class Share:
    """Some rows of a split, and what to sum over them."""

    cache: str
    fingerprint: str | None  # the command's cache has it, so the worker's must
    split: str
    features: tuple[Feature, ...]
    fusion: str
    standardiser: Standardiser  # of these features
    rows: slice
    folds: list[Tensor]  # int64 `[n]` each, the rows of a fold, counted from the first of the share
    class_weights: Tensor  # float32 `[C]`
    sample_weights: Tensor | None  # float32 `[n]`, a factor of the weight of each row; None is 1
    memory_gb: float  # most memory for the features of the share


@dataclass(frozen=True)
class RayMoments:
    """Moments of fused features by fold, summed by the workers of a joined Ray."""

    method: Method
    data: FitData
    folds: Sequence[Tensor]  # int64 `[n]`, the rows of each
    class_weights: Tensor  # float32 `[C]`
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __call__(self, fusion: str, features: Sequence[int]) -> FoldMoments:
        """Sum over all rows in folds, of a fusion without weights of the features at positions."""
        with self._one_at_a_time:  # so that no more than --workers are at work
            return _added(on_workers([*self.shares(fusion, features)]), self.class_weights.device)

    def shares(self, fusion: str, features: Sequence[int]) -> Iterator[Share]:
        """Cut the rows into a share a worker, or fewer."""
        method, data, own = self.method, self.data, self.data.sample_weights
        folds = [rows.cpu() for rows in self.folds]
        columns = columns_of([feature.hidden_size for feature in data.features], features)
        # Rows of a validation split stand behind those of the training split, which workers read.
        n_rows = 1 + max(int(rows.max()) for rows in folds)
        n_blocks = -(-n_rows // _SHARE_ROWS)
        n_shares = min(method.workers, n_blocks)
        ends = [n_blocks * k // n_shares * _SHARE_ROWS for k in range(n_shares)]
        limit = memory_limit() / GB if method.memory_gb is None else method.memory_gb
        for start, stop in itertools.pairwise([*ends, n_rows]):
            yield Share(
                cache=absolute(method.cache),
                fingerprint=data.fingerprint,
                split=data.shares.train_split,
                features=tuple(data.features[index] for index in features),
                fusion=fusion,
                standardiser=data.standardiser.select(columns),
                rows=slice(start, stop),
                folds=[rows[(rows >= start) & (rows < stop)] - start for rows in folds],
                class_weights=self.class_weights.cpu(),
                sample_weights=None if own is None else own[start:stop].clone(),
                memory_gb=limit / method.workers,
            )


@full_float32()
def sums_of(share: Share) -> dict[str, npt.NDArray[Any]]:
    """Read a share of the rows, and give the fields of its moments: what a worker does.

    Raises:
        DataError: the cache is not that of the command.
        CacheError: the cache is missing, malformed, incomplete or damaged.
    """
    cache = open_cache(share.cache)
    if cache.fingerprint != share.fingerprint:
        raise DataError(
            f"a worker of Ray finds another cache at {share.cache} than the command. All machines "
            "must see the same one: pass a place on a shared file system or in an object store."
        )
    split = cache[share.split]
    x = read_features(split, share.features, share.rows, share.memory_gb)
    fusion = make_fusion(share.fusion, [feature.hidden_size for feature in share.features])
    y = torch.from_numpy(targets_of(split)[share.rows])
    with torch.inference_mode():
        fused = fusion(share.standardiser.apply_(x))
        problem = Problem(
            fused, y, share.folds, share.class_weights, sample_weights=share.sample_weights
        )
        return {name: tensor.numpy() for name, tensor in vars(problem.moments).items()}


def joined_if_asked(method: Method) -> AbstractContextManager[None]:
    """Join Ray, or start it, where the engine is Ray; a MissingPackageError if it is not there."""
    is_ray = method.engine == "ray"
    return joined(method.address, method.workers) if is_ray else contextlib.nullcontext()


def on_workers(shares: Sequence[Share]) -> list[dict[str, npt.NDArray[Any]]]:
    """Have all shares summed, and give the sums in the order of the shares.

    Raises:
        LLMEmbedError: what a worker could not do, in its own words.
        EngineError: Ray gave up.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    task: Any = ray.remote(num_cpus=1)(sums_of)
    try:
        return list(ray.get([task.remote(one) for one in shares]))
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, LLMEmbedError):
            raise error.cause from None
        last = str(error).strip().splitlines()[-1]
        raise EngineError(
            f"Ray gave up: {last}. See Ray's logs for the cause, or leave out --engine ray."
        ) from error


def _added(parts: Sequence[dict[str, npt.NDArray[Any]]], device: torch.device) -> FoldMoments:
    """Add the sums of all shares, in float64; the Gram matrix is float32, fold by fold."""
    grams = [
        sum(part["gram"][fold].astype(np.float64) for part in parts).astype(np.float32)
        for fold in range(len(parts[0]["gram"]))
    ]
    sums = {name: sum(part[name] for part in parts) for name in parts[0] if name != "gram"}
    return FoldMoments(
        gram=torch.from_numpy(np.stack(grams)).to(device),
        **{name: torch.from_numpy(one).to(device) for name, one in sums.items()},
    )
