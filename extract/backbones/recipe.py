"""What decides the feature of a text: backbone, tokenizer, and how a text is treated.

A recipe is what a cache records of a source, and all that is needed to repeat the extraction for a
new text. Its `fingerprint` is identity: two recipes with the same fingerprint give the same
features. Its `record` is the way back: where the model was found, and what computed them.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

import xxhash

from llmembed.common.errors import (
    ConfigError,
    MissingPackageError,
    ModelError,
    warn,
)
from llmembed.extract.backbones.models import ModelFiles, find_model, hash_files
from llmembed.extract.texts import template_fields

if TYPE_CHECKING:
    from llmembed.extract.backbones.load import ModelShape

COMPUTE_DTYPES = ("auto", "bfloat16", "float16", "float32")
STORED_DTYPES = ("float16", "float32")
QUANTIZATIONS = ("nf4", "int8", "fp8")
_UNBOUNDED = 1 << 20
"""Tokenizers without a limit of their own say something far beyond this."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a recipe that no recipe can have; it needs neither texts nor a model.

    Raises:
        ConfigError: a value is not among those allowed.
        MissingPackageError: weights are to be quantised by bitsandbytes, which is not installed.
    """
    for option, kind, allowed in (
        ("compute_dtype", "compute dtype", COMPUTE_DTYPES),
        ("dtype", "dtype", STORED_DTYPES),
        ("quantize", "quantization", QUANTIZATIONS),
    ):
        value = options[option]
        if value not in allowed and not (option == "quantize" and value is None):
            remedy = f"Pass one of them to --{option.replace('_', '-')}."
            raise ConfigError.unknown(kind, value, allowed, remedy)
    if options["quantize"] in ("nf4", "int8") and find_spec("bitsandbytes") is None:
        purpose = f"--quantize {options['quantize']}"
        raise MissingPackageError.of("bitsandbytes", "quantize", purpose)
    if options["max_length"] < 1:
        raise ConfigError(
            f"--max-length is {options['max_length']}; it counts from 1. Pass a positive number."
        )
    if options["template"] is not None:
        template_fields(options["template"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A backbone with its tokenizer, and the treatment of texts.

    The fields are options of `ExtractConfig`, and `text_pair`, which the texts decide.

    Raises:
        ConfigError: the template is none, or is for pairs and the texts are not, or the other way
            round.
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
    """Weights of the backbone: nf4, int8, fp8."""
    dtype: str
    """Stored features: float16, float32."""
    torch: str | None = None
    """Version of torch that features were made with, where that is recorded."""
    transformers: str | None = None
    """Version of transformers that they were made with."""
    attention: str | None = None
    """Attention that transformers chose for them: sdpa, eager, ..."""

    def __post_init__(self) -> None:
        """Refuse a template that does not fit the texts."""
        if self.template is None:
            return
        if self.text_pair != ("text_a" in template_fields(self.template)):
            texts, fields = ("pairs", "{text_a} and {text_b}"), ("single", "{text}")
            kind, wanted = texts if self.text_pair else fields
            raise ConfigError(
                f"template {self.template!r} does not fit the texts, which are {kind}. Give it "
                f"{wanted}, or check --text-column."
            )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Rebuild a recipe from what a cache or a run recorded of it.

        Raises:
            ModelError: the record lacks a field, or has one that is unknown or not allowed.
        """
        try:
            recipe = cls(**record)
            for name, hint in typing.get_type_hints(cls).items():
                if not isinstance(getattr(recipe, name), hint):
                    raise TypeError(f"its {name} is of another type")
            if recipe.compute_dtype == "auto" or recipe.max_length > _UNBOUNDED:
                raise TypeError("its compute_dtype or max_length is none that is recorded")
            check_options(vars(recipe))
            return recipe
        except (TypeError, ConfigError) as error:
            reason = str(error).rstrip(".")
            raise ModelError(
                f"the recorded recipe {dict(record)} cannot be read: {reason}. It was written by "
                "another version of llmembed; extract again."
            ) from error

    @property
    def record(self) -> dict[str, Any]:
        """All fields, as JSON takes them, with what computes here where nothing is recorded."""
        return dataclasses.asdict(self) | ({} if self._made_with else self._made_here)

    @property
    def _made_with(self) -> dict[str, str]:
        recorded = {name: getattr(self, name) for name in ("torch", "transformers", "attention")}
        return {name: value for name, value in recorded.items() if value is not None}

    @functools.cached_property
    def _made_here(self) -> dict[str, str]:
        from llmembed.extract.backbones.load import attention_of

        # Builds of one version for a CPU and for CUDA are told apart behind the plus.
        versions = {name: version(name).partition("+")[0] for name in ("torch", "transformers")}
        attention = attention_of(self.shape, trust_remote_code=self.trust_remote_code)
        return versions | {"attention": attention}

    def warn_of_other_versions(self) -> None:
        """Say in one sentence where the recorded features were made with other software."""
        pairs = ((name, value, self._made_here[name]) for name, value in self._made_with.items())
        others = [f"{name} {value} (here {here})" for name, value, here in pairs if value != here]
        if others:
            warn(
                f"features of {self.files.name} were made with {', '.join(others)}: new ones may "
                "differ from them beyond rounding. Install those versions, or compare by "
                "llmembed-cache verify --model."
            )

    @functools.cached_property
    def found(self) -> ModelFiles:
        """The files as they were found, before any conversion."""
        return find_model(self.model, self.revision)

    @functools.cached_property
    def files(self) -> ModelFiles:
        """The files as a folder of safetensors."""
        from llmembed.extract.backbones.load import as_safetensors

        return as_safetensors(self.found)

    @functools.cached_property
    def shape(self) -> ModelShape:
        """Layers and widths of the model."""
        from llmembed.extract.backbones.load import read_shape

        return read_shape(self.files, trust_remote_code=self.trust_remote_code)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            ModelError: it cannot be read, or knows more tokens than the model.
        """
        from llmembed.extract.backbones.load import load_tokenizer

        tokenizer = load_tokenizer(self.files, trust_remote_code=self.trust_remote_code)
        known = self.shape.config.get_text_config().vocab_size
        highest = max(tokenizer.get_vocab().values())
        if highest >= known:
            raise ModelError(
                f"the tokenizer of {self.files.name} has token {highest}, but the model knows "
                f"{known} tokens. Put the tokenizer that belongs to the model beside it."
            )
        return tokenizer

    @property
    def empty_token(self) -> int:
        """The token that stands for a text without any: begin-of-text, else end-of-text, else 0."""
        tokens = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in tokens if token is not None)

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

    def refuse_other(self, expected: Mapping[str, Any]) -> None:
        """Refuse a backbone that has changed since features were made.

        Raises:
            ModelError: a part of the fingerprint is another than was recorded; both are named.
        """
        for key, value in expected.items():
            if self.fingerprint.get(key) != value:
                raise ModelError(
                    f"the backbone {self.files.name} has {key} {self.fingerprint.get(key)!r}, but "
                    f"the features were made with {value!r}. Use the same model files, or extract "
                    "and fit again."
                )

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

    def refuse_prompts(self, prompts: Mapping[str, str]) -> None:
        """Refuse prompts that cannot stand behind a text of this model.

        Raises:
            ConfigError: it reads texts in both directions, or has no token or no position for one.
        """
        from llmembed.extract.backbones.load import says_it_sees_ahead

        if says_it_sees_ahead(self.shape, trust_remote_code=self.trust_remote_code):
            raise no_prompts_behind(self.files.name)
        for prompt in prompts.values():
            self._refuse_without_room(prompt, len(self.suffix(prompt)))

    def suffix(self, prompt: str) -> tuple[int, ...]:
        """Tokenise what stands behind a text, without special tokens."""
        encoded = self.tokenizer(prompt, add_special_tokens=False, verbose=False)
        return tuple(encoded["input_ids"])

    @functools.cached_property
    def n_closing(self) -> int:
        """Special tokens that the tokenizer puts behind a text."""
        encoded = self.tokenizer("a", return_special_tokens_mask=True, verbose=False)
        mask = encoded["special_tokens_mask"]
        return int(mask[::-1].index(0)) if 0 in mask else 0

    def _refuse_without_room(self, prompt: str, n_tokens: int) -> None:
        limit, name = self.shape.max_positions, self.files.name
        if not n_tokens:
            raise ConfigError(
                f"prompt {prompt!r} has no token in the vocabulary of {name}. Pass another one to "
                "--prompts."
            )
        if limit is not None and self.max_length + n_tokens > limit:
            raise ConfigError(
                f"prompt {prompt!r} of {n_tokens} tokens behind a text of --max-length "
                f"{self.max_length} is more than the {limit} positions of {name}. Pass "
                f"--max-length {max(1, limit - n_tokens)} or less."
            )

    def within_positions(self) -> Self:
        """Lower `max_length` to what the model has positions for, with a warning that says both."""
        limits = [self.shape.max_positions, self.tokenizer.model_max_length, _UNBOUNDED]
        limit = min(int(limit) for limit in limits if limit is not None)
        if self.max_length <= limit:
            return self
        warn(
            f"max-length {self.max_length} is more than {self.files.name} has positions for: texts "
            f"are cut at {limit} tokens."
        )
        return dataclasses.replace(self, max_length=limit)


def no_prompts_behind(name: str) -> ConfigError:
    """Make the error for a model in which a token sees those behind it."""
    return ConfigError(
        f"--prompts stand behind a text that is read before them, and {name} reads texts in both "
        "directions. Put the prompt around the text by --template '{text} ...', or pass a causal "
        "model to --model."
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
