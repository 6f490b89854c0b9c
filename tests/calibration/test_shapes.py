"""The input shape of a model without an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError
from fxquant.synthesis.shapes import input_shape
from tests import zoo

PROBE = torch.empty(0)


def conv(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, stride, 1), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)
    )


def strided(times: int, *tail: nn.Module) -> nn.Sequential:
    """``times`` halvings of the side of a picture, for any side."""
    halvings = [conv(3 if i == 0 else 4, 4, 2) for i in range(times)]
    return nn.Sequential(*halvings, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *tail)


class Odd(nn.Module):
    """Written in another order than it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 10)
        self.body = conv(5, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Permuted(nn.Module):
    """Channels last in the user's own way: no usual shape goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 3:
            raise ValueError("channels last, please")
        return self.body(x.permute(0, 3, 1, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "stride 32 is for photographs": (lambda: strided(5, nn.Linear(4, 2)), (3, 224, 224)),
    "stride 16 too": (lambda: strided(4), (3, 224, 224)),
    "stride 8 is for thumbnails": (lambda: strided(3), (3, 32, 32)),
    "28 by 28 and no other": (
        lambda: nn.Sequential(conv(1, 4, 2), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)),
        (1, 28, 28),
    ),
    "8 by 8 and no other": (
        lambda: nn.Sequential(conv(1, 4), nn.Flatten(), nn.Linear(4 * 8 * 8, 10)),
        (1, 8, 8),
    ),
    "a vector": (lambda: nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4)), (12,)),
    "a flattened picture": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4)),
        (784,),
    ),
    "a signal": (lambda: nn.Sequential(nn.Conv1d(2, 4, 9), nn.BatchNorm1d(4)), (2, 1024)),
    "a volume": (
        lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4)),
        (1, 16, 16, 16),
    ),
    "a generator": (
        lambda: nn.Sequential(nn.ConvTranspose2d(7, 4, 4), nn.BatchNorm2d(4)),
        (7, 1, 1),
    ),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), (3, 32, 32)),
    "head written first": (Odd, (5, 32, 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_shape_that_works_is_found(name: str) -> None:
    make, expected = MODELS[name]
    assert input_shape(make().eval(), None, PROBE) == expected


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("resnet18", {"width": 8}, (3, 224, 224)),
        ("mobilenet_v2", {"width": 0.25}, (3, 224, 224)),
        ("resnet20", {}, (3, 32, 32)),
    ],
)
def test_known_networks(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    assert input_shape(zoo.architecture(name, **options).eval(), None, PROBE) == shape


def test_tokens_where_a_vector_does_not_go() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(12, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            if x.dim() != 3:
                raise ValueError("tokens, please")
            return self.norm(self.linear(x).transpose(1, 2))

    assert input_shape(Tokens().eval(), None, PROBE) == (16, 12)


def test_a_shape_has_to_lead_to_a_batchnorm() -> None:
    class Thumbnails(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.shape[-1] > 28 else super().forward(x)

    assert input_shape(Thumbnails().eval(), None, PROBE) == (5, 28, 28)


def test_integer_inputs_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.BatchNorm1d(16))
    with pytest.raises(CalibrationError, match=r"takes integers .*Embedding.*calibration data"):
        input_shape(model, None, PROBE)


def test_several_inputs_are_refused_and_optional_ones_not() -> None:
    class Two(Odd):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]  # on purpose
            return super().forward(x + y)

    class Optional(Odd):
        def forward(self, x: Tensor, y: Tensor | None = None, *z: Tensor, **k: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(CalibrationError, match=r"needs 2 inputs \(x, y\)"):
        input_shape(Two().eval(), None, PROBE)
    assert input_shape(Optional().eval(), None, PROBE) == (5, 32, 32)


def test_no_shape_found_asks_for_an_example() -> None:
    with pytest.raises(CalibrationError, match=r"could not be found.*example_inputs=\(tensor,\)"):
        input_shape(Permuted().eval(), None, PROBE)
    assert input_shape(Permuted().eval(), torch.zeros(1, 9, 9, 3), PROBE) == (9, 9, 3)


def test_trying_leaves_no_hook() -> None:
    model = Permuted().eval()
    with pytest.raises(CalibrationError):
        input_shape(model, None, PROBE)
    other = strided(3).eval()
    input_shape(other, None, PROBE)
    assert not any(m._forward_pre_hooks for m in [*model.modules(), *other.modules()])
