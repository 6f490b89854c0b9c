"""Every op that static mode quantizes trains, and is deployed as it was trained."""

from __future__ import annotations

import dataclasses
from typing import Final

import pytest
import torch

import fxquant
from fxquant import recipes
from fxquant.backends.x86 import X86
from tests.end_to_end.op_rows import MORE, ROWS, Row
from tests.end_to_end.test_op_rows import ON_CODES, decibels, given, model_of
from tests.zoo.any.case import tensors_in

AGREES: Final = 40.0
"""Decibels between the trained and the deployed model: a few codes that a tie decided."""
CASES: Final = tuple(
    pytest.param(row, id=f"{name}") for name, row in (*ROWS.items(), *MORE.items())
)


@pytest.fixture(autouse=True)
def everything_on_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Place by possibility, not by cost."""
    monkeypatch.setitem(
        recipes._BACKENDS, "x86", lambda: dataclasses.replace(X86(), costs=ON_CODES)
    )


@pytest.mark.parametrize("row", CASES)
def test_what_is_deployed_is_what_was_trained(row: Row) -> None:
    model = model_of(row, 0).train()
    data = [given(row.given, seed) for seed in range(3)]
    made = fxquant.prepare(model, mode="qat", example_inputs=(data[0],), overrides=row.asked)
    optimizer = torch.optim.SGD(made.parameters(), 1e-3)
    for x in data:
        optimizer.zero_grad()
        found = [part for part in tensors_in(made(x)) if part.is_floating_point()]
        torch.stack([part.square().mean() for part in found]).sum().backward()
        optimizer.step()
    quantized = fxquant.convert(made, backend="x86")
    assert any(op.int8 for op in fxquant.report(quantized).ops)
    assert fxquant.verify(made, quantized, data).ok
    made.eval()
    with torch.no_grad():
        outputs = tensors_in(made(data[0])), tensors_in(quantized(data[0]))
    for wanted, part in zip(*outputs, strict=True):
        if wanted.is_floating_point():
            assert decibels(wanted, part) >= AGREES
