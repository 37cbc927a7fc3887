"""Which fusions and heads there are, and what is known of each without importing torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from llmembed.common.registry import Registry

AUTO = "auto"
Kind = TypeVar("Kind", bound=type)


@dataclass(frozen=True, kw_only=True)
class FusionSpec:
    """What is known of a fusion."""

    home: Any
    """Its class, a `Fusion` made from the widths of the features, or where it is: module:name."""
    learns: bool = False
    """Whether it has weights of its own, so that it is trained by gradient."""
    completes_base: bool = False
    """Whether the head adds to the logits of a solved linear classifier, instead of making them."""
    takes_one_feature: bool = False
    """Whether it refuses several features."""
    needs_equal_widths: bool = False
    """Whether it refuses features of different widths."""
    of_preset: bool = False
    """Whether it belongs to a `--preset`, and cannot be chosen alone."""


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What is known of a head."""

    home: Any
    """Its class, made from fused width, classes and dropout, or where it is: module:name."""
    is_solved: bool = False
    """Whether it is solved, and folds choose its strength, where the fusion does not learn."""
    is_trained: bool = True
    """Whether it can be trained by gradient."""
    gives_probabilities: bool = False
    """Whether its outputs are probabilities, which no temperature near 1 suits."""
    of_preset: bool = False
    """Whether it belongs to a `--preset`, and cannot be chosen alone."""


FUSIONS = Registry[FusionSpec]("fusion", "llmembed.fusions")
HEADS = Registry[HeadSpec]("head", "llmembed.heads")


def register_fusion(name: str, **facts: bool) -> Callable[[Kind], Kind]:
    """Let `--fusion NAME` stand for the class below; it is made from the widths of the features.

    Args:
        name: what the option takes.
        facts: those of `FusionSpec`, such as `learns=True`.
    """

    def register(kind: Kind) -> Kind:
        FUSIONS.register(name, FusionSpec(home=kind, **facts))
        return kind

    return register


def register_head(name: str) -> Callable[[Kind], Kind]:
    """Let `--head NAME` stand for the module below, which is trained by gradient.

    It is made from the width of the fused vector, the number of classes and the share to drop.
    """

    def register(kind: Kind) -> Kind:
        HEADS.register(name, HeadSpec(home=kind))
        return kind

    return register


def choices(registry: Registry[FusionSpec] | Registry[HeadSpec]) -> tuple[str, ...]:
    """List what an option takes; packages that bring some of the names are not imported."""
    return tuple(
        name for name in registry if registry.brought_by(name) or not registry[name].of_preset
    )


def _of(module: str, name: str) -> str:
    return f"llmembed.train.fusions.{module}:{name}"


FUSIONS.register("mean", FusionSpec(home=_of("fixed", "Mean"), needs_equal_widths=True))
FUSIONS.register("max", FusionSpec(home=_of("fixed", "Max"), needs_equal_widths=True))
FUSIONS.register("concat", FusionSpec(home=_of("fixed", "Concat")))
FUSIONS.register("single", FusionSpec(home=_of("fixed", "Concat"), takes_one_feature=True))
for _name, _class in (("cooc", "Cooc"), ("cooc-cosine", "CoocCosine"), ("cooc-sqrt", "CoocSqrt")):
    FUSIONS.register(_name, FusionSpec(home=_of("cooc", _class), learns=True, completes_base=True))
for _name, _class in (("scalar-mix", "ScalarMix"), ("attention", "Attention")):
    FUSIONS.register(
        _name, FusionSpec(home=_of("mixing", _class), learns=True, needs_equal_widths=True)
    )
FUSIONS.register("gated", FusionSpec(home=_of("mixing", "Gated"), learns=True))
FUSIONS.register("paper", FusionSpec(home=_of("paper", "PaperCooc"), learns=True, of_preset=True))

for _name in ("ridge", "lda"):
    HEADS.register(
        _name, HeadSpec(home=_of("heads", "LinearHead"), is_solved=True, is_trained=False)
    )
HEADS.register("linear", HeadSpec(home=_of("heads", "LinearHead"), is_solved=True))
HEADS.register("mlp", HeadSpec(home=_of("heads", "MLPHead")))
HEADS.register(
    "paper",
    HeadSpec(home=_of("paper", "PaperHead"), gives_probabilities=True, of_preset=True),
)
