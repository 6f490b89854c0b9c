"""Share scales: joined tensors share one scale where that costs none of them more than a bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Node

from fxquant.graph.info import QType, info
from fxquant.graph.view import what
from fxquant.passes.convert import Convert
from fxquant.passes.share_scales import ShareScales
from fxquant.spec import QConfig, QSpec
from tests.helpers import One, Overrides, measured, names, node_of, run

Body = Callable[[Any, Any], Any]
X = torch.randn(2, 4, 6, 6)


def conv(gain: float) -> nn.Module:
    """A convolution whose output spans ``gain`` times that of its input, exactly."""
    made = nn.Conv2d(4, 4, 1, bias=False)
    with torch.no_grad():
        made.weight.copy_(gain * torch.eye(4)[:, :, None, None])
    return made


MINMAX = QConfig(activation=QSpec(observer="minmax"))


def shared(body: Body, *, config: QConfig = MINMAX, **gains: Any) -> Any:
    parts = {name: conv(gain) for name, gain in gains.items()}
    overrides: Overrides = (("*", config),)
    return run(measured(One(body, **parts).eval(), X, overrides=overrides), ShareScales())


def types(module: Any, *found: str) -> list[QType | None]:
    by_name = {n.name: info(n).qtype for n in module.graph.nodes}
    return [by_name[name] for name in found]


def cat(m: Any, x: Any) -> Any:
    return torch.cat([m.a(x), m.b(x)], 1).mean((2, 3))


@pytest.mark.parametrize("gain", [1.0, 0.7, 0.51, 1.9])
def test_within_twice_they_share(gain: float) -> None:
    module = shared(cat, a=1.0, b=gain)
    a, b, joined = types(module, "a", "b", "cat")
    assert a == b == joined
    wide = max(1.0, gain)
    assert a is not None
    # The union's range, up to half a step at either end for the integer zero point.
    assert a.low == pytest.approx(float(X.min()) * wide, abs=a.scale)
    assert a.high == pytest.approx(float(X.max()) * wide, abs=a.scale)


@pytest.mark.parametrize("gain", [0.4, 0.05, 2.2, 30.0])
def test_beyond_twice_the_odd_branch_is_requantized(gain: float) -> None:
    module = shared(cat, a=1.0, b=gain)
    before = types(measured_like(gain), "a", "b", "cat")
    a, b, joined = types(module, "a", "b", "cat")
    assert a is not None and b is not None and joined is not None
    narrow, wide = (b, a) if gain < 1 else (a, b)
    assert wide == joined
    assert narrow == before[1 if gain < 1 else 0], "it keeps its own scale"
    run(module, Convert())
    made = names(module)
    # x, a, b, the narrow one again at the join's scale, and the join itself
    assert made.count("quantize") == 5


def measured_like(gain: float) -> Any:
    parts = {"a": conv(1.0), "b": conv(gain)}
    return measured(One(cat, **parts).eval(), X, overrides=(("*", MINMAX),))


def test_sharing_needs_no_requantization() -> None:
    module = run(shared(cat, a=1.0, b=0.9), Convert())
    assert names(module).count("quantize") == 4  # x, a, b, cat


def test_a_tensor_joined_with_itself() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.a(x)
        return torch.cat([y, y], 1).mean((2, 3))

    module = shared(body, a=1.0)
    a, joined = types(module, "a", "cat")
    assert a == joined
    run(module, Convert())
    assert names(module).count("quantize") == 3


def test_a_chain_of_joins_shares_one_scale() -> None:
    def body(m: Any, x: Any) -> Any:
        y = torch.cat([m.a(x), m.b(x)], 1)
        z = torch.cat([y, m.c(x)], 1)
        return torch.cat([z, m.d(x)], 1).mean((2, 3))

    module = shared(body, a=1.0, b=0.8, c=1.1, d=0.9)
    found = types(module, "a", "b", "c", "d", "cat", "cat_1", "cat_2")
    assert len(set(found)) == 1


def test_a_chain_does_not_drift_beyond_the_narrowest() -> None:
    """Each is within 2x of the next, the last is 5x the first: they cannot all share."""

    def body(m: Any, x: Any) -> Any:
        y = torch.cat([m.a(x), m.b(x)], 1)
        return torch.cat([torch.cat([y, m.c(x)], 1), m.d(x)], 1).mean((2, 3))

    gains: dict[str, Any] = {"a": 1.0, "b": 1.7, "c": 3.0, "d": 5.0}
    found = types(shared(body, **gains), *gains)
    for mine, gain in zip(found, gains.values(), strict=True):
        alone = types(shared(lambda m, x: m.two(m.one(x)), one=gain, two=1.0), "one")[0]
        assert mine is not None and alone is not None
        # Twice its own range, and half a step at either end.
        assert mine.high - mine.low <= 2.02 * (alone.high - alone.low)


def test_through_moves() -> None:
    def body(m: Any, x: Any) -> Any:
        return torch.cat([m.a(x).flip(1), m.b(x)[:, :2]], 1).mean((2, 3))

    module = shared(body, a=1.0, b=0.9)
    assert len(set(types(module, "a", "flip", "b", "getitem", "cat"))) == 1


def test_moves_inherit() -> None:
    module = shared(lambda m, x: m.b(m.a(x).flip(1).transpose(2, 3)), a=1.0, b=1.0)
    a, flip, transpose = types(module, "a", "flip", "transpose")
    assert a == flip == transpose is not None


def test_other_code_ranges_never_share() -> None:
    overrides: Overrides = (("*", MINMAX), ("b", QConfig(activation=QSpec(bits=7))))
    model = One(cat, a=conv(1.0), b=conv(1.0)).eval()
    module = run(measured(model, X, overrides=overrides), ShareScales())
    a, b, joined = types(module, "a", "b", "cat")
    assert a == joined and b != joined


def test_symmetric_codes_stay_symmetric() -> None:
    config = QConfig(activation=QSpec("int8", symmetric=True, observer="minmax"))
    module = shared(cat, config=config, a=1.0, b=0.9)
    a, b, joined = types(module, "a", "b", "cat")
    assert a == b == joined and a is not None
    assert a.zero_point == 0
    assert a.scale == pytest.approx(float(X.abs().max()) / 127, rel=1e-6)


def test_a_stack_is_a_join_too() -> None:
    def body(m: Any, x: Any) -> Any:
        return torch.stack([m.a(x), m.b(x)], 1).mean((3, 4))

    module = shared(body, a=1.0, b=0.9)
    assert len(set(types(module, "a", "b", "stack"))) == 1
    assert info(node_of(module, "stack")).qtype is not None


@pytest.mark.parametrize("gain", [1.0, 0.6])
def test_symmetric_uint8_keeps_its_zero_point_in_the_middle(gain: float) -> None:
    config = QConfig(activation=QSpec("uint8", symmetric=True, observer="minmax"))
    module = shared(cat, config=config, a=1.0, b=gain)
    a, b, joined = types(module, "a", "b", "cat")
    assert a == b == joined and a is not None
    assert a.zero_point == 128
    # The wider one decides, and is not made any wider.
    assert a.scale == pytest.approx(float(X.abs().max()) / 127, rel=1e-6)


def test_sixteen_joins_in_a_row() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.a(x)
        for _ in range(16):
            y = torch.cat([y, m.a(x)[:, :1]], 1)
        return y.mean((2, 3))

    module = shared(body, a=1.0)
    joins = [n.name for n in module.graph.nodes if what(n) == "cat"]
    assert len(joins) == 16
    assert len(set(types(module, *joins))) == 1
    run(module, Convert())
    # x, each call of a, each slice and each join: nothing is requantized
    assert names(module).count("quantize") == 1 + 17 + 16 + 16


def test_a_constant_that_is_joined() -> None:
    def body(m: Any, x: Any) -> Any:
        return torch.cat([m.a(x), m.token.expand(2, -1, -1, -1)], 1).mean((2, 3))

    token = nn.Parameter(torch.randn(1, 1, 6, 6))
    made = One(body, a=conv(1.0), token=token).eval()
    module = run(measured(made, X, overrides=(("*", MINMAX),)), ShareScales())
    a, joined = types(module, "a", "cat")
    assert a == joined is not None
    run(module, Convert())


def test_a_branch_that_only_float_can_compute() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.a(x)
        return torch.cat([y, torch.cumsum(y, 1) * 0.3], 1).mean((2, 3))

    module = run(shared(body, a=1.0), Convert())
    join = node_of(module, "cat")
    parts = join.args[0]
    assert isinstance(parts, tuple | list)
    assert [what(n) for n in parts if isinstance(n, Node)] == ["dequantize", "dequantize"]


@pytest.mark.parametrize("gain", [0.9, 0.2])
def test_a_choice_between_tensors_is_a_join(gain: float) -> None:
    def body(m: Any, x: Any) -> Any:
        return torch.where(m.keep, m.a(x), m.b(x)).mean((2, 3))

    keep = nn.Parameter(torch.rand(6, 6) > 0.5, requires_grad=False)
    made = One(body, a=conv(1.0), b=conv(gain), keep=keep).eval()
    module = run(measured(made, X, overrides=(("*", MINMAX),)), ShareScales())
    a, b, chosen = types(module, "a", "b", "where")
    assert a == chosen is not None
    assert (b == chosen) is (gain > 0.5)


def test_a_tensor_added_to_itself_has_one_type() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.a(x).flip(1)
        return m.b(y + y)

    module = shared(body, a=1.0, b=1.0)
    a, flip, total = types(module, "a", "flip", "add")
    assert a == flip is not None and a is not None and total is not None
    assert total.high == pytest.approx(2 * a.high, rel=0.02)
    run(module, Convert())
    assert names(module).count("quantize") == 4


@pytest.mark.parametrize(("value", "int8"), [(0.0, True), (0.3, True), (90.0, False)])
def test_a_fill_outside_the_range_goes_back_to_float(value: float, int8: bool) -> None:
    def body(m: Any, x: Any) -> Any:
        return m.b(nn.functional.pad(m.a(x), (1, 1), value=value))

    module = shared(body, a=1.0, b=1.0)
    decision = info(node_of(module, "pad")).decision
    assert decision is not None and decision.int8 is int8
    if not int8:
        assert "lies outside" in decision.why
        # What reads it has the range that calibration saw.
        found = info(node_of(module, "pad")).qtype
        assert found is not None and found.high == pytest.approx(value, rel=0.02)
    run(module, Convert())


@pytest.mark.parametrize(("body", "factor"), [
    (lambda m, x: m.b(m.a(x) * 0.125), 0.125),
    (lambda m, x: m.b(m.a(x) / 4), 0.25),
    (lambda m, x: m.b(3 * m.a(x).flip(1)), 3.0),
])  # fmt: skip
def test_a_product_with_a_positive_number_keeps_the_codes(body: Body, factor: float) -> None:
    module = shared(body, a=1.0, b=1.0)
    (scaled,) = (n for n in module.graph.nodes if what(n) in ("mul", "div"))
    (a,), found = types(module, "a"), info(scaled).qtype
    assert a is not None and found is not None
    assert found == QType(a.scale * factor, a.zero_point, a.quant_min, a.quant_max, a.dtype)


@pytest.mark.parametrize("body", [
    lambda m, x: m.b(m.a(x) * -2.0),
    lambda m, x: m.b(m.a(x) * x),
])  # fmt: skip
def test_other_products_have_ranges_of_their_own(body: Body) -> None:
    module = shared(body, a=1.0, b=1.0)
    (scaled,) = (n for n in module.graph.nodes if what(n) == "mul")
    a, found = types(module, "a")[0], info(scaled).qtype
    assert a is not None and found is not None
    assert found.scale != pytest.approx(1.5 * a.scale, rel=1e-6)
