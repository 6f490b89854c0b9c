"""Op table: views, and questions about shapes."""

from __future__ import annotations

import operator
from typing import Final

import torch
from torch import nn

from fxquant.graph import tensor_methods
from fxquant.graph.ops import Kind
from fxquant.graph.table_entry import entry, sig, spellings

_VIEWS: Final = (
    entry(
        "reshape",
        Kind.MOVE,
        torch.reshape,
        sig(lambda input, shape: None),
        alias=True,
        methods=spellings(("reshape", "view"), lambda input, *shape: None),
    ),
    entry(
        "flatten",
        Kind.MOVE,
        torch.flatten,
        sig(lambda input, start_dim=0, end_dim=-1: None),
        alias=True,
        methods=spellings(("flatten",), lambda input, start_dim=0, end_dim=-1: None),
        modules=(nn.Flatten,),
    ),
    entry(
        "permute",
        Kind.MOVE,
        torch.permute,
        sig(lambda input, dims: None),
        alias=True,
        methods=spellings(("permute",), lambda input, *dims: None),
    ),
    entry(
        "transpose",
        Kind.MOVE,
        torch.transpose,
        sig(lambda input, dim0, dim1: None),
        alias=True,
        functions=spellings((torch.swapaxes, torch.swapdims), lambda input, dim0, dim1: None),
        methods=spellings(("transpose", "swapaxes", "swapdims"), lambda input, dim0, dim1: None),
    ),
    entry(
        "squeeze",
        Kind.MOVE,
        torch.squeeze,
        sig(lambda input, dim=None: None),
        alias=True,
        methods=spellings(("squeeze",), lambda input, dim=None: None),
    ),
    entry(
        "unsqueeze",
        Kind.MOVE,
        torch.unsqueeze,
        sig(lambda input, dim: None),
        alias=True,
        methods=spellings(("unsqueeze",), lambda input, dim: None),
    ),
    entry(
        "unflatten",
        Kind.MOVE,
        torch.unflatten,
        sig(lambda input, dim, sizes: None),
        alias=True,
        methods=spellings(("unflatten",), lambda input, dim, sizes: None),
    ),
    entry(
        "movedim",
        Kind.MOVE,
        torch.movedim,
        sig(lambda input, source, destination: None),
        alias=True,
        functions=spellings((torch.moveaxis,), lambda input, source, destination: None),
        methods=spellings(("movedim", "moveaxis"), lambda input, source, destination: None),
    ),
    entry(
        "expand",
        Kind.MOVE,
        tensor_methods.expand,
        sig(lambda input, size: None),
        alias=True,
        functions=spellings((torch.Tensor.expand,), lambda input, size: None),
        methods=spellings(("expand",), lambda input, *size: None),
    ),
    entry(
        "narrow",
        Kind.MOVE,
        torch.narrow,
        sig(lambda input, dim, start, length: None),
        alias=True,
        methods=spellings(("narrow",), lambda input, dim, start, length: None),
    ),
    entry(
        "select",
        Kind.MOVE,
        torch.select,
        sig(lambda input, dim, index: None),
        alias=True,
        methods=spellings(("select",), lambda input, dim, index: None),
    ),
    entry(
        "getitem",
        Kind.MOVE,
        operator.getitem,
        sig(lambda input, index: None),
        alias=True,
    ),
    entry(
        "contiguous",
        Kind.MOVE,
        torch.Tensor.contiguous,
        sig(lambda input: None),
        alias=True,
        absorb={"memory_format": (torch.contiguous_format, torch.channels_last)},
        methods=spellings(
            ("contiguous",), lambda input, memory_format=torch.contiguous_format: None
        ),
    ),
)

_QUESTIONS: Final = (
    entry(
        "size",
        Kind.SHAPE,
        tensor_methods.size,
        sig(lambda input, dim=None: None),
        functions=spellings((torch.Tensor.size,), lambda input, dim=None: None),
        methods=spellings(("size",), lambda input, dim=None: None),
    ),
    entry(
        "dim",
        Kind.SHAPE,
        tensor_methods.dim,
        sig(lambda input: None),
        functions=spellings((torch.Tensor.dim,), lambda input: None),
        methods=spellings(("dim", "ndimension"), lambda input: None),
    ),
    entry(
        "numel",
        Kind.SHAPE,
        torch.numel,
        sig(lambda input: None),
        methods=spellings(("numel", "nelement"), lambda input: None),
    ),
)

VIEWS: Final = (*_VIEWS, *_QUESTIONS)
