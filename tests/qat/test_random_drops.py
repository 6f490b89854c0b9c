"""Modules of the user's that drop at random in training, such as stochastic depth."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import fxquant
import fxquant.schedule
from fxquant.graph.random_drops import RandomDrop, only_drops, take_out, with_stand_ins


class DropPath(nn.Module):
    """As published models write it: whole samples are dropped, the others scaled up."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) + keep
        return x.div(keep) * mask.floor_()


class Net(nn.Module):
    def __init__(self, drop: float = 0.5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.drop = DropPath(drop)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.drop(self.conv(x)))
        return self.head(x.mean((2, 3)))


class Scales(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh_()


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain if self.training else x


def test_what_only_drops() -> None:
    assert only_drops(DropPath(0.3))
    assert only_drops(DropPath(0.3).eval())
    for other in (Scales(), InPlace(), TwoInputs(), Holds(), nn.Dropout(), nn.Identity(), Net()):
        assert not only_drops(other)
    hooked = DropPath(0.3)
    hooked.register_forward_hook(lambda *_: None)
    assert not only_drops(hooked)


def test_the_model_is_not_changed_and_the_copy_gets_its_modules_back() -> None:
    model = Net()
    made, paths = with_stand_ins(model)
    assert paths == ("drop",)
    assert type(model.drop) is DropPath
    assert isinstance(made.get_submodule("drop"), RandomDrop)
    take_out(made, paths)
    assert type(made.get_submodule("drop")) is DropPath
    plain = nn.Linear(2, 2)
    assert with_stand_ins(plain) == (plain, ())


def prepared(drop: float = 0.5) -> tuple[Net, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Net(drop), torch.randn(8, 3, 8, 8)
    return model, fxquant.prepare(model, mode="qat", example_inputs=(x,)), x


def test_it_drops_in_training_and_not_in_evaluation() -> None:
    _, made, x = prepared()
    made.train()(x)
    made.eval()
    assert torch.equal(made(x), made(x))
    made.train()
    assert not torch.equal(made(x), made(x))


def test_it_draws_what_the_float_model_draws() -> None:
    model, made, x = prepared()
    fxquant.schedule.set_fake_quant(made, False)
    torch.manual_seed(1)
    expected = model.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(made.train()(x), expected, rtol=0, atol=1e-5)


def test_its_module_stays_under_its_name_and_is_the_one_that_runs() -> None:
    model, made, x = prepared()
    own = made.get_submodule("drop")
    assert isinstance(own, DropPath)
    assert own is not model.drop
    assert [n for n, _ in made.named_children()][:4] == ["stem", "conv", "drop", "head"]
    own.drop_prob = 0.0  # as schedules of stochastic depth do
    made.train()(x)
    torch.testing.assert_close(made(x), made(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_drop_too(copied: object) -> None:
    _, made, x = prepared()
    assert callable(copied)
    twin = copied(made)
    twin.get_submodule("drop").drop_prob = 0.0
    twin.train()(x)
    torch.testing.assert_close(twin(x), twin(x))
    made.train()(x)
    assert not torch.equal(made(x), made(x))


def test_nothing_of_it_is_deployed() -> None:
    _, made, x = prepared()
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        made.train()(x).square().mean().backward()
        optimizer.step()
    deployed = fxquant.convert(made)
    assert not any(isinstance(m, DropPath | RandomDrop) for m in deployed.modules())
    assert fxquant.verify(made, deployed, [x]).ok
    ops = {op.path: op for op in fxquant.report(deployed).ops}
    assert all(ops[path].int8 for path in ("stem", "conv.0", "head"))
