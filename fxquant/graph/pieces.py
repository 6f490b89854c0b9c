"""Modules that stay the user's own code, and the parts of them that can be captured.

A module whose way through depends on what tensors hold is called as it is. Its children are
captured one by one, from what they are called with while the model runs on the example.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxquant.graph.held_state import random_kept
from fxquant.graph.info import KEY, NodeInfo, info, write_info
from fxquant.graph.reads import watching
from fxquant.graph.signature import Binding, is_literal
from fxquant.graph.state import Argument, GraphState, Group, NodeState, Ref

WHOLE: Final = "whole"
"""Where a model stands that cannot be traced at all, in the graph that calls it."""


class Whole(nn.Module):
    """Calls a model that stays the user's own code.

    Args:
        model: the model.
        optional: arguments that count as left out when they are ``None``.
    """

    def __init__(self, model: nn.Module, optional: frozenset[str]) -> None:
        super().__init__()
        self.model = model
        self.optional = optional

    def forward(
        self, named: dict[str, Any], rest: tuple[Any, ...] = (), more: dict[str, Any] | None = None
    ) -> Any:
        """Call the model with named arguments, ``*rest`` and ``**more``."""
        given = {k: v for k, v in named.items() if v is not None or k not in self.optional}
        if rest:
            return self.model(*given.values(), *rest, **(more or {}))
        return self.model(**given, **(more or {}))


def whole_graph(model: nn.Module, binding: Binding, name: str) -> fx.GraphModule:
    """A graph that calls ``model``, with the arguments of its ``forward``.

    Args:
        model: a copy that belongs to the graph module from now on.
        binding: how it is called.
        name: the class name of the graph module.
    """
    graph = fx.Graph()
    named: dict[str, fx.Node] = {}
    rest: Any = ()
    more: Any = {}
    optional = set()
    defaults = False
    for parameter in binding.signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = graph.placeholder(f"*{parameter.name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            more = graph.placeholder(f"**{parameter.name}")
        elif parameter.default is parameter.empty and not defaults:
            named[parameter.name] = graph.placeholder(parameter.name)
        else:
            defaults = True
            literal = is_literal(parameter.default)
            value = parameter.default if literal else None
            named[parameter.name] = graph.placeholder(parameter.name, default_value=value)
            if not literal:
                optional.add(parameter.name)
    made = graph.call_module(WHOLE, (named, rest, more))
    graph.output(made)
    for node in graph.nodes:
        node.meta[KEY] = NodeInfo(path="" if node is made else node.name, origins=(node.name,))
    root = nn.Module()
    root.add_module(WHOLE, Whole(model, frozenset(optional)))
    return fx.GraphModule(root, graph, name)


def parts_of(module: nn.Module, leaf: str) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a leaf that may be captured: its children; containers give theirs.

    Args:
        module: the graph module.
        leaf: the path of the leaf in it.
    """
    path = f"{leaf}.model" if leaf == WHOLE else leaf
    yield from _children(module.get_submodule(path), path)


