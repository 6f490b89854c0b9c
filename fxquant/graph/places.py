"""Places in a model, such as ``layer1.0.conv1``: which of them a graph has use for."""

from __future__ import annotations

from collections.abc import Iterable


class UsedPlaces:
    """Places that nodes name, what these stand in, and what stands in these.

    Args:
        named: the places that nodes name.

    Example:
        >>> used = UsedPlaces(["body.conv"])
        >>> [used.has(path) for path in ("body", "body.conv", "body.conv.inner", "body.relu")]
        [True, True, True, False]
    """

    def __init__(self, named: Iterable[str]) -> None:
        self.named = frozenset(named)
        self._around = {""}
        for path in self.named:
            outer = path.rpartition(".")[0]
            while outer not in self._around:
                self._around.add(outer)
                outer = outer.rpartition(".")[0]

    def inside(self, path: str) -> bool:
        """Whether a place is named, or stands in one that is."""
        while path:
            if path in self.named:
                return True
            path = path.rpartition(".")[0]
        return False

    def has(self, path: str) -> bool:
        """Whether what stands at a place has to stay."""
        return path in self._around or self.inside(path)
