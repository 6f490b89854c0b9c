"""Canonicalize: one spelling per op, defaults written out, identities gone.

``F.relu``, ``torch.relu``, ``x.relu()``, ``x.relu_()`` and ``nn.ReLU`` become one call; ops with
parameters become calls of the standard ``nn`` modules; ``2 + x`` becomes ``add(x, 2)``.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import nn
from torch.fx import Node

from fxquant.graph import tensor_methods
from fxquant.graph.copies import share_parameters
from fxquant.graph.dtypes import keeps_float32
from fxquant.graph.edit import Editor
from fxquant.graph.guards import is_plumbing
from fxquant.graph.info import ValueKind, info
from fxquant.graph.op_table import (
    SCALAR_ARITHMETIC,
    attribute_spellings,
    function_spellings,
    method_spellings,
    module_of,
    module_op,
    op_named,
    op_of,
)
from fxquant.graph.operands import is_tensor, settle
from fxquant.graph.ops import (
    Call,
    Kind,
    Op,
    SizeOf,
    Unreadable,
    bind,
    given_to,
    module_arguments,
    read_call,
)
from fxquant.graph.own_module import own_module
from fxquant.graph.table_pools import WITH_INDICES
from fxquant.graph.verify import Stage
from fxquant.graph.view import flat_nodes
from fxquant.passes.base import Pass

_NUMBERS: Final = ("scalar", "sizes")
_PLAIN_FACTS: Final = ("dtype", "device", "is_cuda", "layout", "requires_grad")


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Respell every call the op table can read; the rest is marked with the reason."""

    name: ClassVar[str] = "canonicalize"
    needs: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, editor: Editor) -> None:
        """Walk the graph in order, so that the kinds of a node's inputs are known."""
        for node in list(editor.graph.nodes):
            if node.op == "call_module":
                self._module(editor, node)
            elif node.op in ("call_function", "call_method"):
                self._call(editor, node)
            elif node.op in ("placeholder", "get_attr"):
                editor.note_values(node, value=_kind_of_input(node))
        with editor.rule("drop-dead"):
            editor.clean()

    def _module(self, editor: Editor, node: Node) -> None:
        module = module_of(node)
        if isinstance(module, nn.Identity):
            _forward(editor, node)
            return
        op = module_op(module)
        hooks = module._forward_hooks or module._forward_pre_hooks
        args = given_to(op, module, tuple(node.args), node.kwargs) if op is not None else ()
        if op is None or hooks or not args:
            why = "it carries forward hooks" if hooks else _no_form(module)
            editor.note_values(node, opaque=why, value=_held(node))
            return
        if op.target is None:
            editor.note_values(node, value="tensor")
            if node.kwargs:
                with editor.rule("canonicalize"):
                    editor.set_call(node, node.target, args, {})
            return
        if getattr(module, "return_indices", False):
            op = op_named(f"{op.name}{WITH_INDICES}")
        call = settle(Call(op, module_arguments(op, module, args), inplace=False))
        if isinstance(call, Unreadable):
            editor.note_values(node, opaque=call.reason, value="unknown")
            return
        _respell(editor, node, call)

    def _call(self, editor: Editor, node: Node) -> None:
        if is_plumbing(node):
            editor.note_values(node, value=info(node).held)
            return
        if _is_number(node):
            _note_number(editor, node)
            return
        if node.target is builtins.getattr:
            _attribute(editor, node)
            return
        found = (
            function_spellings(node.target)
            if node.op == "call_function"
            else method_spellings(str(node.target))
        )
        if not found:
            name = getattr(node.target, "__name__", node.target)
            why = f"the op table does not know {name}"
            editor.note_values(node, opaque=why, value=_held(node))
            return
        call = read_call(found, tuple(node.args), node.kwargs)
        if isinstance(call, Call):
            call = settle(_divide(editor, node, call))
        if isinstance(call, Unreadable):
            editor.note_values(node, opaque=call.reason, value="unknown")
            return
        if info(node).pinned and call.inplace:
            why = "it writes in place into memory that is read under another name"
            editor.note_values(node, opaque=why, value="unknown")
            return
        _respell(editor, node, call)


