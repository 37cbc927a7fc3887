"""Every module imported, then extract, fit and predict on a toy model; what came out as JSON.

python whole_way.py FOLDER MODEL DATASET [as_on_windows]
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path


def main() -> None:
    """Run in a folder that is empty but for the model and the texts."""
    folder, model, dataset, *system = sys.argv[1:]
    for module in system:
        importlib.import_module(module)
    import llmembed
    from llmembed import ExtractConfig, FitConfig, fit, load_run, open_cache

    for package in (llmembed.cache_format, llmembed.extract, llmembed.train):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    cache = str(Path(folder) / "topics.zarr")
    llmembed.extract.extract(
        ExtractConfig(
            model=model, layers="1,2", dataset=dataset, cache=cache, compute_dtype="float32"
        )
    )
    chunk = {
        f"{split}/{layer}": open_cache(cache)[split].features(layer=layer).tobytes().hex()
        for split in ("train", "test")
        for layer in (1, 2)
    }
    run = fit(FitConfig(cache=cache, fusion="concat", output=str(Path(folder) / "run")))
    answer = load_run(run.path).predict_proba(["w2 w2 w2 w2 w2 w9"])
    print(json.dumps({"features": chunk, "probabilities": answer.tolist()}))


if __name__ == "__main__":
    main()
