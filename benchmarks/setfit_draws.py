"""Train SetFit on each draw of a few texts, in an environment of its own that has it.

Started by `few` with the interpreter that `--setfit` names. One JSON document comes in on stdin:
the folder of the body, tokens kept of a text, draws of texts and classes, and the texts to label. A
line of JSON goes out on stdout for each draw, after it: what was predicted, and seconds of all.

SetFit (Tunstall et al., "Efficient few-shot learning without prompts", 2022) tunes the body on
pairs of texts of equal and of different classes, then fits a logistic regression. Everything but
the body, the length and the seed is SetFit's own default: one epoch over all pairs, in batches of
16, the rarer kind drawn repeatedly.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from typing import Any


def answer(model: str, max_length: int, draw: dict[str, Any], new: list[str]) -> dict[str, Any]:
    """Train on the texts of a draw, and label others.

    Args:
        model: folder of the body, which sentence-transformers can read.
        max_length: tokens kept of each text.
        draw: its `texts`, their classes `y`, and the `seed`.
        new: texts to label.
    """
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    started = time.perf_counter()
    classifier: Any = SetFitModel.from_pretrained(model, device="cpu")
    classifier.model_body.max_seq_length = max_length
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            show_progress_bar=False,
            seed=draw["seed"],
        )
        rows = Dataset.from_dict({"text": draw["texts"], "label": draw["y"]})
        Trainer(model=classifier, args=arguments, train_dataset=rows).train()
    predicted = classifier.predict(new, as_numpy=True, show_progress_bar=False)
    return {"predicted": predicted.tolist(), "seconds": time.perf_counter() - started}


def answer_all() -> None:
    """Answer every draw of the document on stdin; what packages print goes to stderr."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    asked, out = json.load(sys.stdin), sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for draw in asked["draws"]:
            found = answer(asked["model"], asked["max_length"], draw, asked["new"])
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    answer_all()
