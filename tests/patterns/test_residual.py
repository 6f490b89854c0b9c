"""Units of residual sums, and of relu after arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import FLOAT32, One, check_rule, close_share, fused, misses, reported, trained

Body = Callable[[Any, Any], Any]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), (2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1), (2, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 3, padding=1), (2, 4, 5, 4, 3)),
    "linear": (lambda: nn.Linear(6, 6), (3, 6)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_layer_plus_its_input(layer: str, relu: bool, first: bool) -> None:
    make, shape = LAYERS[layer]

    def body(m: Any, x: Any) -> Any:
        y = m.layer(x) + x if first else x + m.layer(x)
        return torch.relu(y) if relu else y

    ops = [layer, "add", "relu"] if relu else [layer, "add"]
    check_rule(One(body, layer=make()).eval(), torch.randn(shape), ops=ops)


def _in_place(m: Any, x: Any) -> Any:
    y = m.layer(x)
    y += x
    return y


SPELLINGS: list[Body] = [
    _in_place,
    lambda m, x: torch.add(x, m.layer(x)),
    lambda m, x: m.layer(x).add(x, alpha=1),
    lambda m, x: m.layer(x).add_(x),
]


@pytest.mark.parametrize("body", SPELLINGS)
def test_every_spelling_of_the_sum(body: Body) -> None:
    model = One(body, layer=nn.Conv2d(4, 4, 1)).eval()
    check_rule(model, torch.randn(1, 4, 3, 3), ops=["conv2d", "add"])


def test_a_weighted_sum_is_no_unit() -> None:
    model = One(lambda m, x: torch.add(m.layer(x), x, alpha=2), layer=nn.Conv2d(4, 4, 1))
    check_rule(model.eval(), torch.randn(1, 4, 3, 3), ops=["conv2d", "add"], unit=False)


class Block(nn.Module):
    """A residual block whose shortcut is a layer too."""

    def __init__(self, shortcut_first: bool) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.shortcut_first = shortcut_first

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut_first:
            side = self.shortcut(x)
            return torch.relu(self.main(x) + side)
        main = self.main(x)
        return torch.relu(main + self.shortcut(x))


@pytest.mark.parametrize("shortcut_first", [False, True])
def test_of_two_layers_the_later_takes_the_sum(shortcut_first: bool) -> None:
    model, x = trained(Block(shortcut_first)), torch.randn(1, 4, 5, 5)
    module = fused(model, x)
    later = "main_0" if shortcut_first else "shortcut_0"
    assert [unit for _, unit in reported(module)] == [None, later, later, later]
    assert close_share(module(x), model(x)) <= FLOAT32
    said = [why for rule, _, why in misses(model, x) if rule == "layer-add"]
    assert all("runs later and takes the sum" in why for why in said)


REFUSED: list[tuple[Body, str, str]] = [
    (lambda m, x: m.layer(x) + 1.5, "layer-add", "the other operand is a number"),
    (lambda m, x: m.layer(x) + x.size(0), "layer-add", "the other operand is a number"),
    (
        lambda m, x: _read_twice(m.layer(x), x),
        "layer-add",
        "conv2d %layer has more than one user: %flatten",
    ),
    (
        lambda m, x: _twice(m.layer(x)),
        "layer-add",
        "conv2d %layer is both inside the pattern and its input",
    ),
]


def _read_twice(y: Any, x: Any) -> Any:
    return y + x, y.flatten()


def _twice(y: Any) -> Any:
    return y + y


@pytest.mark.parametrize(("body", "rule", "reason"), REFUSED, ids=lambda v: None)
def test_where_it_is_refused(body: Body, rule: str, reason: str) -> None:
    model, x = One(body, layer=nn.Conv2d(4, 4, 1)).eval(), torch.randn(1, 4, 3, 3)
    assert {unit for _, unit in reported(fused(model, x))} == {None}
    assert reason in [why for name, _, why in misses(model, x) if name == rule]


def test_an_override_of_the_sum_splits_it() -> None:
    model = One(lambda m, x: torch.relu(m.layer(x) + x), layer=nn.Conv2d(4, 4, 1)).eval()
    module = fused(model, torch.randn(1, 4, 3, 3), overrides=((torch.add, None),))
    assert {unit for _, unit in reported(module)} == {None}


def test_a_broadcast_sum_is_exact_too() -> None:
    model = One(lambda m, x: m.layer(x) + x.mean((2, 3), keepdim=True), layer=nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 4, 3, 3)
    module = fused(model.eval(), x)
    assert close_share(module(x), model(x)) <= FLOAT32


@pytest.mark.parametrize(
    ("body", "op"),
    [
        (lambda m, x: torch.relu(x + x.flip(0)), "add"),
        (lambda m, x: torch.relu(x - x.flip(0)), "sub"),
        (lambda m, x: torch.relu(x * x.flip(0)), "mul"),
        (lambda m, x: torch.relu(m.bn(x)), "batch_norm"),
    ],
)
def test_relu_after_arithmetic(body: Body, op: str) -> None:
    model, x = trained(One(body, bn=nn.BatchNorm2d(4))), torch.randn(2, 4, 3, 3)
    found = [entry for entry in reported(fused(model, x)) if entry[0] != "flip"]
    assert [name for name, _ in found] == [op, "relu"]
    assert found[0][1] == found[1][1] is not None


def test_the_larger_unit_wins() -> None:
    def body(m: Any, x: Any) -> Any:
        return torch.relu(m.two(torch.relu(m.one(x))) + x)

    model = One(body, one=nn.Conv2d(4, 4, 1), two=nn.Conv2d(4, 4, 1)).eval()
    units = [unit for _, unit in reported(fused(model, torch.randn(1, 4, 3, 3)))]
    assert units == ["one", "one", "two", "two", "two"]


@pytest.mark.parametrize("relu", [False, True])
def test_a_sum_that_a_norm_reads_is_no_unit(relu: bool) -> None:
    """Unless ``relu`` stands between: then the norm reads what is left of it."""

    def body(m: Any, x: Any) -> Any:
        y = x + m.layer(x)
        return m.norm(torch.relu(y) if relu else y)

    model, x = One(body, layer=nn.Linear(6, 6), norm=nn.LayerNorm(6)).eval(), torch.randn(3, 6)
    units = dict(reported(fused(model, x)))
    assert (units["linear"] is not None and units["linear"] == units["add"]) == relu
    reasons = [why for _, _, why in misses(model, x) if "reads the sum" in why]
    assert reasons == ([] if relu else ["%norm reads the sum, which stays float"])
