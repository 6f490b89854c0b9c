"""How large the numbers of a value can get, from the graph alone.

Kernels that turn numbers into integers wrap around where the integer does not fit, long after
any scale has run out of codes. Most values of a quantized network come from codes, or from ops
that limit what they give, so that this cannot happen; of the rest nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from fxquant.graph.held import held_tensor
from fxquant.graph.info import info
from fxquant.graph.op_table import (
    DEQUANTIZE,
    DEQUANTIZE_WEIGHT,
    argument,
    is_op,
    module_of,
    op_of,
)
from fxquant.graph.ops import Kind
from fxquant.graph.view import tensor_sources

__all__ = ["largest"]

_MOST: Final = 64
"""How many ops are followed back: chains of float ops have no end."""
_CODES: Final = 256
_NORMED: Final = 2.0**16
"""No norm of fewer than 2**32 numbers makes one of them larger: a lone one becomes sqrt(n)."""

_WITHIN_ONE: Final = ("softmax", "sigmoid", "hardsigmoid", "tanh", "softsign", "erf", "sin", "cos")
_NO_LARGER: Final = (
    *("relu", "relu6", "gelu", "silu", "mish", "hardswish", "abs", "neg", "positive"),
    *("hardshrink", "softshrink", "tanhshrink", "mean"),
    *(f"adaptive_avg_pool{rank}d" for rank in (1, 2, 3)),
)
_TRANSPOSED: Final = tuple(f"conv_transpose{rank}d" for rank in (1, 2, 3))
_NORMS: Final = ("layer_norm", "rms_norm", "group_norm", "instance_norm")
_FILLS: Final = {"pad": "value", "masked_fill": "value", "index_fill": "value", "where": "other"}
"""Ops that put in a number or a tensor, and the argument that gives it."""
_CARRIES: Final = (Kind.MOVE, Kind.SPLIT, Kind.PICK, Kind.JOIN)


def largest(node: Node) -> float | None:
    """A number that no element of ``node``'s value exceeds in size; ``None`` if none is known.

    It holds for every input of finite numbers, and for the weights that the model has now.

    Args:
        node: a value of a canonical graph, before it is lowered.
    """
    found = _Bounds().of(node, 0)
    return found if found is not None and math.isfinite(found) else None


class _Bounds:
    """Bounds of the values that one value is made of."""

    def __init__(self) -> None:
        self._known: dict[Node, float | None] = {}

    def of(self, node: object, depth: int) -> float | None:
        if isinstance(node, int | float) and not isinstance(node, bool):
            return abs(float(node))
        if not isinstance(node, Node) or depth > _MOST:
            return None
        if node not in self._known:
            self._known[node] = self._found(node, depth + 1)
        return self._known[node]

    def _found(self, node: Node, depth: int) -> float | None:
        if node.op == "get_attr":
            return _size(held_tensor(node))
        op = op_of(node)
        if op is None or info(node).custom is not None:
            return None
        own = _OWN.get(op.name)
        if own is not None:
            return own(node)
        if op.kind is Kind.CONTRACT:
            return self._contracted(node, depth)
        if op.kind in _CARRIES and op.name != "dropout":
            return self._carried(node, depth, op.name)
        if op.name in _NO_LARGER:
            return self.of(node.args[0], depth)
        made = _MADE.get(op.name)
        return None if made is None else made(self, node, depth)

    def _each(self, values: Iterable[object], depth: int) -> list[float] | None:
        """The bounds of all values, if all are known."""
        found = [self.of(value, depth) for value in values]
        known = [each for each in found if each is not None]
        return known if len(known) == len(found) else None

    def _carried(self, node: Node, depth: int, name: str) -> float | None:
        values: list[object] = list(tensor_sources(node))
        if name in _FILLS:
            filled = argument(node, _FILLS[name])
            values += [] if filled is None else [filled]
        found = self._each(values, depth)
        return max(found) if found else None

    def _contracted(self, node: Node, depth: int) -> float | None:
        """What an output adds up: each at most the largest input by the largest weight."""
        layer = module_of(node) if node.op == "call_module" else None
        if layer is None:
            source, held = node.args[1], argument(node, "bias")
            size = self.of(source, depth)
            shift = 0.0 if held is None else self.of(held, depth)
            weight = held_tensor(source.args[0] if is_op(source, DEQUANTIZE_WEIGHT) else source)  # type: ignore[union-attr]  # is_op asks
        else:
            weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
            size, shift = _size(weight), 0.0 if bias is None else _size(bias)
        given = self.of(node.args[0], depth)
        if weight is None or size is None or shift is None or given is None:
            return None
        outputs = weight.shape[1 if op_of(node).name in _TRANSPOSED else 0]  # type: ignore[union-attr]  # asked by the caller
        return given * size * (weight.numel() // max(1, outputs)) + shift

    def _sum(self, node: Node, depth: int) -> float | None:
        alpha = abs(float(argument(node, "alpha")))
        found = self._each(node.args[:2], depth)
        return None if found is None else found[0] + alpha * found[1]

    def _product(self, node: Node, depth: int) -> float | None:
        found = self._each(node.args[:2], depth)
        return None if found is None else found[0] * found[1]

    def _quotient(self, node: Node, depth: int) -> float | None:
        number, given = node.args[1], self.of(node.args[0], depth)
        if isinstance(number, Node) or not isinstance(number, int | float) or given is None:
            return None
        return given / abs(float(number)) if number else None

    def _larger(self, node: Node, depth: int) -> float | None:
        found = self._each(node.args[:2], depth)
        return None if found is None else max(found)

    def _weighted(self, node: Node, depth: int) -> float | None:
        """Attention: averages of the values."""
        drops = argument(node, "dropout_p")
        return self.of(argument(node, "value"), depth) if drops == 0 else None

    def _cast(self, node: Node, depth: int) -> float | None:
        # What does not fit 16 bits with a short exponent is infinite afterwards.
        narrow = argument(node, "dtype") is torch.float16
        return None if narrow else self.of(node.args[0], depth)

    def _matmul(self, node: Node, depth: int) -> float | None:
        weights = node.args[0]
        # Not through views: they may change what is added up.
        while is_op(weights, "cast", "contiguous", "clone"):
            weights = weights.args[0]  # type: ignore[union-attr]  # is_op asks
        averages = is_op(weights, "softmax") and argument(weights, "dim") == -1  # type: ignore[arg-type]  # is_op asks
        return self.of(node.args[1], depth) if averages else None


def _size(tensor: Tensor | None) -> float | None:
    if tensor is None or not tensor.is_floating_point():
        return None
    return float(tensor.detach().abs().amax()) if tensor.numel() else 0.0


def _from_codes(node: Node) -> float:
    """Codes of 8 bits are no further than 255 steps from their zero point."""
    return _CODES * abs(float(argument(node, "scale")))


def _from_weight(node: Node) -> float | None:
    scale = _size(held_tensor(node.args[1]))
    return None if scale is None else _CODES * scale


def _normed(node: Node) -> float | None:
    norm = module_of(node)
    if getattr(norm, "track_running_stats", False):
        return None
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    factor = 1.0 if weight is None else _size(weight)
    shift = 0.0 if bias is None else _size(bias)
    return None if factor is None or shift is None else _NORMED * factor + shift


def _one(_: Node) -> float:
    return 1.0


def _looked_up(node: Node) -> float | None:
    """Rows of a table, in float or as codes with scales."""
    table = module_of(node)
    scale = getattr(table, "weight_scale", None)
    weight: Any = getattr(table, "weight", None)
    if isinstance(scale, Tensor):
        found = _size(scale)
        return None if found is None else _CODES * found
    return _size(weight) if isinstance(weight, Tensor) else None


_OWN: Final[dict[str, Callable[[Node], float | None]]] = {
    DEQUANTIZE: _from_codes,
    DEQUANTIZE_WEIGHT: _from_weight,
    "embedding": _looked_up,
    **dict.fromkeys(_NORMS, _normed),
    **dict.fromkeys(_WITHIN_ONE, _one),
}
_MADE: Final[dict[str, Callable[[_Bounds, Node, int], float | None]]] = {
    "add": _Bounds._sum,
    "sub": _Bounds._sum,
    "mul": _Bounds._product,
    "div": _Bounds._quotient,
    "maximum": _Bounds._larger,
    "minimum": _Bounds._larger,
    "scaled_dot_product_attention": _Bounds._weighted,
    "matmul": _Bounds._matmul,
    "cast": _Bounds._cast,
}
