"""``int`` of a size stays symbolic where the module's code allows it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.capture import capture
from fxquant.graph.symbolic_int import SymbolicInt, may_replace_int
from tests.helpers import check_eager


def windows_back(x: Tensor, side: int) -> Tensor:
    n = int(x.shape[0] / (4 / side / side))
    return x.view(n, -1)


class Windows(nn.Module):
    """As Swin does it, with a check of a plain number beside."""

    def forward(self, x: Tensor) -> Tensor:
        side = 2
        assert isinstance(side, int) and isinstance(x.shape[0], int)
        y = windows_back(x, side)
        return y[: int(x.shape[0]), : int(y.size(1) * 0.5)] + int(2.5) + int("3", base=10)


def test_sizes_that_become_ints_stay_free() -> None:
    model = Windows()
    module = capture(model, (torch.randn(2, 4, 6),)).module
    assert "check_answer" not in module.code
    for shape in ((2, 4, 6), (5, 2, 8), (1, 3, 2)):
        check_eager(model, module, torch.randn(shape))
    assert "int" not in globals()


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("def f(x): return int(x)", True),
        ("def f(x): return int(x) if isinstance(x, int) else 0", True),
        ("def f(x): return int(x) if type(x) is int else 0", False),
        ("def f(x): return x.to(int) + int(x)", False),
        ("class A:\n  def f(self, x): return [int(y) for y in x]", True),
        ("class A:\n  @staticmethod\n  def f(x): return x.to(dtype=int)", False),
        ("def f(x): return isinstance(x, int)", False),
    ],
)
def test_which_modules_see_another_int(source: str, allowed: bool) -> None:
    module = ModuleType("made_for_the_test")
    exec(compile(source, "made", "exec"), vars(module))
    assert may_replace_int(module) is allowed


def test_it_answers_as_int_does() -> None:
    made: Any = SymbolicInt
    assert made("12") == 12 and made(2.7) == 2 and made() == 0
    assert isinstance(3, made) and not isinstance("3", made) and issubclass(bool, made)
    assert "made_for_the_test" not in sys.modules
