"""Rows rounded in their own range while training: values of run time, gradients untouched."""

from __future__ import annotations

import pytest
import torch

from fxquant.numerics.dynamic import qdq_rows
from fxquant.numerics.fake_rows import FakeQuantizeRows, trained_rows
from fxquant.spec import ROWS, QSpec

TENSOR = QSpec(observer="runtime")


@pytest.mark.parametrize("spec", [ROWS, TENSOR])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_values_are_those_of_run_time_and_gradients_pass(spec: QSpec, dims: int) -> None:
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    made = trained_rows(x, spec, dims)
    assert torch.equal(made, qdq_rows(x.detach(), spec, dims))
    given = torch.randn_like(x)
    made.backward(given)
    assert x.grad is not None and torch.equal(x.grad, given)


def test_a_row_does_not_depend_on_the_others() -> None:
    x = torch.randn(4, 8)
    assert torch.equal(trained_rows(x, ROWS)[1:2], trained_rows(x[1:2], ROWS))


def test_the_module_is_switched_and_lets_other_things_pass() -> None:
    fake = FakeQuantizeRows(ROWS, "fc", 1)
    x = torch.randn(4, 8)
    assert torch.equal(fake(x), qdq_rows(x, ROWS)) and not torch.equal(fake(x), x)
    assert fake(x.bfloat16()).dtype == torch.bfloat16
    empty, whole = torch.empty(0, 8), torch.arange(3)
    assert fake(empty) is empty and fake(whole) is whole and fake(None) is None
    fake.switch(quantizing=False)
    assert fake(x) is x
