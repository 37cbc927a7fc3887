"""What the Hub's page says of a run: a model card, made from its record."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from llmembed.train.runs.record import how_to_get

_FIGURES = {
    "accuracy": ("Accuracy", "accuracy"),
    "macro_f1": ("Macro F1", "f1"),
    "micro_f1": ("Micro F1", "f1"),
    "samples_f1": ("Samples F1", "f1"),
    "ranking_precision": ("Label ranking average precision", None),
    "nll": ("Negative log-likelihood", None),
    "ece": ("Expected calibration error", None),
}
"""What is shown of metrics.json: its name for people, and the Hub's where it has one."""
_MOST_LABELS = 200
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ task }}: fusion {{ fusion }}, head {{ head }}, trained with
[llmembed](https://pypi.org/project/llmembed-cache/) on hidden states of a frozen language model.

## Use

```
pip install llmembed-cache=={{ version }}
llmembed-predict --run {{ place }} --text "some text"
```

```python
from llmembed.train import load_run

run = load_run("{{ place }}")
print(run.predict(["some text"]), run.predict_proba(["some text"]))
```

The language model is not in this repository:
{% for source in sources %}
- {{ source.name }}: {{ source.how }}
{%- endfor %}

No file here is a pickle, and none is run.

## Evaluation

{{ evaluation }}

| figure | value | 95 % interval |
|---|---|---|
{%- for row in figures %}
| {{ row | join(" | ") }} |
{%- endfor %}

## Classes

{{ labels }}

## Features

| source | layer | pooling | width | max. tokens | template | weights |
|---|---|---|---|---|---|---|
{%- for row in features %}
| {{ row | join(" | ") }} |
{%- endfor %}

Cache {{ fingerprint }}. Seed {{ seed }}. Made with {{ versions }}.

## Limits

- The figures hold for texts like those of the evaluation rows; for others nothing was measured.
- {{ limit }}
- Texts are cut at the number of tokens above.
- What the language model and the training texts are biased to, the answers are, too.
- {{ licence }}
"""


def card_of(
    record: Mapping[str, Any], metrics: Mapping[str, Any], place: str, licence: str | None
) -> str:
    """Write the README.md of a run's repository.

    Args:
        record: content of config.json.
        metrics: content of metrics.json.
        place: where it goes, user/name or user/name@revision.
        licence: the Hub's name of the licence, such as mit; None leaves it open.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    dataset = record["cache"].get("dataset") or PurePath(str(record["fit"].get("cache"))).stem
    name = place.partition("@")[0].partition("/")[2]
    split, n_eval = metrics.get("eval_split"), metrics.get("n_eval")
    backbones = {stored["fingerprint"].get("backbone") for stored in record["sources"].values()}
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=kind,
            metric_name=name,
            metric_value=metrics[figure],
        )
        for figure, (name, kind) in _FIGURES.items()
        if kind is not None and metrics.get(figure) is not None
    ]
    data = ModelCardData(
        license=licence,
        library_name="llmembed",
        pipeline_tag="text-classification",
        tags=["llmembed", "frozen-llm"],
        base_model=sorted(b for b in backbones if _HUB_ID.fullmatch(str(b))) or None,
        metrics=["accuracy", "f1"],
        model_name=name,
        eval_results=results or None,
    )
    names, architecture = record["labels"], record["architecture"]
    multilabel = bool(architecture.get("multilabel"))
    more = f" and {len(names) - _MOST_LABELS} more" if len(names) > _MOST_LABELS else ""
    versions = record.get("versions", {})
    card = ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        name=name,
        place=place,
        task=f"Gives texts those of {len(names)} labels that fit"
        if multilabel
        else f"Classifies texts into {len(names)} classes",
        limit="A text may get several of the labels above, or none; each has its own threshold."
        if multilabel
        else "Every text gets one of the classes above, also one that belongs to none of them.",
        fusion=_cell(architecture["fusion"]),
        head=_cell(architecture["head"]),
        version=versions.get("llmembed-cache", ""),
        sources=[
            {"name": _cell(name), "how": how_to_get(stored)}
            for name, stored in record["sources"].items()
        ],
        evaluation=f"{n_eval:,} rows of the split {_cell(split)} of the data set {_cell(dataset)}, "
        "which decided nothing in training."
        if n_eval
        else "No row was evaluated.",
        figures=[*_figure_rows(metrics)],
        labels=", ".join(_cell(name) for name in names[:_MOST_LABELS]) + more,
        features=[*_feature_rows(record)],
        fingerprint=f"`{record['cache'].get('fingerprint')}`",
        seed=record.get("seed"),
        versions=", ".join(f"{_cell(name)} {_cell(of)}" for name, of in versions.items()),
        licence=f"Licence: {_cell(licence)}." if licence else "No licence is stated.",
    )
    return str(card)


def _figure_rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for figure, (name, _) in _FIGURES.items():
        if metrics.get(figure) is not None:
            yield name, f"{metrics[figure]:.4f}", _interval(metrics.get(f"{figure}_ci95"))
    for baseline, of in (metrics.get("baselines") or {}).items():
        if isinstance(of, Mapping) and of.get("accuracy") is not None:
            name = f"Accuracy of the baseline {_cell(baseline)}"
            yield name, f"{of['accuracy']:.4f}", _interval(of.get("accuracy_ci95"))


def _feature_rows(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for feature in record["features"]:
        identity = record["sources"][feature["source"]]["fingerprint"]
        told = (identity.get(key) for key in ("max_length", "template", "weights"))
        own = (feature[key] for key in ("source", "layer", "pooling", "hidden_size"))
        yield *(_cell(value) for value in own), *(_cell(value) for value in told)


def _interval(ends: Any) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""


def _cell(value: Any) -> str:
    r"""Let a text from a record be a text of a table, whatever it holds.

    >>> _cell("a|b" + chr(10) + "<c>")
    'a\\|b &lt;c&gt;'
    """
    text = "" if value is None else " ".join(str(value).split())
    for sign, shown in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(sign, shown)
    return re.sub(r"([\\|*_`\[\]])", r"\\\1", text)
