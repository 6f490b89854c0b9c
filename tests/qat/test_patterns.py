"""Users' patterns in training: a unit trains as one, by a module of the user's if there is one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.numerics.fake_quantizer import FakeQuantize, FakeQuantizer
from fxquant.schedule import freeze_norms, set_fake_quant
from tests.qat.models import pictures, switch, trained


class Net(nn.Module):
    """Two blocks that a pattern fits, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        x = x * torch.sigmoid(x)
        x = self.norm(self.second(x))
        x = x * torch.sigmoid(x)
        made: Tensor = self.head(x.mean((2, 3)))
        return made


class Softly(nn.Module):
    """What is trained in the place of a block: the same in evaluation, noisy in training."""

    def __init__(self, conv: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn
        self.noise = 0.0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.bn(self.conv(x))
        made: Tensor = y * torch.sigmoid(y)
        return made + self.noise * torch.randn_like(made) if self.training else made


def block(x: Any, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Any:
    y = bn(conv(x))
    return y * torch.sigmoid(y)


def pattern(**options: Any) -> fxquant.Pattern:
    return fxquant.Pattern(block, qat=Softly, **options)


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net().train()
    for norm in (model.bn, model.norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return model


def prepared(model: nn.Module, *patterns: Any, **options: Any) -> Any:
    return fxquant.prepare(
        model, mode="qat", example_inputs=(pictures(),), patterns=patterns, **options
    )


PER_TENSOR = fxquant.QConfig(weight=fxquant.QSpec("int8", symmetric=True, observer="minmax"))


@pytest.mark.parametrize("config", [None, PER_TENSOR], ids=["channel", "tensor"])
def test_the_users_module_is_trained_and_the_unit_is_deployed(config: Any) -> None:
    model = net()
    made = prepared(model, pattern(), qconfig=config)
    softly = [m for m in made.modules() if isinstance(m, Softly)]
    assert len(softly) == 2
    assert [n for n, _ in made.named_parameters()] == [n for n, _ in model.named_parameters()]
    added = [key for key in made.state_dict() if key not in model.state_dict()]
    assert all(key.startswith("fake_quant.") for key in added)
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    trained(made, pictures, steps=3)
    assert all(m.calls == 3 for m in softly)
    assert all(not torch.equal(before[n], p) for n, p in made.named_parameters())
    assert int(made.bn.num_batches_tracked) == 3
    quantized = fxquant.convert(made, backend="reference")
    ops = [op.op for op in fxquant.report(quantized).ops if op.int8 and op.weights]
    assert ops == ["block", "block", "linear"]
    assert fxquant.verify(made, quantized, [pictures(50)]).ok
    x = pictures(51)
    with torch.no_grad():
        wanted, found = made.eval()(x), quantized(x)
    assert float((wanted - found).abs().max()) <= 0.02 * float(wanted.abs().max())


def test_it_computes_what_the_unit_would_without_a_module_of_its_own() -> None:
    models = [prepared(net(), pattern()), prepared(net(), fxquant.Pattern(block, name="block"))]
    for each in models:
        trained(each, pictures)
    one, other = models
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(dict(one.named_parameters())[name], parameter)
    x = pictures(9)
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(x), other.eval()(x), rtol=0, atol=1e-5)


def test_a_layer_comes_with_the_norm_that_the_pattern_does_not_name() -> None:
    def swish(x: Any, conv: nn.Conv2d) -> Any:
        y = conv(x)
        return y * torch.sigmoid(y)

    class Swish(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return y * torch.sigmoid(y)

    made = prepared(net(), fxquant.Pattern(swish, qat=Swish))
    found = [m for m in made.modules() if isinstance(m, Swish)]
    assert len(found) == 2 and all(isinstance(m.conv, nn.Sequential) for m in found)
    trained(made, pictures)
    assert int(made.bn.num_batches_tracked) == 3
    assert fxquant.verify(made, fxquant.convert(made, backend="reference"), [pictures(5)]).ok


def test_inside_a_unit_nothing_else_is_rounded() -> None:
    made = prepared(net(), fxquant.Pattern(block, name="block"))
    plain = prepared(net())
    count = [sum(isinstance(m, FakeQuantize) for m in each.modules()) for each in (made, plain)]
    assert count[0] <= count[1]
    paths = [m.path for m in made.modules() if isinstance(m, FakeQuantize)]
    assert len(paths) == len(set(paths))


def test_switched_off_it_is_the_float_model() -> None:
    model = net()
    made = prepared(model, pattern())
    switch(made, False)
    with torch.no_grad():
        torch.testing.assert_close(made.eval()(pictures()), model.eval()(pictures()))


def test_switches_and_frozen_norms_reach_into_units() -> None:
    made = prepared(net(), pattern())
    set_fake_quant(made, False)
    assert not any(m.quantizing for m in made.modules() if isinstance(m, FakeQuantizer))
    freeze_norms(made)
    before = made.bn.running_mean.clone()
    trained(made, pictures)
    assert torch.equal(made.bn.running_mean, before)
    schedule = fxquant.Schedule(made, freeze_norms_at=1)
    assert made.bn.training
    schedule.step()
    assert not made.bn.training and not made.norm.training


def test_copies_train_on_their_own_and_modes_are_as_found() -> None:
    model = net()
    model.get_submodule("bn").eval()
    made = prepared(model, pattern())
    assert made.training and not made.bn.training and made.norm.training
    twin = copy.deepcopy(made)
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    trained(twin, pictures)
    assert all(torch.equal(before[n], p) for n, p in made.named_parameters())
    assert fxquant.verify(twin, fxquant.convert(twin, backend="reference"), [pictures(5)]).ok


def test_by_an_override_a_unit_stays_float_and_as_it_is() -> None:
    made = prepared(net(), pattern(), overrides={"conv": None, "bn": None})
    assert sum(isinstance(m, Softly) for m in made.modules()) == 1


class Branches(nn.Module):
    """Two results, one of which the other is made from."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        made: Tensor = self.a(torch.relu(y)) + self.b(torch.tanh(y))
        return made


def test_several_results_and_ops_without_weights() -> None:
    def split(x: Any, conv: nn.Conv2d, act: nn.ReLU) -> Any:
        y = conv(x)
        return act(y), torch.tanh(y)

    class Split(nn.Module):
        def __init__(self, **parts: nn.Module) -> None:
            super().__init__()
            self.conv, self.act = parts["conv"], parts["act"]

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.act(y), torch.tanh(y)

    torch.manual_seed(0)
    made = prepared(Branches().train(), fxquant.Pattern(split, qat=Split))
    assert sum(isinstance(m, Split) for m in made.modules()) == 1
    trained(made, pictures)
    quantized = fxquant.convert(made, backend="reference")
    x = pictures(9)
    with torch.no_grad():
        wanted, found = made.eval()(x), quantized(x)
    assert float((wanted - found).abs().max()) <= 0.03 * float(wanted.abs().max())


def test_a_module_that_cannot_be_made_is_named_with_the_line() -> None:
    def broken(conv: nn.Module) -> nn.Module:
        raise RuntimeError("no such thing")

    with pytest.raises(fxquant.errors.PatternError, match=r"test_patterns\.py:\d+.*no such thing"):
        prepared(net(), fxquant.Pattern(block, qat=broken))
    function: Any = lambda conv: torch.relu  # noqa: E731 - no module
    with pytest.raises(fxquant.errors.PatternError, match="it makes the module"):
        prepared(net(), fxquant.Pattern(block, qat=function))
    with pytest.raises(fxquant.errors.PatternError, match="takes 'weight', which is no"):
        fxquant.Pattern(block, qat=lambda weight: nn.Identity())


def test_layers_that_read_each_other_are_refused() -> None:
    def two(x: Any, first: nn.Conv2d, bn: nn.BatchNorm2d, second: nn.Conv2d) -> Any:
        y = bn(first(x))
        return second(y * torch.sigmoid(y))

    with pytest.raises(fxquant.errors.PatternError, match="one pattern for each layer"):
        prepared(net(), fxquant.Pattern(two, qat=lambda **parts: nn.Identity()))
