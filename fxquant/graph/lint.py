"""Whether a graph is well formed: what ``torch.fx.Graph.lint`` asks, asked after every pass.

torch writes a text for every argument before it looks at it, which takes most of its time.
"""

from __future__ import annotations

from typing import Any, Final

from torch import nn
from torch.fx import GraphModule, Node

_NAMED: Final = ("placeholder", "get_attr", "call_module", "call_method", "output")
"""Kinds of nodes whose target is a string."""


def malformed(module: GraphModule) -> str | None:
    """Why the graph of ``module`` is malformed, or ``None`` where it is not.

    Nodes belong to the graph and have names of their own; what they read is made before, in the
    same graph; what they call or name is there.

    Args:
        module: the graph module.

    Example:
        >>> import torch.fx
        >>> malformed(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())))
    """
    graph = module.graph
    made: set[Node] = set()
    names: set[str] = set()
    for node in graph.nodes:
        if node.graph is not graph:
            return f"%{node.name} belongs to another graph"
        for source in node.all_input_nodes:
            if source not in made:
                return f"%{node.name} reads %{source.name}, which is not made before it"
        if node.name in names:
            return f"two nodes are called %{node.name}"
        why = _bad_target(module, node)
        if why is not None:
            return f"%{node.name} {why}"
        made.add(node)
        names.add(node.name)
    return None


def _bad_target(module: GraphModule, node: Node) -> str | None:
    kind, target = node.op, node.target
    if kind == "call_function":
        return None if callable(target) else f"calls {target!r}, which is no function"
    if kind not in _NAMED:
        return f"is a {kind!r}, and there are no such nodes"
    if not isinstance(target, str):
        return f"names {target!r}, which is no name"
    if kind == "call_module":
        return _no_module(module, target)
    return _no_attribute(module, target) if kind == "get_attr" else None


def _no_module(module: nn.Module, path: str) -> str | None:
    found: nn.Module | None = module
    for part in path.split("."):
        found = found._modules.get(part) if found is not None else None
    return None if found is not None else f"calls {path}, and there is no such module"


def _no_attribute(module: nn.Module, path: str) -> str | None:
    found: Any = module
    for part in path.split("."):
        inner = found._modules.get(part) if isinstance(found, nn.Module) else None
        found = getattr(found, part, None) if inner is None else inner
        if found is None:
            return f"reads {path}, and there is no such attribute"
    return None
