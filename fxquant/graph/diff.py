"""What differs between two graphs."""

from __future__ import annotations

from fxquant.graph.state import GraphState, NodeState, graph_state

__all__ = ["GraphState", "NodeState", "graph_state"]
