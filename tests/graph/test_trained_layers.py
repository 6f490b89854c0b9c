"""Layers that take their weight with the call compute as torch's own with that weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.trained_layers import is_trained_layer, rounding_copy, take_given_weights

LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), torch.randn(2, 4, 7, 7)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), torch.randn(2, 4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, bias=False), torch.randn(1, 2, 4, 4, 4)),
    "up1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), torch.randn(2, 4, 5)),
    "up2d": (nn.ConvTranspose2d(4, 6, 2, groups=2, padding=1), torch.randn(2, 4, 5, 5)),
    "up3d": (nn.ConvTranspose3d(2, 3, 2), torch.randn(1, 2, 3, 3, 3)),
    "linear": (nn.Linear(5, 3), torch.randn(2, 4, 5)),
    "bag": (nn.EmbeddingBag(9, 4, mode="mean", padding_idx=1), torch.randint(0, 9, (3, 5))),
    "embedding": (nn.Embedding(9, 4, padding_idx=1), torch.randint(0, 9, (3, 5))),
}


def changed(name: str) -> tuple[nn.Module, Any, Tensor]:
    """The layer, a twin that takes weights, and an input."""
    layer, x = LAYERS[name]
    twin = copy.deepcopy(layer)
    assert take_given_weights(twin) and take_given_weights(twin)
    return layer, twin, x


@pytest.mark.parametrize("name", LAYERS)
def test_without_a_weight_it_is_the_layer(name: str) -> None:
    layer, twin, x = changed(name)
    assert is_trained_layer(twin) and isinstance(twin, type(layer)) and not is_trained_layer(layer)
    assert torch.equal(twin(x), layer(x))
    assert list(twin.state_dict()) == list(layer.state_dict())


@pytest.mark.parametrize("name", LAYERS)
def test_a_given_weight_is_used_and_gets_the_gradient(name: str) -> None:
    layer, twin, x = changed(name)
    given = torch.randn_like(twin.weight).requires_grad_()
    made = twin(x, weight=given)
    made.sum().backward()
    assert given.grad is not None and twin.weight.grad is None
    wanted = copy.deepcopy(layer)
    with torch.no_grad():
        wanted.get_parameter("weight").copy_(given)
    torch.testing.assert_close(made, wanted(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_that_rounds_does_so_wherever_it_is_called(name: str) -> None:
    _, twin, x = changed(name)
    made: Any = rounding_copy(twin, lambda weight: weight.round())
    assert made.weight is twin.weight
    assert torch.equal(made(x), twin(x, weight=twin.weight.round()))
    given = torch.randn_like(twin.weight)
    assert torch.equal(made(x, weight=given), twin(x, weight=given))
    assert "rounding" not in vars(twin)


def test_other_modules_take_none() -> None:
    for module in (nn.BatchNorm2d(3), nn.LSTM(2, 3), nn.Identity()):
        assert not take_given_weights(module) and not is_trained_layer(module)
