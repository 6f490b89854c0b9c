"""What the calls of one weight share, so that it is worked on once: of tied weights, and of layers
that are called again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.fx import GraphModule, Node


@dataclass(eq=False)
class Tied:
    """One integer weight, whichever layers hold it.

    Args:
        calls: how many calls read it.
        table: whether one of them is a lookup, which reads the plain codes.
        packed: what the kernel of static linears reads, once one of the calls has made it.
        made: paths of the modules that were made of it, by what else they depend on.
    """

    calls: int = 0
    table: bool = False
    packed: Tensor | None = None
    made: dict[Hashable, list[str]] = field(default_factory=dict)


def tied_of(codes: Node) -> Tied | None:
    """What the calls of a weight share, if there are several.

    Args:
        codes: the ``get_attr`` that reads the codes.
    """
    root = codes.graph.owning_module
    if not isinstance(root, GraphModule) or not isinstance(codes.target, str):
        return None
    owner: nn.Module = root.get_submodule(codes.target.rpartition(".")[0])
    found = vars(owner).get("tied")
    return found if isinstance(found, Tied) and found.calls > 1 else None