def _kind_of_input(node: Node) -> ValueKind:
    """What was given for it; a default alone tells nothing, as one may have to follow others."""
    held = info(node).held
    if held != "unknown":
        return held
    return "scalar" if node.args else "tensor"


def _divide(editor: Editor, node: Node, call: Call) -> Call:
    """``2 / x`` is ``reciprocal(x) * 2``, which is what PyTorch computes, too."""
    if call.op.name != "div":
        return call
    number, tensor = call.arguments["input"], call.arguments["other"]
    if is_tensor(number) or not is_tensor(tensor):
        return call
    reciprocal = op_named("reciprocal")
    if number == 1 and not isinstance(number, Node):
        return Call(reciprocal, {"input": tensor}, call.inplace)
    with editor.rule("canonicalize"):
        inverse = editor.call(reciprocal, (tensor,), like=node, before=node)
    editor.note_values(inverse, value="tensor")
    return Call(op_named("mul"), {"input": inverse, "other": number}, call.inplace)


def _no_form(module: nn.Module) -> str:
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return (
            f"{_class(module)} is int8 in dynamic mode only: one fixed scale for its state at "
            "every step would cost accuracy"
        )
    return f"no int8 form of {_class(module)} known"


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _held(node: Node) -> ValueKind:
    """What an unknown call yielded on the example, as far as that is of use."""
    return "unknown" if info(node).held == "tensors" else info(node).held


def _is_number(node: Node) -> bool:
    if node.op != "call_function":
        return False
    inputs = list(flat_nodes(node.args))
    if not inputs or not all(info(source).value in _NUMBERS for source in inputs):
        return False
    if info(node).held in _NUMBERS:
        return True
    return node.target in SCALAR_ARITHMETIC or node.target is operator.getitem


def _note_number(editor: Editor, node: Node) -> None:
    first = node.args[0]
    sizes = any(info(source).value == "sizes" for source in flat_nodes(node.args))
    if node.target is operator.getitem and isinstance(first, Node):
        sizes = info(first).value == "sizes" and isinstance(node.args[1], slice)
    editor.note_values(node, value="sizes" if sizes else "scalar")


def _attribute(editor: Editor, node: Node) -> None:
    """``x.shape`` is ``size(x)``, ``x.mT`` a transpose; ``x.dtype`` and the like are facts."""
    source, name = node.args[0], str(node.args[1])
    if name == "data" and isinstance(source, Node) and info(source).held == "tensors":
        why = "it takes a tensor out of a packed sequence"
        editor.note_values(node, opaque=why, value=_held(node))
        return
    for op, spelling in attribute_spellings(name):
        call = bind(op, spelling, (source,), {})
        parts = isinstance(source, Node) and info(source).value == "tensors"
        # `.values` of what torch.sort gives is one of its parts; of a sparse tensor it is not.
        if isinstance(call, Call) and (op.name != "getitem" or parts):
            _respell(editor, node, call)
            return
    if name in _PLAIN_FACTS:
        editor.note_values(node, value="scalar")
    else:
        why = f"the op table does not know .{name}"
        editor.note_values(node, opaque=why, value=_held(node))


def _value_kind(node: Node, op: Op, arguments: Mapping[str, Any]) -> ValueKind:
    if op.kind in (Kind.SPLIT, Kind.PICK):
        return "tensors"
    if op.kind is Kind.SHAPE:
        return "sizes" if op.name == "size" and arguments["dim"] is None else "scalar"
    if op.name == "getitem":
        source = arguments["input"]
        known = isinstance(source, Node) and info(source).value in ("tensor", "tensors")
        return "tensor" if known or info(node).held == "tensor" else "unknown"
    return "tensor"


def _respell(editor: Editor, node: Node, call: Call) -> None:
    """Write ``node`` in canonical form, where it stands."""
    op, given = call.op, call.arguments
    if op.build is not None:
        _adopt(editor, node, op, given)
        return
    if _is_identity(op, given) and not _keeps_memory_apart(node, op):
        _forward(editor, node)
        return
    kind = _value_kind(node, op, given)
    given = {name: _written_out(editor, node, value) for name, value in given.items()}
    if op.name in _DIM_OR_NOT and given["dim"] is None:
        given = {"input": given["input"]}
    tensors = tuple(given[name] for name in op.tensors)
    options = {name: given[name] for name in op.options if name in given}
    # C-implemented targets that take no keywords get their options by position.
    if op.target in _POSITIONAL:
        args, kwargs = (*tensors, *options.values()), {}
    else:
        args, kwargs = tensors, options
    with editor.rule("canonicalize"):
        if not (node.target is op.target and node.args == args and node.kwargs == kwargs):
            editor.set_call(node, op.target, args, kwargs)
    editor.note_values(node, value=kind)


