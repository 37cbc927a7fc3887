"""Doubt: are answers right, and sets of labels complete, as often as held-out rows promise?

Each data set is judged on its published test split, and on test rows drawn anew from all of its
rows, which differ from the training rows by nothing but chance: what is missed on the first alone
is what the data sets differ by. Where a folder has out-of-scope texts (a split `oos_test`), the
out-of-domain share is told apart from the largest probability by the area under the ROC curve,
beside the distance to the k-th nearest training row (Sun et al., "Out-of-distribution detection
with deep nearest neighbors", 2022: features of length 1).

Each figure of a published split has the 95 % interval of a share of so many rows (Wilson): what is
within it of the promise may be chance. That of the draws is their mean with its standard error,
`within` where it is a point off at most (of refusals, below). Beside them stand the accuracies on
the test rows and on held-out rows.

    python benchmarks doubt --data clinc150=texts/clinc150 --data r8=texts/r8 --caches FOLDER
                            [--model minilm] [--layers 6] [--fusion auto] [--draws 5]
                            [--output FILE]

Data sets that the file of `--output` has already, and that are not named, stay in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from regression.suites import named
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

from llmembed.cache_format import open_cache
from llmembed.extract import ExtractConfig, extract
from llmembed.train import FitConfig
from llmembed.train.fusions.classifier import Trained
from llmembed.train.inputs.data import FitData, load_data, read_features
from llmembed.train.linear.domain import Domain
from llmembed.train.measures.doubt import abstain_below, answered, label_sets
from llmembed.train.measures.metrics import wilson_interval
from llmembed.train.verbs.fitting import train

NEIGHBOURS = (1, 10, 50)
A_POINT = 0.01
ABSTAIN, COVERAGES = (0.9, 0.95, 0.99), (0.8, 0.9, 0.95)
OUT_OF_SCOPE = "oos_test"


@harness.known_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Judge each data set, and print a table and the JSON line."""
    parser = harness.command_line(__doc__)
    add = parser.add_argument
    add("--data", action="append", required=True, help="NAME=FOLDER of texts")
    add(
        "--caches", default=".", help="folder for the caches, which are made where they are missing"
    )
    add("--model", default="minilm")
    add("--layers", default="6")
    add("--fusion", default="auto")
    add("--draws", type=int, default=5, help="how often the test rows are drawn anew")
    options = parser.parse_args(arguments)
    print(
        "| data | test rows | rule | asked | found | size | interval or error |\n"
        "|---|---|---|---|---|---|---|"
    )
    settings = {name: getattr(options, name) for name in ("model", "layers", "fusion")}
    document = {"data": {}} | harness.read(options.output) | settings
    for name, folder in named(options.data).items():
        cache = str(Path(options.caches) / f"{name}.zarr")
        files = sorted(path.stem for path in Path(folder).glob("*.parquet"))
        splits = tuple(one for one in ("train", "test", OUT_OF_SCOPE) if one in files)
        extract(
            ExtractConfig(
                model=options.model,
                layers=options.layers,
                pooling=("mean",),
                dataset=folder,
                cache=cache,
                split=splits,
            )
        )
        document["data"][name] = judge(name, cache, options.fusion, options.draws)
    harness.finish(document, options.output)
    return 0


def judge(name: str, cache: str, fusion: str, draws: int) -> dict[str, Any]:
    """Fit on the published training rows and on drawn ones, and compare with what is promised."""
    config = FitConfig(cache=cache, fusion=fusion)
    data = load_data(config.plan().reading)
    published = train(config.plan(), data)
    found: dict[str, Any] = {
        "accuracy": accuracies(published.best, data),
        "published": [with_interval(row) for row in kept_promises(published.best, data)],
    }
    redrawn = []
    for seed in range(draws):
        drawn = drawn_anew(data, seed)
        redrawn.append(kept_promises(train(config.plan(), drawn).best, drawn))
    found["drawn"] = [averaged(rows) for rows in zip(*redrawn, strict=True)]
    print(harness.row(name, "accuracy", *(f"{one:.3f}" for one in found["accuracy"].values())))
    for rows in ("published", "drawn"):
        for one in found[rows]:
            figures = [f"{one[key]:.3f}" for key in ("asked", "found", "size")]
            spread = one["error"] if rows == "drawn" else one["ci95"]
            shown = np.array(spread, dtype=np.float64).round(3)  # of one draw there is no error
            told = harness.row(name, rows, one["rule"], *figures, shown)
            print(told, flush=True)
    if OUT_OF_SCOPE in open_cache(cache).splits:
        split = open_cache(cache)[OUT_OF_SCOPE]
        other = published.data.standardiser(read_features(split, published.data.features))
        found["out_of_scope"] = areas(published.best, published.data, other, config.seed)
        print(found["out_of_scope"], flush=True)
    return found


