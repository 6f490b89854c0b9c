"""Which graphs compute by torch's operators alone, so that these say all that happens."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

_CODE: Final = ("torch", "fxquant", "_operator", "math")
_NOT_THESE: Final = (
    # They call, or keep, what users wrote; or do something besides computing.
    *("torch.utils", "torch.autograd", "torch.jit", "torch.hub", "torch.random", "torch.cuda"),
    *("torch.distributed", "torch._higher_order_ops", "torch._dynamo"),
    *("fxquant.custom", "fxquant.graph.kernel_unit", "fxquant.graph.pieces"),
)
_BUILTINS: Final = (
    *(getattr, len, int, float, bool, tuple, list, dict, slice, min, max, sum, abs, round, range),
    *(isinstance, type, any, all, zip, enumerate, reversed, sorted),
)
_CHANGES: Final = ("setitem", "delitem")
_READS: Final = ("item", "tolist", "numpy", "data_ptr", "cpu", "cuda", "backward", "register_hook")


def why_not_trusted(module: GraphModule) -> str:
    """Why a graph may do more than its operators; empty where it does not.

    Args:
        module: converted.

    Example:
        >>> why_not_trusted(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
        ''
        >>> why_not_trusted(torch.fx.symbolic_trace(lambda x: x.numpy()))
        'numpy: .numpy() may do more than compute'
    """
    for node in module.graph.nodes:
        why = _CHECKS[node.op](module, node)
        if why:
            return f"{node.target if node.op == 'call_module' else node.name}: {why}"
    return ""


def _of_torch(where: str) -> bool:
    return any(_lies_in(where, home) for home in _CODE) and not any(
        _lies_in(where, home) for home in _NOT_THESE
    )


def _lies_in(where: str, home: str) -> bool:
    return where == home or where.startswith(f"{home}.")


def _module(module: GraphModule, node: Node) -> str:
    for inside in module.get_submodule(str(node.target)).modules():
        kind = type(inside)
        if not _of_torch(kind.__module__) or "forward" in vars(inside):
            return f"{kind.__name__} is code of its own"
        if _lies_in(kind.__module__, "torch") and isinstance(inside, nn.RNNBase):
            return f"{kind.__name__} is one call already, and rounds otherwise when it is recorded"
    return ""


def _function(module: GraphModule, node: Node) -> str:
    target: Any = node.target
    name = getattr(target, "__name__", str(target))
    where = getattr(target, "__module__", None) or ""
    if name in _CHANGES:
        return f"{name} changes what it is given"
    if where == "builtins":
        known = target in _BUILTINS
    elif isinstance(target, type):
        known = target in pytree.SUPPORTED_NODES
    else:
        # Methods of torch's own C++ classes do not say where they are from.
        known = _of_torch(where) or isinstance(target, torch._ops.OpOverload)
    return "" if known else f"{name} is code of its own"


def _method(module: GraphModule, node: Node) -> str:
    name = str(node.target)
    if name in _READS or not hasattr(Tensor, name):
        return f".{name}() may do more than compute"
    return ""


def _nothing(module: GraphModule, node: Node) -> str:
    return ""


_CHECKS: Final = {
    "call_module": _module,
    "call_function": _function,
    "call_method": _method,
    **dict.fromkeys(("placeholder", "get_attr", "output"), _nothing),
}
