"""The `--layers` option: which layers of a model a specification names.

Layer k is the output of block k, counted from 1, and layer 0 the embeddings: Hugging Face's
`hidden_states[k]`, whose last member has passed the final norm.
"""

from __future__ import annotations

from llmembed.cache_format.errors import ConfigError


def parse_layers(specification: str, n_layers: int, model: str) -> tuple[int, ...]:
    """Resolve a specification against a model of `n_layers` blocks.

    Args:
        specification: comma-separated numbers, ranges `start:stop:step` with Python's meaning over
            0..n_layers, `all`, or `last:k`; a negative number counts from the end.
        n_layers: blocks of the whole model.
        model: its name, for messages.

    Returns:
        The layers in ascending order, each once.

    Raises:
        ConfigError: a part cannot be read, names a layer that does not exist, or names none.

    >>> parse_layers("8,1:8:3,-1", 30, "smollm2-135m")
    (1, 4, 7, 8, 30)
    >>> parse_layers("last:2", 6, "minilm")
    (5, 6)
    """
    parts = [part.strip() for part in specification.split(",") if part.strip()]
    layers = {layer for part in parts for layer in _resolve(part, n_layers, model)}
    if not layers:
        message = (
            f"--layers {specification!r} names no layer of {model}, which has {n_layers} layers "
            f"(1-{n_layers}; 0 is the embeddings). Pass for example --layers {n_layers}."
        )
        raise ConfigError(message)
    return tuple(sorted(layers))


def _resolve(part: str, n_layers: int, model: str) -> list[int]:
    everything = range(n_layers + 1)
    if part == "all":
        return list(everything)
    head, _, tail = part.partition(":")
    try:
        if head == "last":
            return [_existing(layer, n_layers, model) for layer in range(-int(tail), 0)]
        if ":" in part:
            bounds = [int(bound) if bound else None for bound in part.split(":")]
            return list(everything[slice(*bounds)])
        return [_existing(int(part), n_layers, model)]
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        message = (
            f"--layers has {part!r}, which is no layer. Write numbers (8,16), ranges "
            "(start:stop:step), all, or last:5."
        )
        raise ConfigError(message) from error


def _existing(layer: int, n_layers: int, model: str) -> int:
    counted = layer + n_layers + 1 if layer < 0 else layer
    if not 0 <= counted <= n_layers:
        message = (
            f"layer {layer} does not exist in {model}, which has {n_layers} layers (1-{n_layers}; "
            "0 is the embeddings). Pass --layers within that range."
        )
        raise ConfigError(message)
    return counted
