"""Rehearsal: what a call would do, learnt without its values, its memory or its random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxquant.graph.dispatch import QuietMode
from fxquant.lazy import lazy_module

if TYPE_CHECKING:
    from torch._subclasses import fake_tensor
else:
    fake_tensor = lazy_module("torch._subclasses.fake_tensor")

_SMALL: Final = 4 << 20
_TIMES: Final = 8
"""A result may take this many bytes, or this many times the bytes of what it is made from."""
_UNINITIALISED: Final = ("aten::empty", "aten::new_empty")


class _Watch(QuietMode):
    """Notes what is drawn at random, and how much memory results take."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there
        self.random = False
        self.bytes = 0
        self.blank: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        result = func(*args, **(kwargs or {}))
        if func._schema.name.startswith(_UNINITIALISED):
            self.blank.append(result)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


def rehearse(node: Node, values: Mapping[Node, Any]) -> bool:
    """Whether a call may be made ahead of time: it draws nothing, overwrites nothing, fits memory.

    Args:
        node: a call whose inputs all have values.
        values: the values of the nodes before it.
    """
    watch = _Watch()
    with torch.no_grad(), fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as fake:
        stand_ins: dict[int, Any] = {}

        def stand_in(source: Node) -> Any:
            value = values[source]
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and id(leaf) not in stand_ins:
                    stand_ins[id(leaf)] = fake.from_tensor(leaf)
            return pytree.tree_map(lambda leaf: stand_ins.get(id(leaf), leaf), value)

        args, kwargs = map_arg((node.args, node.kwargs), stand_in)
        before = {key: each._version for key, each in stand_ins.items()}
        try:
            with watch:
                results = pytree.tree_leaves(_call(node, args, kwargs))
        # What cannot be told without values (a mask as an index) is left for every call to do.
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return False
    written = any(each._version != before[key] for key, each in stand_ins.items())
    given = sum(each.untyped_storage().nbytes() for each in stand_ins.values())
    blank = any(each is result for each in watch.blank for result in results)
    return not (watch.random or written or blank) and watch.bytes <= max(_SMALL, _TIMES * given)


def _call(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        owner = node.graph.owning_module
        if not isinstance(owner, GraphModule):
            raise TypeError(f"{node} belongs to no module")
        module: nn.Module = owner.get_submodule(str(node.target))
        return module(*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function has a function
