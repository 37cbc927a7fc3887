"""From texts to a prediction on a toy model, here or in a process that sees what Windows has.

python whole_way.py FOLDER MODEL DATASET
"""

from __future__ import annotations

import json
import pkgutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import as_on_windows


def whole_way(folder: Path, model: Path, dataset: Path) -> dict[str, Any]:
    """Extract, fit and predict; give the features' bytes as text, and probabilities."""
    import llmembed
    from llmembed import ExtractConfig, FitConfig, fit, load_run, open_cache

    cache = str(folder / "topics.zarr")
    config = ExtractConfig(
        model=str(model),
        layers="1,2",
        pooling=("mean",),
        dataset=str(dataset),
        cache=cache,
        max_length=64,
    )
    llmembed.extract.extract(config)
    features = [
        open_cache(cache)[split].features(layer=layer).tobytes().hex()
        for split in ("train", "test")
        for layer in (1, 2)
    ]
    run = fit(FitConfig(cache=cache, fusion="concat", output=str(folder / "run")))
    asked = ["w2 w2 w2 w2 w2 w9", "w1 w1 w1"]
    return {"features": features, "answer": load_run(run.path).predict_proba(asked).tolist()}


def main() -> None:
    """Import every module as on Windows, then go the whole way."""
    as_on_windows.hide()
    for name in ("cache_format", "extract", "train"):
        package = import_module(f"llmembed.{name}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    folder, model, dataset = map(Path, sys.argv[1:])
    sys.stdout.write(json.dumps(whole_way(folder, model, dataset)))


if __name__ == "__main__":
    main()
