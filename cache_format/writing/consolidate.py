"""What plain Zarr readers see: array documents, and consolidated metadata of what is complete.

The root's consolidated metadata lists the complete arrays only, so a reader that opens the root
cannot meet a row that was never written.
"""

from __future__ import annotations

from collections.abc import Mapping

from llmembed.cache_format.layout.columns import LABEL, TEXT_HASH
from llmembed.cache_format.layout.documents import (
    DOCUMENT,
    array_document,
    group_document,
    parse,
    put_document,
)
from llmembed.cache_format.layout.header import Header
from llmembed.cache_format.layout.schema import JSON, N_TOKENS, array_name
from llmembed.cache_format.layout.sources import SourceLayout, layouts, read_layout
from llmembed.cache_format.stores.base import Store
from llmembed.cache_format.writing.plan import SplitPlan


def ensure_arrays(store: Store, plan: SplitPlan) -> None:
    """Write the documents of a plan's arrays and groups, those that are not there yet."""
    source = f"{plan.split}/{plan.source}"
    for key in plan.arrays:
        put_document(
            store, f"{source}/{array_name(key)}/{DOCUMENT}", array_document(plan.feature_info)
        )
    put_document(store, f"{source}/{N_TOKENS}/{DOCUMENT}", array_document(plan.n_tokens_info))
    for pooling in sorted({pooling for pooling, _ in plan.arrays}):
        put_document(store, f"{source}/{pooling}/{DOCUMENT}", group_document({}))
    layout = read_layout(store, plan.split, plan.source)
    known = layout.arrays if layout else ()
    arrays = tuple(sorted({*known, *plan.arrays}))
    new = SourceLayout(block_rows=plan.block_rows, dtype=plan.dtype, arrays=arrays)
    put_document(store, f"{source}/{DOCUMENT}", new.document())


def is_laid_out(store: Store, plan: SplitPlan) -> bool:
    """Tell whether the documents of a plan's arrays are there; the source's comes last."""
    layout = read_layout(store, plan.split, plan.source)
    return layout is not None and set(plan.arrays) <= set(layout.arrays)


def consolidated_metadata(store: Store, header: Header) -> dict[str, JSON] | None:
    """Collect the documents of all complete arrays and their groups; None if there are none."""
    keys: set[str] = set()
    for split, source, layout, commits in layouts(store, header):
        arrays = [key for key in layout.arrays if commits.is_complete(array_name(key))]
        if arrays and commits.is_complete(N_TOKENS):
            keys |= {split, f"{split}/{LABEL}", f"{split}/{TEXT_HASH}", f"{split}/{source}"}
            keys |= {f"{split}/{source}/{N_TOKENS}"}
            keys |= {f"{split}/{source}/{pooling}" for pooling, _ in arrays}
            keys |= {f"{split}/{source}/{array_name(key)}" for key in arrays}
    if not keys:
        return None
    metadata = {key: _document(store, key) for key in sorted(keys)}
    return {"kind": "inline", "must_understand": False, "metadata": metadata}


def _document(store: Store, key: str) -> Mapping[str, JSON]:
    return parse(store.get(f"{key}/{DOCUMENT}") or b"", f"{store.location}/{key}/{DOCUMENT}").value
