"""The `--layers` option: which layers a specification names, in every command.

Layer k is the output of block k, counted from 1, and layer 0 the embeddings: Hugging Face's
`hidden_states[k]`, whose last member has passed the final norm.

A number names a layer of the model: -1 is its last layer, cached or not. A range, `all` and
`last:k` choose among what there is: in an extraction all layers of the model, in a fit those of
the cache. So after `--layers 8,16,24` the fit's `last:2` is 16 and 24, and its -1 an error where
layer 24 is not the model's last.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmembed.common.errors import ConfigError

_HOW = "Write numbers (8,16), ranges (start:stop:step), all, or last:5."


def parse_layers(specification: str, n_layers: int, model: str) -> tuple[int, ...]:
    """Resolve a specification against a model of `n_layers` blocks: ascending, each once.

    Raises:
        ConfigError: a part cannot be read, or names no layer; the message names the model.

    >>> parse_layers("8,1:8:3,-1", 30, "smollm2-135m")
    (1, 4, 7, 8, 30)
    >>> parse_layers("last:2", 6, "minilm")
    (5, 6)
    """
    layers: set[int] = set()
    for part in layer_parts(specification):
        named = named_layers(part, n_layers, range(n_layers + 1))
        if not named:
            raise ConfigError(
                f"layer {part} does not exist in {model}, which has {n_layers} layers "
                f"(1-{n_layers}; 0 is the embeddings). Pass --layers within that range."
            )
        layers.update(named)
    return tuple(sorted(layers))


def check_layers(specification: str) -> None:
    """Refuse, by a `ConfigError`, what no model could make sense of."""
    for part in layer_parts(specification):
        named_layers(part, 1, range(2))


def layer_parts(specification: str) -> list[str]:
    """Split a specification at its commas; without a part, and of no string, it is a `ConfigError`.

    >>> layer_parts("8, last:2")
    ['8', 'last:2']
    """
    if not isinstance(specification, str):  # from Python
        raise ConfigError(f"layers is {specification!r}, no string. Pass one, such as '8,16'.")
    parts = [part.strip() for part in specification.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"--layers {specification!r} names no layer. {_HOW}")
    return parts


def named_layers(part: str, n_layers: int, available: Sequence[int]) -> tuple[int, ...]:
    """Give those of the available layers, ascending, that one part names; it may be none.

    Negative numbers count from the `n_layers` blocks of the whole model. What cannot be read is a
    `ConfigError`.

    >>> named_layers("-1", 32, [8, 16, 32]), named_layers("last:2", 32, [8, 16, 24])
    ((32,), (16, 24))
    >>> named_layers("9:-1", 32, [8, 16, 24]), named_layers("last:4", 32, [8, 16, 24])
    ((16, 24), ())
    """
    try:
        wanted = _read_part(part, n_layers, available)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--layers has {part!r}, which is no layer. {_HOW}") from error
    return tuple(layer for layer in available if layer in wanted)


def _read_part(part: str, n_layers: int, available: Sequence[int]) -> Sequence[int]:
    if part == "all":
        return available
    head, _, tail = part.partition(":")
    if head == "last":
        count = int(tail)
        return available[-count:] if 0 < count <= len(available) else ()
    if ":" in part:
        bounds = [int(bound) if bound else None for bound in part.split(":")]
        return range(n_layers + 1)[slice(*bounds)]
    layer = int(part)
    return (layer + n_layers + 1 if layer < 0 else layer,)
