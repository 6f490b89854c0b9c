"""Parameters that a graph reads where the user's model has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.capture import capture
from fxquant.graph.read_only import ReadOnly, WriteError, borrowed, give_back

X = torch.ones(2, 4)


class Clamps(nn.Module):
    """Writes into the weight of its layer in every call."""

    def __init__(self, through_data: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.through_data = through_data

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.data if self.through_data else self.layer.weight.detach()
        weight.clamp_(-0.01, 0.01)
        made: Tensor = self.layer(x)
        return made


class ReadsWeight(nn.Module):
    """Reads the weight of a layer of torch's as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.again = nn.Linear(4, 7)
        self.again.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.again(x) + nn.functional.linear(x, self.table.weight)
        return made


class Scaled(nn.Module):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x) * self.gain
        return made


def _same_memory(module: nn.Module, model: nn.Module) -> set[str]:
    ours = {p.data_ptr() for p in model.parameters()}
    return {name for name, p in module.named_parameters() if p.data_ptr() in ours}


def test_layers_of_torch_are_read_where_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    module = capture(model, (X,), evaluate=True, borrow=True).module
    assert len(_same_memory(module, model)) == 4
    assert not _same_memory(capture(model, (X,), evaluate=True).module, model)
    assert not {id(p) for p in module.parameters()} & {id(p) for p in model.parameters()}
    assert torch.equal(module(X), model(X))


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("example", [(X,), ()])
def test_who_writes_gets_copies(through_data: bool, example: tuple[Tensor, ...]) -> None:
    model = Clamps(through_data).eval()
    before = model.layer.weight.detach().clone()
    module = capture(model, example, evaluate=True, borrow=True).module
    module(X)
    assert torch.equal(model.layer.weight, before)
    assert "layer.weight" not in _same_memory(module, model)


def test_a_table_that_renormalizes_its_rows_is_copied() -> None:
    table = nn.Embedding(5, 4, max_norm=0.1)
    model = nn.Sequential(table, nn.Linear(4, 4)).eval()
    before = table.weight.detach().clone()
    module = capture(model, (), evaluate=True, borrow=True).module
    module(torch.tensor([0, 1]))
    assert torch.equal(table.weight, before)
    assert _same_memory(module, model) == {"1.weight", "1.bias"}


def test_parameters_of_the_users_own_classes_are_copied() -> None:
    model = Scaled().eval()
    module = capture(model, (X,), evaluate=True, borrow=True).module
    assert _same_memory(module, model) == {"layer.weight", "layer.bias"}


def test_what_the_graph_reads_as_a_tensor_is_copied_and_stays_tied() -> None:
    model = ReadsWeight().eval()
    module = capture(model, (X,), evaluate=True, borrow=True).module
    assert _same_memory(module, model) == {"again.bias"}
    assert module.get_parameter("again.weight") is module.get_parameter("table.weight")


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w[0].zero_(),
        lambda w: torch.add(torch.ones(4, 4), 1.0, out=w),
        lambda w: torch._foreach_mul_([w], 2.0),
    ],
)
def test_the_guard_sees_every_way_to_write(write: object) -> None:
    layer = nn.Linear(4, 4)
    twins = borrowed(layer)
    before = layer.weight.detach().clone()
    with torch.no_grad(), ReadOnly(twins), pytest.raises(WriteError, match="writes"):
        write(twins[id(layer.weight)])  # type: ignore[operator]  # one of the lambdas above
    assert torch.equal(layer.weight, before)
    with torch.no_grad(), ReadOnly(twins):
        assert torch.equal(layer.weight.mul(2).add_(1), before * 2 + 1)


class Catches(nn.Module):
    """Goes another way where it cannot write."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            self.layer.weight.detach().mul_(1.0)
        except Exception:  # noqa: BLE001 - what this test is about
            x = x + 1
        made: Tensor = self.layer(x)
        return made


def test_who_catches_the_guard_gets_copies_too() -> None:
    model = Catches().eval()
    module = capture(model, (X,), evaluate=True, borrow=True).module
    assert "layer.weight" not in _same_memory(module, model)
    assert torch.equal(module(X), model(X))


def test_ops_that_call_functions_are_not_trusted() -> None:
    """No dispatch mode looks into the functions that they call."""
    guard = ReadOnly(borrowed(nn.Linear(2, 2)))
    assert guard.supports_higher_order_operators
    with pytest.raises(WriteError, match="might"):
        guard.__torch_dispatch__(torch.ops.higher_order.cond, (), ())
    assert guard.raised


def test_nothing_is_given_back_where_nothing_is_read() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    twins = borrowed(model)
    module = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    held = module.get_parameter("0.weight")
    give_back(module, twins)
    assert module.get_parameter("0.weight") is held
