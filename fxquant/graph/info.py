"""What fxquant knows of a node: one frozen record under one metadata key.

A record never holds a :class:`torch.fx.Node`: node references inside metadata rot on the
first rewrite. Groups of nodes (fused units, shared scales) are labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch.fx import Node

from fxquant.spec import QConfig

KEY: Final = "fxquant"
ValueKind = Literal["tensor", "tensors", "scalar", "sizes", "unknown"]


@dataclass(frozen=True)
class QType:
    """The type of a quantized edge: ``real = (code - zero_point) * scale``.

    Args:
        scale: real units per code.
        zero_point: the code that means 0.0.
        quant_min: smallest code in use.
        quant_max: largest code in use.
        dtype: ``torch.uint8`` or ``torch.int8``.
    """

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}(scale={self.scale:.6g}, zero_point={self.zero_point})"

    @property
    def low(self) -> float:
        """The smallest real value that can be represented."""
        return (self.quant_min - self.zero_point) * self.scale

    @property
    def high(self) -> float:
        """The largest real value that can be represented."""
        return (self.quant_max - self.zero_point) * self.scale


@dataclass(frozen=True)
class Decision:
    """Whether an op runs in int8, and who decided that and why.

    Args:
        int8: the outcome.
        why: one sentence for a person.
        by: the rule, override, pass or backend that decided.
    """

    int8: bool
    why: str
    by: str


@dataclass(frozen=True)
class CustomUnit:
    """What a user's pattern says of the units it makes.

    Args:
        name: the pattern's name.
        line: where it is written, ``file.py:12``.
        kernel: the user's int8 implementation, if there is one.
        qat: makes the module that is trained in its place, if there is one.
        inputs: names of the pattern's inputs that a kernel takes, in order.
    """

    name: str
    line: str = ""
    kernel: Callable[..., Any] | None = None
    qat: Callable[..., Any] | None = None
    inputs: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> CustomUnit:
        # Immutable, and the user's functions are theirs.
        return self


@dataclass(frozen=True)
class UnitPart:
    """What one node is in the unit of a user's pattern.

    Args:
        unit: the pattern's wishes.
        role: the name of the pattern's parameter that it calls, if it is one.
        reads: places of its arguments that are inputs of the pattern, each with the input's name.
        gives: which outputs of the pattern it is; others may read only those.
        numbers: constants that the pattern binds by name; the same on every node of a unit.
    """

    unit: CustomUnit
    role: str = ""
    reads: tuple[tuple[int, str], ...] = ()
    gives: tuple[int, ...] = ()
    numbers: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class NodeInfo:
    """Everything recorded about one node.

    Args:
        path: where the op lives in the user's model, such as ``layer1.0.conv1``.
        source: the user's line that wrote it, ``file.py:12``.
        origins: names of the captured nodes it comes from.
        rules: names of the rules that made or changed it, oldest first.
        owners: the enclosing modules as ``(path, class)``, outermost first.
        value: whether it yields a tensor, a tuple of tensors, one number, or a shape.
        held: what it yielded when it was captured with example inputs.
        integral: whether that was a tensor of integers or booleans, or a tuple of some.
        config: the configuration that applies; ``None`` means float.
        configured_by: the override or default that chose ``config``.
        unit: label of the fused unit it belongs to.
        decision: int8 or float, and why.
        qtype: the quantized type of its value, once it is known.
        reads: for a lowered op, the edge types its tensor arguments must have, in order.
        writes: for a lowered op, the edge type of its value.
        shape: shape of its value when calibration saw it.
        macs: multiply-accumulates of one call on the first batch of calibration.
        rank: number of dimensions of its value, where it follows from the graph.
        opaque: why the op table has no canonical form for it.
        pinned: why its memory must stay as it is (something is written into it in place).
        part: what it is in the unit of a user's pattern; counts only while it has a ``unit``.
        weight_scales: the scales its weight was trained with, one or one per channel.
        matrix_scales: the same for each weight of a recurrent layer, with its name.
    """

    path: str = ""
    source: str = ""
    origins: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    owners: tuple[tuple[str, type], ...] = ()
    value: ValueKind = "unknown"
    held: ValueKind = "unknown"
    integral: bool = False
    config: QConfig | None = None
    configured_by: str = ""
    unit: str | None = None
    decision: Decision | None = None
    qtype: QType | None = None
    reads: tuple[QType | None, ...] | None = None
    writes: QType | None = None
    shape: tuple[int, ...] | None = None
    macs: int | None = None
    rank: int | None = None
    opaque: str = ""
    pinned: str = ""
    part: UnitPart | None = None
    weight_scales: tuple[float, ...] | None = None
    matrix_scales: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @property
    def custom(self) -> CustomUnit | None:
        """The user's pattern whose unit it belongs to."""
        return self.part.unit if self.part is not None and self.unit is not None else None

    def seen_as(self, kind: ValueKind, *, integral: bool = False) -> NodeInfo:
        """This record, with what the node yielded on the example."""
        return dataclasses.replace(self, held=kind, integral=integral)


_EMPTY: Final = NodeInfo()
_FIELDS: Final = frozenset(field.name for field in dataclasses.fields(NodeInfo))


def info(node: Node) -> NodeInfo:
    """The record of ``node``, an empty one if nothing is known."""
    found: NodeInfo = node.meta.get(KEY, _EMPTY)
    return found


def write_info(node: Node, **changes: Any) -> None:
    """Replace fields of a node's record; for :mod:`fxquant.graph` only, others use the editor."""
    if not _FIELDS.issuperset(changes):
        raise TypeError(f"a record has no fields {sorted(set(changes) - _FIELDS)}")
    # What dataclasses.replace() does, in a tenth of the time: graphs have thousands of records.
    record = object.__new__(NodeInfo)
    record.__dict__.update(vars(info(node)), **changes)
    node.meta[KEY] = record
