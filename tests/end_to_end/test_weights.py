"""Weights that are tied, shared or computed in forward, in the int8 result."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fxquant
from fxquant.record import record_of

BACKENDS = ("x86", "reference")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))
        return y


MODES: tuple[Any, ...] = ("static", "weight_only", "bfloat16")


def normed(norm: Callable[..., nn.Module]) -> nn.Module:
    """A network two of whose weights are computed in every call."""
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # people still use the older ones
        norm(model.b)
        norm(model.c)
    return model.eval()


class Masked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(8, 72))
        self.square = nn.Parameter(torch.randn(8, 8))
        self.mask = nn.Parameter((torch.rand(8, 8) > 0.5).float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.relu(self.a(x)), self.flat.view(8, 8, 3, 3), padding=1).mean((2, 3))
        return torch.matmul(F.relu(F.linear(y, self.square * self.mask)), self.square.t())


def sqnr(exact: Tensor, found: Tensor) -> float:
    """Signal to noise in dB."""
    exact, found = exact.detach(), found.detach()
    return 10 * math.log10(float(exact.square().sum() / (exact - found).square().sum()))


def saved(model: nn.Module) -> int:
    """How many bytes a state dict takes on disk."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue())


def weights(model: nn.Module) -> dict[int, int]:
    """Memory of each int8 weight: address to bytes."""
    held = [t.untyped_storage() for t in model.state_dict().values() if t.dtype == torch.int8]
    return {storage.data_ptr(): storage.nbytes() for storage in held}


def pruned(layer: nn.Module) -> nn.Module:
    """Twice, as iterative pruning does."""
    prune.l1_unstructured(layer, "weight", amount=0.2)
    prune.random_unstructured(layer, "weight", amount=0.3)
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "norm",
    [
        pruned,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ],
)
def test_normed_weights_are_int8(norm: Callable[..., nn.Module], backend: str) -> None:
    torch.manual_seed(0)
    model = normed(norm)
    before = copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    x = torch.randn(4, 3, 8, 8)
    q = fxquant.quantize(model, [x], backend=backend)
    kept = [(op.path, op.why) for op in record_of(q).ops if not op.int8 and op.weights]
    assert kept == []
    # 8-bit weights and codes of a few layers keep 35 dB; a weight taken for another, none.
    assert sqnr(model(x), q(x)) > 30
    assert not [name for name in q.state_dict() if "weight_" in name and "scale" not in name]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    for mode in MODES:
        made = fxquant.quantize(
            model, [x] if mode == "static" else None, mode=mode, example_inputs=x, backend=backend
        )
        twin = pickle.loads(pickle.dumps(made))
        twin.load_state_dict(made.state_dict())
        assert torch.equal(twin(x), made(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_and_reshaped_weights_are_int8(backend: str) -> None:
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(4, 3, 8, 8)
    q = fxquant.quantize(model, [x], backend=backend)
    assert [op.op for op in record_of(q).ops if not op.int8 and "linear" in op.op] == []
    assert sqnr(model(x), q(x)) > 30
    floats = [n for n, t in q.state_dict().items() if t.is_floating_point() and t.numel() > 8]
    assert floats == [], "float copies of weights are left"


class Calls(nn.Module):
    """Two layers with one weight, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.a, self.b):
            x = F.relu(layer(x))
        return x


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_many_calls_is_stored_once(backend: str) -> None:
    torch.manual_seed(0)
    model, x = Calls().eval(), torch.randn(16, 64)
    q = fxquant.quantize(model, [x], backend=backend)
    assert [op.int8 for op in record_of(q).ops] == [True] * 4
    assert list(weights(q).values()) == [64 * 64]
    assert saved(q) < saved(model)
    assert sqnr(model(x), q(x)) > 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_that_disagree_have_weights_of_their_own(backend: str) -> None:
    torch.manual_seed(0)
    model, x = Calls().eval(), torch.randn(16, 64)
    q = fxquant.quantize(model, [x], backend=backend, overrides={"b": None})
    layers = [op for op in record_of(q).ops if op.op.startswith("linear")]
    assert [(op.path, op.int8) for op in layers] == [("a", True), ("b", False)] * 2
    assert sqnr(model(x), q(x)) > 30


def test_the_user_trains_on_with_the_same_weights() -> None:
    model = Calls().train()
    x = torch.randn(16, 64)
    model(x).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with pytest.warns(fxquant.errors.FxQuantWarning):
        fxquant.quantize(model, [x], backend="reference")
    assert model.training and model.b.weight is model.a.weight
    found: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    assert all(torch.equal(found[name], grad) for name, grad in grads.items())
