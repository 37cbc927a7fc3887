"""A trained classifier with its record, and what it says of new texts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmembed.common.errors import (
    ConfigError,
    RunFormatError,
)
from llmembed.common.process import full_float32, memory_told
from llmembed.common.regular import open_regular
from llmembed.train.fusions.classifier import Classifier
from llmembed.train.inputs import Feature
from llmembed.train.inputs.arguments import as_texts
from llmembed.train.linear.domain import Domain
from llmembed.train.measures import Floats, HeldOutRows, likeliest_first
from llmembed.train.measures.doubt import answered
from llmembed.train.measures.promises import Promises
from llmembed.train.runs.held_out import (
    DOMAIN_FILE,
    HELD_OUT_FILE,
    require_held_out,
    way_to_more,
)
from llmembed.train.runs.predict import Backbones, Counted, Places, notes_on, warn_of_empty
from llmembed.train.runs.predictions import (
    PREDICTIONS_FILE,
    without_texts,
)
from llmembed.train.runs.record import (
    CONFIG_FILE,
    METRICS_FILE,
    MODEL_FILE,
    ONNX_FILE,
    as_json,
    read_json,
)

_SHARED_FILES = (
    CONFIG_FILE,
    METRICS_FILE,
    MODEL_FILE,
    DOMAIN_FILE,
    HELD_OUT_FILE,
    PREDICTIONS_FILE,
    ONNX_FILE,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained classifier with its record.

    The backbone is loaded at the first prediction and kept as long as the run lives; where the run
    is pickled or copied it stays behind. The backbones of several sources are kept together where
    the device has room (`llmembed.train.runs.predict.Backbones`). Texts go through some thousand
    at a time, so that memory holds the features of these alone.
    """

    path: Path
    """Folder of the run."""
    config: Mapping[str, Any] = field(repr=False)
    """Content of config.json."""
    metrics: Mapping[str, Any] = field(repr=False)
    """Content of metrics.json."""
    classifier: Classifier = field(repr=False)
    """The classifier, on the CPU."""
    held_out: HeldOutRows | None = field(default=None, repr=False)
    """What it said of training rows that it had not seen; None where it keeps none."""
    domain: Domain | None = field(default=None, repr=False, compare=False)
    """What tells how far a text lies from those of the training; None where it keeps none."""
    _backbones: Backbones = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Load no backbone yet."""
        object.__setattr__(self, "_backbones", Backbones(self.path, self.config))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the C classes."""
        return tuple(self.config["labels"])

    @property
    def features(self) -> tuple[Feature, ...]:
        """Features the classifier takes, side by side."""
        return tuple(Feature(**feature) for feature in self.config["features"])

    @property
    def text_column(self) -> str | None:
        """Column that the texts of its cache came from, if that is known."""
        column: str | None = self.config.get("cache", {}).get("text_column")
        return column

    @property
    def takes_pairs(self) -> bool:
        """Whether a text is a pair, joined by U+001F."""
        return any(source["recipe"].get("text_pair") for source in self.config["sources"].values())

    @property
    def thresholds(self) -> Floats | None:
        """Probabilities from which on labels are given, float64 `[C]`; None if a text has one."""
        found = self.classifier.thresholds
        return None if found is None else found.double().numpy()

    def token_counter(self) -> Callable[[Sequence[str]], Counted]:
        """Make what counts tokens, once a prediction has loaded the backbones.

        Raises:
            ConfigError: they are too large to be kept together.
        """
        return self._backbones.token_counter()

    def predict(
        self,
        texts: Sequence[str],
        device: str = "auto",
        *,
        model: Places = None,
        trust_remote_code: bool = False,
        abstain: float | None = None,
        unknown: str = "",
    ) -> list[str] | list[list[str]]:
        """Name the class of each text; other arguments and errors are those of `predict_proba`.

        Where a text may have several labels, it is a list of those that are given, the likeliest
        first, which may be empty.

        With `abstain` only so many are named that this share of the names is right, which rows held
        out of training tell; what is not named is `unknown`. A ConfigError says where they do not
        reach this share, or the run keeps none.

        A warning counts texts that are empty: they get a label as any other.
        """
        below = None if abstain is None else self.abstain_below(abstain)
        proba = self.predict_proba(texts, device, model=model, trust_remote_code=trust_remote_code)
        warn_of_empty(texts)
        if self.thresholds is not None:
            given = likeliest_first(proba, self.thresholds)
            return [[self.labels[index] for index in row] for row in given]
        named = [self.labels[index] for index in proba.argmax(axis=1)]
        if below is None:
            return named
        told = answered(proba, below)
        return [name if tells else unknown for name, tells in zip(named, told, strict=True)]

    def abstain_below(self, accuracy: float) -> float:
        """Find the probability below which to abstain, so that answers are right with this share.

        Raises:
            ConfigError: the rows held out of training do not reach it, or the run has none.
        """
        return self._promises("--abstain").abstain_below(accuracy)

    def predict_proba(
        self,
        texts: Sequence[str],
        device: str = "auto",
        *,
        model: Places = None,
        trust_remote_code: bool = False,
    ) -> Floats:
        """Give float64 `[N, C]`, the probability of each class for each text.

        The columns are the classes of `labels`, in this order. Where a text may have several
        labels, each has a probability of its own.

        Args:
            texts: N texts.
            device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
            model: where the backbone is now, where it is not where it was; of several sources,
                a mapping from their names to places, or `source=place` for each.
            trust_remote_code: whether code that a backbone brings may run.

        Raises:
            ConfigError: a backbone brings code of its own and `trust_remote_code` is not given,
                `model` leaves open which of several sources it is for, or memory runs out.
            DataError: `texts` is a single string or holds something else than strings.
            ModelError: a backbone is missing, or is not the one the run was trained with.
        """
        return self.judge(texts, device, model=model, trust_remote_code=trust_remote_code)[0]

    def out_of_domain(
        self,
        texts: Sequence[str],
        device: str = "auto",
        *,
        model: Places = None,
        trust_remote_code: bool = False,
    ) -> Floats:
        """Give the share of training rows at least as far from the others as each text, `[N]`.

        Of texts like those of the training, 1 % have 0.01 or less. Arguments and errors are those
        of `predict_proba`.

        Raises:
            ConfigError: the run does not keep what tells it.
        """
        domain = self.require_domain()
        return self.judge(texts, device, domain, model=model, trust_remote_code=trust_remote_code)[
            1
        ]

    def require_domain(self) -> Domain:
        """Give what tells how far a text lies from those of the training.

        Raises:
            ConfigError: the run does not keep it.
        """
        self._refuse_sets("--ood")
        if self.domain is None:
            raise ConfigError(
                f"the run {self.path} is of an earlier version and does not keep what --ood needs. "
                "Fit again."
            )
        return self.domain

    def _refuse_sets(self, option: str) -> None:
        if self.thresholds is not None:
            raise ConfigError(
                f"{option} is for runs in which each text has one label, and in the run "
                f"{self.path} it may have several. Leave it out; --proba tells how sure it is of "
                "each label."
            )

    def judge(
        self,
        texts: Sequence[str],
        device: str = "auto",
        domain: Domain | None = None,
        *,
        model: Places = None,
        trust_remote_code: bool = False,
    ) -> tuple[Floats, Floats]:
        """Give what `predict_proba` does and, by a domain, what `out_of_domain` does, at once."""
        texts = as_texts(texts, "texts")
        far = np.ones(len(texts))
        proba, start = np.empty((len(texts), len(self.labels))), 0
        remedy = "Free some of it, or pass --device cpu, in Python device='cpu'."
        features = self._backbones.features(
            texts, device, model, trust_remote_code=trust_remote_code
        )
        # Closed, for backbones are locked as long as it is at work.
        with full_float32(), memory_told(remedy), contextlib.closing(features):
            for x in features:
                with torch.inference_mode():
                    of_block = self.classifier.proba(self.classifier(x).double())
                    if domain is not None:
                        z = self.classifier.standardise(x)
                        far[start : start + len(x)] = domain.shares_as_far(z)
                proba[start : start + len(x)] = of_block.numpy()
                start += len(x)
        return proba, far

    def notes(self, texts: Sequence[str]) -> list[str]:
        """Say of texts that were predicted which are `empty` and which were `truncated`.

        Raises:
            ConfigError: backbones are too large to be kept together.
        """
        return notes_on(texts, self.token_counter()(texts).is_cut) if texts else []

    def label_sets(
        self, proba: Floats, coverage: float = 0.9, *, by_class: bool = False
    ) -> list[list[str]]:
        """Give the labels of each text that hold the right one with this share, likeliest first.

        Args:
            proba: float64 `[N, C]`, of `predict_proba`.
            coverage: share of the sets that hold the right label.
            by_class: of the texts of each class this share, not of all alone.

        Raises:
            ConfigError: `coverage` is not between 0 and 1, or the run keeps too few held-out rows.
        """
        found = self._promises("--conformal").label_sets(proba, coverage, by_class=by_class)
        order = (-proba).argsort(axis=1, kind="stable")
        return [
            [self.labels[k] for k in row if inside[k]]
            for row, inside in zip(order, found, strict=True)
        ]

    def check_sets(self, coverage: float, *, by_class: bool) -> HeldOutRows:
        """Refuse a coverage that the held-out rows can't show, and give these.

        Raises:
            ConfigError: as `label_sets` does.
        """
        promises = self._promises("--conformal")
        promises.check_sets(coverage, by_class=by_class)
        return promises.held_out

    def _promises(self, option: str) -> Promises:
        """Give what held-out rows promise, to who asks by this option.

        Raises:
            ConfigError: a text may have several labels, or the run keeps no held-out rows.
        """
        self._refuse_sets(option)
        return Promises(
            held_out=require_held_out(self.held_out, self.path, option),
            n_classes=len(self.labels),
            who=f"the run {self.path}",
            option=option,
            way=way_to_more(self.metrics),
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        licence: str | None = None,
        commit_message: str = "Add a run of llmembed",
    ) -> str:
        """Put the run on the Hugging Face Hub, with a model card, and give the URL of its page.

        It takes the place of a run that is there. Neither texts nor the report nor logs nor paths
        of this machine go along (`llmembed.train.runs.sharing`).

        Args:
            repo_id: user/name; a repository of models, made if need be.
            private: whether it is private, where it is made.
            token: a token with the right to write; None is HF_TOKEN, or that of `hf auth login`.
            revision: branch, made if need be; None is main.
            licence: the Hub's name of a licence for the card, such as mit; None states none.
            commit_message: of the one commit that it becomes.

        Raises:
            ConfigError: `repo_id` is no name of a repository.
            RunFormatError: its folder no longer holds this run, or the repository no run.
            RunStorageError: the Hub refuses or fails; nothing has changed there.
        """
        from llmembed.train.runs.card import card_of
        from llmembed.train.runs.sharing import CARD_FILE, public_record, push

        files = {}
        for name in _SHARED_FILES:
            try:
                with open_regular(self.path / name, RunFormatError) as file:
                    files[name] = file.read()
            except FileNotFoundError:
                continue
        if PREDICTIONS_FILE in files:
            files[PREDICTIONS_FILE] = without_texts(files[PREDICTIONS_FILE])
        if read_json(self.path / CONFIG_FILE) != json.loads(as_json(self.config)):
            raise RunFormatError(
                f"{self.path} holds another run since this one was loaded. Load it again."
            )
        record = public_record(self.config)
        files[CONFIG_FILE] = as_json(record)
        place = repo_id if revision is None else f"{repo_id}@{revision}"
        files[CARD_FILE] = card_of(record, self.metrics, place, licence).encode()
        return push(
            repo_id,
            files,
            may_hold=_SHARED_FILES,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
        )

    def to_onnx(self) -> bytes:
        """Give the classifier as an ONNX model, features in, probabilities out.

        Raises:
            MissingPackageError: onnx or onnxscript is not installed.
        """
        from llmembed.train.runs.export import onnx_of

        return onnx_of(self.classifier, self.config)