def drawn_anew(data: FitData, seed: int) -> FitData:
    """Divide all rows of both splits by chance, into shares as large as they are."""
    x, y = torch.cat([data.x, data.x_eval]), torch.cat([data.y, data.y_eval])
    order = np.random.default_rng(seed).permutation(len(x))
    n_watched = len(data.shares.validation)
    n = n_watched + len(data.shares.train)
    watched, trained, test = order[:n_watched], order[n_watched:n], torch.from_numpy(order[n:])
    shares = dataclasses.replace(data.shares, train=np.sort(trained), validation=np.sort(watched))
    return dataclasses.replace(data, x=x, y=y, shares=shares, x_eval=x[test], y_eval=y[test])


def accuracies(trained: Trained, data: FitData) -> dict[str, float]:
    """Give the accuracy on held-out training rows and on the test rows."""
    assert trained.held_out is not None
    right = trained.classifier.logits_all(data.x_eval).argmax(dim=1) == data.y_eval
    return {"held_out": float(trained.held_out.right.mean()), "test": right.double().mean().item()}


def with_interval(row: dict[str, Any]) -> dict[str, Any]:
    """Add the interval of a share of so many rows, and whether the promise lies in it."""
    n = row["n"]
    low, high = wilson_interval(round(row["found"] * n), n) if n else (0.0, 1.0)
    least = 0.0 if row["rule"] == "abstain" else low  # it promises so many or more
    return row | {"ci95": [low, high], "within": least <= row["asked"] <= high}


def averaged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average a rule over draws; where none is answered, none is wrong.

    `found_answered` is the share of all answers that are right, however they lie in the draws.
    """
    rule, asked = rows[0]["rule"], rows[0]["asked"]
    n, found = np.array([row["n"] for row in rows]), np.array([row["found"] for row in rows])
    kept = np.where(n > 0, found, 1)
    mean = float(kept.mean())
    missed = asked - mean if rule == "abstain" else abs(asked - mean)
    return {
        "rule": rule,
        "asked": asked,
        "found": mean,
        "found_answered": float(np.average(found, weights=n)) if n.any() else None,
        "error": float(kept.std(ddof=1) / np.sqrt(len(kept))) if len(kept) > 1 else None,
        "size": float(np.mean([row["size"] for row in rows])),
        "n": float(n.mean()),
        "n_draws": len(rows),
        "within": missed <= A_POINT,
    }


def kept_promises(trained: Trained, data: FitData) -> list[dict[str, Any]]:
    """Compare what the held-out rows promise with what the test rows show."""
    assert trained.held_out is not None
    columns = trained.classifier.architecture.widths
    assert sum(columns) == data.x_eval.shape[1]
    proba = trained.classifier.logits_all(data.x_eval).softmax(dim=1).numpy()
    labels = data.y_eval.numpy()
    right, rows = proba.argmax(axis=1) == labels, []
    for accuracy in ABSTAIN:
        threshold = abstain_below(trained.held_out, accuracy)
        told = answered(proba, 2 if threshold is None else threshold)
        size, found = float(told.mean()), float(right[told].mean()) if told.any() else accuracy
        row = {"rule": "abstain", "asked": accuracy, "found": found, "size": size}
        rows.append(row | {"n": int(told.sum())})
    for by_class in (False, True):
        for coverage in COVERAGES:
            sets = label_sets(trained.held_out, proba, coverage, by_class=by_class)
            found, size = (
                float(sets[np.arange(len(sets)), labels].mean()),
                float(sets.sum(1).mean()),
            )
            rule = "sets by class" if by_class else "sets"
            row = {"rule": rule, "asked": coverage, "found": found, "size": size}
            rows.append(row | {"n": len(labels)})
    return rows


def areas(trained: Trained, data: FitData, other: Tensor, seed: int) -> dict[str, float]:
    """Tell test rows from others by distance and by the largest probability: areas under ROC."""
    domain, classifier = Domain.of(data, seed), trained.classifier
    scores = {
        "out_of_domain": [domain.shares_as_far(x) for x in (data.x_eval, other)],
        "max_probability": [
            classifier.logits_all(x).softmax(dim=1).amax(dim=1).numpy()
            for x in (data.x_eval, other)
        ],
    }
    for k in NEIGHBOURS:
        scores[f"nearest_{k}"] = [-nearest(x, data, k) for x in (data.x_eval, other)]
    of = np.repeat([0, 1], [len(data.x_eval), len(other)])
    found = {name: float(roc_auc_score(of, -np.concatenate(one))) for name, one in scores.items()}
    told = {f"inside_at_{share:g}": share for share in (0.01, 0.05)}
    inside = scores["out_of_domain"][0]
    return found | {name: float((inside <= share).mean()) for name, share in told.items()}


def nearest(x: Tensor, data: FitData, k: int) -> np.ndarray:
    """Give the distance of rows `[n, F]` of length 1 to the k-th nearest training row, `[n]`."""
    trained = normalize(data.x[torch.from_numpy(data.shares.train)])
    blocks = (torch.cdist(normalize(one), trained) for one in torch.split(x, 512))
    return torch.cat([one.kthvalue(k, dim=1).values for one in blocks]).numpy()
