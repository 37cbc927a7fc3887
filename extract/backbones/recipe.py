"""What decides the feature of a text: backbone, tokenizer, and how a text is treated.

A recipe is what a cache records of a source, and all that is needed to repeat the extraction for a
new text. Its `fingerprint` is identity: two recipes with the same fingerprint give the same
features. Its `record` is the way back: where the model was found.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
import warnings
from collections.abc import Mapping
from typing import Any, Self

import xxhash

from llmembed.common.errors import (
    ConfigError,
    LLMEmbedWarning,
    ModelError,
)
from llmembed.extract.backbones.gguf import as_safetensors
from llmembed.extract.backbones.load import ModelShape, load_tokenizer, read_shape
from llmembed.extract.backbones.models import ModelFiles, find_model
from llmembed.extract.backbones.weights import hash_files
from llmembed.extract.config import ExtractConfig
from llmembed.extract.texts import template_fields

_UNBOUNDED = 1 << 20
"""Tokenizers without a limit of their own say something far beyond this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A backbone with its tokenizer, and the treatment of texts.

    Raises:
        ConfigError: the template is none, or is for pairs and the texts are not, or the other way
            round.
        ModelError: the tokenizer knows more tokens than the model.
    """

    model: str
    """The model as the user named it; a local one by its whole path."""
    revision: str | None = None
    """Commit, branch or tag of a Hub model."""
    trust_remote_code: bool = False
    """Whether code that the model brings may run."""
    template: str | None = None
    """Format string around each text, with the field {text}, or {text_a} and {text_b}."""
    text_pair: bool = False
    """Whether a text is a pair, as `llmembed.extract.texts` joins them."""
    max_length: int
    """Tokens kept of each text."""
    compute_dtype: str
    """Arithmetic of the backbone: bfloat16, float16, float32."""
    quantize: str | None = None
    """Weights of the backbone: nf4, int8."""
    dtype: str
    """Stored features: float16, float32."""

    def __post_init__(self) -> None:
        """Refuse a template that does not fit the texts."""
        if self.template is None:
            return
        if self.text_pair != ("text_a" in template_fields(self.template)):
            texts, fields = ("pairs", "{text_a} and {text_b}"), ("single", "{text}")
            kind, wanted = texts if self.text_pair else fields
            message = (
                f"template {self.template!r} does not fit the texts, which are {kind}. Give it "
                f"{wanted}, or check --text-column."
            )
            raise ConfigError(message)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Rebuild a recipe from what a cache or a run recorded of it.

        Raises:
            ModelError: the record lacks a field, or has one that is unknown or not allowed.
        """
        try:
            recipe = cls(**record)
            _check(recipe)
            return recipe
        except (TypeError, ConfigError) as error:
            reason = str(error).rstrip(".")
            message = (
                f"the recorded recipe {dict(record)} cannot be read: {reason}. It was written by "
                "another version of llmembed; extract again."
            )
            raise ModelError(message) from error

    @property
    def record(self) -> dict[str, Any]:
        """All fields, as JSON takes them."""
        return dataclasses.asdict(self)

    @functools.cached_property
    def found(self) -> ModelFiles:
        """The files as they were found, before any conversion."""
        return find_model(self.model, self.revision)

    @functools.cached_property
    def files(self) -> ModelFiles:
        """The files as a folder of safetensors."""
        return as_safetensors(self.found)

    @functools.cached_property
    def shape(self) -> ModelShape:
        """Layers and widths of the model."""
        return read_shape(self.files, trust_remote_code=self.trust_remote_code)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        tokenizer = load_tokenizer(self.files, trust_remote_code=self.trust_remote_code)
        known = self.shape.config.get_text_config().vocab_size
        highest = max(tokenizer.get_vocab().values())
        if highest >= known:
            message = (
                f"the tokenizer of {self.files.name} has token {highest}, but the model knows "
                f"{known} tokens. Put the tokenizer that belongs to the model beside it."
            )
            raise ModelError(message)
        return tokenizer

    @property
    def empty_token(self) -> int:
        """The token that stands for a text without any: begin-of-text, else end-of-text, else 0."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def pad_token(self) -> int:
        """The token in padded places: the tokenizer's, else `empty_token`."""
        token = self.tokenizer.pad_token_id
        return self.empty_token if token is None else int(token)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of the features, as JSON takes it."""
        return {
            "backbone": self.found.backbone,
            "revision": self.found.revision,
            "weights": hash_files(self.found.weight_files),
            "tokenizer": _tokenizer_hash(self.tokenizer),
            "special_tokens": True,
            "template": self.template,
            "max_length": self.max_length,
            "layer_convention": "hidden_states[k]; 0 = embeddings, last = after the final norm",
            "compute_dtype": self.compute_dtype,
            "quantize": self.quantize,
            **({"text_pair": True} if self.text_pair else {}),
        }

    def notes_on(self, n_truncated: int, n_empty: int) -> list[str]:
        """Say of some texts how many were cut, and how many are empty."""
        notes = []
        if n_truncated:
            were = "text was" if n_truncated == 1 else "texts were"
            notes.append(f"{n_truncated:,} {were} cut at {self.max_length} tokens.")
        if n_empty:
            token = self.tokenizer.convert_ids_to_tokens(self.empty_token)
            texts = "text" if n_empty == 1 else "texts"
            notes.append(f"{n_empty:,} empty {texts} got the feature of the lone token {token!r}.")
        return notes

    def within_positions(self) -> Self:
        """Lower `max_length` to what the model has positions for, with a warning that says both."""
        limits = [self.shape.max_positions, self.tokenizer.model_max_length]
        limit = min(int(limit) for limit in (*limits, _UNBOUNDED) if limit is not None)
        if self.max_length <= limit:
            return self
        warnings.warn(
            f"max-length {self.max_length} is more than {self.files.name} has positions for: texts "
            f"are cut at {limit} tokens.",
            LLMEmbedWarning,
            stacklevel=2,
        )
        return dataclasses.replace(self, max_length=limit)


def _check(recipe: Recipe) -> None:
    """Refuse values that no extraction records.

    Raises:
        TypeError, ConfigError: saying which.
    """
    for name, hint in typing.get_type_hints(Recipe).items():
        if not isinstance(getattr(recipe, name), hint):
            raise TypeError(f"its {name} is of another type")
    if recipe.compute_dtype == "auto" or recipe.max_length > _UNBOUNDED:
        raise TypeError("its compute_dtype or max_length is none that is recorded")
    ExtractConfig(
        model=recipe.model,
        layers="all",
        template=recipe.template,
        max_length=recipe.max_length,
        compute_dtype=recipe.compute_dtype,
        quantize=recipe.quantize,
        dtype=recipe.dtype,
    )


def _tokenizer_hash(tokenizer: Any) -> str:
    """Hash everything a fast tokenizer does, truncation and padding settings aside."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    digest = xxhash.xxh3_128_hexdigest(backend.to_str().encode())
    if truncation is not None:
        backend.enable_truncation(**truncation)
    if padding is not None:
        backend.enable_padding(**padding)
    return digest
