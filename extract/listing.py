"""Which models and data sets have a short name, and which of them are on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmembed.extract.backbones.models import MODELS
from llmembed.extract.backbones.packaged import packaged_file
from llmembed.extract.texts import DATASETS


def models() -> list[dict[str, Any]]:
    """Describe every alias of `--model`; `here` says what has it on this machine, if anything."""
    return [
        {
            "name": name,
            "hub_id": (alias := MODELS[name]).hub_id,
            "layers": alias.n_layers,
            "hidden_size": alias.hidden_size,
            "licence": alias.licence,
            "here": _packaged(alias.package, [alias.file]) or _on_hub_cache(alias.hub_id),
        }
        for name in MODELS
    ]


def datasets() -> list[dict[str, Any]]:
    """Describe every alias of `--dataset`; `here` says what has it on this machine, if anything."""
    listed = []
    for name in DATASETS:
        alias = DATASETS[name]
        here = _packaged(alias.package, [*alias.files.values()])
        if alias.files and alias.package is None and all(map(os.path.exists, alias.files.values())):
            here = "files"
        if alias.hub_id is not None:
            here = _in_datasets_cache(alias.hub_id)
        place = alias.hub_id or alias.package or ", ".join(alias.files.values())
        listed.append({"name": name, "place": place, "here": here})
    return listed


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out such descriptions in columns."""
    lines = [
        [*rows[0]],
        *(["-" if row[name] is None else str(row[name]) for name in row] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    laid = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join(line.replace("_", " ") if n == 0 else line for n, line in enumerate(laid))


def _packaged(package: str | None, files: Sequence[str]) -> str | None:
    if package is None or not all(packaged_file(package, file) for file in files):
        return None
    return f"package {package.partition('==')[0]}"


def _on_hub_cache(hub_id: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    has_weights = isinstance(config, str) and any(Path(config).parent.glob("*.safetensors"))
    return "Hub cache" if has_weights else None


def _in_datasets_cache(hub_id: str) -> str | None:
    from huggingface_hub.constants import HF_HOME

    place = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    return "datasets cache" if (place / hub_id.replace("/", "___")).is_dir() else None
