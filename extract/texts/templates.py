"""Text around a text: a template, whose fields are bare, so that no text can be formatted away."""

from __future__ import annotations

import string

from llmembed.common.errors import ConfigError


def template_fields(template: str) -> list[str]:
    """List the fields of a template, which are bare: no width, conversion or attribute.

    Raises:
        ConfigError: it is no such template.

    >>> template_fields("{text_a} {{so}} {text_b}")
    ['text_a', 'text_b']
    """
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except (ValueError, TypeError) as error:
        message = (
            f"template {template!r} is not a format string ({error}). Write a brace that is text "
            "twice, as in {{, and the place of the text as {text}."
        )
        raise ConfigError(message) from error
    fields = [str(name) for _, name, _, _ in parts]
    is_bare = all(not width and conversion is None for _, _, width, conversion in parts)
    if not is_bare or (fields != ["text"] and sorted(fields) != ["text_a", "text_b"]):
        written = [
            f"{{{name}{'' if conversion is None else f'!{conversion}'}{width and f':{width}'}}}"
            for _, name, width, conversion in parts
        ]
        message = (
            f"template {template!r} has the fields {', '.join(written) or 'none'}; it must have "
            "{text}, once and alone, or for pairs {text_a} and {text_b}, once each, with nothing "
            "else inside the braces. Write a brace that is text twice, as in {{."
        )
        raise ConfigError(message)
    return fields
