"""Watchers in several processes: each sees a part of the data, and all end as if each saw it all.

Nothing is exchanged while the data goes by, so processes may have different numbers of batches,
or none. At the end everyone gets what everyone saw (:meth:`Watcher.part`) and joins it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """What one process saw; plain data that can be sent.

    Args:
        before: what was known before, the same in all processes; tensors on the CPU by name.
        own: what was seen since then.
        facts: what was seen first, by name: a shape, a dtype; ``None`` if nothing was.
        floating: whether all that came by were floating-point tensors.
        steps: smallest and largest values of each tensor, where their order counts.
    """

    before: dict[str, Tensor] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    floating: bool = True
    steps: tuple[tuple[Tensor, Tensor], ...] = ()


class Watcher(nn.Module):
    """What watches values go by, in one process or in several."""

    def begin_part(self) -> None:
        """From now on watch a part of the data only."""
        raise NotImplementedError

    def part(self) -> Part:
        """What was seen since :meth:`begin_part`."""
        raise NotImplementedError

    def join_parts(self, parts: Sequence[Part]) -> None:
        """End with what all processes saw.

        Args:
            parts: those of all processes, in the order of their ranks.
        """
        raise NotImplementedError

    def drop_part(self) -> None:
        """Forget what was seen since :meth:`begin_part`."""
        raise NotImplementedError


def first_fact(name: str, parts: Sequence[Part]) -> Any:
    """The fact that the first process has that knows it."""
    return next((p.facts[name] for p in parts if p.facts.get(name) is not None), None)


def steps_together(parts: Sequence[Part]) -> list[tuple[Tensor, Tensor]]:
    """The ends of each step over all processes: their n-th tensors are parts of one batch.

    Example:
        >>> ends = torch.tensor([1.0]), torch.tensor([2.0])
        >>> lower = torch.tensor([0.0]), torch.tensor([1.0])
        >>> steps_together([Part(steps=(ends, ends)), Part(steps=(lower,))])
        [(tensor([0.]), tensor([2.])), (tensor([1.]), tensor([2.]))]
    """
    made = []
    for step in range(max((len(part.steps) for part in parts), default=0)):
        ends = [part.steps[step] for part in parts if step < len(part.steps)]
        lows, highs = (torch.stack(side) for side in zip(*ends, strict=True))
        made.append((lows.amin(0), highs.amax(0)))
    return made