def _written_out(editor: Editor, node: Node, value: Any) -> Any:
    """The shape of a tensor as a call of ``size``."""
    if not isinstance(value, SizeOf):
        return value
    with editor.rule("canonicalize"):
        size = editor.call(op_named("size"), (value.tensor,), like=node, before=node)
    editor.note_values(size, value="sizes")
    return size


_DIM_OR_NOT: Final = ("size", "squeeze")
"""Ops whose ``dim`` may be left out but not given as ``None``."""

_POSITIONAL: Final = (
    operator.getitem,
    tensor_methods.size,
    tensor_methods.dim,
    tensor_methods.expand,
    tensor_methods.repeat,
    tensor_methods.unfold,
    torch.tensor_split,
    torch.hsplit,
)


def _is_identity(op: Op, given: Mapping[str, Any]) -> bool:
    if op.name == "getitem":
        index = given["index"]
        return all(
            part == slice(None) for part in (index if isinstance(index, tuple) else (index,))
        )
    if op.name == "dropout":
        return given["training"] is False or given["p"] == 0
    if op.name == "cast":
        return keeps_float32(given)
    return op.name in ("contiguous", "clone", "detach")


def _keeps_memory_apart(node: Node, op: Op) -> bool:
    """A copy made before one of the two is written into in place is no identity."""
    return op.name in _COPIES and any(info(n).pinned for n in (node, *node.all_input_nodes))


_COPIES: Final = ("clone", "contiguous")


def _forward(editor: Editor, node: Node) -> None:
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    if not isinstance(source, Node):
        return
    with editor.rule("drop-identity"):
        editor.replace(node, source)


def _adopt(editor: Editor, node: Node, op: Op, given: dict[str, Any]) -> None:
    """Turn ``F.conv2d(x, self.w)`` into a call of an ``nn.Conv2d`` that owns ``self.w``."""
    values: dict[str, Any] = {}
    weights: list[str] = []
    for name, value in given.items():
        if name == op.tensors[0]:
            continue
        if isinstance(value, Node):
            if value.op != "get_attr":
                why = f"its {name} is computed by %{value.name} in every call"
                editor.note_values(node, opaque=why, value="tensor")
                return
            weights.append(str(value.target))
            value = _tensor_at(editor, str(value.target))
        values[name] = value
    needed = _NEEDED.get(op.name, "weight")
    if op.build is None or values[needed] is None:
        why = f"{op.name} without {needed.replace('_', ' ')}"
        editor.note_values(node, opaque=why, value="tensor")
        return
    with editor.rule("canonicalize"):
        own = own_module(editor.module, node, op, values, weights)
        if own is None:
            path = editor.add_module(_module_path(node, op), op.build(values))
        elif editor.graph.find_nodes(op="call_module", target=own):
            # Every call owns its module; see the unshare pass.
            path = editor.add_module(own, share_parameters(editor.module.get_submodule(own)))
        else:
            path = own
        editor.set_call(node, path, (given[op.tensors[0]],), {})
        editor.annotate(node, path=path)
    editor.note_values(node, value="tensor")


_NEEDED: Final = {
    "batch_norm": "running_mean",
    "layer_norm": "normalized_shape",
    "rms_norm": "normalized_shape",
    "instance_norm": "eps",
}
"""What a functional layer cannot do without, where that is not its weight."""


def _module_path(node: Node, op: Op) -> str:
    owners = info(node).owners
    return f"{owners[-1][0]}.{op.name}" if owners else op.name


def _tensor_at(editor: Editor, path: str) -> Any:
    parent, _, leaf = path.rpartition(".")
    return getattr(editor.module.get_submodule(parent), leaf)


def is_canonical(node: Node) -> bool:
    """Whether ``node`` is a call in canonical form."""
    return op_of(node) is not None
