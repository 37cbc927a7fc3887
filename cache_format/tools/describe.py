"""What `llmembed-cache info` prints: a tree of what a cache holds, as data and as text.

Names and values come from the cache, so they are printed with every control character escaped.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmembed.cache_format.layout.documents import JSON
from llmembed.cache_format.layout.schema import UNLABELLED, array_name
from llmembed.cache_format.reader import Cache, Split
from llmembed.common.errors import shown


def describe(cache: Cache) -> dict[str, JSON]:
    """Collect what a cache holds, as one JSON document."""
    return {
        "path": str(cache.path),
        "fingerprint": cache.fingerprint,
        "multilabel": cache.multilabel,
        "created": cache.created,
        "versions": dict(cache.versions),
        "dataset": {**vars(cache.dataset), "labels": list(cache.labels)},
        "sources": {name: vars(source) for name, source in cache.sources.items()},
        "splits": {name: _describe_split(cache, cache[name]) for name in cache.splits},
    }


def tree(description: dict[str, JSON]) -> Iterator[str]:
    """Print a description as lines of text."""
    dataset = description["dataset"]
    n_classes = len(dataset["labels"])
    several = ", several labels a text" if description["multilabel"] else ""
    yield f"{_text(description['path'])}  {_text(dataset['name'])}, {n_classes} classes{several}"
    yield f"  fingerprint {description['fingerprint'][:16]}"
    yield f"  created {_text(description['created'])}"
    for key, value in sorted(dataset["provenance"].items()):
        yield f"  {_text(key)}: {_text(value)}"
    for name, source in description["sources"].items():
        identity = ", ".join(f"{_text(k)}={_text(v)}" for k, v in source["fingerprint"].items())
        yield f"  source {name}: hidden size {source['hidden_size']}, {identity}"
        for prompt, text in source["prompts"].items():
            yield f"    prompt {prompt}: {_text(text)}"
    for name, split in description["splits"].items():
        told = "".join(f", {_text(one)}" for one in _told_columns(split))
        yield f"  {name}/  {split['n_rows']} rows{told}"
        for array in split["arrays"]:
            state = "complete" if array["complete"] else f"{array['n_committed']} rows committed"
            shape = " x ".join(str(size) for size in array["shape"])
            size = f"{array['size_bytes'] / 1e6:.1f} MB"
            yield f"    {array['name']:<40} {array['dtype']} {shape}  {size}  {state}"


def _describe_split(cache: Cache, split: Split) -> dict[str, JSON]:
    arrays, layouts = [], split.layouts
    for (source, pooling, layer), n_committed in split.arrays.items():
        hidden_size, dtype = cache.sources[source].hidden_size, layouts[source].dtype
        arrays.append(
            {
                "name": f"{source}/{array_name((pooling, layer))}",
                "source": source,
                "pooling": pooling,
                "layer": layer,
                "dtype": dtype,
                "shape": [split.n_rows, hidden_size],
                "size_bytes": split.n_rows * hidden_size * (2 if dtype == "float16" else 4),
                "n_committed": n_committed,
                "complete": n_committed == split.n_rows,
            }
        )
    return {"n_rows": split.n_rows, **_describe_columns(split), "arrays": arrays}


def _describe_columns(split: Split) -> dict[str, JSON]:
    """Sum up several labels, weights and groups, where the split has them."""
    found: dict[str, JSON] = {}
    if split.label_sets is not None:
        n_labels = split.label_sets.sum(axis=1, dtype=np.int64)
        known = n_labels[split.label_sets[:, 0] != UNLABELLED]
        found["label_sets"] = {
            "n_labelled": len(known),
            "labels_per_text": round(float(known.mean()), 4) if len(known) else None,
            "n_without_label": int((known == 0).sum()),
        }
    if split.weights is not None:
        low, high = (float(of(split.weights)) if split.n_rows else None for of in (np.min, np.max))
        found["weights"] = {"min": low, "max": high}
    if split.groups is not None:
        found["groups"] = {"n_groups": len(np.unique(split.groups))}
    return found


def _told_columns(split: dict[str, JSON]) -> Iterator[str]:
    if "label_sets" in split:
        sets = split["label_sets"]
        yield (
            f"{sets['labels_per_text']} labels a text in {sets['n_labelled']} labelled rows "
            f"({sets['n_without_label']} have none)"
        )
    if "weights" in split:
        yield "weights {min} to {max}".format(**split["weights"])
    if "groups" in split:
        yield "{n_groups} groups".format(**split["groups"])


def _text(value: JSON) -> str:
    return shown(value if isinstance(value, str) else repr(value))
