"""What sentence encoders make of the same texts: MiniLM frozen with a regression, and SetFit.

sentence-transformers (Reimers and Gurevych, 2019) encodes with one vector a text; its users put a
logistic regression on it. SetFit (Tunstall et al., 2022) first tunes the encoder on pairs of texts
of equal and of different classes. Both start from the texts, so their time includes the encoder.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from compare import Ints
from sklearn.base import ClassifierMixin

from llmembed.extract import Recipe
from llmembed.extract.backbones.load import quiet

Labels = npt.NDArray[np.int32]
PAIRS_A_STEP = 16


def encode_and_regress(
    model: str, regression: ClassifierMixin, texts: Sequence[str], y: Labels, new: Sequence[str]
) -> Ints:
    """Encode texts by sentence-transformers, fit a regression, and label others.

    Args:
        model: alias or folder of the encoder.
        regression: scikit-learn classifier to fit.
        texts: N training texts.
        y: int32 `[N]`, their classes.
        new: n texts to label.

    Returns:
        int64 `[n]` of classes.
    """
    with _calm():
        from sentence_transformers import SentenceTransformer

        encoder = SentenceTransformer(_folder(model), device="cpu")
        x, x_new = (encoder.encode(list(part), show_progress_bar=False) for part in (texts, new))
    predicted: Ints = regression.fit(x, y).predict(x_new)
    return predicted


def tune_by_pairs(
    model: str, n_steps: int, texts: Sequence[str], y: Labels, new: Sequence[str]
) -> Ints:
    """Tune the encoder by SetFit for some steps of 16 pairs, fit its regression, label others.

    Args:
        model: alias or folder of the encoder.
        n_steps: gradient steps; SetFit's own default would see every pair once.
        texts: N training texts.
        y: int32 `[N]`, their classes.
        new: n texts to label.

    Returns:
        int64 `[n]` of classes.
    """
    torch.manual_seed(0)
    with _calm(), tempfile.TemporaryDirectory() as folder:
        from datasets import Dataset
        from setfit import SetFitModel, Trainer, TrainingArguments

        classifier: Any = SetFitModel.from_pretrained(_folder(model), device="cpu")
        arguments = TrainingArguments(
            batch_size=PAIRS_A_STEP,
            max_steps=n_steps,
            output_dir=folder,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            show_progress_bar=False,
            seed=0,
        )
        rows = Dataset.from_dict({"text": list(texts), "label": y.tolist()})
        Trainer(model=classifier, args=arguments, train_dataset=rows).train()
        predicted = classifier.predict(list(new), as_numpy=True, show_progress_bar=False)
    return np.asarray(predicted, dtype=np.int64)


def _folder(model: str) -> str:
    recipe = Recipe(model=model, max_length=128, compute_dtype="float32", dtype="float16")
    return str(recipe.files.folder)


@contextmanager
def _calm() -> Iterator[None]:
    """Pass over what these packages say about their own use of others."""
    logging.disable(logging.WARNING)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
