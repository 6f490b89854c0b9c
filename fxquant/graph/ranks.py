"""How many dimensions each value has, found from the graph alone; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch.fx import Graph, Node

from fxquant.graph.held import held_tensor
from fxquant.graph.info import info, write_info
from fxquant.graph.op_table import argument, op_of
from fxquant.graph.ops import Kind

_KEEPS: Final = (Kind.CONTRACT, Kind.UNARY, Kind.FLOAT)
_CHANGES: Final = (
    *("addmm", "addbmm", "einsum", "tensordot", "inner", "bilinear"),
    *("attention_mask", "attention_weights"),
)
_KEEPS_BY_NAME: Final = (
    *("layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize", "softmax"),
    *("log_softmax", "local_response_norm", "glu"),
    *(f"lp_pool{rank}d" for rank in (1, 2, 3)),
    *(f"{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg") for rank in (1, 2, 3)),
    *("batch_norm", "cat", "pad", "transpose", "interpolate", "narrow", "flip", "roll", "dropout"),
    *("movedim", "scaled_dot_product_attention", "append_row"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "index_select", "prelu"),
)
_REDUCTIONS: Final = (
    *("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "norm", "vector_norm"),
)


def record_ranks(graph: Graph, inputs: Mapping[str, int]) -> None:
    """Write the rank of every value where it follows from the graph.

    Args:
        graph: a canonicalized graph.
        inputs: ranks of the inputs, by name, as far as they are known.
    """
    for node in graph.nodes:
        if node.op == "placeholder":
            rank = inputs.get(str(node.target))
        else:
            rank = _constant_rank(node) if node.op == "get_attr" else _rank(node)
        write_info(node, rank=rank)


def _rank(node: Node) -> int | None:
    op = op_of(node)
    if (
        op is None
        or op.name in _CHANGES
        or not node.args
        or not isinstance(node.args[0], Node | tuple | list)
    ):
        return None
    if op.name == "reshape":
        shape = argument(node, "shape")
        return len(shape) if isinstance(shape, tuple | list) else None
    if op.name == "permute":
        return len(argument(node, "dims"))
    first = node.args[0]
    before = info(first).rank if isinstance(first, Node) else _common(first)
    if op.name == "flatten":
        return _flattened(node, before)
    if before is None:
        return None
    if op.name in ("unsqueeze", "embedding"):
        return before + 1
    if op.name == "select":
        return before - 1
    if op.name in _REDUCTIONS:
        return _reduced(node, before)
    if op.name == "unflatten":
        return _unflattened(node, before)
    if op.name in ("add", "sub", "mul", "div", "maximum", "minimum"):
        other = node.args[1]
        right = info(other).rank if isinstance(other, Node) else 0
        return None if right is None else max(before, right)
    if op.name == "matmul":
        right = info(node.args[1]).rank if isinstance(node.args[1], Node) else None
        return None if right is None or min(before, right) < 2 else max(before, right)
    return before if op.kind in _KEEPS or op.name in _KEEPS_BY_NAME else None


def _constant_rank(node: Node) -> int | None:
    found = held_tensor(node)
    return None if found is None else found.dim()


def _common(parts: tuple[object, ...] | list[object]) -> int | None:
    ranks = {info(part).rank for part in parts if isinstance(part, Node)}
    return ranks.pop() if len(ranks) == 1 else None


def _flattened(node: Node, before: int | None) -> int | None:
    start, end = argument(node, "start_dim"), argument(node, "end_dim")
    if end == -1 and isinstance(start, int) and start >= 0:
        return start + 1
    if before is None or not isinstance(start, int) or not isinstance(end, int):
        return None
    return before - (end % before - start % before)


def _unflattened(node: Node, before: int) -> int | None:
    sizes = argument(node, "sizes")
    return before + len(sizes) - 1 if isinstance(sizes, tuple | list) else None


def _reduced(node: Node, before: int) -> int | None:
    dim, keep = argument(node, "dim"), argument(node, "keepdim")
    if keep is True:
        return before
    if dim is None or dim == ():
        return 0
    return before - (len(dim) if isinstance(dim, tuple | list) else 1)
