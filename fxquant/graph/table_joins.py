"""Op table: tensors put side by side, and tensors cut into parts."""

from __future__ import annotations

from typing import Any, Final

import torch

from fxquant.graph.functions import index_put, where
from fxquant.graph.ops import Function, Kind, Op
from fxquant.graph.table_entry import entry, fixed, sig, spellings


def _stacks(name: str, target: Function, *more: Function) -> Op:
    like = lambda tensors: None
    return entry(
        name,
        Kind.JOIN,
        target,
        sig(like),
        tensors=("tensors",),
        functions=spellings((target, *more), like),
    )


_JOINS: Final = (
    entry(
        "cat",
        Kind.JOIN,
        torch.cat,
        sig(lambda tensors, dim=0: None),
        tensors=("tensors",),
        functions=spellings((torch.concat, torch.concatenate), lambda tensors, dim=0: None),
    ),
    entry("stack", Kind.JOIN, torch.stack, sig(lambda tensors, dim=0: None), tensors=("tensors",)),
    _stacks("hstack", torch.hstack),
    _stacks("vstack", torch.vstack, torch.row_stack),
    _stacks("dstack", torch.dstack),
    _stacks("column_stack", torch.column_stack),
    entry(
        "where",
        Kind.JOIN,
        where,
        sig(lambda input, other, *, condition: None),
        tensors=("input", "other"),
        functions=spellings((torch.where,), lambda condition, input, other: None),
        methods=spellings(("where",), lambda input, condition, other: None),
    ),
    entry(
        "index_put",
        Kind.JOIN,
        index_put,
        sig(lambda input, values, *, indices: None),
        tensors=("input", "values"),
        absorb={"accumulate": (False,)},
        functions=spellings(
            (torch.index_put,), lambda input, indices, values, accumulate=False: None
        ),
        methods=spellings(("index_put",), lambda input, indices, values, accumulate=False: None)
        | spellings(
            ("index_put_",), lambda input, indices, values, accumulate=False: None, inplace=True
        ),
    ),
)


def _cuts(given: dict[str, Any]) -> dict[str, Any]:
    """``tensor_split(x, sections=3)`` and ``tensor_split(x, indices=(1, 2))`` are one argument."""
    named = [given.pop(name) for name in ("sections", "indices")]
    found = next((value for value in named if value is not None), given["indices_or_sections"])
    found = tuple(found) if isinstance(found, list) else found
    return {**given, "indices_or_sections": found}


_tensor_split = lambda input, indices_or_sections=None, dim=0, *, sections=None, indices=None: None
_hsplit = lambda input, indices_or_sections=None, *, sections=None, indices=None: None
_unsafe = lambda input, split_size_or_sections, dim=0: None

_SPLITS: Final = (
    entry(
        "chunk",
        Kind.SPLIT,
        torch.chunk,
        sig(lambda input, chunks, dim=0: None),
        alias=True,
        functions=spellings((torch.unsafe_chunk,), lambda input, chunks, dim=0: None),
        methods=spellings(("chunk", "unsafe_chunk"), lambda input, chunks, dim=0: None),
    ),
    entry(
        "split",
        Kind.SPLIT,
        torch.split,
        sig(_unsafe),
        alias=True,
        functions=spellings(
            (torch.unsafe_split, torch.split_with_sizes, torch.unsafe_split_with_sizes), _unsafe
        ),
        methods=spellings(
            ("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes"), _unsafe
        ),
    ),
    entry(
        "tensor_split",
        Kind.SPLIT,
        torch.tensor_split,
        sig(lambda input, indices_or_sections, dim=0: None),
        alias=True,
        functions=spellings((torch.tensor_split,), _tensor_split, read=_cuts)
        | spellings((torch.vsplit,), _hsplit, read=lambda given: fixed(dim=0)(_cuts(given)))
        | spellings((torch.dsplit,), _hsplit, read=lambda given: fixed(dim=2)(_cuts(given))),
        methods=spellings(("tensor_split",), _tensor_split, read=_cuts)
        | spellings(("vsplit",), _hsplit, read=lambda given: fixed(dim=0)(_cuts(given)))
        | spellings(("dsplit",), _hsplit, read=lambda given: fixed(dim=2)(_cuts(given))),
    ),
    entry(
        "hsplit",
        Kind.SPLIT,
        torch.hsplit,
        sig(lambda input, indices_or_sections: None),
        alias=True,
        functions=spellings((torch.hsplit,), _hsplit, read=_cuts),
        methods=spellings(("hsplit",), _hsplit, read=_cuts),
    ),
    entry(
        "unbind",
        Kind.SPLIT,
        torch.unbind,
        sig(lambda input, dim=0: None),
        alias=True,
        methods=spellings(("unbind",), lambda input, dim=0: None),
    ),
)

JOINS: Final = (*_JOINS, *_SPLITS)
