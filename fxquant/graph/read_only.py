"""Parameters of the user's model that a graph reads where they are, instead of a copy of them.

Large models are mostly the parameters of torch's own layers, which nobody writes to while a
model is quantized. Who does is found out before it happens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxquant.graph.dispatch import QuietMode


class WriteError(Exception):
    """An op was about to write into a parameter of the user's model."""


def borrowed(model: nn.Module) -> dict[int, nn.Parameter]:
    """Twins of the parameters of torch's own layers, over the same memory, by the id of the own.

    Args:
        model: the user's model. Parameters of its own classes, of layers that change them in
            ``forward``, and that are inference tensors, have no twin.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> twin = borrowed(model)[id(model.weight)]
        >>> twin is model.weight, twin.data_ptr() == model.weight.data_ptr()
        (False, True)
    """
    own, made = set(), {}
    for module in model.modules():
        torchs = type(module).__module__.startswith("torch.nn.modules.")
        for held in module._parameters.values():
            if type(held) is not nn.Parameter:
                continue
            changes = not torchs or getattr(module, "max_norm", None) is not None
            # What was made in inference mode can have no twin that may be trained outside of it.
            if changes or held.is_inference():
                own.add(id(held))
            elif id(held) not in made:
                made[id(held)] = nn.Parameter(held.detach(), held.requires_grad)
    return {key: twin for key, twin in made.items() if key not in own}


class ReadOnly(QuietMode):
    """Raises where an op is about to write into what was borrowed.

    Args:
        twins: what :func:`borrowed` returned.

    ``raised`` says whether it did: a user's own code may catch what is raised in it.

    Raises:
        WriteError: from the op, before it writes.

    Example:
        >>> with ReadOnly({0: nn.Parameter(torch.ones(2))}):
        ...     torch.ones(2).add_(1)
        tensor([2., 2.])
    """

    supports_higher_order_operators = True

    def __init__(self, twins: dict[int, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.raised = False
        self._places = {place for twin in twins.values() if (place := _place(twin))}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at ops that write; all others pass."""
        named = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            # Ops that call functions: what is done in there is not seen.
            self.raised = True
            raise WriteError(f"{func} might write into a parameter")
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                given = args[place] if place < len(args) else named.get(argument.name)
                for leaf in pytree.tree_leaves(given):
                    if isinstance(leaf, Tensor) and _place(leaf) in self._places:
                        self.raised = True
                        raise WriteError(f"{func} writes into a parameter")
        return func(*args, **named)


def _place(tensor: Tensor) -> int:
    """Where its memory begins; 0 for what has none."""
    if tensor.layout != torch.strided:
        return 0
    return tensor.untyped_storage().data_ptr()


def give_back(module: fx.GraphModule, twins: dict[int, nn.Parameter]) -> None:
    """Copy the borrowed parameters that the graph reads as tensors: it might write into them.

    Args:
        module: the graph module; changed in place.
        twins: what :func:`borrowed` returned.
    """
    names = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    ours = {id(twin) for twin in twins.values()}
    copies: dict[int, nn.Parameter] = {}
    for path, held in module.named_parameters(remove_duplicate=False):
        if path in names and id(held) in ours and id(held) not in copies:
            copies[id(held)] = nn.Parameter(held.detach().clone(), held.requires_grad)
    for owner in module.modules() if copies else ():
        for name, old in owner._parameters.items():
            if old is not None and id(old) in copies:
                owner._parameters[name] = copies[id(old)]
