"""Small models that carry observers, as ``prepare`` would leave them."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fxquant.numerics.observers import Observer, make_observer
from fxquant.spec import QSpec


def observer(path: str) -> Observer:
    """An observer for a site called ``path``."""
    return make_observer(QSpec(observer="minmax"), path)


class Watched(nn.Module):
    """x[N, 3] -> [N, 2], with an observer at the input and at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.before = observer("x")
        self.linear = nn.Linear(3, 2)
        self.after = observer("linear")

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(self.before(x)))


class Optional(Watched):
    """The same with an argument that need not be given."""

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        return super().forward(x if extra is None else x + extra.reshape(-1, 1))


class Pair(nn.Module):
    """Two inputs, both needed, and an observer at their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.before = observer("sum")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.before(x + y)


class Branches(Watched):
    """Seven sites, of which data reaches two."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.ModuleList(observer(f"aux.{i}") for i in range(7))


def traced(model: nn.Module) -> fx.GraphModule:
    """``model`` as a GraphModule, its observers leaves, as ``prepare`` returns it."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Observer) or super().is_leaf_module(m, module_qualified_name)

    return fx.GraphModule(model, Tracer().trace(model))


def batches(count: int = 4, size: int = 5) -> list[Tensor]:
    """``count`` different batches [size, 3] of float32."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(size, 3, generator=generator) for _ in range(count)]
