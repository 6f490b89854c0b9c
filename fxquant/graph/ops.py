"""The op table's vocabulary: what an op is, and how a call of any spelling is read.

The table itself, one record per canonical op, is :mod:`fxquant.graph.op_table`. Canonical
form: an op with parameters is a ``call_module`` of its standard ``nn`` class; every other op
is a ``call_function`` of :attr:`Op.target` with its tensor arguments positional and all other
arguments as keywords, defaults written out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from torch import nn
from torch.fx import Node

Function = Callable[..., Any]


class Kind(Enum):
    """How an op behaves towards quantization."""

    CONTRACT = "multiplies by a weight and adds up: convolution, linear"
    UNARY = "one real function of each element: a 256-entry table can hold it"
    MOVE = "moves or selects elements: codes pass through untouched"
    JOIN = "puts tensors side by side: its inputs and its output share one scale"
    ARITH = "arithmetic on elements that needs scales: add, mul, average, affine"
    SHAPE = "answers a question about a tensor; its value is not a tensor"
    SPLIT = "cuts a tensor into a tuple of tensors"
    PICK = "selects elements and says where: a tuple of values, which are codes, and indices"
    INDEX = "says where elements are: its result counts, whatever the scale"
    FLOAT = "needs floating point"
    BOUNDARY = "changes between float and codes"


@dataclass(frozen=True)
class Spelling:
    """One way to write an op.

    Args:
        signature: the parameters of this spelling, with their defaults.
        inplace: whether it overwrites its first argument.
        read: from its own arguments to the canonical ones; ``None`` says that this call, by the
            kind of its arguments, spells another op (``torch.max`` is three).
        absorb: as for :class:`Op`, for arguments that this spelling alone has.
    """

    signature: inspect.Signature
    inplace: bool = False
    read: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
    absorb: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class SizeOf:
    """An argument that is the shape of a tensor: ``x.view_as(y)`` is ``x.reshape(y.size())``.

    Args:
        tensor: the node whose shape is meant.
    """

    tensor: Any


@dataclass(frozen=True, eq=False)
class Op:
    """One canonical op.

    Args:
        name: its name in patterns, reports and messages.
        kind: how it behaves towards quantization.
        target: the function a canonical call names; ``None`` if it is a module call.
        signature: canonical parameters and defaults.
        tensors: which of the parameters are tensors, in order.
        functions: functions that spell it.
        methods: tensor methods that spell it.
        modules: ``nn`` classes that spell it.
        attributes: tensor attributes that spell it, such as ``.mT``.
        commutes: whether the first two tensor arguments may be swapped.
        alias: whether the result may share memory with its first argument.
        build: makes the ``nn`` module of a functional call, for ops with parameters.
        absorb: arguments of spellings that canonical form leaves out, with the values that
            may be left out; another value makes the call opaque.
        module_constants: module class to arguments that it fixes without an attribute.
        tidy: writes arguments that mean the same in one way.
        module_names: canonical argument to the attribute of modules that holds it, if another.
    """

    name: str
    kind: Kind
    target: Function | None
    signature: inspect.Signature
    tensors: tuple[str, ...] = ("input",)
    functions: Mapping[Function, Spelling] = field(default_factory=dict)
    methods: Mapping[str, Spelling] = field(default_factory=dict)
    modules: tuple[type[nn.Module], ...] = ()
    commutes: bool = False
    alias: bool = False
    build: Callable[[Mapping[str, Any]], nn.Module] | None = None
    absorb: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    module_constants: Mapping[type[nn.Module], Mapping[str, Any]] = field(default_factory=dict)
    tidy: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    attributes: Mapping[str, Spelling] = field(default_factory=dict)
    module_names: Mapping[str, str] = field(default_factory=dict)

    def tidied(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """``arguments`` in the one way to say them: ``stride=None`` of a pool is its kernel."""
        return arguments if self.tidy is None else self.tidy(arguments)

    @functools.cached_property
    def options(self) -> tuple[str, ...]:
        """Names of the parameters that are not tensors."""
        return tuple(name for name in self.signature.parameters if name not in self.tensors)

    def __repr__(self) -> str:
        return f"Op({self.name})"


@dataclass(frozen=True)
class Call:
    """A call read through the op table: which op, with which arguments.

    Args:
        op: the canonical op.
        arguments: canonical argument name to value; nodes stay nodes.
        inplace: whether this spelling overwrites its first argument.
    """

    op: Op
    arguments: dict[str, Any]
    inplace: bool


@dataclass(frozen=True)
class Unreadable:
    """Why a call has no canonical form.

    Args:
        reason: one sentence.
    """

    reason: str


_RENAMED: Final = {
    "axis": "dim",
    "keepdims": "keepdim",
    "axis0": "dim0",
    "axis1": "dim1",
    "tensor": "input",  # torch.split
    "split_size": "split_size_or_sections",  # Tensor.split
    "split_sizes": "split_size_or_sections",  # Tensor.split_with_sizes
    "train": "training",  # torch.dropout
    "size": "shape",  # Tensor.view
    "mat2": "other",  # torch.mm, torch.bmm
    "vec": "other",  # torch.mv
    "batch1": "mat1",  # torch.baddbmm
    "batch2": "mat2",
    **dict.fromkeys(("x", "a", "x1"), "input"),  # what numpy calls them
    "x2": "other",
}
_SWITCHES: Final = {"inplace": (True, False)}


def bind(
    op: Op, spelling: Spelling, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call | Unreadable:
    """Read one call of ``spelling`` into canonical arguments.

    Args:
        op: the op that ``spelling`` writes.
        spelling: how it is written.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        The call, or why it cannot be read.
    """
    names = spelling.signature.parameters
    renamed = {_RENAMED.get(k, k) if k not in names else k: v for k, v in kwargs.items()}
    for name in [n for n, p in names.items() if p.kind is p.VAR_POSITIONAL and n in renamed]:
        args = (*args, renamed.pop(name))  # permute(dims=(0, 2, 1)) is permute((0, 2, 1))
    try:
        bound = spelling.signature.bind(*args, **renamed)
    except TypeError as error:
        return Unreadable(f"its arguments do not fit {op.name}{spelling.signature}: {error}")
    bound.apply_defaults()
    values = {name: _unwrap(names[name], value) for name, value in bound.arguments.items()}
    inplace = spelling.inplace or values.get("inplace") is True
    if spelling.read is not None:
        found = spelling.read(values)
        if found is None:
            return Unreadable(f"it is no call of {op.name}")
        values = found
    for name in [n for n in values if n not in op.signature.parameters]:
        allowed = (*op.absorb.get(name, _SWITCHES.get(name, ())), *spelling.absorb.get(name, ()))
        value = values.pop(name)
        if isinstance(value, Node) or not any(value is a or value == a for a in allowed):
            return Unreadable(f"{op.name} has no canonical form with {name}={value!r}")
    for name, parameter in op.signature.parameters.items():
        values.setdefault(name, parameter.default)
    given = op.tidied({name: values[name] for name in op.signature.parameters})
    return Call(op, given, inplace)


def _unwrap(parameter: inspect.Parameter, value: Any) -> Any:
    """``view(2, 3)`` and ``view((2, 3))`` are the same call."""
    if parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
        return value
    if len(value) == 1 and isinstance(value[0], tuple | list):
        return tuple(value[0])
    # A lone node may be a whole torch.Size: `x.view(y.shape)`; the caller decides by its kind.
    return tuple(value)


def module_arguments(op: Op, module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Canonical arguments of a call of ``module`` that spells an op without parameters.

    Args:
        op: the op.
        module: the module called.
        args: what it is called with: its tensors, or all that its ``forward`` takes.
    """
    constants = op.module_constants.get(type(module), {})
    names = (
        op.tensors if len(args) <= len(op.tensors) else inspect.signature(module.forward).parameters
    )
    values: dict[str, Any] = dict(zip(names, args, strict=False))
    for name in [option for option in op.options if option not in values]:
        default = op.signature.parameters[name].default
        held = op.module_names.get(name, name)
        values[name] = constants.get(name, getattr(module, held, default))
    return op.tidied({name: values[name] for name in op.signature.parameters})


def read_call(
    found: tuple[tuple[Op, Spelling], ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Call | Unreadable:
    """The call, by the first spelling that its arguments fit."""
    calls = [bind(*spelled, args, kwargs) for spelled in found]
    return next((call for call in calls if isinstance(call, Call)), calls[0])


def given_to(
    op: Op, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """What a module is called with, in order; nothing if that is more than the op can say."""
    if len(args) + len(kwargs) == 1:
        return (*args, *kwargs.values())
    names = list(inspect.signature(module.forward).parameters)
    if not set(names) <= set(op.signature.parameters):
        return ()
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return tuple(given.get(name) for name in names)
