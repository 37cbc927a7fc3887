"""Texts in, classes out, with scikit-learn's conventions: here both stages meet.

The estimator extracts the features of its texts and trains on them as `llmembed-fit` does, all rows
but the validation share being trained on. Several labels a text come as an indicator matrix
`[N, C]`, or as a list of labels for each; the predictions are such a matrix. Several targets of
several classes each are fitted by scikit-learn's `MultiOutputClassifier` around this one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmembed.common.errors import ConfigError, DataError, MissingPackageError
from llmembed.common.process import full_float32
from llmembed.train.config import FitConfig
from llmembed.train.fusions.classifier import Architecture, Classifier
from llmembed.train.inputs import Feature, data_in_memory
from llmembed.train.inputs.arguments import (
    as_class_weights,
    as_seed,
    as_texts,
    as_weights,
)
from llmembed.train.inputs.grouping import as_group_names
from llmembed.train.inputs.sets import weights_of_sets
from llmembed.train.linear.devices import device_of
from llmembed.train.linear.domain import Domain
from llmembed.train.measures import Floats, HeldOutRows, decided
from llmembed.train.measures.doubt import Bools, answered
from llmembed.train.measures.promises import Promises
from llmembed.train.verbs.fitting import train

if TYPE_CHECKING:
    from llmembed.extract import TextFeatures

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.validation import check_consistent_length, check_is_fitted

    from llmembed.train.inputs.classes import as_target
except ModuleNotFoundError as error:
    raise MissingPackageError.of("scikit-learn", "sklearn", "LLMEmbedClassifier") from error

_FIT_OPTIONS = frozenset(field.name for field in dataclasses.fields(FitConfig)) - {"cache"}
_OF_EARLIER_VERSIONS = {"held_out_": None, "domain_": None, "_watches": False}
_SHARED = frozenset({"layers", "pooling"})  # a fit uses all that is extracted


@dataclasses.dataclass(repr=False, eq=False)
class LLMEmbedClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # untyped
    """Classifies texts by the hidden states of a frozen language model.

    Args:
        model: backbone: an alias, a Hub id, or a local folder or GGUF file.
        layers: layers to use: 16, [8, 16, 24], or a string: 8,16,24; a range; last:5; all.
        pooling: poolings over tokens, a list or separated by commas.
        prompts: prompts behind each text, whose last tokens are features too: a set (sentiment,
            topic, intent, general, eol, meta-eol, or auto: of the names of the classes), a prompt
            itself, or a list of them.
        max_length: tokens kept of each text.
        template: format string around each text, with the field {text}.
        compute_dtype: arithmetic of the backbone.
        quantize: nf4 or int8.
        revision: commit, branch or tag of a Hub model.
        trust_remote_code: run the model code that a Hub repository brings.
        device: device of the backbone.
        cache: folder that remembers the features of texts, so that none is computed twice; made by
            the first fit, and no cache of a data set, as llmembed-extract makes them.
        fusion: how the features become one vector.
        head: classifier on the fused vector.
        val_fraction: share of the rows that early stopping watches.
        epochs: most epochs to train by gradient.
        batch_size: examples in a training step.
        lr: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        dropout: share of the fused vector that is dropped while training.
        patience: epochs without a lower validation loss before the fit stops.
        class_weight: None, "balanced" (`n / (C n_c)` for class c, n_c being the sum of the sample
            weights of its texts and n that of all), or a dict of weights, a class that is not in
            it having 1. Of several labels a text, None.
        threshold: of several labels a text the probability from which on each is given; None is
            that with the best F1 of each label on rows not fitted to.
        accelerator: Lightning's accelerator for the fit.
        random_state: of the shares, the first weights, the order of batches and dropout: a seed,
            or None, a RandomState or a Generator of numpy, which draw another at every fit.

    As in scikit-learn's own vectorisers of texts, there is no `n_features_in_`: texts have no
    columns.

    Attributes:
        classes_: the C classes, sorted; the columns of an indicator matrix, by number, or by name
            where a table has them.
        features_: what the classifier takes of the backbone, side by side.
        classifier_: the classifier, in torch and float64.
        held_out_: what it said of training texts that it had not seen, by which it doubts; None
            where no text was held out, or of several labels a text.
        domain_: what tells how far a text lies from those of the training; None of several labels.
    """

    model: str = "smollm2-135m"
    layers: str | int | Sequence[int] = "8,16,24"
    _: dataclasses.KW_ONLY
    pooling: str | Sequence[str] = "mean,last"
    prompts: str | Sequence[str] = ()
    max_length: int = 512
    template: str | None = None
    compute_dtype: str = "auto"
    quantize: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    cache: str | None = None
    fusion: str = FitConfig.fusion
    head: str = FitConfig.head
    val_fraction: float | None = FitConfig.val_fraction
    epochs: int | None = FitConfig.epochs
    batch_size: int | None = FitConfig.batch_size
    lr: float | None = FitConfig.lr
    weight_decay: float | None = FitConfig.weight_decay
    dropout: float | None = FitConfig.dropout
    patience: int | None = FitConfig.patience
    class_weight: str | Mapping[Any, float] | None = None
    threshold: float | None = FitConfig.threshold
    accelerator: str = FitConfig.accelerator
    random_state: Any = FitConfig.seed

    def fit(
        self,
        X: Iterable[str],  # noqa: N803 - scikit-learn's name
        y: Iterable[Any],
        sample_weight: Iterable[float] | None = None,
        groups: Iterable[Any] | None = None,
    ) -> Self:
        """Extract the features of texts and train on them.

        A text of weight s, in a class of weight c, counts as `s c` where something is trained or
        chosen; the statistics of the features and the temperature count s alone. Only the
        proportions of weights matter. A text without weight is left out, as if it were not there,
        and a class that has no other text with it.

        Args:
            X: N texts: a list, an iterator, an array, a series, or a table of one column.
            y: N classes: strings, whole numbers or booleans. Where a text may have several, an
                indicator matrix `[N, C]`, or N lists of them.
            sample_weight: N weights of 0 or more; None weighs all texts alike.
            groups: N values; texts of one, such as those of one author, stay on one side of the
                folds and of the validation share. None divides texts as they come.

        Raises:
            ConfigError: a parameter is not allowed.
            DataError: a text is no string, a class or a group is missing, there is only one class
                or group, or a weight is not allowed.
            ModelError: the backbone cannot be used.
            CacheMismatchError: the cache is one that llmembed-extract made.
        """
        config = self._fit_config()
        plan = config.plan()
        device_of(plan.method.accelerator, plan.method.devices)
        texts, (names, codes) = as_texts(X), as_target(y)
        check_consistent_length(texts, codes)
        if not texts:
            raise DataError("X must be a list of strings, and holds none. Pass some of each class.")
        weights = as_weights(sample_weight, len(texts))
        group_of = None if groups is None else as_group_names(groups, len(texts))
        of_names = None
        if codes.ndim == 2:
            if self.class_weight is not None:
                raise weights_of_sets(self.class_weight)
        elif isinstance(self.class_weight, Mapping):
            of_names = as_class_weights(self.class_weight, names)
        kept = np.flatnonzero(weights if of_names is None else weights * of_names[codes])
        self.classes_, codes = names, codes[kept]
        if codes.ndim == 1:
            present, codes = np.unique(codes, return_inverse=True)
            self.classes_ = names[present]
        if codes.ndim == 1 and len(self.classes_) < 2:
            found = f"1 class, {self.classes_.tolist()[0]!r}," if len(kept) else "no class"
            raise DataError(
                f"y has {found} in the {len(kept)} texts whose weight is above 0; a classifier "
                "needs two. Pass texts of another class."
            )
        self.text_features_ = self._text_features([str(name) for name in self.classes_])
        made = self.text_features_
        features = [
            Feature(made.source, pooling, layer, made.hidden_size) for pooling, layer in made.arrays
        ]
        data = data_in_memory(
            plan.reading,
            self._read_all([texts[row] for row in kept], features),
            codes.astype(np.int64),
            [str(name) for name in self.classes_],
            features,
            sample_weights=weights[kept],
            class_weights=None if of_names is None else of_names[np.isin(names, self.classes_)],
            groups=None if group_of is None else group_of[kept],
        )
        outcome = train(plan, data)
        self.features_ = outcome.data.features
        # In float32 the scores of a text would differ in the last bits by what stands beside it.
        self.classifier_ = outcome.best.classifier.double()
        self.held_out_ = outcome.best.held_out
        self.domain_ = None if codes.ndim == 2 else Domain.of(outcome.data, config.seed)
        self._watches = len(data.shares.validation) > 0
        return self

    def decision_function(self, X: Iterable[str]) -> Floats:  # noqa: N803
        """Give the scores whose softmax are the probabilities, float64 `[N, C]`.

        Of two classes it is one score a text, `[N]`: the log-odds of the second class. Of several
        labels a text it is how far the log-odds of each lie above those of its threshold.
        """
        scores = self._scores(X)
        if self.classifier_.thresholds is not None:
            found: Floats = scores - torch.logit(self.classifier_.thresholds, 1e-12).numpy()
            return found
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: Iterable[str]) -> Floats:  # noqa: N803
        """Give float64 `[N, C]`, the probability of each class for each text."""
        return self._proba(self._scores(X))

    def predict(
        self,
        X: Iterable[str],  # noqa: N803
        *,
        abstain: float | None = None,
        unknown: Any = None,
    ) -> npt.NDArray[Any]:
        """Give the class of each text; of several labels an indicator matrix, int64 `[N, C]`.

        Args:
            X: N texts.
            abstain: answer only so many texts that this share of the answers is right, such as
                0.95, which texts held out of training tell; None answers all.
            unknown: what stands in place of other answers. Where it is of the kind of `classes_`,
                such as a string among strings, so is the array; else it is one of objects.

        Returns:
            `[N]`, of the type of `classes_`, or what `unknown` makes of it.

        Raises:
            ConfigError: as `abstain_below` does, or there is an `unknown` without `abstain`.
        """
        if unknown is not None and abstain is None:
            raise ConfigError(
                f"unknown {unknown!r} is for texts that abstain leaves without an answer. Pass "
                "abstain=0.95 or another share, or leave it out."
            )
        below = None if abstain is None else self.abstain_below(abstain)
        scores = self._scores(X)
        if self.classifier_.thresholds is not None:
            thresholds = self.classifier_.thresholds.double().numpy()
            return decided(self._proba(scores), thresholds).astype(np.int64)
        predicted: npt.NDArray[Any] = self.classes_[scores.argmax(axis=1)]
        if below is None:
            return predicted
        return _with_unknown(predicted, ~answered(self._proba(scores), below), unknown)

    def abstain_below(self, accuracy: float) -> float:
        """Find the probability below which to abstain, so that answers are right with this share.

        Texts held out of training tell it; `predict(X, abstain=accuracy)` answers the texts whose
        likeliest class has at least this probability.

        Raises:
            ConfigError: `accuracy` is not between 0 and 1, the texts held out do not reach it, none
                were held out, or a text may have several labels.
        """
        return self._promises("abstain").abstain_below(accuracy)

    def label_sets(
        self,
        X: Iterable[str],  # noqa: N803
        coverage: float = 0.9,
        *,
        by_class: bool = False,
    ) -> Bools:
        """Give for each text the labels that hold the right one with this share, bool `[N, C]`.

        The columns are the classes of `classes_`. No label may be in a set: nothing known is like
        the text.

        Args:
            X: N texts.
            coverage: share of the sets that hold the right label; texts held out of training tell
                which labels that takes.
            by_class: of the texts of each class this share, not of all alone. A class of which too
                few were held out is in every set, with a warning.

        Raises:
            ConfigError: `coverage` is not between 0 and 1, too few texts were held out for it, or a
                text may have several labels.
        """
        promises = self._promises("coverage")
        promises.check_sets(coverage, by_class=by_class)
        return promises.label_sets(self.predict_proba(X), coverage, by_class=by_class)

    def out_of_domain(self, X: Iterable[str]) -> Floats:  # noqa: N803
        """Give the share of training texts at least as far from the others as each text.

        Of texts like those of the training, 1 % have 0.01 or less.

        Returns:
            float64 `[N]`, above 0 and at most 1.

        Raises:
            ConfigError: a text may have several labels.
        """
        check_is_fitted(self)
        self._refuse_sets("out_of_domain")
        if self.domain_ is None:
            raise ConfigError(
                "this classifier was fitted by an earlier version and does not keep what "
                "out_of_domain needs. Fit again."
            )
        texts, found = as_texts(X), [np.empty(0)]
        if texts:
            with torch.inference_mode(), full_float32():
                for x in self._read(texts, self.features_):
                    z = self.classifier_.standardise(x).float()
                    found.append(self.domain_.shares_as_far(z))
        return np.concatenate(found)

    def __getstate__(self) -> dict[str, Any]:
        """Give plain values and arrays alone, as skops takes them."""
        state: dict[str, Any] = dict(super().__getstate__())
        if "classifier_" in state:
            weights = self.classifier_.state_dict().items()
            state["features_"] = [tuple(feature) for feature in self.features_]
            state["classifier_"] = {
                "architecture": dataclasses.asdict(self.classifier_.architecture),
                "weights": {name: weight.numpy() for name, weight in weights},
            }
            if self.held_out_ is not None:
                state["held_out_"] = dict(vars(self.held_out_))
            if self.domain_ is not None:
                state["domain_"] = {name: one.numpy() for name, one in vars(self.domain_).items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build what was fitted from them."""
        if "classifier_" in state:
            with torch.device("meta"):
                classifier = Classifier(Architecture(**state["classifier_"]["architecture"]))
            weights = state["classifier_"]["weights"].items()
            classifier.load_state_dict(
                {name: torch.tensor(array) for name, array in weights}, assign=True
            )
            features = tuple(Feature(*feature) for feature in state["features_"])
            state = _OF_EARLIER_VERSIONS | state
            state |= {"features_": features, "classifier_": classifier.eval()}
            if (held_out := state["held_out_"]) is not None:
                state["held_out_"] = HeldOutRows(**held_out)
            if (domain := state["domain_"]) is not None:
                tensors = {name: torch.tensor(array) for name, array in domain.items()}
                state["domain_"] = Domain(**tensors)
        super().__setstate__(state)

    def __sklearn_tags__(self) -> Any:
        """Say that the input is a list of strings."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.no_validation = True
        tags.classifier_tags.multi_label = True
        return tags

    def _promises(self, option: str) -> Promises:
        """Give what held-out rows promise, to who asks by this argument."""
        check_is_fitted(self)
        self._refuse_sets(option)
        if self.held_out_ is None:
            raise ConfigError(
                f"this classifier keeps no held-out rows, which {option} needs: it was fitted on "
                "too few texts to hold any out, with val_fraction=0, or by an earlier version. Fit "
                "again, on more texts, or without val_fraction=0."
            )
        auto = ", or with fusion='auto', which holds every text out" if self._watches else ""
        return Promises(
            held_out=self.held_out_,
            n_classes=len(self.classes_),
            who="this classifier",
            option=option,
            way=f"fit on more texts{auto}",
        )

    def _refuse_sets(self, option: str) -> None:
        if self.classifier_.thresholds is not None:
            raise ConfigError(
                f"{option} is for classifiers of texts with one label each, and this one was "
                "fitted on texts that may have several. Leave it out; predict_proba tells how sure "
                "it is of each label."
            )

    def _proba(self, scores: Floats) -> Floats:
        proba: Floats = self.classifier_.proba(torch.from_numpy(scores)).numpy()
        return proba

    def _scores(self, X: Iterable[str]) -> Floats:  # noqa: N803
        check_is_fitted(self)
        texts = as_texts(X)
        if not texts:
            return np.empty((0, len(self.classes_)))
        with torch.inference_mode(), full_float32():
            blocks = self._read(texts, self.features_)
            scores: Floats = torch.cat([self.classifier_(x) for x in blocks]).numpy()
        return scores

    def _read_all(self, texts: list[str], features: Sequence[Feature]) -> Tensor:
        x, start = torch.empty(len(texts), sum(one.hidden_size for one in features)), 0
        for block in self._read(texts, features):
            x[start : start + len(block)] = block
            start += len(block)
        return x

    def _read(self, texts: list[str], features: Sequence[Feature]) -> Iterator[Tensor]:
        for arrays in self.text_features_.in_blocks(texts):
            parts = [arrays[feature.pooling, feature.layer] for feature in features]
            yield torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))

    def _text_features(self, labels: Sequence[str]) -> TextFeatures:
        from llmembed.extract import ExtractConfig, TextFeatures
        from llmembed.extract.texts.prompts import resolve_prompts

        given = self.get_params(deep=False)
        own = (_FIT_OPTIONS - _SHARED) | {"class_weight", "random_state"}
        options = {name: value for name, value in given.items() if name not in own}
        config = ExtractConfig(**options)
        prompts = tuple(resolve_prompts(config.prompts, labels).values())
        return TextFeatures(dataclasses.replace(config, prompts=prompts))

    def _fit_config(self) -> FitConfig:
        given = self.get_params(deep=False)
        options = {name: given[name] for name in _FIT_OPTIONS - _SHARED if name in given}
        balance = "none" if self.class_weight is None else self.class_weight
        if not isinstance(balance, str | Mapping):
            raise ConfigError(
                f"class_weight {balance!r} is neither None, 'balanced', nor a dict with a weight "
                "for each class. Pass one of these."
            )
        options["class_weight"] = balance if isinstance(balance, str) else "none"
        return FitConfig(cache="texts", seed=as_seed(self.random_state), **options)


def _with_unknown(predicted: npt.NDArray[Any], refused: Bools, unknown: Any) -> npt.NDArray[Any]:
    """Put `unknown` in place of what is refused, `[N]`.

    >>> _with_unknown(np.array(["a", "b"]), np.array([False, True]), "other").tolist()
    ['a', 'other']
    >>> _with_unknown(np.array([3, 4]), np.array([False, True]), None).tolist()
    [3, None]
    """
    kind = np.asarray(unknown).dtype
    is_alike = kind.kind == predicted.dtype.kind
    found = predicted.astype(np.result_type(predicted, kind) if is_alike else object)
    found[refused] = unknown
    return found
