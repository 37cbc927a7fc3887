"""Texts in, classes out, with scikit-learn's conventions.

The estimator extracts the features of its texts and trains on them as `llmembed-fit` does, all rows
but the validation share being trained on. Parameters have the names and defaults of `ExtractConfig`
and `FitConfig`, but for `random_state` and `class_weight`, which are scikit-learn's.

Without `cache` the backbone runs anew for every call, in a grid search for every fold; with it no
text is computed twice, whatever the folds. Several labels to a text (an indicator matrix `[N, C]`)
are several classifiers: scikit-learn's `MultiOutputClassifier` around this one fits them, and with
`cache` computes the features once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmembed.cache_format.errors import DataError, MissingPackageError
from llmembed.train.config import FitConfig
from llmembed.train.data import data_in_memory
from llmembed.train.fitting import train
from llmembed.train.metrics import Floats
from llmembed.train.predict import text_features
from llmembed.train.select import Feature

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets, type_of_target
    from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d
except ModuleNotFoundError as error:
    raise MissingPackageError.of("scikit-learn", "sklearn", "LLMEmbedClassifier") from error

_FIT_OPTIONS = frozenset(field.name for field in dataclasses.fields(FitConfig)) - {"cache"}
_SHARED = frozenset({"layers", "pooling"})  # a fit uses all that is extracted


class LLMEmbedClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # untyped
    """Classifies texts by the hidden states of a frozen language model.

    Args:
        model: backbone: an alias, a Hub id, or a local folder or GGUF file.
        layers: layers to use: 8,16,24; a range; last:5; all.
        pooling: poolings over tokens, separated by commas.
        max_length: tokens kept of each text.
        template: format string around each text, with the field {text}.
        compute_dtype: arithmetic of the backbone.
        quantize: nf4 or int8.
        revision: commit, branch or tag of a Hub model.
        trust_remote_code: run the model code that a Hub repository brings.
        device: device of the backbone.
        cache: folder that remembers the features of texts; None remembers nothing.
        fusion: how the features become one vector.
        head: classifier on the fused vector.
        val_fraction: share of the rows that early stopping watches.
        epochs: most epochs to train by gradient.
        batch_size: examples in a training step.
        lr: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        dropout: share of the fused vector that is dropped while training.
        patience: epochs without a lower validation loss before the fit stops.
        class_weight: None or "balanced".
        accelerator: Lightning's accelerator for the fit.
        random_state: seed of the shares, the first weights, the order of batches and dropout.

    Attributes:
        classes_: the C classes, sorted.
        features_: what the classifier takes of the backbone, side by side.
        classifier_: the classifier, in torch.
    """

    classes_: npt.NDArray[Any]

    def __init__(
        self,
        model: str = "smollm2-135m",
        layers: str = "8,16,24",
        *,
        pooling: str = "mean",
        max_length: int = 512,
        template: str | None = None,
        compute_dtype: str = "auto",
        quantize: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str = "auto",
        cache: str | None = None,
        fusion: str = FitConfig.fusion,
        head: str = FitConfig.head,
        val_fraction: float | None = FitConfig.val_fraction,
        epochs: int | None = FitConfig.epochs,
        batch_size: int | None = FitConfig.batch_size,
        lr: float | None = FitConfig.lr,
        weight_decay: float | None = FitConfig.weight_decay,
        dropout: float | None = FitConfig.dropout,
        patience: int | None = FitConfig.patience,
        class_weight: str | None = None,
        accelerator: str = FitConfig.accelerator,
        random_state: int = FitConfig.seed,
    ) -> None:
        self.model = model
        self.layers = layers
        self.pooling = pooling
        self.max_length = max_length
        self.template = template
        self.compute_dtype = compute_dtype
        self.quantize = quantize
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.device = device
        self.cache = cache
        self.fusion = fusion
        self.head = head
        self.val_fraction = val_fraction
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.patience = patience
        self.class_weight = class_weight
        self.accelerator = accelerator
        self.random_state = random_state

    def fit(self, X: Iterable[str], y: Iterable[Any]) -> Self:  # noqa: N803 - scikit-learn's name
        """Extract the features of texts and train on them.

        Args:
            X: N texts.
            y: N classes, numbers or strings.

        Raises:
            ConfigError: a parameter is not allowed.
            DataError: a text is no string, has several labels, or there is only one class.
            ModelError: the backbone cannot be used.
        """
        config = self._fit_config()
        texts = _as_texts(X)
        check_classification_targets(y)
        if type_of_target(y).startswith("multilabel"):
            raise DataError(
                f"y has the shape {np.asarray(y).shape}, several labels to a text; a fit takes one "
                "class a text. Wrap it, MultiOutputClassifier(LLMEmbedClassifier(cache=...)) of "
                "scikit-learn, to fit one for each label; the cache keeps the features."
            )
        classes = column_or_1d(y, warn=True)
        check_consistent_length(texts, classes)
        self.classes_, codes = np.unique(classes, return_inverse=True)
        self.text_features_ = text_features(self._extract_options())
        source = self.text_features_.source
        features = [
            Feature(source, pooling, layer, self.text_features_.hidden_size)
            for pooling, layer in self.text_features_.arrays
        ]
        data = data_in_memory(
            config,
            self._read(texts, features),
            codes.astype(np.int64),
            [str(name) for name in self.classes_],
            features,
        )
        outcome = train(config, data)
        self.features_, self.classifier_ = outcome.data.features, outcome.best.classifier
        return self

    def predict_proba(self, X: Iterable[str]) -> Floats:  # noqa: N803
        """Give float64 `[N, C]`, the probability of each class for each text."""
        check_is_fitted(self)
        x = self._read(_as_texts(X), self.features_)
        with torch.inference_mode():
            proba: Floats = self.classifier_(x).double().softmax(dim=1).numpy()
        return proba

    def predict(self, X: Iterable[str]) -> npt.NDArray[Any]:  # noqa: N803
        """Give the class of each text."""
        proba = self.predict_proba(X)
        predicted: npt.NDArray[Any] = self.classes_[proba.argmax(axis=1)]
        return predicted

    def __sklearn_tags__(self) -> Any:
        """Say that the input is a list of strings."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.no_validation = True
        return tags

    def _read(self, texts: list[str], features: Iterable[Feature]) -> Tensor:
        arrays = self.text_features_.features(texts)
        parts = [arrays[feature.pooling, feature.layer] for feature in features]
        return torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))

    def _extract_options(self) -> dict[str, Any]:
        given = self.get_params(deep=False)
        own = (_FIT_OPTIONS - _SHARED) | {"class_weight", "random_state"}
        options = {name: value for name, value in given.items() if name not in own}
        return options | {"pooling": tuple(part.strip() for part in self.pooling.split(","))}

    def _fit_config(self) -> FitConfig:
        given = self.get_params(deep=False)
        options = {name: given[name] for name in _FIT_OPTIONS - _SHARED if name in given}
        options["class_weight"] = self.class_weight or "none"
        return FitConfig(cache="texts", seed=self.random_state, **options)


def _as_texts(X: Iterable[str]) -> list[str]:  # noqa: N803
    texts = [] if isinstance(X, str) else list(X)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(
            "X must be a list of strings, and not empty. Pass [text] for a single one, and one "
            "column where the texts are part of a table."
        )
    return texts
