"""Op table: ops that select elements by their order, and say where they were."""

from __future__ import annotations

from typing import Any, Final

import torch

from fxquant.graph.ops import Function, Kind, Op
from fxquant.graph.table_entry import entry, sig, spellings


def _along(given: dict[str, Any]) -> dict[str, Any] | None:
    """``torch.max(x, 1)`` reduces a dimension; ``torch.max(x, y)`` takes the larger of two."""
    return given if isinstance(given["dim"], int) else None


def _by_dim(name: str, target: Function) -> Op:
    like = lambda input, dim, keepdim=False: None
    return entry(
        name,
        Kind.PICK,
        target,
        sig(like),
        functions=spellings((target,), like, read=_along),
        methods=spellings((name,), like, read=_along),
    )


def _running(name: str, target: Function) -> Op:
    like = lambda input, dim: None
    return entry(name, Kind.PICK, target, sig(like), methods=spellings((name,), like))


def _where_largest(name: str, target: Function) -> Op:
    like = lambda input, dim=None, keepdim=False: None
    return entry(name, Kind.INDEX, target, sig(like), methods=spellings((name,), like))


_sort = lambda input, dim=-1, descending=False, *, stable=False: None
_topk = lambda input, k, dim=-1, largest=True, sorted=True: None

PICKS: Final = (
    _by_dim("max", torch.max),
    _by_dim("min", torch.min),
    _running("cummax", torch.cummax),
    _running("cummin", torch.cummin),
    entry("topk", Kind.PICK, torch.topk, sig(_topk), methods=spellings(("topk",), _topk)),
    entry(
        "kthvalue",
        Kind.PICK,
        torch.kthvalue,
        sig(lambda input, k, dim=-1, keepdim=False: None),
        methods=spellings(("kthvalue",), lambda input, k, dim=-1, keepdim=False: None),
    ),
    entry(
        "sort",
        Kind.PICK,
        torch.sort,
        sig(_sort),
        methods=spellings(("sort",), _sort),
    ),
    entry(
        "argsort",
        Kind.INDEX,
        torch.argsort,
        sig(_sort),
        methods=spellings(("argsort",), _sort),
    ),
    _where_largest("argmax", torch.argmax),
    _where_largest("argmin", torch.argmin),
)
