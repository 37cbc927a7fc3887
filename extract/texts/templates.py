"""What the tokenizer is given: a text, or a pair of texts, and what stands around it.

The texts of a pair (premise and hypothesis, question and answer) are held as one string, joined by
the unit separator U+001F, which no text may hold by itself. Only the tokenizer, which has its own
way of joining two texts, and a template with {text_a} and {text_b} take it apart.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from llmembed.common.errors import ConfigError, DataError

SEPARATOR = "\x1f"


def template_fields(template: str) -> list[str]:
    """List the fields of a template, bare, so that no text is formatted away; or a ConfigError.

    >>> template_fields("{text_a} {{so}} {text_b}")
    ['text_a', 'text_b']
    """
    if isinstance(template, str) and not is_unicode(template):
        raise ConfigError(
            f"template {template!r} holds a lone surrogate, which is not Unicode. Write it in "
            "UTF-8."
        )
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"template {template!r} is not a format string ({error}). Write a brace that is text "
            "twice, as in {{, and the place of the text as {text}."
        ) from error
    fields = [str(name) for _, name, _, _ in parts]
    written = [
        f"{{{name}{'' if conversion is None else f'!{conversion}'}{width and f':{width}'}}}"
        for _, name, width, conversion in parts
    ]
    if sorted(written) not in (["{text}"], ["{text_a}", "{text_b}"]):
        raise ConfigError(
            f"template {template!r} has the fields {', '.join(written) or 'none'}; it must have "
            "{text}, once and alone, or for pairs {text_a} and {text_b}, once each, with nothing "
            "else inside the braces. Write a brace that is text twice, as in {{."
        )
    return fields


def fill(template: str | None, texts: Sequence[str], *, text_pair: bool) -> list[list[str]]:
    r"""Give what the tokenizer takes: one list of texts, or for pairs without a template two.

    Raises:
        DataError: a text is not a pair and should be.

    >>> fill("{text_a} -> {text_b}", ["rain\x1fwet"], text_pair=True)
    [['rain -> wet']]
    >>> fill(None, ["rain\x1fwet"], text_pair=True)
    [['rain'], ['wet']]
    """
    if not text_pair:
        return [[template.format(text=text) for text in texts] if template else list(texts)]
    pairs = [text.split(SEPARATOR) for text in texts]
    for row, pair in enumerate(pairs):
        if len(pair) != 2:
            raise DataError(
                f"text {row} is not a pair, which the features are made of. Pass a file with two "
                "columns (--text-column a,b), or join two strings by U+001F."
            )
    if template:
        return [[template.format(text_a=first, text_b=second) for first, second in pairs]]
    return [[first for first, _ in pairs], [second for _, second in pairs]]


def describe_bad_text(texts: Sequence[Any]) -> str:
    """Name the first text that is no Unicode string."""
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {row} is a {type(text).__name__}, not a string. Pass strings only."
        if not is_unicode(text):
            return f"text {row} holds a lone surrogate, which is not Unicode. Repair its encoding."
    return "the texts cannot be tokenised. Pass a list of strings."


def is_unicode(text: str) -> bool:
    r"""Tell whether a string can be written: a lone surrogate cannot.

    >>> is_unicode("é"), is_unicode("\ud83d")
    (True, False)
    """
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
