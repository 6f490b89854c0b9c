"""A model that counts in its forward: trial runs leave its counter alone, calls do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.graph.capture import capture
from fxquant.graph.held_state import held_state, state_kept


class Counting(nn.Module):
    """Divides by how often it was called."""

    calls: Tensor
    still: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("still", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.still / self.calls


@pytest.mark.parametrize("backend", ["x86", "reference"])
def test_quantizing_leaves_the_count_of_the_model(backend: str) -> None:
    torch.manual_seed(0)
    model, x = Counting().eval(), torch.randn(16, 8)
    model(x)
    q = fxquant.quantize(model, [x] * 3, backend=backend)
    assert float(model.calls) == float(q.calls) == 1
    for calls in (2, 3):
        found, wanted = q(x), model(x)
        # 8 bits of one layer: well above 30 dB. A wrong count would leave 6 dB.
        assert (found - wanted).square().mean() < 1e-3 * wanted.square().mean()
        assert float(q.calls) == calls


def test_only_what_is_written_is_kept() -> None:
    prepared = fxquant.prepare(Counting().eval(), example_inputs=torch.randn(2, 8))
    assert [id(t) for t in held_state(prepared)] == [id(prepared.calls)]
    with pytest.raises(ValueError, match="stop"), state_kept(prepared):
        prepared(torch.randn(2, 8))
        assert float(prepared.calls) == 1  # type: ignore[arg-type]
        raise ValueError("stop")
    assert float(prepared.calls) == 0  # type: ignore[arg-type]


def test_nothing_is_written_in_most_models() -> None:
    module = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), (torch.ones(1, 4),)).module
    assert held_state(module) == ()
