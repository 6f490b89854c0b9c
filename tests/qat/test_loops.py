"""Training loops of other kinds: compiled, checkpointed, accumulated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant.numerics.fake_quantizer import FakeQuantize
from tests.qat.models import built, pictures, trained


def prepared(learned: bool = False) -> Any:
    activation = fxquant.QSpec(learned=learned)
    weight = fxquant.QSpec(
        "int8", symmetric=True, granularity="channel", observer="minmax", learned=learned
    )
    config = fxquant.QConfig(activation, weight)
    return fxquant.prepare(
        built("residual"), mode="qat", example_inputs=(pictures(),), qconfig=config
    )


def same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    """Whether all parameters and buffers of two models are equal."""
    for key, value in a.state_dict().items():
        other = b.state_dict()[key]
        torch.testing.assert_close(other, value, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpoints_observe_once(reentrant: bool) -> None:
    one, two = prepared(), prepared()
    for model in (one, two):
        for norm in (model.bn1, model.bn2):
            norm.momentum = 0.0  # a norm follows its batch twice, as in float
    x = pictures(2).requires_grad_()
    one(x).square().mean().backward()
    checkpoint(two, x, use_reentrant=reentrant).square().mean().backward()
    for mine, theirs in zip(one.parameters(), two.parameters(), strict=True):
        if mine.grad is not None:
            assert theirs.grad is not None
            torch.testing.assert_close(theirs.grad, mine.grad, rtol=0, atol=1e-6)
    fakes = [m for m in two.modules() if isinstance(m, FakeQuantize)]
    assert all(int(fake.batches) == 1 for fake in fakes)


def test_accumulated_gradients_are_those_of_the_sum() -> None:
    model = prepared()
    trained(model, pictures, steps=1)
    model.eval()
    together, apart = copy.deepcopy(model), copy.deepcopy(model)
    halves = (pictures(1), pictures(2))
    (together(halves[0]).square().sum() + together(halves[1]).square().sum()).backward()
    for half in halves:
        apart(half).square().sum().backward()
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5)


# torch.compile instantiates the autograd functions that it traces, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("learned", [False, True])
def test_a_compiled_model_trains_as_the_plain_one_and_converts(learned: bool) -> None:
    one, two = prepared(learned), prepared(learned)
    compiled: Any = torch.compile(two, backend="eager", fullgraph=True)
    for model in (one, compiled):
        trained(model, pictures)
    same(one, two, 1e-5)
    converted = fxquant.convert(compiled, backend="reference")
    assert fxquant.verify(compiled, converted, [pictures(50)]).ok


def test_autocast_follows_float32_closely() -> None:
    one, two = prepared(), prepared()
    trained(one, pictures, steps=2)

    def mixed(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=1e-3)
        for step in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss: Tensor = model(pictures(step)).float().square().mean()
            loss.backward()
            optimizer.step()

    mixed(two)
    fakes = {n: m for n, m in one.named_modules() if isinstance(m, FakeQuantize)}
    for name, fake in fakes.items():
        other: Any = two.get_submodule(name)
        assert other.scale.dtype == torch.float32
        # bfloat16 keeps 8 bits: ranges differ by rounding errors of single values.
        torch.testing.assert_close(other.scale, fake.scale, rtol=0.05, atol=0)
    converted = fxquant.convert(two, backend="reference")
    assert fxquant.verify(two, converted, [pictures(50)]).ok
