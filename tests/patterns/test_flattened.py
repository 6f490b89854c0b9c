"""Linears between views that undo each other: which are, which are not, and what is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.graph.op_table import is_op
from tests.helpers import One, check_eager, fused, misses, names, node_of

Body = Callable[[Any, Any], Any]
X = torch.randn(2, 3, 4)


def model_of(body: Body) -> nn.Module:
    torch.manual_seed(0)
    return One(body, layer=nn.Linear(4, 6), act=nn.GELU()).eval()


def lead_and_width(m: Any, x: Any) -> Any:
    size = x.size()[:-1] + (6,)  # noqa: RUF005 - so GPT-2 has it
    return m.layer(x.view(-1, x.size(-1))).view(size)


def unpacked(m: Any, x: Any) -> Any:
    batch, tokens, width = x.shape
    return m.layer(x.reshape(batch * tokens, width)).view(batch, tokens, 6)


def with_a_reader(m: Any, x: Any) -> Any:
    flat = x.view(-1, 4)
    return m.layer(flat).view(*x.shape[:-1], 6) + flat.sum()


FOUND: dict[str, Body] = {
    "as Conv1D does": lead_and_width,
    "with a number": lambda m, x: m.layer(x.view(-1, 4)).view((*x.shape[:-1], 6)),
    "starred": lambda m, x: m.layer(x.view(-1, 4)).view(*x.shape[:-1], 6),
    "unpacked": unpacked,
    "the last is open": lambda m, x: m.layer(x.view(-1, 4)).view(x.size(0), x.size(1), -1),
    "flattened": lambda m, x: m.layer(x.flatten(0, -2)).view(x.size(0), x.size(1), 6),
    "another reader": with_a_reader,
}


@pytest.mark.parametrize("name", FOUND)
def test_the_views_go(name: str) -> None:
    model = model_of(lambda m, x: m.act(FOUND[name](m, x)))
    module = fused(model, X)
    layer = node_of(module, "linear")
    assert [node.op for node in layer.all_input_nodes] == ["placeholder"]
    assert not any(is_op(user, "reshape") for user in layer.users)
    for shape in ((2, 3, 4), (5, 1, 4), (1, 7, 4)):
        check_eager(model, module, torch.randn(shape))


def swapped(m: Any, x: Any) -> Any:
    return m.layer(x.view(-1, 4)).view(x.size(1), x.size(0), 6)


def regrouped(m: Any, x: Any) -> Any:
    y = x.view(3, 2, 4)
    return m.layer(x.view(-1, 4)).view(y.size(0), y.size(1), 6)


def split_heads(m: Any, x: Any) -> Any:
    return m.layer(x.view(-1, 4)).view(x.size(0), x.size(1), 2, 3)


def turned(m: Any, x: Any) -> Any:
    return m.layer(x.transpose(0, 1).reshape(-1, 4)).view(x.size(0), x.size(1), 6)


def read_twice(m: Any, x: Any) -> Any:
    y = m.layer(x.view(-1, 4))
    return y.view(*x.shape[:-1], 6), y


KEPT: dict[str, Body] = {
    "swapped": swapped,
    "of another size": regrouped,
    "heads": split_heads,
    "turned before": turned,
    "the rows are read too": read_twice,
    "fixed sizes": lambda m, x: m.layer(x.view(-1, 4)).view(2, 3, 6),
    "other rows": lambda m, x: m.layer(x.view(3, 2, 4)).view(x.size(0), x.size(1), 6),
    "no second view": lambda m, x: m.layer(x.view(-1, 4)),
    "something between": lambda m, x: m.layer(x.view(-1, 4)).cumsum(0).view(*x.shape[:-1], 6),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_views_stay(name: str) -> None:
    model = model_of(KEPT[name])
    module = fused(model, X)
    assert sum(found in ("reshape", "flatten") for found in names(module)) >= 1
    check_eager(model, module, X)


def test_it_says_why_not() -> None:
    found = [why for rule, _, why in misses(model_of(swapped), X) if rule == "linear-of-rows"]
    assert "it is not known to have the leading dimensions of what was flattened" in found


def test_a_weight_that_is_computed_is_left_alone() -> None:
    def body(m: Any, x: Any) -> Any:
        return F.linear(x.view(-1, 4), m.layer.weight * x.mean()).view(*x.shape[:-1], 6)

    model = model_of(body)
    module = fused(model, X)
    assert "reshape" in names(module)
    check_eager(model, module, X)


def test_what_follows_is_part_of_the_layer() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
            self.norm, self.last = nn.LayerNorm(32), nn.LayerNorm(32)

        def rows(self, layer: nn.Linear, x: Tensor) -> Tensor:
            size = x.size()[:-1] + (layer.out_features,)  # noqa: RUF005 - so GPT-2 has it
            made: Tensor = layer(x.view(-1, x.size(-1)))
            return made.view(size)

        def forward(self, x: Tensor) -> Tensor:
            y = F.gelu(self.rows(self.up, self.norm(x)), approximate="tanh")
            made: Tensor = self.last(x + self.rows(self.down, y))
            return made

    torch.manual_seed(0)
    x, model = torch.randn(4, 5, 32), Block().eval()
    for made in (
        fxquant.quantize(model, [x]),
        fxquant.quantize(model, mode="dynamic", example_inputs=(x,)),
    ):
        found = [op.op for op in fxquant.report(made).ops]
        assert "reshape" not in found
        assert "linear+gelu" in found
        with torch.no_grad():
            for given in (x, torch.randn(1, 9, 32)):
                assert torch.allclose(made(given), model(given), atol=0.1)


def test_an_override_of_the_layer_counts() -> None:
    """The views are no ops of their own: what was asked of the layer is done."""
    model = model_of(FOUND["as Conv1D does"])
    made = fxquant.quantize(model, [X], overrides={nn.Linear: "weight-only-int8"})
    (op,) = fxquant.report(made).ops
    assert op.stored


def test_models_in_training_lose_the_views_too() -> None:
    torch.manual_seed(0)
    model = model_of(lambda m, x: m.act(lead_and_width(m, x)))
    prepared = fxquant.prepare(model, mode="qat", example_inputs=(X,))
    prepared.train()(X).sum().backward()
    converted = fxquant.convert(prepared.eval())
    assert [op.op for op in fxquant.report(converted).ops] == ["linear+gelu"]
    assert fxquant.verify(prepared, converted, [X]).ok
