"""Spelling cases: views, joins, splits, picks and questions about shapes."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from tests.graph.spelling import Case, Spelled

_LAST_TWO: Final[dict[str, Any]] = {"dim0": -2, "dim1": -1}
_WHOLE: Final[dict[str, Any]] = {"start_dim": 0, "end_dim": -1}

VIEWS: Final[dict[str, Case]] = {
    "reshape": Case(options={"shape": (2, -1)}),
    "flatten": Case(
        shape=(2, 3, 2, 2),
        options={"start_dim": 1, "end_dim": -2},
        modules=(Spelled(lambda: nn.Flatten(1, -2)),),
        only={torch.ravel: _WHOLE, "ravel": _WHOLE},
    ),
    "unflatten": Case(
        options={"dim": -1, "sizes": (2, 3)}, modules=(Spelled(lambda: nn.Unflatten(-1, (2, 3))),)
    ),
    "permute": Case(options={"dims": (0, -1, 1)}),
    "transpose": Case(
        options={"dim0": -1, "dim1": 1},  # the smaller one stands first
        only=dict.fromkeys((torch.adjoint, "adjoint", ".mT", ".mH"), _LAST_TWO),
    ),
    "t": Case(shape=(3, 4)),
    "movedim": Case(options={"source": (0, -1), "destination": (1, 0)}),
    "squeeze": Case(shape=(2, 1, 6), options={"dim": -2}),
    "unsqueeze": Case(options={"dim": -1}),
    "expand": Case(shape=(2, 1, 6), options={"size": (2, 4, -1)}),
    "narrow": Case(options={"dim": -1, "start": 1, "length": 3}),
    "select": Case(options={"dim": -1, "index": -2}),
    "getitem": Case(options={"index": (slice(None), slice(1, 3))}),
    "diagonal": Case(options={"offset": 1, "dim1": -2, "dim2": -1}),
    "unfold": Case(options={"dimension": -1, "size": 3, "step": 2}),
    "contiguous": Case(gone=True),
    "detach": Case(gone=True),
    "clone": Case(gone=True),
    "cat": Case(options={"dim": -2}, joins=2),
    "stack": Case(options={"dim": -2}, joins=2),
    "hstack": Case(joins=2),
    "vstack": Case(joins=2),
    "dstack": Case(joins=2),
    "column_stack": Case(joins=2),
    "where": Case(options={"condition": torch.rand(4, 6) > 0.5}),
    "index_put": Case(shape=(6,), options={"indices": (torch.tensor([4, 3, 0, 1, 5, 2]),)}),
    "chunk": Case(options={"chunks": 2, "dim": -1}),
    "split": Case(
        shape=(4, 4, 4),
        options={"split_size_or_sections": [1, 3], "dim": 1},
        only={
            key: {"split_size_or_sections": 3, "dim": 1}
            for key in (torch.unsafe_split, "unsafe_split")
        },
    ),
    "tensor_split": Case(
        shape=(4, 6, 5),
        options={"indices_or_sections": (1, 3), "dim": -1},
        only={
            **{k: {"indices_or_sections": (1, 3), "dim": 0} for k in (torch.vsplit, "vsplit")},
            **{k: {"indices_or_sections": (1, 3), "dim": 2} for k in (torch.dsplit, "dsplit")},
        },
    ),
    "hsplit": Case(options={"indices_or_sections": (1, 3)}),
    "unbind": Case(options={"dim": -1}),
    "max": Case(options={"dim": -1, "keepdim": True}),
    "min": Case(options={"dim": -1, "keepdim": True}),
    "cummax": Case(options={"dim": -1}),
    "cummin": Case(options={"dim": -1}),
    "topk": Case(options={"k": 3, "dim": -2, "largest": False, "sorted": True}),
    "kthvalue": Case(options={"k": 2, "dim": -2, "keepdim": True}),
    "sort": Case(options={"dim": 1, "descending": True, "stable": True}),
    "argsort": Case(options={"dim": 1, "descending": True, "stable": True}),
    "argmax": Case(options={"dim": -1, "keepdim": True}),
    "argmin": Case(options={"dim": -1, "keepdim": True}),
    "size": Case(options={"dim": -1}, only={".shape": {"dim": None}}),
    "dim": Case(),
    "numel": Case(),
}
