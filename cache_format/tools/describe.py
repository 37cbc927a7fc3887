"""What `llmembed-cache info` prints: a tree of what a cache holds, as data and as text.

Names and values come from the cache, so they are printed with every control character escaped.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmembed.cache_format.layout.documents import JSON
from llmembed.cache_format.layout.schema import array_name
from llmembed.cache_format.reader import Cache, Split
from llmembed.common.errors import shown


def describe(cache: Cache) -> dict[str, JSON]:
    """Collect what a cache holds, as one JSON document."""
    return {
        "path": str(cache.path),
        "fingerprint": cache.fingerprint,
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
    yield f"{_text(description['path'])}  {_text(dataset['name'])}, {n_classes} classes"
    yield f"  fingerprint {description['fingerprint'][:16]}"
    yield f"  created {_text(description['created'])}"
    for key, value in sorted(dataset["provenance"].items()):
        yield f"  {_text(key)}: {_text(value)}"
    for name, source in description["sources"].items():
        identity = ", ".join(f"{_text(k)}={_text(v)}" for k, v in source["fingerprint"].items())
        yield f"  source {name}: hidden size {source['hidden_size']}, {identity}"
    for name, split in description["splits"].items():
        yield f"  {name}/  {split['n_rows']} rows"
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
    return {"n_rows": split.n_rows, "arrays": arrays}


def _text(value: JSON) -> str:
    return shown(value if isinstance(value, str) else repr(value))
