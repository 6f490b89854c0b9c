"""Running a graph one node at a time, with the values in the hands of the caller."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxquant.graph.view import flat_nodes


def bind_inputs(
    module: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[Node, Any]:
    """The values of the placeholders for one call.

    Args:
        module: a graph module, not a user's class.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        TypeError: the arguments do not fit.
    """
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    return dict(zip(places, bound.arguments.values(), strict=True))


class Walk:
    """Runs a graph node by node and forgets each value after its last reader.

    Args:
        module: the graph module; its submodules are called as they are.
        inputs: values of the placeholders.
        changed: called with each node and its value; what it returns is what readers get.
    """

    def __init__(
        self,
        module: GraphModule,
        inputs: Mapping[Node, Any],
        changed: Callable[[Node, Any], Any] | None = None,
    ) -> None:
        self._module = module
        self._changed = changed
        self._inputs = inputs
        self._last = _last_readers(module)
        self.values: dict[Node, Any] = {}

    def run(self) -> Any:
        """Run what is left of the graph; returns the output."""
        result = None
        for node in self._module.graph.nodes:
            result = self.step(node)
        return result

    def step(self, node: Node) -> Any:
        """Run one node whose inputs are known, and keep its value for its readers."""
        value = self._value(node)
        if self._changed is not None:
            value = self._changed(node, value)
        self.values[node] = value
        for gone in self._last.get(node, ()):
            self.values.pop(gone, None)
        return value

    def _value(self, node: Node) -> Any:
        if node.op == "placeholder":
            return self._inputs[node]
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            return getattr(self._module.get_submodule(path), leaf)
        args = map_arg(node.args, self.values.__getitem__)
        kwargs = map_arg(node.kwargs, self.values.__getitem__)
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            # Not module(...): the __call__ of a graph module prints what fails to stderr.
            return nn.Module.__call__(self._module.get_submodule(str(node.target)), *args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = node.target
        return target(*args, **kwargs)


def _last_readers(module: GraphModule) -> dict[Node, list[Node]]:
    """For each node, the values that nobody reads after it."""
    seen: set[Node] = set()
    last: dict[Node, list[Node]] = {}
    for node in reversed(module.graph.nodes):
        for source in (node, *flat_nodes((node.args, node.kwargs))):
            if source not in seen:
                seen.add(source)
                last.setdefault(node, []).append(source)
    return last
