"""Weights that several calls read: packed once, under the user's first name."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.x86 import X86
from fxquant.backends.x86_layers import X86Layer
from fxquant.report.checks import size_in_bytes
from tests.backends.lockstep import reference_of

pytestmark = [
    pytest.mark.skipif(X86().missing() is not None, reason=str(X86().missing())),
    pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning"),
]


class Again(nn.Module):
    """Layers that are called three times; three of them read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            mixed = torch.softmax(self.q(x) @ self.k(x).mT / 6, -1) @ self.v(x)
            x = torch.tanh(self.out(mixed)) + 0.5
        return x


def pair() -> nn.Module:
    """Two layers with one weight and biases of their own."""
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


class ConvAgain(nn.Module):
    """Convolutions that are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.up(torch.tanh(self.conv(torch.tanh(self.conv(x)))))))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    # The model, its input, and how many modules and packed weights of linears there are to be.
    "called again": (Again, (2, 5, 32), 2, 2),
    "tied": (pair, (6, 32), 2, 1),
    "convolutions": (ConvAgain, (2, 4, 6, 6), 2, 0),
}


def _layers(model: nn.Module) -> dict[str, X86Layer]:
    return {name: each for name, each in model.named_modules() if isinstance(each, X86Layer)}


@pytest.mark.parametrize("name", CASES)
def test_dynamic_layers_are_made_once(name: str) -> None:
    torch.manual_seed(0)
    make, shape, modules, packed = CASES[name]
    model, x = make().eval(), torch.randn(shape)
    prepared = fxquant.prepare(model, mode="dynamic")
    # The reference with the weights of x86, which are coarser where its kernels add pairs.
    q, truth = fxquant.convert(prepared, backend="x86"), reference_of(prepared)
    layers = _layers(q)
    assert len(layers) == modules
    assert len({id(each.packed) for each in layers.values() if each.packed is not None}) == packed
    assert set(layers) <= {path for path, _ in model.named_modules()}  # the user's own names
    # Exact sums against sums in float32, a few layers deep.
    torch.testing.assert_close(q(x), truth(x), rtol=1e-4, atol=1e-4)
    for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(twin(x), q(x))
    other = copy.deepcopy(q)
    for each in _layers(other).values():
        each.weight_scale.zero_()
    other.load_state_dict(q.state_dict())
    assert torch.equal(other(x), q(x))


@pytest.mark.parametrize("name", ["called again", "tied"])
def test_static_linears_share_the_packed_weight(name: str) -> None:
    torch.manual_seed(0)
    make, shape, _, packed = CASES[name]
    model, x = make().eval(), torch.randn(shape)
    q = fxquant.quantize(model, [x], backend="x86")
    layers = _layers(q).values()
    assert len({id(each.packed) for each in layers}) == (4 if name == "called again" else packed)
    truth = fxquant.quantize(model, [x], backend="reference")
    noise = (q(x) - truth(x)).square().mean() / truth(x).square().mean()
    assert float(noise) < 1e-3  # codes may differ by one
    assert torch.equal(pickle.loads(pickle.dumps(q))(x), q(x))


class Words(nn.Module):
    """A table that is the last layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.head(torch.tanh(self.mix(self.table(ids))))
        return made


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_table_that_is_a_layer_too_is_stored_once(mode: Any) -> None:
    torch.manual_seed(0)
    model, ids = Words().eval(), torch.randint(0, 24, (3, 5))
    data = [ids] if mode == "static" else None
    q = fxquant.quantize(model, data, mode=mode, backend="x86", example_inputs=ids)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    for made in (q, copy.deepcopy(q), torch.load(file, weights_only=False)):
        state = made.state_dict()
        assert state["head.weight"].data_ptr() == state["table.weight"].data_ptr()
        assert torch.equal(made(ids), q(ids))
    other = copy.deepcopy(q)
    other.load_state_dict({k: torch.zeros_like(v) for k, v in q.state_dict().items()})
    other.load_state_dict(q.state_dict())
    assert torch.equal(other(ids), q(ids))


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_one_form_of_a_weight_is_kept(mode: Any) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 7)).eval(),
        torch.randn(4, 40),
    )
    prepared = fxquant.prepare(model, mode=mode, example_inputs=x)
    if mode == "static":
        fxquant.calibrate(prepared, [x])
    q, truth = fxquant.convert(prepared, backend="x86"), reference_of(prepared)
    codes = {name: each for name, each in truth.state_dict().items() if name.endswith(".weight")}
    state = q.state_dict()
    for name, layer in _layers(q).items():
        assert layer.packed is not None and layer._buffers["weight"] is None
        assert torch.equal(layer.weight, codes[f"{name}.weight"])
        assert torch.equal(state[f"{name}.weight"], layer.weight)
    held = sum(t.numel() * t.element_size() for t in state.values())
    assert size_in_bytes(q) == held
    with torch.no_grad():
        for name in codes:
            state[name] = -state[name]
    wanted = q(x)
    q.load_state_dict(state)
    assert not torch.equal(q(x), wanted)
    for name, layer in _layers(q).items():
        assert torch.equal(layer.weight, -codes[f"{name}.weight"])
