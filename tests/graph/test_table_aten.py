"""Every op of the table, written as users write it and then exported, is the op again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from fxquant.graph.export import export_graph
from fxquant.graph.info import info
from fxquant.graph.op_table import function_spelling, op_named
from fxquant.graph.ops import Kind
from fxquant.graph.table_aten import may_alias, writes_first
from fxquant.graph.view import what
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.unshare import Unshare
from tests.graph.spelling_cases import CASES
from tests.graph.test_op_table import Cell, _cells, _inputs, _model
from tests.helpers import One, canonical, check_eager, nodes, options, run

_IN_PARTS: Final = {
    "embedding_bag": "arange.start_step reshape embedding_bag.padding_idx getitem",
    "normalize": "vector_norm clamp expand_as.default div",
    "local_response_norm": "mul unsqueeze pad avg_pool2d squeeze mul add pow div",
    "softsign": "abs add div",
    "tanhshrink": "tanh sub",
    "norm": "vector_norm",
    "tensordot": "tensordot",  # with both lists of dimensions written out
    "select": "getitem",
    "dim": "",
    "max_unpool1d": "unsqueeze unsqueeze max_unpool2d.default squeeze",
    "max_unpool2d": "max_unpool2d.default",
    "max_unpool3d": "max_unpool3d.default",
    "masked_select": "masked_select ge check_value",  # how many there are is asserted
    "lp_pool1d": "pow avg_pool1d sign abs relu mul mul pow",
    "lp_pool2d": "pow avg_pool2d sign abs relu mul mul pow",
    "lp_pool3d": "pow avg_pool3d sign abs relu mul mul pow",
}
"""Ops that torch writes in Python: an exported graph holds their parts."""


def exported(model: nn.Module, *args: Any) -> fx.GraphModule:
    """``model`` exported and canonicalized."""
    module = export_graph(copy.deepcopy(model), args, {})
    return run(module, Functionalize(), Unshare(), Canonicalize())


def _one_of_each() -> Iterator[Cell]:
    """The first spelling of each op, and the modules of ops with parameters."""
    seen: dict[str, None] = {}
    for cell in _cells():
        overwrites = str(cell.key).endswith("_") or cell.style == "inplace"
        if cell.style != "positional" or overwrites:
            continue
        if cell.op not in seen or (cell.kind == "module" and op_named(cell.op).target is None):
            seen[cell.op] = None
            yield cell


def _as_lists(value: Any) -> Any:
    """What ATen cannot tell apart: ``shifts=2`` is ``shifts=(2,)``; constants have other names."""
    if isinstance(value, dict):
        return {name: _as_lists(item) for name, item in value.items()}
    if isinstance(value, fx.Node):
        return "tensor"
    if isinstance(value, list | tuple) and len(value) == 1:
        return _as_lists(value[0])
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("cell", list(_one_of_each()), ids=str)
def test_an_exported_spelling_is_the_same_canonical_call(cell: Cell) -> None:
    op, case = op_named(cell.op), CASES[cell.op]
    shape = case.shapes.get(cell.key, case.shape)
    if cell.kind == "module":
        shape = case.modules[cell.key].shape or shape
    inputs = _inputs(op, case, shape, cell.key)
    model = _model(op, case, cell).eval().requires_grad_(False)
    found = exported(model, *inputs)
    check_eager(model, found, *(each.clone() for each in inputs))
    calls = [n for n in nodes(found) if info(n).value not in ("scalar", "sizes")]
    calls = [n for n in calls if getattr(n.target, "__name__", "") != "check_conditions"]
    said = [what(n) for n in calls]
    if getattr(cell.key, "__module__", "").startswith("fxquant"):
        return  # a function of fxquant's own, which no exported graph calls
    if cell.op in _IN_PARTS:
        assert " ".join(said) == _IN_PARTS[cell.op]
        return
    wanted = [n for n in nodes(canonical(model, *inputs)) if info(n).value != "scalar"]
    parts = ("getitem", "Structure") if op.kind in (Kind.SPLIT, Kind.PICK) else ()
    wanted, kept = ([n for n in each if what(n) not in parts] for each in (wanted, calls))
    assert [what(n) for n in kept] == [what(n) for n in wanted]
    for a, b in zip(kept, wanted, strict=True):
        assert _as_lists(options(a)) == _as_lists(options(b))


@pytest.mark.parametrize(
    ("overload", "op", "inplace"),
    [
        (torch.ops.aten.conv2d.default, "conv2d", False),
        (torch.ops.aten.conv2d.padding, "conv2d", False),
        (torch.ops.aten.batch_norm.default, "batch_norm", False),
        (torch.ops.aten.relu_.default, "relu", True),
        (torch.ops.aten.add_.Tensor, "add", True),
        (torch.ops.aten.view.default, "reshape", False),
        (torch.ops.aten.clamp_min.default, "clamp", False),
        (torch.ops.aten.special_expit.default, "sigmoid", False),
        (torch.ops.aten.sym_size.int, "size", False),
    ],
)
def test_overloads_by_hand(overload: OpOverload, op: str, inplace: bool) -> None:
    found = function_spelling(overload)
    assert found is not None
    assert (found[0].name, found[1].inplace) == (op, inplace)


@pytest.mark.parametrize(
    "overload",
    [
        torch.ops.aten.view.dtype,  # other bits, not another shape
        torch.ops.aten.add.int,  # numbers, not tensors
        torch.ops.aten.relu.out,
        torch.ops.aten.native_layer_norm.default,
    ],
)
def test_overloads_that_spell_nothing(overload: OpOverload) -> None:
    assert function_spelling(overload) is None


def test_schemas_tell_writes_and_views() -> None:
    assert writes_first(torch.ops.aten.fill_.Scalar)
    assert not writes_first(torch.ops.aten.add.Tensor)
    assert not writes_first(torch.relu_)
    assert may_alias(torch.ops.aten.slice.Tensor)
    assert not may_alias(torch.ops.aten.clone.default)


@pytest.mark.parametrize(
    ("body", "index"),
    [
        (lambda m, x: x[:, 1], (slice(None), 1)),
        (lambda m, x: x[1], 1),
        (lambda m, x: x[:, 1:3], (slice(None), slice(1, 3))),
        (lambda m, x: x[:, :, ::2], (slice(None), slice(None), slice(None, None, 2))),
        (lambda m, x: x.select(-1, 2), (..., 2)),
    ],
)
def test_slices_and_selections_are_one_getitem(body: Any, index: Any) -> None:
    x = torch.randn(3, 4, 6)
    model = One(body)
    found = exported(model, x)
    calls = [n for n in nodes(found) if what(n) == "getitem"]
    assert [n.args[1] for n in calls] == [index]
    check_eager(model, found, x)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "nearest-exact"])
@pytest.mark.parametrize("given", [{"size": (7, 9)}, {"scale_factor": 2.0}])
def test_every_resize_is_interpolate(mode: str, given: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 5, 5)
    model = One(lambda m, x: F.interpolate(x, mode=mode, **given))
    found = exported(model, x)
    calls = [n for n in nodes(found) if what(n) == "interpolate"]
    assert [options(n)["mode"] for n in calls] == [mode]
    check_eager(model, found, x)


def test_a_dropout_left_on_stays() -> None:
    model = One(lambda m, x: F.dropout(x, 0.5, True))
    found = exported(model, torch.ones(4, 4))
    drawn: Tensor = found(torch.ones(64, 64))
    assert 0.2 < float((drawn == 0).float().mean()) < 0.8
