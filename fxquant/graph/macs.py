"""How many multiply-accumulates an op does, from the shapes of what it reads and writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.held import held_tensor
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, function_spelling, module_of, op_of
from fxquant.graph.ops import Kind, Op
from fxquant.graph.view import flat_nodes

Shape = tuple[int, ...]
ShapeOf = Callable[[Node], Shape | None]

_RECURRENT: Final = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_LOOKS_UP: Final = (nn.Embedding, nn.EmbeddingBag)
_MATRICES: Final = {"matmul": 0, "addmm": 1, "addbmm": 1}
"""Products of matrices, and the place of their first factor: what is only added stands before."""
_CONTRACTIONS: Final = ("tensordot", "inner")
_ATTENTION: Final = ("scaled_dot_product_attention", "attention_weights")
_PRODUCTS: Final = (*_MATRICES, *_CONTRACTIONS, *_ATTENTION, "einsum", "bilinear")


def multiplies(node: Node) -> bool:
    """Whether ``node`` multiplies and adds up, so that its shapes matter: conv, matmul, LSTM.

    Args:
        node: a node of a canonicalized graph; calls without canonical form count too.
    """
    op = _op(node)
    if op is not None:
        return op.kind is Kind.CONTRACT or op.name in _PRODUCTS
    return node.op == "call_module" and _has_weights(node)


def count_macs(node: Node, shape_of: ShapeOf) -> int | None:
    """The multiply-accumulates of one call of ``node``; 0 where it does not multiply and add up.

    Args:
        node: a node of a canonicalized graph whose weights are still those of its modules.
        shape_of: the shape of the value of a node, ``None`` if it is not known.

    Returns:
        ``None`` where a shape is not known, or how the module computes. A module that stays the
        user's own code counts 0 if it has no weights; products of what it is given are not seen.
    """
    if not multiplies(node):
        return 0
    op = _op(node)
    if op is not None and op.kind is Kind.CONTRACT:
        return _contraction(op, node, shape_of)
    if op is not None:
        return _product(op, node, shape_of)
    return _module(module_of(node), node, shape_of)


def shapes_needed(node: Node) -> tuple[Node, ...]:
    """The values whose shapes :func:`count_macs` asks for; none where it needs none."""
    if not multiplies(node):
        return ()
    values = (node, *flat_nodes((node.args, tuple(node.kwargs.values()))))
    asked = [value for value in values if info(value).value not in ("scalar", "sizes")]
    return tuple(dict.fromkeys(value for value in asked if value.op != "get_attr"))


def _op(node: Node) -> Op | None:
    """The op of a call, also of one that has no canonical form: ``F.linear(x, w * mask)``."""
    found = op_of(node)
    if found is None and node.op == "call_function":
        spelled = function_spelling(node.target)
        return None if spelled is None else spelled[0]
    return found


def _has_weights(node: Node) -> bool:
    module = module_of(node)
    if getattr(module, "is_observer", False) or isinstance(module, _LOOKS_UP):
        return False
    return any(p.dim() > 1 for p in _own_parameters(module))


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those outside of graphs: pieces of a module that stays the user's code count themselves."""
    if isinstance(module, GraphModule):
        return
    yield from module.parameters(recurse=False)
    for child in module.children():
        yield from _own_parameters(child)


def _contraction(op: Op, node: Node, shape_of: ShapeOf) -> int | None:
    given, made = _shape(node.args[0], shape_of), shape_of(node)
    if node.op == "call_module":
        weight: Shape | None = tuple(module_of(node).get_parameter("weight").shape)
    else:
        named = node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
        weight = _shape(named, shape_of)
    if weight is None:
        return None
    if op.name == "linear":
        return None if given is None else math.prod(given) * weight[0]
    walked = given if op.name.startswith("conv_transpose") else made
    return None if walked is None else math.prod(walked) * math.prod(weight[1:])


def _product(op: Op, node: Node, shape_of: ShapeOf) -> int | None:
    values = (*node.args, *node.kwargs.values())
    if op.name == "einsum":
        parts = node.args[0] if isinstance(node.args[0], tuple | list) else ()
        return _einsum(str(argument(node, "equation")), [_shape(part, shape_of) for part in parts])
    start = _MATRICES.get(op.name, 0)
    made, shapes = shape_of(node), [_shape(value, shape_of) for value in values[start : start + 3]]
    if made is None or len(shapes) < 2 or shapes[0] is None or shapes[1] is None:
        return None
    first, second = shapes[0], shapes[1]
    if op.name == "addbmm":  # sums over the batch
        return math.prod(first) * second[-1]
    if op.name in _MATRICES:
        return math.prod(made) * first[-1]
    if op.name in _CONTRACTIONS:
        # Every index stands in two of the three shapes.
        return math.isqrt(math.prod(first) * math.prod(second) * math.prod(made))
    if op.name == "attention_weights":
        return math.prod(first) * second[-2]
    if op.name == "scaled_dot_product_attention":
        # Scores cost one query width each, and as many sums as the result has columns.
        return math.prod(made[:-1]) * second[-2] * (first[-1] + made[-1])
    weight = shapes[2] if len(shapes) > 2 else None
    return None if weight is None else math.prod(made[:-1]) * math.prod(weight)


def _einsum(equation: str, shapes: list[Shape | None]) -> int | None:
    """Two operands at a time, from the left, as torch does it."""
    terms, _, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if len(names) != len(shapes) or None in shapes:
        return None
    sizes: dict[str, int] = {}
    spelled: list[set[str]] = []
    for name, shape in zip(names, shapes, strict=True):
        head, dots, tail = name.partition("...")
        hidden = len(shape or ()) - len(head) - len(tail)
        # What the dots stand for is aligned at the right.
        letters = [*head, *(f".{hidden - i}" for i in range(hidden if dots else 0)), *tail]
        for letter, size in zip(letters, shape or (), strict=False):
            sizes[letter] = max(size, sizes.get(letter, 1))
        spelled.append(set(letters))
    kept, total = spelled[0], 0
    for place in range(1, len(spelled)):
        joined = kept | spelled[place]
        total += math.prod(sizes[letter] for letter in joined)
        later = set().union(*spelled[place + 1 :], result)
        kept = {letter for letter in joined if letter in later or letter.startswith(".")}
    return total


def _module(module: nn.Module, node: Node, shape_of: ShapeOf) -> int | None:
    shapes = [_shape(value, shape_of) for value in (*node.args, *node.kwargs.values())]
    first = shapes[0] if shapes else None
    if first is None:
        return None
    if isinstance(module, _RECURRENT):
        # Every step multiplies by every matrix once.
        steps = math.prod(first[:-1])
        return steps * sum(p.numel() for p in module.parameters() if p.dim() > 1)
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, [shape for shape in shapes if shape is not None])
    if isinstance(module, nn.Bilinear):
        return math.prod(first[:-1]) * int(module.weight.numel())
    return None


def _attention(module: nn.MultiheadAttention, shapes: list[Shape]) -> int | None:
    if len(shapes) < 3 or any(len(shape) < 2 for shape in shapes[:3]):
        return None
    query, key, value = shapes[:3]
    width: int = module.embed_dim
    projections = width * sum(math.prod(shape) for shape in (query, query, key, value))
    batched = len(query) == 3
    at = 1 if batched and module.batch_first else 0
    batch = query[1 - at] if batched else 1
    return projections + 2 * batch * query[at] * key[at] * width


def _shape(value: Any, shape_of: ShapeOf) -> Shape | None:
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        found = held_tensor(value)
        return None if found is None else tuple(found.shape)
    return shape_of(value)
