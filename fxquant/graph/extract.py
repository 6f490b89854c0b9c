"""A part of a graph as a graph of its own, to run it apart from the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg


def extract(outputs: Sequence[Node], entries: Mapping[Node, str]) -> GraphModule:
    """The nodes that lead from ``entries`` to ``outputs``, and the constants that they read.

    Args:
        outputs: what the result returns, always as a tuple.
        entries: nodes that become inputs, with their names, in the order of the call.

    Raises:
        TypeError: the nodes stand in no module.
    """
    graph = Graph()
    made = {node: graph.placeholder(name) for node, name in entries.items()}

    def copy(node: Node) -> Node:
        if node not in made:
            args, kwargs = map_arg((node.args, node.kwargs), copy)
            made[node] = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        return made[node]

    graph.output(tuple(copy(node) for node in outputs))
    owner = outputs[0].graph.owning_module
    if owner is None:
        raise TypeError("the nodes stand in no module")
    return GraphModule(owner, graph)
