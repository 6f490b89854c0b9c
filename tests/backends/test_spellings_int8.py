"""Every spelling of an op that runs in int8 gives the same codes, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxquant.backends.base import INT8_OPS
from fxquant.backends.x86 import X86
from fxquant.graph.op_table import op_named
from fxquant.passes.convert import Convert
from fxquant.passes.lower import Lower
from fxquant.passes.share_scales import ShareScales
from tests.graph.spelling_cases import CASES
from tests.graph.test_op_table import Cell, _cells, _inputs, _model
from tests.helpers import measured, run


class Beside(nn.Module):
    """All spellings of one call, each on a copy of the inputs; what reads them reads codes."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Any, y: Any = None, z: Any = None) -> Any:
        found = []
        for part in self.parts:
            made = part(*(each.clone() for each in (x, y, z) if each is not None))
            found.append((made[0] if isinstance(made, tuple | list) else made) * 0.5)
        return found


def _one_style() -> Iterator[Cell]:
    """One cell of every spelling: that styles agree, the spelling matrix shows."""
    seen: set[tuple[str, str, Any]] = set()
    for cell in _cells():
        key = (cell.op, cell.kind, cell.key)
        if cell.op in INT8_OPS and cell.op in CASES and cell.style != "bare" and key not in seen:
            seen.add(key)
            yield cell


def _alike(cell: Cell) -> str:
    """Cells that say the same of the same shape must agree; layers have weights of their own."""
    op, case = op_named(cell.op), CASES[cell.op]
    if cell.kind == "module":
        spelled = case.modules[cell.key]
        said = spelled.options or case.options
        shape = spelled.shape or case.shape
        own = f" of module {cell.key}" if op.build is not None or case.parameters else ""
        return f"{said}{shape}{own}"
    shape = case.shapes.get(cell.key, case.shape)
    other = case.partners.get(cell.key), case.held.get(cell.key)
    return f"{case.only.get(cell.key, case.options)}{shape}{other if any(other) else ''}"


def _groups() -> dict[str, list[list[Cell]]]:
    found: dict[str, dict[str, list[Cell]]] = {}
    for cell in _one_style():
        found.setdefault(cell.op, {}).setdefault(_alike(cell), []).append(cell)
    several = {op: [g for g in groups.values() if len(g) > 1] for op, groups in found.items()}
    return {op: groups for op, groups in several.items() if groups}


GROUPS = _groups()


def _seeded(cell: Cell) -> nn.Module:
    torch.manual_seed(7)
    return _model(op_named(cell.op), CASES[cell.op], cell)


def _lowered(cells: list[Cell]) -> list[Tensor]:
    """What each of the spellings gives on the x86 backend, on one input."""
    first = cells[0]
    op, case = op_named(first.op), CASES[first.op]
    shape = case.shapes.get(first.key, case.shape)
    if first.kind == "module":
        shape = case.modules[first.key].shape or shape
    torch.manual_seed(8)
    inputs = _inputs(op, case, shape, first.key)
    model = Beside([_seeded(cell) for cell in cells]).eval()
    module = measured(model, tuple(inputs))
    run(module, ShareScales(), Convert(), Lower(X86().rules))
    with torch.no_grad():
        found: list[Tensor] = list(module(*(x.clone() for x in inputs)))
    return found


@pytest.mark.parametrize("op", GROUPS)
def test_every_spelling_gives_the_same_codes(op: str) -> None:
    for cells in GROUPS[op]:
        wanted, *others = _lowered(cells)
        for cell, found in zip(cells[1:], others, strict=True):
            assert torch.equal(found, wanted), f"{cell} differs from {cells[0]}"
