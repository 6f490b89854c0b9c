"""Fake-quantize: which values and weights are rounded in training, and which are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.numerics.fake_quantizer import FakeQuantizer
from fxquant.numerics.fake_rows import FakeQuantizeRows
from fxquant.numerics.fake_weights import FakeQuantizeWeight, fold_factor
from fxquant.passes.fake_quantize import InsertFakeQuants
from fxquant.spec import PRESETS, QConfig, QSpec
from tests.helpers import One, Overrides, names, node_of
from tests.passes.trainees import inserted, values, weights

X = torch.randn(2, 4, 6, 6)


def net(**more: nn.Module) -> One:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.bn(m.a(x)))
        made: Tensor = m.b(y) + y
        return made

    parts = {"a": nn.Conv2d(4, 4, 3, padding=1), "bn": nn.BatchNorm2d(4), "b": nn.Conv2d(4, 4, 1)}
    torch.manual_seed(0)
    return One(body, **(parts | more))


def switched_off(module: nn.Module) -> nn.Module:
    for fake in module.modules():
        if isinstance(fake, FakeQuantizer):
            fake.switch(quantizing=False)
    return module.eval()


def test_it_fires_on_values_that_become_codes_and_on_weights() -> None:
    module = inserted(net(), X)
    assert values(module) == ["x", "relu"]
    assert weights(module) == ["a_weight", "b_weight"]
    relu = node_of(module, "relu")
    readers = {user.name for user in relu.users}
    assert len(readers) == 1, "conv and sum read through the fake-quant"


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        ((("a", None),), ["b_weight"]),
        ((("a", PRESETS["weight-only-int4"]),), ["b_weight"]),
        ((("a", QConfig(weight=None)),), ["b_weight"]),
        ((("*", None),), []),
    ],
)
def test_it_leaves_what_stays_float(overrides: Overrides, left: list[str]) -> None:
    assert weights(inserted(net(), X, overrides=overrides)) == left


def test_layers_that_are_dynamic_round_their_weight_and_the_rows_they_read() -> None:
    module = inserted(net(), X, overrides=(("*", PRESETS["dynamic"]),))
    assert weights(module) == ["a_weight", "b_weight"] and values(module) == []
    rows = {n: m for n, m in module.named_modules() if isinstance(m, FakeQuantizeRows)}
    assert {name: m.dims for name, m in rows.items()} == {
        "fake_quant.x_rows": 3, "fake_quant.relu_rows": 3,
    }  # fmt: skip
    relu = node_of(module, "relu")
    assert {user.name for user in relu.users} == {"fake_quant_relu_rows", "add"}


def test_products_at_run_time_round_rows_on_the_left_and_columns_on_the_right() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return torch.matmul(m.a(x), x.mT)

    asked = ((torch.matmul, PRESETS["dynamic"]),)
    module = inserted(One(body, a=nn.Conv2d(4, 4, 3, padding=1)), X, overrides=asked)
    rows = {n: m.by_column for n, m in module.named_modules() if isinstance(m, FakeQuantizeRows)}
    assert sorted(rows.values()) == [False, True]
    left, right = node_of(module, "matmul").all_input_nodes
    assert (rows[str(left.target)], rows[str(right.target)]) == (False, True)


def test_what_several_dynamic_layers_read_is_rounded_once() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        made: Tensor = m.a(x) + m.b(x)
        return made

    model = One(body, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    module = inserted(model, X, overrides=(("*", PRESETS["dynamic"]),))
    assert sum(isinstance(m, FakeQuantizeRows) for m in module.modules()) == 1


def test_switched_off_nothing_has_changed() -> None:
    model = net().eval()
    module = switched_off(inserted(model, X))
    with torch.no_grad():
        torch.testing.assert_close(module(X), model(X), rtol=0, atol=1e-6)


def test_one_scale_for_all_channels_looks_at_the_norm() -> None:
    spec = QSpec("int8", symmetric=True, observer="minmax")
    module = inserted(net(), X, config=QConfig(weight=spec))
    assert names(module).count("fold_factor") == 1  # b has no norm
    assert names(inserted(net(), X)).count("fold_factor") == 0  # with a scale each it cancels out
    model = module.eval()
    with torch.no_grad():
        model(X)
    fake = model.get_submodule("fake_quant.a_weight")
    assert isinstance(fake, FakeQuantizeWeight)
    bn: Any = model.get_submodule("bn")
    factor = fold_factor(bn.weight, bn.running_var, bn.eps)
    folded = model.get_parameter("a.weight").detach() * factor.view(-1, 1, 1, 1)
    torch.testing.assert_close(fake.scale, folded.abs().amax().view(1) / 127)


def test_where_pairs_can_saturate_weights_have_seven_bits() -> None:
    parts = {"a": nn.Conv2d(4, 4, 3, padding=1, groups=4)}  # sums run over one channel
    module = inserted(net(**parts), X, saturates=True)
    bits = {n: module.get_submodule(f"fake_quant.{n}").spec.bits for n in weights(module)}  # type: ignore[union-attr]  # fake-quants
    assert bits == {"a_weight": 8, "b_weight": 7}


def test_a_product_with_a_number_is_not_rounded_a_second_time() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        made: Tensor = m.b(F.relu(m.a(x)) * 0.5)
        return made

    model = One(body, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))
    assert values(inserted(model, X)) == ["x", "relu"]


@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_a_constant_that_needs_a_range_is_put_in_in_float(fill: float) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        made: Tensor = m.b(F.pad(m.a(x), (1, 1, 0, 0), value=fill))
        return made

    model = One(body, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1))
    module = inserted(model, X)
    assert values(module) == ["x", "pad" if fill else "a"]
    decision = info(node_of(module, "pad")).decision
    assert decision is not None and decision.int8 is not bool(fill)


def test_what_drops_at_random_is_a_module_again() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        made: Tensor = m.b(F.dropout(m.drop(m.a(x)), 0.5, m.training))
        return made

    parts = {"a": nn.Linear(6, 6), "drop": nn.Dropout(0.25), "b": nn.Linear(6, 6)}
    module = inserted(One(body, **parts).train(), X)
    found = [m for m in module.modules() if isinstance(m, nn.Dropout)]
    assert sorted(m.p for m in found) == [0.25, 0.5]
    assert isinstance(module.get_submodule("drop"), nn.Dropout)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_round_each_matrix(layer: Any) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        made: Tensor = m.rnn(x)[0]
        return made

    model = One(body, rnn=layer(6, 8))
    x = torch.randn(3, 2, 6)
    asked = ((layer, PRESETS["dynamic"]),)
    module = inserted(model, x, overrides=asked)
    assert weights(module) == ["rnn_weight_ih_l0", "rnn_weight_hh_l0"]
    decision = info(next(n for n in module.graph.nodes if n.target == "rnn")).decision
    assert decision is not None and decision.int8 and decision.by == InsertFakeQuants.name
    switched_off(module)
    with torch.no_grad():
        assert torch.equal(module(x), model.eval()(x))
    left = inserted(One(body, rnn=layer(6, 8)), x)
    assert weights(left) == []
    decision = info(next(n for n in left.graph.nodes if n.target == "rnn")).decision
    assert decision is not None and "faster" in decision.why


def test_it_is_idempotent() -> None:
    module = inserted(net(), X)
    again = Editor(module)
    InsertFakeQuants().run(again)
    assert again.log == []
