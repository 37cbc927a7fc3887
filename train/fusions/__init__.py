"""How several features become one vector, and what stands on it: names and facts, without torch.

The classes are in the modules, one a family; `classifier` puts them together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from llmembed.common.registry import Registry

AUTO = "auto"
Kind = TypeVar("Kind", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class FusionSpec:
    """What is known of a fusion."""

    home: Any  # its class, made from the widths of the features, or where it is: module:name
    learns: bool = False  # whether it has weights of its own, so that it is trained by gradient
    completes_base: bool = False  # whether the head adds to the logits of a solved classifier
    takes_one_feature: bool = False  # whether it refuses several features
    needs_equal_widths: bool = False  # whether it refuses features of different widths
    of_preset: bool = False  # whether it belongs to a `--preset`, and cannot be chosen alone


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What is known of a head."""

    home: Any  # its class, made from fused width, classes and dropout, or where it is: module:name
    is_solved: bool = False  # whether it is solved where the fusion does not learn
    is_trained: bool = True  # whether it can be trained by gradient
    gives_probabilities: bool = False  # which no temperature near 1 suits
    of_preset: bool = False  # whether it belongs to a `--preset`, and cannot be chosen alone


FUSIONS = Registry[FusionSpec]("fusion", "llmembed.fusions")
HEADS = Registry[HeadSpec]("head", "llmembed.heads")


def register_fusion(name: str, **facts: bool) -> Callable[[Kind], Kind]:
    """Let `--fusion NAME` stand for the class below; it is made from the widths of the features.

    It is given float32, by `LLMEmbedClassifier` float64, and gives what it is given.

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


def _register(name: str, home: str, **facts: bool) -> None:
    FUSIONS.register(name, FusionSpec(home=f"{__name__}.{home}", **facts))


def _register_head(name: str, home: str, **facts: bool) -> None:
    HEADS.register(name, HeadSpec(home=f"{__name__}.{home}", **facts))


_register("mean", "mixing:Mean", needs_equal_widths=True)
_register("max", "mixing:Max", needs_equal_widths=True)
_register("concat", "mixing:Concat")
_register("single", "mixing:Concat", takes_one_feature=True)
_register("cooc", "cooc:Cooc", learns=True, completes_base=True)
_register("cooc-cosine", "cooc:CoocCosine", learns=True, completes_base=True)
_register("cooc-sqrt", "cooc:CoocSqrt", learns=True, completes_base=True)
_register("scalar-mix", "mixing:ScalarMix", learns=True, needs_equal_widths=True)
_register("attention", "mixing:Attention", learns=True, needs_equal_widths=True)
_register("gated", "mixing:Gated", learns=True)
_register("paper", "paper:PaperCooc", learns=True, of_preset=True)
_register_head("ridge", "heads:LinearHead", is_solved=True, is_trained=False)
_register_head("lda", "heads:LinearHead", is_solved=True, is_trained=False)
_register_head("linear", "heads:LinearHead", is_solved=True)
_register_head("mlp", "heads:MLPHead")
_register_head("paper", "paper:PaperHead", gives_probabilities=True, of_preset=True)
