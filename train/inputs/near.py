"""Evaluation rows that are a training row, or nearly one: they flatter the figures.

Two rows are near where the cosine of their features is 0.98 or more, centred and scaled by the
training rows, in the deepest layer that is read: of such pairs four in five share half of their
runs of five letters, of those just below it half do (benchmarks/LOG.md). Rows
of equal texts, told by their hashes, are counted apart.

Products are made block by block. Beyond 50 billion multiplications, a second of two cores, only
some evaluation rows are looked at, at equal distances, and the record says how many.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llmembed.cache_format import Cache
from llmembed.common.process import full_float32
from llmembed.train.inputs.data import FitData, columns_of
from llmembed.train.inputs.shares import same_texts

COSINE = 0.98
_BUDGET = 5e10
_BLOCK_ROWS = 512
MOST_LISTED = 1000
"""Pairs of each kind that a record holds, for people to look at; all of them are counted."""


@full_float32()
@torch.inference_mode()
def find_repeated(cache: Cache, data: FitData) -> dict[str, Any]:
    """Count evaluation rows whose text, or nearly so, is trained on, and name them.

    Returns:
        `n_same_text`; `same_text`, in order: a `row` of the evaluation split, and the first
        `train_row` of the training split that has its text; `near`: `cosine`, `feature`,
        `n_checked`, `n` of these that are near and no same text, and `pairs`, the nearest first:
        such rows, and their `cosine`. Of each list the first `MOST_LISTED`.
    """
    shares, trained = data.shares, data.shares.seen
    same, same_rows = same_texts(cache, shares)
    feature = max(range(len(data.features)), key=lambda k: data.features[k].layer)
    columns = columns_of([one.hidden_size for one in data.features], [feature])
    n_most = max(1, int(_BUDGET / (len(trained) * len(columns))))
    checked = np.delete(np.arange(len(shares.eval)), same)
    checked = checked[:: -(-len(checked) // n_most) or 1]
    first = slice(int(columns[0]), int(columns[-1]) + 1)
    x = data.x[:, first].index_select(0, torch.from_numpy(trained))
    mean, scale = x.mean(dim=0), x.std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, torch.inf)
    x = F.normalize(x.sub_(mean).div_(scale))
    cosines, nearest = np.empty(len(checked), np.float32), np.empty(len(checked), np.int64)
    for start in range(0, len(checked), _BLOCK_ROWS):
        own = slice(start, start + _BLOCK_ROWS)
        block = data.x_eval[torch.from_numpy(checked[own]), first]
        best = (F.normalize((block - mean) / scale) @ x.T).max(dim=1)
        cosines[own], nearest[own] = best.values.numpy(), best.indices.numpy()
    order = np.argsort(-cosines, kind="stable")[: int((cosines >= COSINE).sum())]
    pairs = [
        {
            "row": int(shares.eval[checked[k]]),
            "train_row": int(trained[nearest[k]]),
            "cosine": round(min(float(cosines[k]), 1.0), 4),
        }
        for k in order[:MOST_LISTED]
    ]
    near = {"cosine": COSINE, "feature": data.features[feature]._asdict()}
    near |= {"n_checked": len(checked), "n": len(order), "pairs": pairs}
    listed = zip(shares.eval[same[:MOST_LISTED]], same_rows, strict=False)
    same_text = [{"row": int(row), "train_row": int(of_train)} for row, of_train in listed]
    return {"n_same_text": len(same), "same_text": same_text, "near": near}
