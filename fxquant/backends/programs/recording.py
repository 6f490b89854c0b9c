"""What a call of a model did: its calls of operators, and the tensors between them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Found = TypeVar("Found")


@dataclass(frozen=True)
class Value:
    """A tensor of a recording: an input, one that the model holds, or a result. Or an answer.

    Args:
        number: inputs come first, in their order.
    """

    number: int


@dataclass(frozen=True)
class Step:
    """One call of an operator.

    Args:
        op: the operator.
        args: by place, with a :class:`Value` for each tensor.
        kwargs: by name.
        results: what it returns; of a list its items.
        several: whether it returns a list or a tuple.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Value, ...]
    several: bool

    @functools.cached_property
    def reads(self) -> tuple[Value, ...]:
        """The tensors that it is given."""
        return tuple(values_in((self.args, self.kwargs)))

    @property
    def pure(self) -> bool:
        """Whether nothing but its results comes of it, and the same ones every time."""
        return is_pure(self.op) and torch.Tag.nondeterministic_seeded not in self.op.tags


@dataclass(frozen=True)
class Recording:
    """All calls of operators that one call of a model made.

    Args:
        inputs: the tensors it was given.
        held: the tensors that the model holds.
        tensors: these, in the order of ``held``.
        steps: in order.
        answers: what operators said of numbers in tensors, and Python went on from.
        results: leaves of what it returned, with a :class:`Value` for each tensor.
        structure: how these stand in it.
    """

    inputs: tuple[Value, ...]
    held: tuple[Value, ...]
    tensors: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    answers: dict[Value, bool]
    results: tuple[Any, ...]
    structure: pytree.TreeSpec

    def agrees(self, other: Recording) -> bool:
        """Whether another call made the same calls of operators, on the same held tensors."""
        return (
            self.inputs == other.inputs
            and self.held == other.held
            and all(map(_is, self.tensors, other.tensors))
            and self.steps == other.steps
            and self.answers == other.answers
            and self.results == other.results
            and self.structure == other.structure
        )


def _is(one: object, other: object) -> bool:
    return one is other


def values_in(nest: Any) -> Iterator[Value]:
    """All values in tuples, lists and dictionaries.

    Example:
        >>> [value.number for value in values_in(([Value(1), 2], {"a": Value(3)}))]
        [1, 3]
    """
    return found_in(nest, Value)


def found_in(nest: Any, kind: type[Found]) -> Iterator[Found]:
    """All that is of one class in tuples, lists and dictionaries."""
    if isinstance(nest, kind):
        yield nest
    elif isinstance(nest, tuple | list):
        for item in nest:
            yield from found_in(item, kind)
    elif isinstance(nest, dict):
        yield from found_in(tuple(nest.values()), kind)


def is_pure(op: Any) -> bool:
    """Whether an operator does nothing but return something, as far as torch says.

    Operators from outside ``aten`` do not always say what they write to: oneDNN's sums do not.
    """
    return op.namespace == "aten" and not op._schema.is_mutable
