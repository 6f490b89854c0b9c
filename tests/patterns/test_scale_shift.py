"""Folding of factors and terms that a model holds: where, where not and why; outputs stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.passes.fuse import Fuse
from tests.helpers import One, check_eager, check_rule, fused, misses, names, node_of, trained

Body = Callable[[Any, Tensor], Tensor]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 8), 2),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 6, 7), 3),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, bias=False), (2, 4, 9), 1),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 5, 6), 2),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 6, 2, bias=False), (2, 4, 3, 4, 5), 3),
    "linear": (lambda: nn.Linear(4, 6), (2, 5, 4), 0),
}
"""A layer of six output channels, what it reads, and how many dimensions follow the channels."""


def held(model_layer: nn.Module, behind: int, body: Body, *, whole: bool = False) -> nn.Module:
    """A model whose ``body`` finds the layer, and a factor and a term per channel."""
    shape = (*((1,) if whole else ()), 6, *(1,) * behind)
    scale, shift = torch.rand(shape) + 0.5, torch.randn(shape)
    kept = (nn.Parameter(scale), nn.Parameter(shift))
    return trained(One(body, layer=model_layer, scale=kept[0], shift=kept[1]))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.layer(x) * m.scale,
        lambda m, x: m.scale * m.layer(x),
        lambda m, x: m.shift + m.layer(x),
        lambda m, x: m.layer(x).mul_(m.scale).add_(m.shift),
        lambda m, x: (m.layer(x) + m.shift) * m.scale * m.scale,
    ],
)
def test_factors_and_terms_of_layers(name: str, whole: bool, body: Body) -> None:
    make, shape, behind = LAYERS[name]
    check_rule(held(make(), behind, body, whole=whole), torch.randn(shape), ops=[name])


def test_one_value_for_all_channels_and_what_follows() -> None:
    model = held(nn.Conv2d(4, 6, 3), 2, lambda m, x: torch.relu(m.layer(x) * m.one + m.shift))
    model.register_buffer("one", torch.tensor(-1.5))
    module = check_rule(model, torch.randn(2, 4, 9, 8), ops=["conv2d", "relu"])
    assert info(node_of(module, "conv2d")).rules[:2] == ("fold-scale", "fold-shift")
    again = Editor(module)
    Fuse().run(again)
    assert again.log == []


def test_folding_leaves_the_models_own_layer() -> None:
    model = held(nn.Linear(4, 6), 0, lambda m, x: m.layer(x) * m.scale)
    before = model.get_parameter("layer.weight").detach().clone()
    fused(model, torch.randn(2, 4))
    assert torch.equal(model.get_parameter("layer.weight"), before)


REFUSED: list[tuple[Body, list[str], str, str]] = [
    (
        lambda m, x: m.layer(x) * m.pixels,
        ["conv2d", "mul"],
        "fold-scale",
        "a tensor of shape [7, 6] is not one value for each of the 6 channels",
    ),
    (
        lambda m, x: m.layer(x) * m.scale.sigmoid(),
        ["conv2d", "sigmoid", "mul"],
        "",
        "",
    ),
    (
        lambda m, x: m.layer(x) * m.many,
        ["conv2d", "mul"],
        "fold-scale",
        "it may give the result more dimensions: give example_inputs",
    ),
    (
        lambda m, x: _twice(m.layer(x), m.scale),
        ["conv2d", "mul", "add"],
        "fold-scale",
        "conv2d %layer has more than one user: %add",
    ),
    (
        lambda m, x: m.layer(x) * m.scale + m.other(x).sum(),
        ["conv2d", "mul", "conv2d", "sum", "add"],
        "fold-scale",
        "other modules share the weight",
    ),
    (
        lambda m, x: torch.add(m.layer(x), m.shift, alpha=2),
        ["conv2d", "add"],
        "",
        "",
    ),
]


def _twice(y: Tensor, scale: Tensor) -> Tensor:
    return scale * y + y


@pytest.mark.parametrize(("body", "ops", "rule", "reason"), REFUSED)
def test_where_it_is_refused(body: Body, ops: list[str], rule: str, reason: str) -> None:
    model = held(nn.Conv2d(4, 6, 3), 2, body)
    model.register_buffer("pixels", torch.rand(7, 6))
    model.register_buffer("many", torch.rand(1, 1, 6, 1, 1))
    other = nn.Conv2d(4, 6, 3)
    other.weight = model.get_submodule("layer").weight  # type: ignore[assignment]
    if "other" in body.__code__.co_names:
        model.add_module("other", other)
    x = torch.randn(2, 4, 9, 8)
    module = fused(model, x)
    assert names(module) == ops
    check_eager(model, module, x)
    if rule:
        assert any(reason in why for name, _, why in misses(model, x) if name == rule)


def test_without_a_rank_a_batch_of_one_is_no_channel() -> None:
    """[6, 1, 1] fits whatever the rank; [1, 6, 1, 1] makes one picture a batch."""
    model = held(nn.Conv2d(4, 6, 3), 2, lambda m, x: m.layer(x) * m.scale, whole=True)
    assert names(fused(model)) == ["conv2d", "mul"]
    x = torch.randn(4, 9, 8)
    check_eager(model, fused(model), x)
    assert names(fused(held(nn.Conv2d(4, 6, 3), 2, lambda m, x: m.layer(x) * m.scale))) == [
        "conv2d"
    ]


class FrozenNorm(nn.Module):
    """As torchvision's and DETR's: a batch norm whose numbers are buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        parts = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, var = (self.get_buffer(n).reshape(1, -1, 1, 1) for n in parts)
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


def test_frozen_norms_vanish_in_quantized_models() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), FrozenNorm(16), nn.ReLU(), nn.Conv2d(16, 8, 3),
        FrozenNorm(8),
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 16, 16)
    q = fxquant.quantize(model, [x], mode="static")
    assert [row["op"] for row in fxquant.report(q).rows] == ["conv2d+relu", "conv2d"]
    with torch.no_grad():
        error = (q(x) - model(x)).pow(2).sum() / model(x).pow(2).sum()
    assert float(error) < 1e-4
