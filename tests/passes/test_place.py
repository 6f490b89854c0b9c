"""Place: int8 only where it pays, by a minimum cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.backends.base import MEASURED, Cost, Costs
from fxquant.graph.edit import Editor
from fxquant.passes.place import Place
from fxquant.passes.share_scales import ShareScales
from tests.helpers import One, decisions, measured, run

Body = Callable[[Any, Any], Any]
X = torch.randn(1, 4, 16, 16)


def conv() -> nn.Module:
    return nn.Conv2d(4, 4, 1)


def placed(body: Body, costs: Costs = MEASURED) -> dict[str, bool]:
    model = One(body, a=conv(), b=conv(), c=conv()).eval()
    module = run(measured(model, X), ShareScales(), Place(costs))
    return {name: int8 for name, (int8, _) in decisions(module).items()}


def costs(
    quantize: float = 10, dequantize: float = 5, codes: Any = None, real: Any = None
) -> Costs:
    """Costs of calls only, so that sums can be done by hand."""
    on_codes = {"": Cost(10.0, 0.0), **{k: Cost(v, 0.0) for k, v in (codes or {}).items()}}
    in_float = {"": Cost(10.0, 0.0), **{k: Cost(v, 0.0) for k, v in (real or {}).items()}}
    return Costs(Cost(quantize, 0.0), Cost(dequantize, 0.0), on_codes, in_float)


def between_convs(m: Any, x: Any) -> Any:
    return m.b(torch.tanh(m.a(x)).flip(1) + 1)


def test_a_lone_op_between_float_values_goes_to_float() -> None:
    found = placed(lambda m, x: torch.cumsum(torch.cumsum(x, 1) * 2, 1) + m.a(x).flip(1))
    assert not found["mul"]
    assert found["a"], "layers are int8 because that was asked for"


def test_an_op_between_layers_stays() -> None:
    found = placed(lambda m, x: m.b(torch.cat([m.a(x), m.c(x)], 1)[:, :4]))
    assert found == {"a": True, "c": True, "cat": True, "getitem": True, "b": True}


def test_the_reason_is_told() -> None:
    model = One(lambda m, x: m.a(torch.cumsum(torch.tanh(x), 1)), a=conv()).eval()
    module = run(measured(model, X), ShareScales(), Place())
    int8, why = decisions(module)["tanh"]
    assert not int8
    assert why in (
        "tanh is faster in float here than with its conversions",
        "nothing reads its result as codes",
    )


def test_costs_move_the_cut() -> None:
    body: Body = lambda m, x: m.b(F.normalize(m.a(x).flip(1)))  # noqa: E731
    assert placed(body, costs(codes={"normalize": 1}))["normalize"]
    # Codes cost 100 more than float; leaving and coming back costs 5 / 2 + 10.
    assert not placed(body, costs(codes={"normalize": 110}))["normalize"]
    dear = costs(quantize=1000, dequantize=1000, codes={"normalize": 110})
    assert placed(body, dear)["normalize"]


def test_a_product_with_a_positive_number_costs_nothing_on_codes() -> None:
    """Its codes are those of its source, at another scale."""
    table = costs(codes={"mul": 1e6, "getitem": 0.0})
    assert placed(lambda m, x: m.b(m.a(x).flip(1) * 2), table)["mul"]
    assert not placed(lambda m, x: m.b(m.a(x).flip(1) * -2), table)["mul"]


def test_layers_never_move() -> None:
    dear = costs(codes={"conv2d": 1e6, "": 1e6})
    found = placed(between_convs, dear)
    assert found["a"] and found["b"]


def test_readers_in_float_share_one_conversion() -> None:
    """Two sums read x + 1 in float: one dequantize of 20 against 2 x 12 more on codes."""

    def body(m: Any, x: Any) -> Any:
        y = m.a(x) + 1
        return torch.cumsum(y * 2, 1), torch.cumsum(y * 3, 1), m.b(y)

    table = costs(quantize=20, dequantize=20, codes={"mul": 12.0}, real={"mul": 1.0})
    found = placed(body, table)
    assert found["add"] and not found["mul"] and not found["mul_1"]


Sides = dict[str, bool]
TWO = ("normalize", "normalize_1")


def price(table: Costs, side: Sides) -> float:
    """What conv a -> normalize -> normalize_1 -> conv b costs with these sides."""
    side = {**side, "a": True, "b": True}
    total = sum((table.codes if side[n] else table.real)("normalize").of(0) for n in TWO)
    for maker, reader in (("a", TWO[0]), TWO, (TWO[1], "b")):
        if side[maker] and not side[reader]:
            # A layer can write float itself: that is half a conversion.
            total += table.dequantize.of(0) * (0.5 if maker == "a" else 1.0)
        if not side[maker] and side[reader]:
            total += table.quantize.of(0)
    return total


@pytest.mark.parametrize("code", [1.0, 9.0, 12.0, 16.0, 40.0])
@pytest.mark.parametrize(("quantize", "dequantize"), [(1.0, 1.0), (10.0, 5.0), (30.0, 3.0)])
def test_the_cut_is_the_cheapest(code: float, quantize: float, dequantize: float) -> None:
    table = costs(quantize, dequantize, codes={"normalize": code}, real={"normalize": 8.0})
    found = placed(lambda m, x: m.b(F.normalize(F.normalize(m.a(x)))), table)
    ways = [dict(zip(TWO, s, strict=True)) for s in product((True, False), repeat=2)]
    assert price(table, found) == min(price(table, way) for way in ways)


def test_a_split_and_its_parts_stay_together() -> None:
    def body(m: Any, x: Any) -> Any:
        first, second = m.a(x).chunk(2, 1)[0], m.c(x).chunk(2, 1)[1]
        return m.b(torch.cat([first, second], 1))

    found = placed(body)
    assert found["chunk"] == found["getitem"]
    assert found["chunk_1"] == found["getitem_1"]


def test_it_is_deterministic_and_settles() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.a(x)
        for k in range(2, 8):
            y = torch.tanh(y * k) + y
        return m.b(y)

    assert len({tuple(placed(body).items()) for _ in range(4)}) == 1
    model = One(body, a=conv(), b=conv()).eval()
    module = run(measured(model, X), ShareScales(), Place())
    again = Editor(module)
    Place().run(again)
    assert again.log == []


def test_larger_tensors_pay_for_dearer_conversions() -> None:
    """The same graph, other sizes: what is a fixed cost at 1 x 1 vanishes at 64 x 64."""
    table = dataclasses.replace(
        costs(codes={"mul": 20.0}, real={"mul": 8.0}),
        quantize=Cost(1.0, 10.0),
        dequantize=Cost(1.0, 10.0),
    )

    def at(side: int) -> bool:
        model = One(lambda m, x: m.b(m.a(x) * 2), a=conv(), b=conv()).eval()
        module = run(measured(model, torch.randn(1, 4, side, side)), ShareScales(), Place(table))
        return decisions(module)["mul"][0]

    assert not at(1)
    assert at(64)


def test_the_cut_does_not_hang_on_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers add up to the same in any order, and the order of sets changes by process."""
    asked: list[Any] = []
    real: Callable[..., Any] = nx.minimum_cut

    def watched(net: Any, *ends: str) -> Any:
        asked.extend(c for _, _, c in net.edges(data="capacity") if c is not None)
        return real(net, *ends)

    monkeypatch.setattr(nx, "minimum_cut", watched)
    placed(between_convs)
    assert asked and all(isinstance(capacity, int) for capacity in asked)
