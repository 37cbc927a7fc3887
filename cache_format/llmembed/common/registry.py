"""Names that an option takes, and what each stands for: one registry a kind.

What is built in is registered where the kind is defined. Users add their own by the kind's
decorator, or let an installed package do it: its entry point of the kind's group has the new name,
and leads to the module whose import registers it. Names and facts of what is built in are known
without importing what does the work.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from llmembed.common.errors import ConfigError

Spec = TypeVar("Spec")


class Registry(Generic[Spec]):
    """What each name of a kind stands for.

    Args:
        kind: what messages call it; with hyphens for spaces, the option that takes its names.
        group: of the entry points by which packages bring names.

    >>> colours = Registry[str]("colour", "llmembed.doctest")
    >>> colours.register("red", "#ff0000")
    >>> list(colours), colours["red"]
    (['red'], '#ff0000')
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._specs: dict[str, Spec] = {}

    def register(self, name: str, spec: Spec) -> None:
        """Add a name; that it stands for something else already is a `ConfigError`."""
        if self._specs.setdefault(name, spec) != spec:
            raise ConfigError(
                f"{self.kind} {name!r} is registered already. Register yours by another name."
            )

    def __getitem__(self, name: str) -> Spec:
        if name not in self._specs and name in self._plugins:
            plugin, reason = self._plugins[name], "does not register it"
            try:
                plugin.load()
            except (ImportError, AttributeError) as error:
                reason = f"cannot be imported: {error}"
            if name not in self._specs:
                raise ConfigError(
                    f"{self.kind} {name!r} should come from {_said(plugin)}, which {reason}. "
                    f"Mend that package, or choose another --{self._option}."
                )
        if name not in self._specs:
            remedy = f"Pass one of them to --{self._option}."
            raise ConfigError.unknown(self.kind, name, self, remedy)
        return self._specs[name]

    def __contains__(self, name: object) -> bool:
        return name in self._specs or name in self._plugins

    def __iter__(self) -> Iterator[str]:
        """Give all names: what is registered in its order, then what packages bring."""
        yield from self._specs
        yield from (name for name in sorted(self._plugins) if name not in self._specs)

    def brought_by(self, name: str) -> str | None:
        """Name the package and version that bring a name; None for what no package brings."""
        return _said(self._plugins[name]) if name in self._plugins else None

    @property
    def _option(self) -> str:
        return self.kind.replace(" ", "-")

    @functools.cached_property
    def _plugins(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}


def _said(plugin: EntryPoint) -> str:
    return f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else plugin.value


def loaded(home: Any) -> Any:
    """Give what a registration stands for: itself, or what a string `module:name` leads to.

    >>> loaded("math:floor")(2.5), loaded(round)(2.5)
    (2, 2)
    """
    return pkgutil.resolve_name(home) if isinstance(home, str) else home
