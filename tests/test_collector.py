"""The collector comes back as it was, whatever happens meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.collector import collector_paused
from fxquant.errors import FxQuantError


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    was_on = gc.isenabled()
    yield
    (gc.enable if was_on else gc.disable)()


class Branches(nn.Module):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize("on", [True, False])
def test_it_comes_back_as_it_was(on: bool) -> None:
    (gc.enable if on else gc.disable)()
    with collector_paused(), collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled() == on


def test_a_failure_brings_it_back() -> None:
    gc.enable()
    with pytest.raises(FxQuantError):
        fxquant.prepare(Branches().eval(), example_inputs=(torch.ones(1),))
    assert gc.isenabled()


def test_calibration_runs_with_it() -> None:
    """A user's data may hold cycles."""
    gc.enable()
    prepared = fxquant.prepare(
        nn.Sequential(nn.Linear(2, 2)).eval(), example_inputs=(torch.ones(1, 2),)
    )
    seen: list[bool] = []

    def batches() -> Iterator[Tensor]:
        seen.append(gc.isenabled())
        yield torch.ones(1, 2)

    fxquant.calibrate(prepared, batches())
    fxquant.convert(prepared, backend="reference")
    assert seen == [True] and gc.isenabled()
