"""Every row of the table of ops, in every spelling: int8 from edge to edge, or a stated reason."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant import recipes
from fxquant.backends.base import Cost, Costs
from fxquant.backends.x86 import X86
from tests.end_to_end.op_rows import MORE, ROWS, Row
from tests.helpers import One
from tests.zoo.any.case import tensors_in
from tests.zoo.statistics import randomize_bn, smooth_images

ON_CODES: Final = Costs(
    quantize=Cost(1e3, 0.0),
    dequantize=Cost(1e3, 0.0),
    on_codes={"": Cost(0.0, 0.0)},
    in_float={"": Cost(1.0, 0.0)},
)
"""Whatever can run on codes does: these models are too small for int8 to pay."""
FLOOR: Final = 20.0
"""Decibels; what is one op between two layers loses less than a whole network may."""
CASES: Final = tuple(
    pytest.param(row, place, id=f"{name}-{place}")
    for name, row in (*ROWS.items(), *((f"{name} ", row) for name, row in MORE.items()))
    for place in range(len(row.bodies))
)


@pytest.fixture(autouse=True)
def everything_on_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Place by possibility, not by cost."""
    monkeypatch.setitem(
        recipes._BACKENDS, "x86", lambda: dataclasses.replace(X86(), costs=ON_CODES)
    )


def given(kind: str, seed: int) -> Tensor:
    """What the first layer reads."""
    if kind == "ids":
        return torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(seed))
    flat = smooth_images(2, 3, 16, seed)
    shapes = {"image": (2, 3, 16, 16), "signal": (2, 3, 256), "volume": (2, 3, 4, 8, 8)}
    return flat.view(2, 48, 16)[:, :6] if kind == "rows" else flat.view(shapes[kind])


def first_layer(kind: str) -> nn.Module:
    """Makes what a body gets: codes, when the model is int8."""
    made: dict[str, Any] = {
        "image": lambda: nn.Conv2d(3, 8, 2, 2),
        "signal": lambda: nn.Conv1d(3, 8, 16, 16),
        "volume": lambda: nn.Conv3d(3, 8, (1, 3, 3)),
        "rows": lambda: nn.Linear(16, 16),
        "ids": nn.Identity,
    }
    layer: nn.Module = made[kind]()
    return layer


def model_of(row: Row, place: int) -> nn.Module:
    """A layer, the spelling, a layer."""
    torch.manual_seed(0)
    body = row.bodies[place]
    inner = One(body, **row.parts())
    first = first_layer(row.given)
    inner.eval()
    with torch.no_grad():
        made = body(inner, first(given(row.given, 0)))
    if row.ends:
        return One(lambda m, x: m.inner(m.first(x)), first=first, inner=inner).eval()
    last: nn.Module = (
        nn.Conv2d(made.shape[1], 4, 1) if made.dim() == 4 else nn.Linear(made.shape[-1], 4)
    )
    model = One(
        lambda m, x: m.last(m.inner(m.first(x))), first=first, inner=inner, last=last
    ).eval()
    if row.given != "ids":
        randomize_bn(model, 0, given(row.given, 1))
    return model


def decibels(wanted: Tensor, found: Tensor) -> float:
    error = float((wanted - found).double().square().sum())
    return 10 * math.log10(float(wanted.double().square().sum()) / max(error, 1e-30))


@pytest.mark.parametrize(("row", "place"), CASES)
def test_a_spelling_is_int8_from_edge_to_edge(row: Row, place: int) -> None:
    model = model_of(row, place)
    data = [given(row.given, seed) for seed in range(6)]
    quantized = fxquant.quantize(model, data, backend="x86", overrides=row.asked)
    report = fxquant.report(quantized)
    for op in report.ops:
        if not op.int8:
            reasons = [why for name, why in row.floats.items() if name in op.op.split("+")]
            assert reasons and op.why and reasons[0] in op.why, str(report)
    with torch.no_grad():
        outputs = tensors_in(model(data[0])), tensors_in(quantized(data[0]))
    for wanted, found in zip(*outputs, strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        if wanted.is_floating_point():
            assert decibels(wanted, found) >= FLOOR
        else:
            assert float((wanted == found).double().mean()) > 0.9


def test_the_table_has_46_rows() -> None:
    assert len(ROWS) == 46
