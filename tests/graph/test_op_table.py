"""The spelling matrix: every spelling of every op gives the same canonical node and output.

Calls are made from the table's own signatures and run in eager PyTorch, so that a wrong signature
fails there; what the canonical node must be is written by hand in ``spelling_cases``. A new op or
module needs a case, a new function or method spelling is picked up by itself.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxquant.graph.chain import UnaryChain
from fxquant.graph.info import info
from fxquant.graph.integer_modules import IntegerEmbedding, IntegerEmbeddingBag
from fxquant.graph.op_table import (
    OPS,
    op_named,
    op_names,
)
from fxquant.graph.ops import Kind, Op, Spelling
from fxquant.graph.random_drops import RandomDrop
from fxquant.graph.table_norms import FunctionalBatchNorm, FunctionalInstanceNorm
from fxquant.graph.table_pools import WITH_INDICES
from tests.graph.spelling import Case
from tests.graph.spelling_cases import CASES
from tests.helpers import One, Three, Two, canonical, check_eager, names, nodes, options

_BOUNDARIES = {op.name for op in map(op_named, op_names()) if op.kind is Kind.BOUNDARY}
_WORDS: dict[Any, dict[str, str]] = {
    torch.split: {"input": "tensor"},
    **{
        key: {"split_size_or_sections": "split_size"}
        for key in ("split", torch.unsafe_split, "unsafe_split")
    },
    **{
        key: {"split_size_or_sections": "split_sizes"}
        for key in (
            *(torch.split_with_sizes, torch.unsafe_split_with_sizes),
            *("split_with_sizes", "unsafe_split_with_sizes"),
        )
    },
    **{
        key: {"indices_or_sections": "indices"}
        for key in (
            *(torch.tensor_split, torch.hsplit, torch.vsplit, torch.dsplit),
            *("tensor_split", "hsplit", "vsplit", "dsplit"),
        )
    },
    torch.dropout: {"training": "train"},
    "view": {"shape": "size"},
    **{f: {"other": "mat2"} for f in (torch.mm, torch.bmm, "mm", "bmm")},
    **{f: {"other": "vec"} for f in (torch.mv, "mv")},
    **{f: {"mat1": "batch1", "mat2": "batch2"} for f in (torch.baddbmm, "baddbmm")},
    **{
        key: {"dim0": "axis0", "dim1": "axis1"} for key in (torch.swapaxes, "swapaxes", "swapaxes_")
    },
}
"""What some spellings call an argument, where it is not its canonical name."""
_NUMPY = {"dim": "axis", "keepdim": "keepdims", "input": "x", "other": "x2"}
_WRITTEN_IN_PYTHON = (
    *("split", "unflatten", "norm", "unsafe_split", "split_with_sizes"),
    *("unsafe_split_with_sizes", "tensor_split"),
)
"""Methods that take no names of numpy's."""
_NOT_BARE = {
    "clamp": "it takes at least one bound",
    "interpolate": "it takes a size or a factor",
    "roll": "several shifts take dimensions",
    "dropout": "it is active by default",
    "cast": "it says what to make",
    "attention_mask": "it takes at least one mask",
    "tensor_split": "its sections have several names",
    "hsplit": "its sections have several names",
    "logit": "without eps the inputs outside 0 to 1 give NaN, equal to nothing",
    "softmax": "PyTorch guesses its dim",
    "log_softmax": "PyTorch guesses its dim",
}
"""Ops whose optional arguments cannot all be left out."""
_STABLE = ("sort", "argsort")
"""Stable sorts take all their options by name."""
_SHAPED_AS = ("view_as", "reshape_as", "expand_as")
"""They take a second call, so they have a test of their own."""


@dataclass(frozen=True)
class Cell:
    """One way to write one op."""

    op: str
    kind: str
    key: Any
    style: str

    def __str__(self) -> str:
        return f"{self.op}-{self.kind}-{getattr(self.key, '__name__', self.key)}-{self.style}"


def _cells() -> Iterator[Cell]:
    for op in OPS:
        for function, spelling in op.functions.items():
            if isinstance(function, types.MethodDescriptorType):
                continue  # torch.Tensor.expand(x): torch.fx cannot trace it, users write x.expand
            styles = _styles(op, function, spelling)
            yield from (Cell(op.name, "function", function, style) for style in styles)
        for method, spelling in op.methods.items():
            if method not in _SHAPED_AS:
                styles = _of_method(op, method, spelling)
                yield from (Cell(op.name, "method", method, style) for style in styles)
        for attribute in op.attributes:
            if op.name != "getitem":
                yield Cell(op.name, "attribute", f".{attribute}", "bare")
        for place, _ in enumerate(CASES[op.name].modules) if op.name in CASES else ():
            yield Cell(op.name, "module", place, "positional")
            yield Cell(op.name, "module", place, "keyword")


