"""Prompts behind a text: what they are called, and which sets of them are there, as data.

A causal model's last token knows all of the text, and what stands behind the text asks it for
something: its sentiment, its topic, one word for it (PromptEOL: Jiang et al. 2024, "Scaling
Sentence Embeddings with Large Language Models"; several tasks side by side: MetaEOL, Lei et al.
2024, "Meta-Task Prompting Elicits Embeddings from Large Language Models"). The hidden states of the
prompt's last token are a feature of their own, the pooling `last` of that prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import xxhash

from llmembed.common.errors import ConfigError
from llmembed.extract.texts.templates import is_unicode

PRESETS: Mapping[str, tuple[str, ...]] = {
    "sentiment": ("It was", "The sentiment is", "In one word:", "This is"),
    "topic": ("This is about", "Keywords:", "The subject is", "In one word:"),
    "intent": ("In one word:", "The user wants to", "It was", "I want to"),
    "general": ("In one word:", "It was", "This is about", "This is"),
    "eol": ("In one word:",),
    "meta-eol": (
        "The topic in one word:",
        "The sentiment in one word:",
        "The intent in one word:",
        "In one word:",
    ),
}
"""Suffixes by the name of their set, chosen over folds of training rows, and short: every token is
computed for every text."""
AUTO = "auto"
"""The set that is made of the names of the classes."""
_ASKED_OF = "last"
"""The pooling over the tokens of a text and its prompt."""
_NAMED_LABELS = 8
"""Classes that a prompt names, at most: longer lists cost more tokens than most texts have."""
_SLUG_LENGTH, _DIGITS = 24, 6
_BARE = re.compile(r"[\w-]+")
_WORD = re.compile(r"[a-z0-9]+")


def check_prompts(given: Sequence[str]) -> None:
    """Refuse what is neither a set of prompts nor a suffix; it needs no data set.

    Raises:
        ConfigError: naming the value.
    """
    for value in given:
        if value != AUTO:
            _suffixes_of(value, ())


def resolve_prompts(given: Sequence[str], labels: Sequence[str] = ()) -> dict[str, str]:
    """Give the suffixes that are meant, by name; `labels` are the names of the classes.

    >>> resolve_prompts(["It was", "eol"])
    {'it-was-64c6ad': ' It was', 'in-one-word-18e602': ' In one word:'}
    """
    joined = (_joined(text) for value in given for text in _suffixes_of(value, labels))
    return {name_of(text): text for text in joined}


def name_of(prompt: str) -> str:
    """Name a prompt by its words, and by its hash: so the name is its identity.

    >>> name_of(" It was")
    'it-was-64c6ad'
    """
    slug = "-".join(_WORD.findall(prompt.casefold()))[:_SLUG_LENGTH].strip("-") or "prompt"
    return f"{slug}-{xxhash.xxh3_64_hexdigest(prompt.encode())[:_DIGITS]}"


def pooling_of(name: str) -> str:
    """Name the pooling that a prompt makes.

    >>> pooling_of("it-was-64c6ad")
    'last.it-was-64c6ad'
    """
    return f"{_ASKED_OF}.{name}"


def _joined(text: str) -> str:
    return text if text[0].isspace() else f" {text}"


def _suffixes_of(value: str, labels: Sequence[str]) -> tuple[str, ...]:
    if value == AUTO:
        return (_about(labels),)
    if value in PRESETS:
        return PRESETS[value]
    if not is_unicode(value) or not value.strip():
        raise ConfigError(
            f"--prompts {value!r} is no text. Pass words that stand behind each text, such as "
            f"'The topic is', or one of {', '.join([*PRESETS, AUTO])}."
        )
    if _BARE.fullmatch(value):
        raise ConfigError.unknown(
            "set of prompts",
            value,
            [*PRESETS, AUTO],
            f"Pass one of them to --prompts, or a prompt of several words; ' {value}', with a "
            "blank before it, is a prompt of one.",
        )
    return (value,)


def _about(labels: Sequence[str]) -> str:
    """Ask which class it is: all of them named, or the first of many.

    >>> _about(["sports", "world"])
    'Is it sports or world? It is'
    """
    named = [label.replace("_", " ").strip() for label in labels]
    if not any(any(c.isalpha() for c in label) for label in named):
        raise ConfigError(
            "--prompts auto is made of the names of the classes, and these have none: "
            f"{', '.join(map(repr, named[:3])) or 'no class'}. Pass a set, such as "
            f"{', '.join(PRESETS)}, or a prompt of your own."
        )
    if len(named) > _NAMED_LABELS:
        return f"The category, such as {', '.join(named[:3])}, is"
    *others, last = named
    return f"Is it {', '.join(others)} or {last}? It is" if others else f"Is it {last}? It is"
