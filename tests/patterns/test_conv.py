"""Units of convolutions: with every activation of the table, and with none but those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.info import info
from fxquant.graph.op_table import op_named, op_names
from fxquant.graph.ops import Kind
from fxquant.patterns.units import ACTIVATIONS
from tests.graph.spelling_cases import CASES
from tests.helpers import One, check_rule, fused, misses, names, node_of, nodes, reported

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2),
    "conv3d": lambda: nn.Conv3d(4, 6, 3),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(4, 6, 3),
}


SHIFTED = ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "acosh")
SQUEEZED = ("asin", "acos", "atanh", "erfinv")


def image(layer: str) -> Tensor:
    return torch.randn(2, 4, *(7, 6, 5)[: int(layer[-2])])


def activation(name: str) -> Callable[[Any], Any]:
    """A call of the canonical op, safe on any real number."""
    op, options = op_named(name), CASES[name].options
    assert op.target is not None
    target: Callable[..., Any] = op.target
    if name in SHIFTED:
        # Squares plus one would hide the sign; adding 20 keeps these in their domain.
        return lambda y: target(y + 20, **options)
    if name in SQUEEZED:
        return lambda y: target(y.sigmoid(), **options)
    return lambda y: target(y, **options)


def before(name: str) -> list[str]:
    """The op that :func:`activation` puts in front of one that is not defined everywhere."""
    return ["sigmoid"] if name in SQUEEZED else []


def after(layer: str, name: str) -> list[str]:
    """The ops of ``layer`` and an activation: a shifted one is a chain of two."""
    return [layer, "unary"] if name in SHIFTED else [layer, *before(name), name]


def test_every_unary_op_ends_a_unit() -> None:
    unary = {name for name in op_names() if op_named(name).kind is Kind.UNARY}
    assert set(ACTIVATIONS) == unary - {"unary"}  # chains are tables of their own
    wanted = "relu relu6 hardtanh leaky_relu hardswish silu gelu sigmoid tanh hardsigmoid"
    assert set(wanted.split()) <= unary


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_after_a_convolution(name: str) -> None:
    act = activation(name)
    model = One(lambda m, x: act(m.conv(x)), conv=LAYERS["conv2d"]()).eval()
    alone = name in SHIFTED or bool(before(name))
    check_rule(model, image("conv2d"), ops=after("conv2d", name), unit=not alone)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["relu", "gelu", "leaky_relu"])
def test_every_convolution_with_an_activation(layer: str, name: str) -> None:
    act = activation(name)
    model = One(lambda m, x: act(m.conv(x)), conv=LAYERS[layer]()).eval()
    module = check_rule(model, image(layer), ops=[layer, name])
    assert {info(n).unit for n in nodes(module)} == {"conv"}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_lone_convolution_is_a_unit_of_its_own(layer: str) -> None:
    check_rule(nn.Sequential(LAYERS[layer]()).eval(), image(layer), ops=[layer])


def test_only_the_first_activation_joins() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Sigmoid()).eval()
    module = fused(model, torch.randn(1, 4, 3, 3))
    assert reported(module) == [("conv2d", "_0"), ("relu", "_0"), ("sigmoid", None)]


def test_a_convolution_read_elsewhere_is_refused_with_the_reader() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.conv(x)
        return torch.relu(y), y.flatten(1)

    model = One(body, conv=nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(1, 4, 3, 3)
    assert {unit for _, unit in reported(fused(model, x))} == {None}
    found = [why for rule, _, why in misses(model, x) if rule == "conv-act"]
    assert found == ["conv2d %conv has more than one user: %flatten"]


def test_an_override_splits_a_unit() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
    x = torch.randn(1, 4, 3, 3)
    overrides = (("1", None),)
    assert {unit for _, unit in reported(fused(model, x, overrides=overrides))} == {None}
    found = [why for rule, _, why in misses(model, x, overrides=overrides) if rule == "conv-act"]
    assert found == ["the default says int8 for %_0, override '1' says float for %_1"]


def test_an_override_of_both_keeps_the_unit() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
    module = fused(model, torch.randn(1, 4, 3, 3), overrides=(("*", None),))
    assert {unit for _, unit in reported(module)} == {"_0"}


def test_in_place_activations_fuse() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    module = fused(layers.eval(), torch.randn(1, 4, 3, 3))
    assert [unit for _, unit in reported(module)] == ["_0", "_0", None]
    assert names(module) == ["conv2d", "relu", "conv2d"]
    assert node_of(module, "relu").target is torch.relu
