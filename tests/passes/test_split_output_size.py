"""Transposed convolutions that are told how large their result must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.capture import capture
from fxquant.graph.edit import Editor
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.split_output_size import SplitOutputSize
from tests.helpers import One, names, run

Body = Callable[[Any, Any], Any]

ASKED: dict[str, Body] = {
    "the size of another": lambda m, x: m.up(m.down(x), output_size=x.size()),
    "its shape": lambda m, x: m.up(m.down(x), output_size=x.shape[-2:]),
    "by place": lambda m, x: m.up(m.down(x), x.size()),
    "computed sides": lambda m, x: m.up(m.down(x), output_size=(x.size(2), x.size(3))),
    "numbers": lambda m, x: m.up(m.down(x), output_size=[9, 10]),
}


def model(body: Body) -> nn.Module:
    up = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)
    return One(body, down=nn.Conv2d(4, 8, 3, 2, 1), up=up).eval()


@pytest.mark.parametrize("name", ASKED)
def test_the_result_has_the_size_that_was_asked_for(name: str) -> None:
    whole, x = model(ASKED[name]), torch.randn(2, 4, 9, 10)
    module = run(capture(whole, (x,)).module, SplitOutputSize(), Canonicalize())
    assert "conv_transpose2d" in names(module) and names(module)[-1] == "getitem"
    with torch.no_grad():
        assert torch.allclose(module(x), whole(x), atol=1e-6)
        if name != "numbers":
            other = torch.randn(1, 4, 12, 7)
            assert torch.allclose(module(other), whole(other), atol=1e-6)
    again = Editor(module)
    SplitOutputSize().run(again)
    assert again.log == []


def test_without_a_size_nothing_changes() -> None:
    whole, x = model(lambda m, x: m.up(m.down(x))), torch.randn(2, 4, 9, 10)
    editor = Editor(capture(whole, (x,)).module)
    SplitOutputSize().run(editor)
    assert editor.log == []


def test_in_int8() -> None:
    whole = model(ASKED["the size of another"])
    q = fxquant.quantize(whole, [torch.randn(2, 4, 33, 34)])
    assert fxquant.report(q).weight_coverage == 1.0
    x = torch.randn(1, 4, 21, 40)
    with torch.no_grad():
        wanted = whole(x)
    assert q(x).shape == wanted.shape
    assert float((q(x) - wanted).abs().max()) < 0.1 * float(wanted.abs().max())
