"""Patterns as functions and as lists: what they match, and definitions that cannot work."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigError, PatternError
from tests.helpers import One, Two

X = torch.randn(2, 3, 8, 8)

SILU: dict[str, Callable[[Any], Any]] = {
    "function": F.silu,
    "in place": lambda y: F.silu(y, inplace=True),
    "by hand": lambda y: y * torch.sigmoid(y),
    "swapped": lambda y: y.sigmoid() * y,
    "methods": lambda y: y.mul(y.sigmoid()),
    "in place product": lambda y: y.mul_(torch.sigmoid(y)),
    "torch.mul": lambda y: torch.mul(torch.sigmoid(y), y),
    "torch.multiply": lambda y: torch.multiply(y, F.sigmoid(y)),
    "module": lambda y: nn.SiLU()(y),
}


def definition(spelling: Callable[[Any], Any]) -> Callable[..., Any]:
    def conv_silu(x, conv: nn.Conv2d):  # type: ignore[no-untyped-def]  # as users write it
        return spelling(conv(x))

    return conv_silu


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(SILU)), st.sampled_from(sorted(SILU)))
def test_every_spelling_matches_every_spelling(written: str, used: str) -> None:
    unit = fxquant.Pattern(definition(SILU[written]))
    model = One(lambda m, x: SILU[used](m.conv(x)), conv=nn.Conv2d(3, 4, 3)).eval()
    found = unit.match(model)
    assert [hit.ops for hit in found.hits] == [("conv2d", "silu")]
    assert found.hits[0].bound == {"x": "x", "conv": "conv"}


@pytest.mark.parametrize("used", SILU)
def test_a_list_matches_every_spelling_too(used: str) -> None:
    unit = fxquant.Pattern([nn.Conv2d, (nn.ReLU, F.silu)])
    model = One(lambda m, x: SILU[used](m.conv(x)), conv=nn.Conv2d(3, 4, 3)).eval()
    assert len(unit.match(model)) == 1


LINEAR: list[Callable[[Any, Any], Any]] = [
    lambda m, x: torch.relu(m.layer(x) * 0.5 + 1.0),
    lambda m, x: F.relu(1.0 + 0.5 * m.layer(x), inplace=True),
    lambda m, x: torch.add(F.linear(x, m.layer.weight, m.layer.bias).mul_(0.5), 1.0).relu_(),
    lambda m, x: m.layer(x).mul(0.5).add(1.0).clamp(min=0),
]


@pytest.mark.parametrize("body", LINEAR[:3])
def test_constants_bind_any_number(body: Callable[[Any, Any], Any]) -> None:
    @fxquant.pattern
    def scaled(x, layer: nn.Linear, scale: float, shift: float):  # type: ignore[no-untyped-def]
        return torch.relu(layer(x) * scale + shift)

    found = scaled.match(One(body, layer=nn.Linear(4, 4)).eval())
    assert found.hits[0].bound["scale"] == "0.5"
    assert found.hits[0].bound["shift"] == "1.0"


def test_a_default_is_that_constant() -> None:
    @fxquant.pattern
    def halved(x, layer: nn.Linear, scale=0.5):  # type: ignore[no-untyped-def]
        return torch.relu(layer(x) * scale)

    def model(factor: float) -> nn.Module:
        return One(lambda m, x: torch.relu(m.layer(x) * factor), layer=nn.Linear(4, 4)).eval()

    assert halved.match(model(0.5))
    miss = halved.match(model(0.25))
    assert not miss and "expected 0.5, found 0.25" in str(miss)


def test_operands_stand_as_written_where_that_is_asked_for() -> None:
    def gate(x, y, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
        return conv(x) + y

    swapped = Two(lambda m, x, y: y + m.conv(x), conv=nn.Conv2d(3, 3, 1)).eval()
    assert fxquant.Pattern(gate).match(swapped)
    assert not fxquant.Pattern(gate, commutes=False).match(swapped)


def test_optional_parts() -> None:
    @fxquant.pattern
    def block(x, conv: nn.Conv2d, act: nn.ReLU | nn.SiLU | None):  # type: ignore[no-untyped-def]
        y = conv(x)
        return (act(y) if act is not None else y) * 2.0

    for act in (nn.ReLU(), nn.SiLU(), None):
        body = (lambda m, x: m.act(m.conv(x)) * 2.0) if act else (lambda m, x: m.conv(x) * 2.0)
        model = One(body, conv=nn.Conv2d(3, 4, 3), act=act).eval()
        found = block.match(model)
        assert len(found) == 1 and ("act" in found.hits[0].bound) is (act is not None)
    assert not block.match(One(lambda m, x: torch.tanh(m.conv(x)) * 2.0, conv=nn.Conv2d(3, 4, 3)))


def test_a_batch_norm_that_is_folded_is_part_of_its_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU()).eval()
    for unit in (
        fxquant.Pattern([nn.Conv2d, nn.SiLU]),
        fxquant.Pattern([nn.Conv2d, nn.BatchNorm2d, nn.SiLU]),
        fxquant.Pattern([nn.Conv2d, (nn.BatchNorm2d, None), nn.SiLU]),
    ):
        assert unit.match(net).hits[0].ops == ("conv2d", "batch_norm", "silu")
    assert not fxquant.Pattern([nn.Conv2d, nn.BatchNorm1d, nn.SiLU]).match(net)
    assert not fxquant.Pattern([nn.Conv2d, nn.BatchNorm2d, nn.SiLU]).match(net[::2])


def test_dropout_and_identity_do_not_stand_in_the_way() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU()).eval()
    assert fxquant.Pattern([nn.Linear, nn.Dropout, nn.ReLU]).match(net)
    assert fxquant.Pattern([nn.Linear, nn.Identity, nn.ReLU]).match(net)
    assert fxquant.Pattern([nn.Linear, nn.ReLU]).match(net)


def test_where_is_asked_with_what_it_names() -> None:
    def small(conv, act):  # type: ignore[no-untyped-def]
        if conv.groups != 1:
            return f"it has {conv.groups} groups"
        return act.negative_slope < 0.2

    @fxquant.pattern(where=small)
    def leaky(x, conv: nn.Conv2d, act: nn.LeakyReLU):  # type: ignore[no-untyped-def]
        return act(conv(x))

    def net(groups: int, slope: float) -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups), nn.LeakyReLU(slope)).eval()

    assert leaky.match(net(1, 0.1))
    assert "it has 2 groups" in str(leaky.match(net(2, 0.1)))
    assert "where= refuses it" in str(leaky.match(net(1, 0.3)))


def test_two_outputs_and_shared_values() -> None:
    @fxquant.pattern
    def both(x, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
        y = conv(x)
        return y, torch.sigmoid(y)

    def body(m: Any, x: Any) -> Any:
        y = m.conv(x)
        return m.a(y) * m.b(torch.sigmoid(y))

    parts = {"conv": nn.Conv2d(3, 4, 3), "a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)}
    assert both.match(One(body, **parts).eval()).hits[0].ops == ("conv2d", "sigmoid")


def test_outputs_side_by_side() -> None:
    @fxquant.pattern
    def pair(x, a: nn.Linear, b: nn.Linear):  # type: ignore[no-untyped-def]
        return torch.relu(a(x)), torch.tanh(b(x))

    def body(m: Any, x: Any) -> Any:
        return torch.tanh(m.q(x)) + torch.relu(m.p(x))

    found = pair.match(One(body, p=nn.Linear(4, 4), q=nn.Linear(4, 4)).eval())
    assert found.hits[0].bound == {"x": "x", "a": "p", "b": "q"}


def test_a_second_user_is_named() -> None:
    @fxquant.pattern
    def unit(x, conv: nn.Conv2d, bn: nn.BatchNorm2d):  # type: ignore[no-untyped-def]
        return torch.relu(bn(conv(x)))

    def body(m: Any, x: Any) -> Any:
        y = m.norm(m.conv(x))
        return torch.relu(y) + y

    model = One(body, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)).eval()
    found = unit.match(model)
    assert not found
    assert "`bn` has a second user: `add`" in str(found)


def test_a_unit_cannot_wait_for_itself() -> None:
    @fxquant.pattern
    def unit(x, z, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
        y = conv(x)
        return y, torch.relu(y + z)

    def body(m: Any, x: Any) -> Any:
        y = m.conv(x)
        return torch.relu(y + torch.tanh(y))

    found = unit.match(One(body, conv=nn.Conv2d(3, 3, 1)).eval())
    assert not found and "an input depends on its own `conv`" in str(found)


def test_overlaps_go_by_priority_then_size_then_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Tanh()).eval()

    def ops(*units: fxquant.Pattern) -> list[str]:
        q = fxquant.quantize(net, [X], patterns=units, backend="reference")
        return [op.op for op in fxquant.report(q).ops]

    small = fxquant.Pattern([nn.Conv2d, nn.ReLU], name="small")
    large = fxquant.Pattern([nn.Conv2d, nn.ReLU, nn.Tanh], name="large")
    first = fxquant.Pattern([nn.Conv2d, nn.ReLU], name="first", priority=1)
    twin = fxquant.Pattern([nn.Conv2d, nn.ReLU], name="another")
    assert ops(small, large)[0] == ops(large, small)[0] == "large"
    assert ops(large, first)[0] == "first"
    assert ops(small, twin)[0] == ops(twin, small)[0] == "another"


def test_a_decorated_function_can_still_be_called() -> None:
    @fxquant.pattern
    def double(x: Tensor, layer: nn.Linear) -> Tensor:
        """Twice."""
        return layer(x) * 2.0

    layer = nn.Linear(2, 2)
    assert torch.equal(double(torch.ones(2), layer), layer(torch.ones(2)) * 2.0)
    assert double.__doc__ == "Twice." and "test_pattern.py" in repr(double)


def _branch(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
    return layer(x) if x.sum() > 0 else x


def _asks(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
    return layer(x) * layer.in_features


def _unknown(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
    return torch.fft.fft(layer(x)).real


def _input(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
    return layer(x), x


def _nothing(x):  # type: ignore[no-untyped-def]
    return x


def _number(x):  # type: ignore[no-untyped-def]
    return 3.0


def _weight(x, w):  # type: ignore[no-untyped-def]
    return F.linear(x, w)


def _unused(x, layer: nn.Linear, bn: nn.BatchNorm1d):  # type: ignore[no-untyped-def]
    return layer(x)


def _unused_input(x, y, layer: nn.Linear):  # type: ignore[no-untyped-def]
    return layer(x)


def _twice(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
    return layer(layer(x))


def _annotated(x, layer: str):  # type: ignore[no-untyped-def]
    return x


def _own_class(x, block: One):  # type: ignore[no-untyped-def]
    return block(x)


def _star(*x):  # type: ignore[no-untyped-def]
    return x[0] + x[1]


def _fails(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
    raise KeyError("mine")


def _shape(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
    return layer(x).view(x.shape[0], -1)


def _split(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
    return torch.chunk(layer(x), 2)[0]


def _same(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
    y = layer(x)
    return y, y


def _tensor(x):  # type: ignore[no-untyped-def]
    return torch.relu(x + torch.ones(3))


HOSTILE = {
    _branch: "cannot be traced",
    _asks: "cannot be traced",
    _unknown: "can never match",
    _input: "an output that is one of its inputs",
    _nothing: "an output that is one of its inputs",
    _number: "an output that is no tensor",
    _weight: "take the layer as a parameter",
    _unused: "bn, which leads to no output",
    _unused_input: "y, which leads to no output",
    _twice: "called twice",
    _annotated: "which a pattern cannot look for",
    _own_class: "no op of fxquant",
    _star: "fixed number of inputs",
    _fails: "KeyError: 'mine'",
    _shape: "an option that is computed",
    _split: "a tuple of tensors",
    _same: "the same output twice",
    _tensor: "a tensor of its own",
}


@pytest.mark.parametrize("function", HOSTILE, ids=lambda f: f.__name__)
def test_what_cannot_work_fails_where_it_is_written(function: Callable[..., Any]) -> None:
    with pytest.raises(PatternError, match=HOSTILE[function]) as caught:
        fxquant.Pattern(function)
    assert "test_pattern.py:" in str(caught.value)


def _layer(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
    return torch.relu(layer(x))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: fxquant.Pattern([]), "has no op"),
        (lambda: fxquant.Pattern([nn.Conv2d, torch.fft.fft]), "no op of fxquant"),
        (lambda: fxquant.Pattern([nn.Conv2d(3, 3, 1), nn.ReLU]), "give its class"),
        (lambda: fxquant.Pattern([nn.LSTM]), "no op of fxquant"),
        (lambda: fxquant.Pattern([()]), "has no op"),
        (lambda: fxquant.Pattern(3), "a function written like model code"),  # type: ignore[arg-type]
        (lambda: fxquant.Pattern(nn.Linear), "a function written like model code"),
        (lambda: fxquant.Pattern(_layer, where=lambda conv: None), "no parameter of the pattern"),
        (lambda: fxquant.Pattern(_layer, kernel=lambda x: x), "does not fit its pattern"),
        (lambda: fxquant.Pattern(_layer, kernel=3), "must be callable"),  # type: ignore[arg-type]
        (lambda: fxquant.Pattern(_layer, replacement=lambda q: q), "no parameter of the pattern"),
        (lambda: fxquant.Pattern(_layer, replacement=3), "pass a function"),  # type: ignore[arg-type]
        (lambda: fxquant.Pattern(_layer, priority="high"), "must be an integer"),  # type: ignore[arg-type]
        (lambda: fxquant.Pattern(_layer, name=""), "must be a string"),
        (
            lambda: fxquant.Pattern(_layer, kernel=lambda **k: 0, replacement=nn.Identity()),
            "replacement= and kernel=",
        ),
    ],
)
def test_options_that_cannot_work(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(PatternError, match=why) as caught:
        make()
    assert "test_pattern.py:" in str(caught.value)


def test_lists_take_functions_of_two_tensors() -> None:
    unit = fxquant.Pattern([nn.Conv2d, torch.sigmoid, operator.mul])
    model = Two(lambda m, x, y: y * m.conv(x).sigmoid(), conv=nn.Conv2d(3, 3, 1)).eval()
    assert unit.match(model).hits[0].ops == ("conv2d", "sigmoid", "mul")


@pytest.mark.parametrize(
    ("patterns", "why"),
    [
        ([_layer], "put @fxquant.pattern above"),
        ([[nn.Conv2d, nn.ReLU]], "wrap a list"),
        ("conv", "takes fxquant.Pattern"),
        (3, "takes fxquant.Pattern"),
        ([None], "pass fxquant.Pattern"),
    ],
)
def test_what_is_no_pattern(patterns: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        fxquant.prepare(nn.Sequential(nn.Linear(2, 2)), patterns=patterns)


def test_any_iterable_of_patterns_will_do() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh()).eval()
    unit = fxquant.Pattern([nn.Conv2d, nn.Tanh], name="mine")
    for held in (unit, [unit], (unit,), {"a": unit}.values(), iter([unit])):
        q = fxquant.quantize(net, [X], patterns=held, backend="reference")
        assert fxquant.report(q).ops[0].op == "mine"
    with pytest.raises(PatternError, match="two rules are called 'mine'"):
        fxquant.quantize(net, [X], patterns=[unit, unit], backend="reference")


class Callable_:
    """An object that is called."""

    def __call__(self, x, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
        return torch.relu(conv(x))

    def method(self, x, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
        return torch.relu(conv(x))


def test_methods_and_objects_are_definitions_too() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    assert fxquant.Pattern(Callable_()).match(net)
    assert fxquant.Pattern(Callable_().method).match(net)
    with pytest.raises(PatternError, match=r"write a function that calls it, or a list"):
        fxquant.Pattern(torch.relu)


def test_a_tuple_of_classes_says_either() -> None:
    def either(x, conv, act):  # type: ignore[no-untyped-def]
        return act(conv(x))

    # As they are written, and as the strings that postponed annotations are.
    either.__annotations__ = {"conv": (nn.Conv1d, nn.Conv2d), "act": "(nn.ReLU, nn.SiLU)"}
    unit = fxquant.Pattern(either)
    assert unit.match(nn.Sequential(nn.Conv1d(3, 8, 3), nn.SiLU()).eval())
    assert unit.match(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval())
    assert not unit.match(nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU()).eval())


def test_a_condition_that_fails_says_where() -> None:
    unit = fxquant.Pattern(_layer, where=lambda layer: bool(1 / 0))
    with pytest.raises(PatternError, match=r"where= of pattern '_layer' failed at .*ZeroDivision"):
        unit.match(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_parts_of_a_module_that_stays_python_are_looked_into() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Any:
            return self.body(x) if x.sum() > 0 else x

    found = fxquant.Pattern(_layer).match(nn.Sequential(Gate()), torch.ones(1, 4))
    assert [hit.path for hit in found.hits] == ["0.body.0"]


def test_what_a_pattern_lost_to_another_is_a_near_miss() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Tanh()).eval()
    small = fxquant.Pattern([nn.Conv2d, nn.ReLU], name="small")
    large = fxquant.Pattern([nn.Conv2d, nn.ReLU, nn.Tanh], name="large")
    prepared = fxquant.prepare(net, patterns=[small, large])
    near = {rule: why for rule, _, why in fxquant.history(prepared).near()}
    assert near["small"].endswith("belongs to pattern 'large', which goes first")
    assert any("belongs to pattern 'large'" in why for why in near.values())


def test_patterns_of_a_program_are_used_again_and_again() -> None:
    mine = [fxquant.Pattern([nn.Linear, nn.Tanh], name="mine", qat=lambda **parts: nn.Identity())]
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval()
    before = copy.deepcopy(net)
    for _ in range(2):
        q = fxquant.quantize(net, [torch.randn(8, 4)], patterns=mine, backend="reference")
        assert fxquant.report(q).ops[0].op == "mine"
    assert all(
        torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True)
    )
    assert mine[0].unit.qat is not None and "mine" in repr(mine[0])


def test_active_dropout_inside_a_unit_is_its_own() -> None:
    unit = fxquant.Pattern([nn.Linear, nn.Dropout, nn.ReLU], name="mine")
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 4)).eval()
    q = fxquant.quantize(net, [torch.randn(8, 4)], patterns=[unit], backend="reference")
    assert [op.op for op in fxquant.report(q).ops] == ["mine", "linear"]
