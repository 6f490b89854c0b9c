"""A function of one element that a model spells in several ops, as one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Earlier:
    """Stands for a value in a :class:`Step`: 0 is the input, ``n`` the result of step ``n - 1``.

    Args:
        index: which value.
    """

    index: int


@dataclass(frozen=True)
class Step:
    """One elementwise call.

    Args:
        name: the op, for people.
        function: what is called; a module or a function.
        args: its arguments, earlier values among them.
        kwargs: its keywords, all constant.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(_text, self.args))})"


def _text(value: Any) -> str:
    if isinstance(value, Earlier):
        return f"v{value.index}" if value.index else "x"
    return f"{float(value):g}"


class UnaryChain(nn.Module):
    """Elementwise ops of one tensor, run one after the other.

    Args:
        steps: the calls, each reading the input, results of earlier steps, and numbers.

    Example:
        >>> import torch
        >>> swish = UnaryChain((
        ...     Step("sigmoid", torch.sigmoid, (Earlier(0),)),
        ...     Step("mul", torch.mul, (Earlier(0), Earlier(1))),
        ... ))
        >>> swish(torch.tensor([0.0, 100.0]))
        tensor([  0., 100.])
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; the result has the same."""
        values = [input]
        for step in self.steps:
            args = [values[a.index] if isinstance(a, Earlier) else a for a in step.args]
            values.append(step.function(*args, **step.kwargs))
        return values[-1]

    def extra_repr(self) -> str:
        """The calls, for ``print(model)``."""
        return "; ".join(f"v{index} = {step}" for index, step in enumerate(self.steps, 1))
