"""How else hidden states are had on a GPU: the official way, a Hugging Face loop done well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from bench_extract import timed

N_OFFICIAL_LAYERS = 5
"""The paper takes the last five."""

Ids = Sequence[Sequence[int]]
Vectors = npt.NDArray[np.float32]


def load_transformers(folder: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a whole model as `AutoModel` does, straight to the device."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype, device_map={"": device})
    return model.eval()


def official(model: Any, ids: Ids, width: int, batch_size: int) -> Vectors:
    """Pool as the paper's code does: all padded to one width, all hidden states, pads in the mean.

    Args:
        model: a whole transformers model, in float16 on a GPU.
        ids: token ids of N texts.
        width: tokens to which each is padded.
        batch_size: texts a batch.

    Returns:
        float32 `[N, 5, H]`: the last five hidden states, mean over the width.
    """
    pooled = []
    for start in range(0, len(ids), batch_size):
        padded, mask = _padded(ids[start : start + batch_size], width, model.device)
        with torch.inference_mode():
            output = model(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        means = [hidden.mean(dim=1) for hidden in output.hidden_states[-N_OFFICIAL_LAYERS:]]
        pooled.append(torch.stack(means, dim=1).float().cpu())
    return torch.cat(pooled).numpy()


def sorted_loop(model: Any, ids: Ids, batch_size: int) -> Vectors:
    """Pool the last hidden state in batches of texts sorted by length, padded to their longest.

    Results stay on the device until the end, and no key or value is stored: the best of what one
    writes with `AutoModel` alone.

    Args:
        model: a whole transformers model.
        ids: token ids of N texts.
        batch_size: texts a batch.

    Returns:
        float32 `[N, H]`, mean over the real tokens.
    """
    order = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
    pooled = []
    for start in range(0, len(order), batch_size):
        rows = [ids[row] for row in order[start : start + batch_size]]
        padded, mask = _padded(rows, len(rows[0]), model.device)
        with torch.inference_mode():
            output = model(input_ids=padded, attention_mask=mask, use_cache=False)
            hidden = output.last_hidden_state.float() * mask[..., None]
            pooled.append(hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True))
    features = torch.empty_like(torch.cat(pooled))
    features[torch.tensor(order, device=features.device)] = torch.cat(pooled)
    found: Vectors = features.cpu().numpy()
    return found


def alone(model: Any, ids: Ids) -> Vectors:
    """Pool the last hidden state one text at a time: float32 `[N, H]`."""
    return sorted_loop(model, ids, 1)


def best_size(run: Callable[[int], Any], sizes: Sequence[int]) -> tuple[int, dict[int, float]]:
    """Find the batch size that is fastest, each run once after a warm-up.

    Args:
        run: does the work at a batch size.
        sizes: to try, ascending; those from the first on that does not fit are left out.

    Returns:
        The best one, and the seconds of all that fit.
    """
    run(sizes[0])
    seconds = dict(_seconds_of(run, sizes))
    return min(seconds, key=seconds.__getitem__), seconds


def _seconds_of(run: Callable[[int], Any], sizes: Sequence[int]) -> Iterator[tuple[int, float]]:
    for size in sizes:
        try:
            yield size, timed(lambda: run(size))[0]  # noqa: B023 - runs at once
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return


def _padded(
    rows: Ids, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:  # int64 [B, T] both
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = (torch.arange(width, device=device) < lengths[:, None]).long()
    return torch.from_numpy(padded).to(device), mask


def busy_share(intervals: npt.NDArray[np.float64], skip: float = 0.2) -> float:
    """Share of the time in which a kernel or copy ran, after a first share of that work.

    Args:
        intervals: begin and end of each, float64 `[N, 2]`.
        skip: share of the summed time that counts as warm-up.

    >>> busy_share(np.array([[0.0, 2.0], [4.0, 8.0], [5.0, 6.0], [10.0, 12.0]]), skip=0.25)
    0.75
    """
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    summed = np.cumsum(ordered[:, 1] - ordered[:, 0])
    ordered = ordered[np.searchsorted(summed, skip * summed[-1], side="right") :]
    reached = np.maximum.accumulate(ordered[:, 1])
    before = np.concatenate([ordered[:1, 0], reached[:-1]])
    idle = np.maximum(0, ordered[:, 0] - before).sum()
    whole = reached[-1] - ordered[0, 0]
    return float(1 - idle / whole)
