"""What a loaded model forgot: torch.fx pickles a graph as code, without the records of nodes."""

from __future__ import annotations

from torch.fx import Graph

from fxquant.graph.info import info, write_info
from fxquant.graph.state import GraphState, graph_state


def recall(graph: Graph, state: GraphState) -> bool:
    """Give the nodes their records again, as far as a snapshot holds them.

    Args:
        graph: the graph; left alone where it knows where any of its nodes comes from.
        state: the snapshot of it before it was saved.

    Returns:
        Whether it knows now.
    """
    nodes = list(graph.nodes)
    if any(info(node).origins for node in nodes):
        return True
    # Names may be other ones; the order of the code is that of the nodes.
    present = graph_state(graph).nodes
    kinds = [[(each.op, each.target) for each in some] for some in (present, state.nodes)]
    if kinds[0] != kinds[1]:
        return False
    for node, old in zip(nodes, state.nodes, strict=True):
        write_info(
            node,
            path=old.path,
            source=old.source,
            origins=old.origins,
            rules=old.rules,
            unit=old.unit,
            reads=old.reads,
            writes=old.writes,
            qtype=old.qtype,
        )
    return True
