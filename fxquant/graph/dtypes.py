"""Which values are float32, as far as that follows from the graph alone; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.fx import Node

from fxquant.graph.held import held_tensor
from fxquant.graph.info import info
from fxquant.graph.op_table import module_of, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.view import tensor_sources

_FOLLOWS: Final = (Kind.UNARY, Kind.MOVE, Kind.JOIN, Kind.ARITH, Kind.SPLIT, Kind.FLOAT)


def is_float32(value: Node) -> bool:
    """Whether ``value`` is known to be a float32 tensor.

    Layers with float32 weights make float32; moves and arithmetic keep what they read. An input
    of the model may be of any type.
    """
    todo, seen = [value], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        known = _makes_float32(node)
        if known is False:
            return False
        if known is None:
            todo.extend(tensor_sources(node))
    return True


def keeps_float32(given: Mapping[str, Any]) -> bool:
    """``x.float()``, ``x.to(y)``, ``x.to(y.dtype)`` of float32 tensors on the processor."""
    source, dtype, like = given["input"], given["dtype"], given["like"]
    if not isinstance(source, Node) or not is_float32(source):
        return False
    if isinstance(like, Node):
        # A fact: x.to(y.dtype), x.to(y.device)
        like = like.args[0] if info(like).value == "scalar" else like
        if not isinstance(like, Node) or not is_float32(like):
            return False
    elif not (dtype is None or dtype == torch.float32 or _dtype_of_float32(dtype)):
        return False
    return _stays(given["device"])


def _dtype_of_float32(dtype: Any) -> bool:
    source = dtype.args[0] if isinstance(dtype, Node) and dtype.args else None
    return isinstance(source, Node) and is_float32(source)


def _stays(device: Any) -> bool:
    if device is None or isinstance(device, Node):
        return True
    return torch.device(device).type == "cpu"


def _makes_float32(node: Node) -> bool | None:
    """``None`` if it makes what it reads."""
    if node.op == "get_attr":
        return _is_real(held_tensor(node))
    op = op_of(node)
    if op is None:
        return False
    if node.op == "call_module":
        weights = list(module_of(node).parameters(recurse=False))
        return all(_is_real(weight) for weight in weights) if weights else None
    if op.name == "cast":
        return bool(node.kwargs["dtype"] == torch.float32)
    return None if op.kind in _FOLLOWS and tensor_sources(node) else False


def _is_real(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32
