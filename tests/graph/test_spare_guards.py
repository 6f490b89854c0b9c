"""Guards of the batch size that nothing depends on go; every other one stays."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import GuardError
from fxquant.graph.capture import SYMBOLIC, capture
from fxquant.graph.guards import check_answer, check_cases
from tests.helpers import One

Body = Callable[[Any, Tensor], Tensor]


def kinds(module: GraphModule) -> list[str]:
    """The guards of answers that are left."""
    wanted = (check_answer, check_cases)
    return [node.target.__name__ for node in module.graph.nodes if node.target in wanted]


def expands(m: Any, x: Tensor) -> Tensor:
    """What transformers does before it makes a mask."""
    places = torch.arange(x.shape[1]).unsqueeze(0)
    if x.shape[0] != places.shape[0]:
        places = places.expand(x.shape[0], -1)
    rows = torch.arange(x.shape[0])
    return x * places[rows].to(x.dtype)


def expands_if_not_equal(m: Any, x: Tensor) -> Tensor:
    """The same, asked the other way round."""
    places = torch.arange(x.shape[1])[None]
    if places.shape[0] == x.shape[0]:
        return x + places
    return x + places.expand(len(x), -1)


def same_bodies(m: Any, x: Tensor) -> Tensor:
    """Two spellings of one op."""
    return x.relu() * 2 if x.shape[0] > 1 else 2 * torch.relu(x)


def as_argument(m: Any, x: Tensor) -> Tensor:
    """An answer that is handed on."""
    keep = x.shape[0] > 1 and not m.training and m.one is None
    return x.sum(1, keepdim=keep)


def several(m: Any, x: Tensor) -> Tensor:
    """One question in two places, of two tensors."""
    for shift in (torch.zeros(1, x.shape[1]), torch.ones(1, x.shape[1])):
        if shift.size(0) != x.size(0):
            shift = shift.expand(x.size(0), -1)
        x = x + shift.clone()
    return x


SPARED: list[Body] = [expands, expands_if_not_equal, same_bodies, as_argument, several]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("body", SPARED)
def test_a_graph_that_is_right_in_both_cases_runs_in_both(body: Body, count: int) -> None:
    model = One(body, one=nn.Identity())
    made = capture(model, (torch.randn(count, 5),))
    assert made.rung == SYMBOLIC and "check_answer" not in kinds(made.module)
    for module in (made.module, copy.deepcopy(made.module), again(made.module)):
        for shape in ((1, 5), (2, 5), (3, 4), (7, 1), (16, 5)):
            x = torch.randn(shape)
            assert torch.equal(module(x), model(x))


def again(module: GraphModule) -> GraphModule:
    """The module from its pickle."""
    loaded: GraphModule = pickle.loads(pickle.dumps(module))
    return loaded


def other_numbers(m: Any, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 1 else x * 3


def other_order(m: Any, x: Tensor) -> Tensor:
    return (x + 1).relu() if x.shape[0] == 1 else x.relu() + 1


def other_layers(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.one(x) if x.shape[0] == 1 else m.two(x)
    return y


def other_memory(m: Any, x: Tensor) -> Tensor:
    y = x + 0
    if x.shape[0] == 1:
        y.mul_(2)
    else:
        y.mul(2)
    return y


def other_constants(m: Any, x: Tensor) -> Tensor:
    return x + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0 if x.shape[0] == 1 else 6.0])


def other_sizes(m: Any, x: Tensor) -> Tensor:
    """At other sizes than these two, the expand is none."""
    if x.shape[0] > 1:
        return x[:1].expand(x.shape[0], -1)
    return x[:1]


def other_dtypes(m: Any, x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.shape[0] == 1 else torch.float32)


def grows(m: Any, x: Tensor) -> Tensor:
    """Of one dimension more or less, the expand would be no identity."""
    y = x.mean(-1)
    if y.shape[0] != x.shape[0] - 1:
        y = y.expand(x.shape[0] - 1 + 1)
    return y


def loops(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[1])
    for place in range(x.shape[0]):
        y = y + x[place]
    return y


def reshaped(m: Any, x: Tensor) -> Tensor:
    """The same question of the same tensor, with another answer."""
    y = x + 0
    before = y.size(0)
    y.unsqueeze_(0)
    return y.sum(0) * (1.0 if before == 1 else 2.0) * y.size(0)


KEPT: list[Body] = [
    other_numbers,
    other_order,
    other_layers,
    other_memory,
    other_constants,
    other_dtypes,
    loops,
    reshaped,
]


@pytest.mark.parametrize(("count", "other"), [(1, 2), (1, 3), (4, 1)])
@pytest.mark.parametrize("body", KEPT)
def test_another_way_is_still_refused(body: Body, count: int, other: int) -> None:
    layers = {"one": nn.Linear(5, 5), "two": nn.Linear(5, 5)}
    model = One(body, **layers)
    module = capture(model, (torch.randn(count, 5),)).module
    x = torch.randn(count, 5)
    assert torch.equal(module(x), model(x))
    with pytest.raises(GuardError, match=r"test_spare_guards\.py:\d+: "):
        module(torch.randn(other, 5))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("body", [*SPARED, *KEPT, other_sizes, grows])
def test_no_call_ever_gets_a_wrong_answer(body: Body, count: int) -> None:
    """Whatever the shape: the model's own answer, its own failure, or a guard."""
    model = One(body, one=nn.Linear(5, 5), two=nn.Linear(5, 5))
    module = capture(model, (torch.randn(count, 5),)).module
    for shape in ((1, 5), (2, 5), (3, 5), (4, 5), (9, 5), (1, 1), (5, 1), (0, 5)):
        x = torch.randn(shape)
        try:
            found = module(x)
        except (GuardError, RuntimeError, IndexError):
            continue
        assert torch.equal(found, model(x))


def test_where_two_questions_differ_both_are_asked_together() -> None:
    """Each alone may have another answer than in either trace; no trace shows that case."""

    def body(m: Any, x: Tensor) -> Tensor:
        y = x * 2 if x.shape[0] > 1 else 2 * x
        return y + 1 if x.shape[0] > 2 else 1 + y

    model = One(body)
    module = capture(model, (torch.randn(4, 5),)).module
    assert kinds(module) == ["check_cases"]
    for count in (1, 3, 4, 9):
        x = torch.randn(count, 5)
        assert torch.equal(module(x), model(x))
        assert torch.equal(again(module)(x), model(x))
    with pytest.raises(GuardError, match=r"x\.shape\[0\] > 1.*\n.*this line and others"):
        module(torch.randn(2, 5))


def test_what_the_model_keeps_is_as_it_was() -> None:
    class Counts(nn.Module):
        """A counter in a buffer, random numbers, a branch."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("calls").add_(1)
            y: Tensor = self.layer(x)
            return y.relu() if x.shape[0] > 1 else torch.relu(y)

    model, state = Counts(), torch.get_rng_state()
    module = capture(model, (torch.randn(2, 5),)).module
    state = torch.get_rng_state()
    module = capture(model, (torch.ones(2, 5),)).module
    assert torch.equal(torch.get_rng_state(), state)
    assert model.get_buffer("calls") == 0 and kinds(module) == []
    module(torch.randn(1, 5))
    assert module.get_buffer("calls") == 1


def test_models_that_ask_nothing_are_traced_once() -> None:
    calls = []

    def body(m: Any, x: Tensor) -> Tensor:
        calls.append(x.shape)
        assert x.shape[1] == 5
        return x.reshape(x.shape[0], -1)

    capture(One(body), (torch.randn(2, 5),))
    assert len(calls) == 1
