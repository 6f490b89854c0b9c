"""The first convolution quantizes the picture itself, and nothing else changes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.x86_stem import X86Stem
from tests.backends.lockstep import check_ops


class Net(nn.Module):
    """A first convolution, and one more."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, **options)
        self.second = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class TwoReaders(Net):
    """The picture's codes have another reader."""

    def __init__(self) -> None:
        super().__init__(3)
        self.other = nn.Conv2d(3, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) + self.other(x)


def converted(model: nn.Module, x: Tensor, backend: str = "x86") -> Any:
    prepared = fxquant.prepare(model.eval(), example_inputs=x)
    fxquant.calibrate(prepared, [x])
    return fxquant.convert(prepared, backend=backend)


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"padding": 1}, {"stride": 2, "padding": 2, "dilation": 2}, {"bias": False}]
)
@pytest.mark.parametrize("last", [False, True])
def test_reads_the_float_picture(channels: int, options: dict[str, Any], last: bool) -> None:
    torch.manual_seed(0)
    model, x = Net(channels, **options), torch.randn(3, channels, 15, 17) + 0.7
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    lowered, reference = converted(model, x), converted(model, x, "reference")
    assert isinstance(lowered.first, X86Stem)
    assert not any("quantize" in str(node.target) for node in lowered.graph.nodes)
    # One op after another may move a code by one each; the second layer sees 72 of them.
    steps = (lowered(x) - reference(x)).abs().max() / reference(x).abs().max()
    assert steps < 0.02
    for other in (x[:1], torch.randn(2, channels, 9, 31)):
        assert lowered(other).shape == reference(other).shape
        assert (lowered(other) - reference(other)).abs().max() < 0.02 * reference(x).abs().max()
    assert lowered(x[:0]).shape == reference(x[:0]).shape
    assert torch.equal(lowered(x[0]), lowered(x[:1])[0])


@pytest.mark.parametrize("model", [Net(1), Net(4), Net(2, groups=2), TwoReaders()])
def test_leaves_other_first_layers_alone(model: Net) -> None:
    x = torch.randn(2, model.first.in_channels, 8, 8)
    assert not isinstance(converted(model, x).first, X86Stem)


def test_copies_pickles_and_state_dicts() -> None:
    model, x = Net(3), torch.randn(2, 3, 8, 8)
    lowered = converted(model, x)
    assert lowered.state_dict()["first.weight"].shape == (8, 3, 3, 3)
    file = io.BytesIO()
    torch.save(lowered, file)
    file.seek(0)
    for again in (copy.deepcopy(lowered), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), lowered(x))


def test_one_code_of_the_reference() -> None:
    torch.manual_seed(1)
    checked = check_ops(Net(3, padding=1).eval(), torch.randn(4, 3, 20, 20))
    assert "X86Stem" in checked.kernels


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 2, 8, 8), (3, 3), (1, 2, 3, 8, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    lowered = converted(Net(3), torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match="reads 3 channels"):
        lowered.first(torch.randn(shape))
