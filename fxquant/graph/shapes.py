"""Shapes of all values for one example, found without computing anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

from fxquant.graph.info import write_info


class _Recorder(fx.Interpreter):
    """Interprets a graph on fake tensors and writes shapes into the records."""

    def run_node(self, n: Node) -> Any:
        """Run one node and note the shape of its value."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            write_info(n, shape=tuple(int(side) for side in value.shape))
        return value


def record_shapes(
    module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Write the shape of every value into the records.

    Args:
        module: the captured graph.
        args: positional example inputs.
        kwargs: keyword example inputs.

    Returns:
        ``None``, or why shapes are not known: something in the graph cannot run on fake tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if _plain(value) else value

    placeholders = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    given = dict(zip(placeholders, args, strict=False)) | kwargs
    defaults = {str(n.target): n.args[0] for n in module.graph.nodes if n.op == "placeholder" and n.args}
    values = [given.get(name, defaults.get(name)) for name in placeholders]
    try:
        with mode, torch.no_grad():
            _Recorder(module).run(*torch.utils._pytree.tree_map(fake, values))
    # A user's own op may fail on fake tensors in any way; shapes are a help, never a need.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