def _children(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        where = f"{path}.{name}"
        if isinstance(child, torch.jit.ScriptModule):
            continue  # its Python code is gone
        if type(child).forward is nn.Module.forward:  # ModuleList, ModuleDict: never called
            yield from _children(child, where)
        else:
            yield where, child


def users_path(path: str) -> str:
    """The path in the user's model of what stands at ``path`` in a graph module."""
    return path.removeprefix(f"{WHOLE}.model").removeprefix(".")


@dataclass
class Calls:
    """How a part was called while the model ran on the example.

    Args:
        args: positional arguments of the first call.
        kwargs: keyword arguments of the first call.
        why: why the part cannot be captured from that; empty if it can.
        reads: names of its tensors whose types or sizes the code around it asks for.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    why: str = "the example never reaches it"
    reads: frozenset[str] = frozenset()


def record_calls(
    module: nn.Module,
    paths: Iterable[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Calls]:
    """Run ``module`` on the example and note what its parts are called with.

    Args:
        module: the graph module; run without gradients.
        paths: the parts.
        args: positional example inputs.
        kwargs: keyword example inputs.
    """
    found = {path: Calls() for path in paths}
    seen: dict[str, Any] = {}

    def note(path: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls = found[path]
        if any(_is_wrapped(leaf) for leaf in pytree.tree_leaves((given, named))):
            # Outside of that call there is no such tensor to capture it with, or to run it on.
            seen[path], calls.why = None, "torch.vmap or the like calls it on tensors of its own"
            return
        kind = _kind(given, named)
        if path not in seen:
            seen[path] = kind
            copied = pytree.tree_map(_kept, (given, named))
            calls.args, calls.kwargs, calls.why = copied[0], copied[1], ""
        elif seen[path] != kind:
            calls.why = "it is called in several ways"

    handles = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda _m, given, named, path=path: note(path, given, named), with_kwargs=True
        )
        for path in found
    ]
    try:
        with random_kept(module), torch.no_grad(), ExitStack() as watch:
            reads = {
                path: watch.enter_context(watching(module.get_submodule(path))) for path in found
            }
            nn.Module.__call__(module, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for path, calls in found.items():
        calls.reads = frozenset(reads[path].described)
        if reads[path].computed and not calls.why:
            calls.why = f"the code around it computes with its {min(reads[path].computed)}"
    return found


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What two calls must share for one graph to serve both; sizes are free."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return spec, [
        (leaf.dim(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    ]


class Alone(nn.Sequential):
    """Calls a single layer, under its own name."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__(OrderedDict({name: layer}))


def is_alone(module: nn.Module) -> bool:
    """Whether a module only calls a single layer."""
    return isinstance(module, Alone)


def is_layer(module: nn.Module) -> bool:
    """Whether tracing takes a module as one op: a layer of torch's own."""
    own = type(module).__module__.startswith("torch.nn.")
    return own and not isinstance(module, nn.Sequential)


def prefix_paths(module: fx.GraphModule, prefix: str, cls: type[nn.Module] | None) -> None:
    """Let the nodes of a part's graph know their paths in the whole model.

    Args:
        module: the captured part.
        prefix: where the part stands in the user's model.
        cls: the class of the part; ``None`` for one that is a single layer.
    """
    first = () if cls is None else ((prefix, cls),)
    base = prefix if cls is not None else prefix.rpartition(".")[0]
    for node in module.graph.nodes:
        record = info(node)
        inside = ".".join(filter(None, (base, record.path)))
        path = inside if record.path and node.op.startswith("call") else prefix
        owners = tuple((".".join(filter(None, (base, p))), owner) for p, owner in record.owners)
        write_info(node, path=path, owners=(*first, *owners))


def joined(outer: GraphState, parts: Iterable[tuple[str, GraphState]]) -> GraphState:
    """The states of a graph and of the parts its leaves call, as one; names get a prefix.

    Args:
        outer: the state of the graph.
        parts: path and state of each part.
    """
    nodes = list(outer.nodes)
    for path, state in parts:
        nodes += [_renamed(node, path) for node in state.nodes]
    return GraphState(tuple(nodes))


def _renamed(node: NodeState, path: str) -> NodeState:
    prefix = path.replace(".", "_")
    at = node.op in ("call_module", "get_attr")
    return replace(
        node,
        name=f"{prefix}__{node.name}",
        target=f"{path}.{node.target}" if at else node.target,
        args=tuple(_moved(value, prefix) for value in node.args),
        kwargs=tuple((name, _moved(value, prefix)) for name, value in node.kwargs),
        origins=tuple(f"{prefix}__{name}" for name in node.origins),
        unit=None if node.unit is None else f"{prefix}__{node.unit}",
    )


def _moved(value: Argument, prefix: str) -> Argument:
    if isinstance(value, Ref):
        return Ref(f"{prefix}__{value.name}")
    if isinstance(value, Group):
        return Group(value.kind, tuple(_moved(item, prefix) for item in value.items))
    return value
