"""Recurrent cells opened up compute what torch's own do, and are int8 where layers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.graph.capture import capture
from tests.helpers import names

X = torch.randn(3, 5, 6)


class Steps(nn.Module):
    """A cell called by hand for three steps, with and without a state to begin with."""

    def __init__(self, cell: nn.Module, begin: bool) -> None:
        super().__init__()
        self.cell, self.begin = cell, begin

    def forward(self, x: Tensor) -> Any:
        paired = isinstance(self.cell, nn.LSTMCell)
        h: Any = None
        if self.begin:
            zero = torch.tanh(x[:, 0, :4])
            h = (zero, zero * 0.5) if paired else zero
        out = []
        for step in range(3):
            h = self.cell(x[:, step], h)
            out.append(h[0] if paired else h)
        return torch.stack(out, 1), h


CELLS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.RNNCell(6, 4),
    lambda: nn.RNNCell(6, 4, nonlinearity="relu", bias=False),
    lambda: nn.LSTMCell(6, 4),
    lambda: nn.LSTMCell(6, 4, bias=False),
    lambda: nn.GRUCell(6, 4),
    lambda: nn.GRUCell(6, 4, bias=False),
)


@pytest.mark.parametrize("make", CELLS)
@pytest.mark.parametrize("begin", [False, True])
def test_the_same_numbers_in_float64(make: Callable[[], nn.Module], begin: bool) -> None:
    model = Steps(make(), begin).double().eval()
    module = capture(model, (X.double(),), evaluate=True).module
    assert not [n for n in names(module) if n.endswith("Cell")]
    with torch.no_grad():
        (out, last), (wanted, wanted_last) = module(X.double()), model(X.double())
    # The same sums in another order: rounding of float64, some eight roundings deep.
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(last, wanted_last, rtol=1e-12, atol=1e-14)


def test_a_single_sample_without_a_batch() -> None:
    cell = nn.GRUCell(6, 4).eval()
    module = capture(cell, (X[0, 0],), evaluate=True).module
    with torch.no_grad():
        torch.testing.assert_close(module(X[0, 0]), cell(X[0, 0]))


def test_the_users_cell_is_untouched_and_its_parameters_are_not_copied_twice() -> None:
    cell = nn.LSTMCell(6, 4)
    before = list(cell.state_dict())
    capture(Steps(cell, True), (X,), evaluate=True)
    assert type(cell) is nn.LSTMCell
    assert list(cell.state_dict()) == before


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class Own(nn.RNNCell):
        def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
            return input * 2

    assert (
        capture(nn.Sequential(Own(6, 6)), (X[:, 0],), evaluate=True)
        .module(X[:, 0])
        .equal(X[:, 0] * 2)
    )


@pytest.mark.parametrize("make", CELLS[::2])
def test_the_products_are_int8(make: Callable[[], nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(16, 3, 6, generator=generator) for _ in range(3)]
    model = Steps(make(), True).eval()
    quantized = fxquant.quantize(model, data, backend="reference")
    report = fxquant.report(quantized)
    assert report.mac_coverage == 1.0, str(report)
    with torch.no_grad():
        wanted, found = model(data[0])[0], quantized(data[0])[0]
    # int8 codes of a state in [-1, 1]: a hundredth, three steps deep.
    assert float((wanted - found).abs().max()) < 0.06
