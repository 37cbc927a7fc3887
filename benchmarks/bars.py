"""What a figure must reach, and how it is said whether it does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a figure must reach."""

    limit: float
    """The bound."""
    is_least: bool = False
    """Whether the figure must be at least that, not at most."""

    def holds(self, figure: float) -> bool:
        """Whether it is reached."""
        return figure >= self.limit if self.is_least else figure <= self.limit

    def line(self, name: str, figure: float) -> str:
        """Lay out a figure beside its bar."""
        bound = f"at {'least' if self.is_least else 'most'} {self.limit:g}"
        verdict = "holds" if self.holds(figure) else "NOT MET"
        return f"{name:<48} {figure:10.4g}   {bound:<14} {verdict}"


def least(limit: float) -> Bar:
    """Make a bound from below."""
    return Bar(limit=limit, is_least=True)
