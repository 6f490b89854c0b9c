"""Which values of a rewritten graph stand for which values of the captured one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from fxquant.graph.align import own_origins
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import DEQUANTIZE, QUANTIZE, is_op
from fxquant.graph.view import tensor_sources

_SAME_VALUE = (DEQUANTIZE, "cast", "clone", "contiguous")


@dataclass(frozen=True)
class Counterpart:
    """One value of the captured graph, and what stands for it.

    Args:
        real: the captured node.
        node: the node whose value stands for it: codes, where ``qtype`` is not ``None``.
        qtype: the type of the codes.
    """

    real: Node
    node: Node
    qtype: QType | None


def last_origins(groups: Collection[tuple[str, ...]], captured: Graph) -> list[Node | None]:
    """For each group of origins the captured node that makes its result.

    A result is claimed once, by the last group that has it; the others get ``None``: a part of
    one captured op, such as the padding that was split off a convolution, makes no result of it.

    Args:
        groups: origins of ops, in graph order.
        captured: the captured graph.
    """
    made: dict[str, Node] = {}
    place: dict[Node, int] = {}
    for index, node in enumerate(captured.nodes):
        place[node] = index
        for origin in info(node).origins:
            made[origin] = node
    owner = {made[origin]: index for index, origins in enumerate(groups)
             for origin in origins if origin in made}  # fmt: skip
    found: list[Node | None] = []
    for index, origins in enumerate(groups):
        nodes = [made[origin] for origin in origins if origin in made]
        last = max(nodes, key=place.__getitem__, default=None)
        found.append(last if last is None or owner[last] == index else None)
    return found


def as_made(results: Sequence[Node | None], captured: Graph, made: Graph) -> list[Node | None]:
    """The results of ops as ``made`` has them: of what one op computes there, the last.

    It goes to the first of the ops, whose kernel it is: a linear that adds up a float sum as well.
    The others get ``None``.

    Args:
        results: nodes of ``captured``, one for each op, in graph order.
        captured: the captured graph.
        made: what passes made of it.
    """
    place = {node: index for index, node in enumerate(captured.nodes)}
    known = [node for node in results if node is not None]
    together: dict[Node, list[Node]] = {}
    for pair in counterparts(captured, made, known):
        together.setdefault(pair.node, []).append(pair.real)
    moved: dict[Node, Node | None] = {}
    for reals in together.values():
        reals.sort(key=place.__getitem__)
        moved.update(dict.fromkeys(reals))
        moved[reals[0]] = reals[-1]
    return [moved.get(node, node) if node is not None else None for node in results]


def results_kept(captured: Graph, made: Graph) -> list[Node]:
    """Nodes of ``captured`` whose value is there in ``made``; what was fused into others is not.

    Args:
        captured: the captured graph.
        made: what passes made of it.
    """
    place = {node: index for index, node in enumerate(captured.nodes)}
    calls = [node for node in captured.nodes if node.op.startswith("call")]
    last: dict[Node, Node] = {}
    for pair in counterparts(captured, made, calls):
        best = last.get(pair.node)
        if best is None or place[best] < place[pair.real]:
            last[pair.node] = pair.real
    return list(last.values())


def counterparts(captured: Graph, made: Graph, results: Collection[Node]) -> Iterator[Counterpart]:
    """What stands in ``made`` for the values of ``results``, where something does.

    Args:
        captured: the captured graph.
        made: what passes made of it.
        results: nodes of ``captured``.
    """
    nodes = list(made.nodes)
    known = frozenset(origin for node in captured.nodes for origin in info(node).origins)
    owned = own_origins([info(node).origins for node in nodes], known)
    having: dict[str, list[Node]] = {}
    for node, origins in zip(nodes, owned, strict=True):
        if node.op in ("get_attr", "output") or info(node).value in ("scalar", "sizes"):
            continue
        for origin in origins:
            having.setdefault(origin, []).append(node)
    for real in results:
        if info(real).pinned:
            continue  # its memory is written later: a copy of it would miss that
        known_as = [name for name in info(real).origins if name in having]
        if known_as:
            yield _settled(real, having[known_as[0]])


def as_float_readers_see(pair: Counterpart) -> Counterpart:
    """``pair``, but of a value that is read both in float and as codes what is read in float.

    The rounding is then no part of the value: it belongs to the ops that read the codes.
    """
    source = pair.node.args[0] if is_op(pair.node, QUANTIZE) else None
    if not isinstance(source, Node) or not set(info(pair.real).origins) & set(info(source).origins):
        return pair
    in_float = any(_reads_floats(user, source) for user in source.users)
    return Counterpart(pair.real, source, None) if in_float else pair


def _reads_floats(user: Node, source: Node) -> bool:
    """Whether an op computes with the numbers of ``source``; a lowered one declares what it reads.

    Others ask for its size.
    """
    if is_op(user, QUANTIZE):
        return False
    reads = user.op == "output" or info(user).reads is not None
    return reads or source in tensor_sources(user)


def _settled(real: Node, having: list[Node]) -> Counterpart:
    node = having[-1]
    while is_op(node, *_SAME_VALUE) and node.args and node.args[0] in having:
        source = node.args[0]
        if not isinstance(source, Node):
            break
        node = source
    return Counterpart(real, node, info(node).writes)