def _styles(op: Op, function: Any, spelling: Spelling) -> Iterator[str]:
    if op.name not in _STABLE:
        yield "positional"
    if not _by_place_only(function):
        yield "keyword"
    if _has_switch(function):
        yield "inplace"
    parameters = spelling.signature.parameters
    builtin = isinstance(function, types.BuiltinFunctionType) and not function.__module__
    if builtin and set(_NUMPY) & set(parameters):
        yield "numpy"
    if any(p.default is not p.empty for p in parameters.values()) and _may_be_bare(op):
        yield "bare"


def _of_method(op: Op, method: str, spelling: Spelling) -> Iterator[str]:
    later = list(spelling.signature.parameters.values())[1:]
    if op.name not in _STABLE:
        yield "positional"
    if any(p.kind is p.VAR_POSITIONAL and p.name != "targets" for p in later):
        yield "tuple"
    if later and "targets" not in spelling.signature.parameters:
        yield "keyword"
    if {"dim", "keepdim"} & {p.name for p in later} and method not in _WRITTEN_IN_PYTHON:
        yield "numpy"
    if any(p.default is not p.empty for p in later) and _may_be_bare(op):
        yield "bare"


def _may_be_bare(op: Op) -> bool:
    return op.target is not None and op.name not in _NOT_BARE and WITH_INDICES not in op.name


def _has_switch(function: Any) -> bool:
    known = isinstance(function, types.FunctionType)
    return known and "inplace" in inspect.signature(function).parameters


def _by_place_only(function: Any) -> bool:
    return getattr(function, "__module__", None) == "_operator" or function is torch.einsum


def _inputs(op: Op, case: Case, shape: tuple[int, ...], key: Any) -> tuple[Tensor, ...]:
    if op.name in ("embedding", "embedding_bag"):
        return (torch.tensor([[0, 4, 1], [3, 2, 2]]),)
    own = 1 if op.target is None or case.parameters else len(op.tensors)
    shapes = [shape, *[case.partners.get(key, shape)] * ((case.joins or own) - 1)]
    drawn = [torch.randn(shape) for shape in shapes]
    if case.positive or case.above_one:
        return tuple(x.abs().clamp(0.1, 0.9) + float(case.above_one) for x in drawn)
    return tuple(drawn)


def _model(op: Op, case: Case, cell: Cell) -> nn.Module:
    """A model that consists of the one call that ``cell`` describes."""
    if cell.kind == "module":
        module = case.modules[cell.key].make()
        if cell.style == "keyword":
            word = next(iter(inspect.signature(module.forward).parameters))
            return One(lambda self, x: self.part(**{word: x}), part=module)
        return One(lambda self, x: self.part(x), part=module)
    shapes = case.held.get(cell.key, case.parameters).items()
    parts = {name: nn.Parameter(torch.rand(shape) + 0.5) for name, shape in shapes}
    said = case.says.get(cell.key, case.only.get(cell.key, case.options))
    write = _Writer(op, cell, said)
    if case.joins == 2:
        return Two(lambda self, x, y: write({"tensors": [x, y]}), **parts)
    own = op.tensors[:1] if op.target is None or case.parameters else op.tensors
    held = list(parts)
    if len(own) == 2:
        return Two(lambda self, x, y: write(dict(zip(own, (x, y), strict=True))))
    if len(own) == 3:
        return Three(lambda self, x, y, z: write(dict(zip(own, (x, y, z), strict=True))))
    return One(lambda self, x: write({own[0]: x, **{n: getattr(self, n) for n in held}}), **parts)


