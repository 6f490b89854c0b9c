"""The op table: one record per canonical op, with every spelling. No other file knows spellings.

Entries of one topic stand together in a ``table_*.py`` file beside this one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fxquant.graph.info import KEY
from fxquant.graph.ops import Kind, Op, Spelling
from fxquant.graph.table_activations import ACTIVATION
from fxquant.graph.table_arith import ARITHMETIC
from fxquant.graph.table_aten import AtenSpellings
from fxquant.graph.table_averages import AVERAGES
from fxquant.graph.table_entry import entry, sig
from fxquant.graph.table_joins import JOINS
from fxquant.graph.table_matmul import MATMULS
from fxquant.graph.table_moves import MOVES
from fxquant.graph.table_norms import NORMS
from fxquant.graph.table_pads import PADS
from fxquant.graph.table_picks import PICKS
from fxquant.graph.table_pointwise import POINTWISE
from fxquant.graph.table_pools import POOLS
from fxquant.graph.table_views import VIEWS
from fxquant.graph.table_weights import WEIGHTED

QUANTIZE: Final = "quantize"
DEQUANTIZE: Final = "dequantize"
DEQUANTIZE_WEIGHT: Final = "dequantize_weight"
RUN_TIME: Final = "quantize_at_run_time"
DEQUANTIZE_STORED: Final = "dequantize_stored"


_Spelled = tuple[Op, Spelling]


def _named(ops: tuple[Op, ...]) -> dict[str, Op]:
    names: dict[str, Op] = {}
    for op in ops:
        if op.name in names:
            raise ValueError(f"the op table has two records named {op.name!r}")
        names[op.name] = op
    return names


def _spelled(
    ops: tuple[Op, ...], of: Callable[[Op], Mapping[Any, Spelling]]
) -> dict[Any, tuple[_Spelled, ...]]:
    """Every spelling of one sort; several ops may share one if its arguments tell them apart."""
    found: dict[Any, tuple[_Spelled, ...]] = {}
    for op in ops:
        for key, spelling in of(op).items():
            before = found.get(key, ())
            if any(other.read is None for _, other in before):
                raise ValueError(f"{key} spells both {op.name} and {before[0][0].name}")
            found[key] = (*before, (op, spelling))
    return found


OPS: Final = (
    *WEIGHTED,
    *NORMS,
    *ACTIVATION,
    *POINTWISE,
    *ARITHMETIC,
    *MATMULS,
    *VIEWS,
    *MOVES,
    *PADS,
    *PICKS,
    *JOINS,
    *POOLS,
    *AVERAGES,
)
_NAMES: Final = _named(OPS)
_FUNCTIONS: Final = _spelled(OPS, lambda op: op.functions)
_METHODS: Final = _spelled(OPS, lambda op: op.methods)
_ATTRIBUTES: Final = _spelled(OPS, lambda op: op.attributes)
_MODULES: Final = {cls: op for op in OPS for cls in op.modules}
_ATEN: Final = AtenSpellings(OPS)
_TARGETS: Final[dict[Callable[..., Any], Op]] = {
    **{op.target: op for op in OPS if op.target is not None},
    # Once weights are integers an op with parameters is a call of its function.
    **{function: op for op in OPS if op.target is None for function in op.functions},
}


def op_named(name: str) -> Op:
    """The op called ``name``.

    Raises:
        KeyError: there is none.
    """
    return _NAMES[name]


def has_op(name: str) -> bool:
    """Whether the table has an op called ``name``."""
    return name in _NAMES


def op_names() -> tuple[str, ...]:
    """The names of all canonical ops, in table order."""
    return tuple(_NAMES)


def function_spellings(function: object) -> tuple[tuple[Op, Spelling], ...]:
    """What a function may spell; which, its arguments say. Empty if the table does not know it."""
    if isinstance(function, OpOverload):
        return _ATEN.of(function)
    try:
        return _FUNCTIONS.get(function, ())
    except TypeError:  # unhashable callables are nobody's spelling
        return ()


def method_spellings(name: str) -> tuple[tuple[Op, Spelling], ...]:
    """What a tensor method may spell."""
    return _METHODS.get(name, ())


def attribute_spellings(name: str) -> tuple[tuple[Op, Spelling], ...]:
    """What a tensor attribute spells: ``.mT`` is a transpose."""
    return _ATTRIBUTES.get(name, ())


def function_spelling(function: object) -> tuple[Op, Spelling] | None:
    """The first op that a function spells, if the table knows it."""
    return next(iter(function_spellings(function)), None)


def method_spelling(name: str) -> tuple[Op, Spelling] | None:
    """The first op that a tensor method spells, if the table knows it."""
    return next(iter(method_spellings(name)), None)


def module_op(module: nn.Module) -> Op | None:
    """The op that a module spells: its class, or a subclass that keeps its ``forward``."""
    return class_op(type(module))


def class_op(cls: type[nn.Module]) -> Op | None:
    """The op that calls of a module class spell."""
    if cls in _MODULES:
        return _MODULES[cls]
    for base in cls.__mro__[1:]:
        if base in _MODULES:
            same = cls.forward is base.forward and not _overrides(cls, base)
            return _MODULES[base] if same else None
    return None


def _overrides(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    name = "_conv_forward"
    return getattr(cls, name, None) is not getattr(base, name, None)


def register_boundary(name: str, target: Callable[..., Any]) -> None:
    """Tell the table which function moves between float and codes.

    ``graph`` and ``numerics`` are blind to each other, so the floor above introduces them.

    Args:
        name: :data:`QUANTIZE`, :data:`DEQUANTIZE`, :data:`DEQUANTIZE_WEIGHT` or :data:`RUN_TIME`.
        target: the function; its signature becomes the op's.
    """
    op = entry(name, Kind.BOUNDARY, target, sig(target), tensors=_BOUNDARY_TENSORS[name])
    _NAMES[name] = op
    _TARGETS[target] = op


def register_kernel(name: str, target: Callable[..., Any]) -> None:
    """Tell the table which function of a backend does what the one of a boundary does.

    Args:
        name: as for :func:`register_boundary`.
        target: a function with the same arguments and the same results.
    """
    _TARGETS[target] = _NAMES[name]


def register_module(name: str, cls: type[nn.Module]) -> None:
    """Tell the table that a module of the floor above spells the op called ``name``."""
    _MODULES[cls] = _NAMES[name]


_BOUNDARY_TENSORS: Final[Mapping[str, tuple[str, ...]]] = {
    QUANTIZE: ("x",),
    DEQUANTIZE: ("q",),
    DEQUANTIZE_WEIGHT: ("q", "scale"),
    RUN_TIME: ("x",),
    DEQUANTIZE_STORED: ("q", "scale", "zero_point"),
}


def op_of(node: Node) -> Op | None:
    """The canonical op that ``node`` calls, or ``None``; only for canonicalized graphs."""
    record = node.meta.get(KEY)
    if record is not None and record.opaque:
        return None
    if node.op == "call_function":
        try:
            return _TARGETS.get(node.target)  # type: ignore[arg-type]  # a target may be a string
        except TypeError:  # unhashable callables are nobody's target
            return None
    if node.op == "call_module":
        found = module_op(module_of(node))
        return found if found is not None and found.target is None else None
    return None


def module_of(node: Node) -> nn.Module:
    """The module that a ``call_module`` node calls."""
    module: nn.Module | None = node.graph.owning_module
    if not isinstance(module, GraphModule) or not isinstance(node.target, str):
        raise TypeError(f"{node} calls no module of a GraphModule")
    # What get_submodule does, without its checks: this is asked tens of thousands of times.
    for part in node.target.split("."):
        module = module._modules[part]  # type: ignore[union-attr]  # an empty slot fails below or raises
    if module is None:
        raise TypeError(f"{node} calls {node.target}, which is empty")
    return module


def is_op(node: object, *names: str) -> bool:
    """Whether ``node`` is a canonical call of one of the named ops."""
    if not isinstance(node, Node):
        return False
    found = op_of(node)
    return found is not None and found.name in names


def argument(node: Node, name: str) -> Any:
    """The value of the argument called ``name`` of a canonical call.

    Raises:
        KeyError: the op has no such argument.
    """
    op = op_of(node)
    if op is None:
        raise KeyError(f"{node} is no canonical op, so it has no argument {name!r}")
    if name in op.tensors:
        place = op.tensors.index(name)
        if place < len(node.args):
            return node.args[place]
        return op.signature.parameters[name].default
    if node.op == "call_module":
        return getattr(module_of(node), name)
    if name in node.kwargs:
        return node.kwargs[name]
    places = list(op.signature.parameters)
    if places.index(name) < len(node.args):
        return node.args[places.index(name)]
    return op.signature.parameters[name].default


SCALAR_ARITHMETIC: Final = frozenset(
    {
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.pow,
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.ifloordiv,
        min,
        max,
        int,
        float,
        round,
        abs,
        torch.sym_int,
        torch.sym_float,
        torch.sym_max,
        torch.sym_min,
    }
)
"""Functions that give a number when all their arguments are numbers."""
