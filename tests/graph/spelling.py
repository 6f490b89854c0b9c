"""How a case of the spelling matrix is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spelled:
    """A module that spells an op.

    Args:
        make: makes it.
        shape: of its input, where the case's own does not fit.
        options: canonical arguments, where the case's own are not those of the module.
    """

    make: Callable[[], nn.Module]
    shape: Shape | None = None
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Case:
    """How the spellings of one op are exercised.

    Args:
        shape: of each tensor input.
        options: the canonical arguments that are not tensors, defaults written out.
        modules: modules that spell the op.
        parameters: shapes of the tensors of an op with parameters, by argument name.
        positive: inputs lie in 0.1 to 0.9.
        above_one: inputs lie in 1.1 to 1.9.
        gone: canonical form drops the call.
        joins: how many tensors a join takes.
        only: function, method or ".attribute" to the options that it can say.
        shapes: function or method to the input shape that it takes.
        partners: function or method to the shape of its second input, where that is another.
        held: function or method to the shapes of its parameters, where those are others.
        says: function or method to its own arguments, where those are not canonical ones.
    """

    shape: Shape = (2, 4, 6)
    options: dict[str, Any] = field(default_factory=dict)
    modules: tuple[Spelled, ...] = ()
    parameters: dict[str, Shape] = field(default_factory=dict)
    positive: bool = False
    above_one: bool = False
    gone: bool = False
    joins: int = 0
    only: dict[Any, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[Any, Shape] = field(default_factory=dict)
    partners: dict[Any, Shape] = field(default_factory=dict)
    held: dict[Any, dict[str, Shape]] = field(default_factory=dict)
    says: dict[Any, dict[str, Any]] = field(default_factory=dict)


class Unpooled(nn.Module):
    """A max unpool whose indices are known.

    Args:
        part: the unpool.
        indices: int64.
    """

    indices: Tensor

    def __init__(self, part: nn.Module, indices: Tensor) -> None:
        super().__init__()
        self.part = part
        self.register_buffer("indices", indices)

    def forward(self, input: Tensor) -> Tensor:
        return self.part(input, self.indices)