class _Writer:
    """Makes the call of one cell from named arguments."""

    def __init__(self, op: Op, cell: Cell, given: dict[str, Any]) -> None:
        self._cell = cell
        self._given = given
        if cell.kind == "attribute":
            return
        table = op.functions if cell.kind == "function" else op.methods
        self._parameters = list(table[cell.key].signature.parameters.values())

    def __call__(self, tensors: dict[str, Any]) -> Any:
        if self._cell.kind == "attribute":
            return getattr(tensors["input"], self._cell.key.removeprefix("."))
        known = {**tensors, **self._given}
        values = {p.name: known.get(p.name, p.default) for p in self._parameters}
        said = [p.name for p in self._parameters if p.name in known]
        if self._cell.style == "bare":
            needed = [p.name for p in self._parameters if p.default is p.empty]
            said = [name for name in said if name in (*tensors, *needed)]
        function = self._cell.key
        if self._cell.kind == "method":
            function = getattr(values.pop(said.pop(0)), self._cell.key)
        if self._cell.style in ("keyword", "numpy"):
            words = _NUMPY if self._cell.style == "numpy" else _WORDS.get(self._cell.key, {})
            return function(**{words.get(name, name): values[name] for name in said})
        by_name = [p.name for p in self._parameters if p.kind is p.KEYWORD_ONLY]
        more = {name: values.pop(name) for name in by_name if name in said}
        if self._cell.style == "inplace":
            more["inplace"] = True
        return function(*self._by_place(values, [n for n in said if n in values]), **more)

    def _by_place(self, values: dict[str, Any], said: list[str]) -> list[Any]:
        last = max((list(values).index(name) for name in said), default=-1)
        placed: list[Any] = []
        for p in [p for p in self._parameters if p.name in list(values)[: last + 1]]:
            spread = p.kind is p.VAR_POSITIONAL and self._cell.style == "positional"
            placed.extend(values[p.name] if spread else (values[p.name],))
        return placed


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple) and any(isinstance(part, Tensor) for part in wanted):
        return all(_same(a, b) for a, b in zip(found, wanted, strict=True))
    if isinstance(wanted, Tensor):  # a constant that the graph holds as an attribute
        return isinstance(found, fx.Node) and found.op == "get_attr"
    return bool(found == wanted) and isinstance(found, type(wanted))


@pytest.mark.parametrize("cell", list(_cells()), ids=str)
def test_every_spelling_gives_one_canonical_node_and_the_output_of_eager(cell: Cell) -> None:
    op, case = op_named(cell.op), CASES[cell.op]
    shape = case.shapes.get(cell.key, case.shape)
    wanted = case.only.get(cell.key, case.options)
    if cell.kind == "module":
        spelled = case.modules[cell.key]
        shape = spelled.shape or shape
        wanted = wanted if spelled.options is None else spelled.options
    inputs = _inputs(op, case, shape, cell.key)
    model = _model(op, case, cell).eval()
    # With an example the number of dimensions is known, and no node asks for it.
    module = canonical(model, *(() if op.name == "dim" else inputs))
    check_eager(model, module, *inputs)
    if case.gone:
        assert names(module) == []
        return
    assert names(module) == [op.name], [info(n).opaque for n in nodes(module)]
    if cell.style == "bare" and cell.kind != "attribute":
        return  # that what is left out means what it means in PyTorch, its outputs have shown
    found = options(nodes(module)[0])
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert _same(found[name], value), f"{name}={found[name]!r}, not {value!r}"


def test_every_op_has_a_case() -> None:
    assert set(op_names()) - _BOUNDARIES == set(CASES)


def test_every_module_class_has_a_case() -> None:
    for op in OPS:
        parts = [spelled.make() for spelled in CASES[op.name].modules]
        made = {type(getattr(part, "part", part)) for part in parts}
        # What rewrites make and nobody spells; the matrix has F.batch_norm and F.instance_norm.
        by_rewrites = {
            FunctionalBatchNorm,
            FunctionalInstanceNorm,
            UnaryChain,
            IntegerEmbedding,
            IntegerEmbeddingBag,
            RandomDrop,
        }
        wanted = set(op.modules) - by_rewrites
        assert made == wanted, f"{op.name}: cases of {made}, spellings {wanted}"


def test_every_case_states_all_options() -> None:
    for op in OPS:
        assert set(CASES[op.name].options) == set(op.options), op.name


@pytest.mark.parametrize("method", _SHAPED_AS)
@pytest.mark.parametrize("style", ["positional", "keyword"])
def test_a_shape_taken_from_another_tensor(method: str, style: str) -> None:
    x, like = (
        torch.randn(2, 1, 6),
        torch.randn(2, 1, 6) if method != "expand_as" else torch.randn(2, 4, 6),
    )

    def body(self: Any, a: Any, b: Any) -> Any:
        return getattr(a, method)(other=b) if style == "keyword" else getattr(a, method)(b)

    module = canonical(Two(body), x, like)
    check_eager(Two(body), module, x, like)
    size, node = nodes(module)
    op = "expand" if method == "expand_as" else "reshape"
    assert names(module) == ["size", op]
    assert size in node.args or size in node.kwargs.values()
