"""Functions that a model caches are called as they stand while it is traced."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.graph.capture import capture
from tests.helpers import check_eager


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """As in transformers: a wrapper whose closure holds the cache."""
    held = functools.lru_cache(maxsize=1)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return held(*args)

    return call


@functools.lru_cache(maxsize=8)
def positions(rows: int, columns: int) -> Tensor:
    """A function of the module."""
    return torch.ones(rows, columns).cumsum(1)


class Net(nn.Module):
    """Positions by three ways of caching."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @cached
    def wrapped(self, rows: int, columns: int) -> Tensor:
        """Behind a wrapper."""
        return torch.ones(rows, columns).cumsum(1) * 0.1

    @staticmethod
    @cached
    def static(rows: int) -> Tensor:
        """A wrapper of no object."""
        return torch.ones(rows, 1).cumsum(0)

    @staticmethod
    @functools.lru_cache
    def plain(shape: torch.Size) -> Tensor:
        """The cache of no object, by a whole shape."""
        rows, columns = shape
        return torch.ones(rows, columns)

    @functools.lru_cache(maxsize=1)  # noqa: B019 # models are written so
    def direct(self, rows: int, columns: int) -> Tensor:
        """The cache itself is the method."""
        return torch.ones(rows, columns).cumsum(0) * 0.2

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        held = self.wrapped(rows, columns) + self.direct(rows, columns) + positions(rows, 4)
        return self.fc(x) + held + self.static(rows) + self.plain(x.shape)


class Broken(Net):
    """Fails while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise RuntimeError("no")


def caches() -> list[Any]:
    """All that may be replaced."""
    wrapped: Any = vars(Net)["wrapped"]
    assert isinstance(wrapped, types.FunctionType)
    functions = (wrapped, Net.static)
    cells = [cell.cell_contents for f in functions for cell in f.__closure__ or ()]
    return [vars(Net)["direct"], vars(Net)["plain"], positions, *cells]


def test_other_batches_are_right() -> None:
    model, x = Net().eval(), torch.randn(2, 4)
    before = caches()
    module = capture(model, (x,)).module
    assert all(new is old for new, old in zip(caches(), before, strict=True))
    for rows in (2, 1, 5):
        check_eager(model, module, torch.randn(rows, 4))
    # What the model caches are numbers, not what stood for them.
    assert type(model.wrapped(2, 4)) is type(model.direct(2, 4)) is type(positions(2, 4)) is Tensor


def test_caches_come_back_when_tracing_fails() -> None:
    before = caches()
    with pytest.raises(Exception, match="no"):
        capture(Broken().eval(), (torch.randn(2, 4),))
    assert all(new is old for new, old in zip(caches(), before, strict=True))


def test_quantized_models_take_other_batches() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(8, 4)
    q = fxquant.quantize(model, mode="dynamic", example_inputs=x, backend="reference")
    report = str(fxquant.report(q))
    assert "symbolic tracing" in report and "in pieces" not in report
    for rows in (8, 1, 3):
        y = torch.randn(rows, 4)
        with torch.no_grad():
            assert float((q(y) - model(y)).abs().max()) < 0.05
