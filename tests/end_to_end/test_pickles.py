"""What a pickle keeps of a model, beside what it computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigError
from fxquant.graph.info import info


class Net(nn.Module):
    """A residual and a buffer that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        self.shift: Tensor
        self.register_buffer("shift", torch.full((1, 8, 1, 1), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """Through all of it."""
        x = torch.relu(self.first(x)) + self.shift
        return self.head(torch.relu(self.second(x) + x).mean((2, 3)))


def again(model: Any) -> Any:
    """The model from its pickle."""
    return pickle.loads(pickle.dumps(model))


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    """Batches."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """The float model."""
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
def test_what_is_known_of_nodes_is_kept(mode: Any, net: nn.Module, data: list[Tensor]) -> None:
    calibration = data if mode == "static" else None
    made = fxquant.quantize(net, calibration, mode=mode, backend="reference")
    loaded = again(made)
    calls = [[n for n in m.graph.nodes if n.op != "get_attr"] for m in (made, loaded)]
    assert [info(node).origins for node in calls[0]] == [info(node).origins for node in calls[1]]
    assert [info(node).writes for node in calls[0]] == [info(node).writes for node in calls[1]]
    assert not fxquant.diff(made, loaded)
    assert fxquant.diff(net, made).summary == fxquant.diff(net, loaded).summary
    first, second = (fxquant.compare(net, each, data) for each in (made, loaded))
    assert first.to_dict() == second.to_dict()
    assert any(row.own is not None for row in second)


def test_copies_of_what_was_loaded_remember_too(net: nn.Module, data: list[Tensor]) -> None:
    made = fxquant.quantize(net, data, backend="reference")
    loaded = copy.deepcopy(again(made))
    assert fxquant.report(loaded).to_dict() == fxquant.report(made).to_dict()
    with pytest.raises(ConfigError, match="was made by fxquant"):
        fxquant.quantize(loaded, data)


def test_prepared_models_are_calibrated_and_converted(net: nn.Module, data: list[Tensor]) -> None:
    made = []
    for keep in (copy.deepcopy, again):
        prepared = keep(fxquant.prepare(net, example_inputs=(data[0],), backend="reference"))
        fxquant.calibrate(prepared, data)
        made.append(fxquant.convert(keep(prepared), backend="reference"))
    with torch.no_grad():
        assert torch.equal(made[0](data[0]), made[1](data[0]))


def test_functions_of_patterns_are_no_part_of_converted_models() -> None:
    def definition(x: Any, layer: nn.Linear) -> Any:
        return torch.relu(layer(x)) * 0.5

    halved = fxquant.Pattern(definition, name="halved", where=lambda layer: None)

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x)) * 0.5

    batches = [torch.randn(4, 8)]
    made = fxquant.quantize(Halves().eval(), batches, patterns=[halved], backend="reference")
    # The layer, and the activation after it as a table of codes.
    rows = [op.op for op in fxquant.report(again(made)).ops]
    assert rows == ["halved", "halved (table)"]


class Writes(nn.Module):
    """A convolution, and something written in place into what is read later."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        """Read through another name, after the write."""
        y = self.conv(x)
        seen = y[:, :4]
        self.write(y)
        z: Tensor = self.head((y + seen.sum(1, keepdim=True)).mean((2, 3)))
        return z


def set_item(y: Tensor) -> None:
    y[:, 0] = 1.0


def set_masked(y: Tensor) -> None:
    y[y < 0] = 0.5


def add_to_view(y: Tensor) -> None:
    part = y[:, 1]
    part += 2.0


def multiply(y: Tensor) -> None:
    y *= 3.0


def power(y: Tensor) -> None:
    y **= 2


def remainder(y: Tensor) -> None:
    y %= 0.75


def method(y: Tensor) -> None:
    y[:, 2].zero_()


@pytest.mark.parametrize(
    "write", [set_item, set_masked, add_to_view, multiply, power, remainder, method]
)
@pytest.mark.parametrize("backend", ["reference", "x86"])
@pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
def test_what_is_written_in_place_still_is(
    write: Callable[[Tensor], Any], backend: str, data: list[Tensor]
) -> None:
    torch.manual_seed(0)
    model = Writes(write).eval()
    made = fxquant.quantize(model, data, backend=backend)
    wanted = made(data[0])
    error = (wanted - model(data[0])).square().mean() / model(data[0]).square().mean()
    assert error < 1e-3
    for twin in (again(made), again(again(made)), copy.deepcopy(again(made))):
        assert torch.equal(twin(data[0]), wanted)


def test_numbers_that_are_added_to_are_new_ones(data: list[Tensor]) -> None:
    class Counts(nn.Module):
        """``n += 1`` leaves the number alone that it started from."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            n = y.shape[-1]
            more = n
            more += 2
            more *= 2
            z: Tensor = y.new_ones(n, more).sum() * y.mean((2, 3))
            return z

    model = Counts().eval()
    made = fxquant.quantize(model, data, backend="reference")
    unseen = fxquant.quantize(model, mode="dynamic", backend="reference")
    for size in (8, 5):
        x = torch.randn(2, 3, size, size)
        for each in (made, unseen, again(made), again(unseen)):
            found, wanted = each(x), model(x)
            assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
