"""Op table: views, and questions about shapes."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch import nn

from fxquant.graph import tensor_methods
from fxquant.graph.functions import reverse_dims
from fxquant.graph.ops import Kind, SizeOf
from fxquant.graph.table_entry import entry, fixed, in_tuples, sig, spellings


def _shaped_as(name: str) -> Any:
    """``x.view_as(y)`` and ``x.expand_as(y)`` take their size from another tensor."""
    return lambda given: {"input": given["input"], name: SizeOf(given["other"])}


_SHAPED: Final = (
    entry(
        "reshape",
        Kind.MOVE,
        torch.reshape,
        sig(lambda input, shape: None),
        alias=True,
        tidy=in_tuples("shape"),
        methods=spellings(("reshape", "view"), lambda input, *shape: None)
        | spellings(("view_as", "reshape_as"), lambda input, other: None, read=_shaped_as("shape")),
    ),
    entry(
        "flatten",
        Kind.MOVE,
        torch.flatten,
        sig(lambda input, start_dim=0, end_dim=-1: None),
        alias=True,
        functions=spellings(
            (torch.ravel,), lambda input: None, read=fixed(start_dim=0, end_dim=-1)
        ),
        methods=spellings(("flatten",), lambda input, start_dim=0, end_dim=-1: None)
        | spellings(("ravel",), lambda input: None, read=fixed(start_dim=0, end_dim=-1)),
        modules=(nn.Flatten,),
    ),
    entry(
        "unflatten",
        Kind.MOVE,
        torch.unflatten,
        sig(lambda input, dim, sizes: None),
        alias=True,
        tidy=in_tuples("sizes"),
        methods=spellings(("unflatten",), lambda input, dim, sizes: None),
        modules=(nn.Unflatten,),
        module_names={"sizes": "unflattened_size"},
    ),
    entry(
        "squeeze",
        Kind.MOVE,
        torch.squeeze,
        sig(lambda input, dim=None: None),
        alias=True,
        methods=spellings(("squeeze",), lambda input, dim=None: None)
        | spellings(("squeeze_",), lambda input, dim=None: None, inplace=True),
    ),
    entry(
        "unsqueeze",
        Kind.MOVE,
        torch.unsqueeze,
        sig(lambda input, dim: None),
        alias=True,
        methods=spellings(("unsqueeze",), lambda input, dim: None)
        | spellings(("unsqueeze_",), lambda input, dim: None, inplace=True),
    ),
    entry(
        "expand",
        Kind.MOVE,
        tensor_methods.expand,
        sig(lambda input, size: None),
        alias=True,
        tidy=in_tuples("size"),
        functions=spellings((torch.Tensor.expand, torch.broadcast_to), lambda input, size: None),
        methods=spellings(("expand",), lambda input, *size: None)
        | spellings(("broadcast_to",), lambda input, size: None)
        | spellings(("expand_as",), lambda input, other: None, read=_shaped_as("size")),
    ),
)


def _smaller_first(given: dict[str, Any]) -> dict[str, Any]:
    """``transpose(-1, -2)`` is ``transpose(-2, -1)``."""
    first, second = given["dim0"], given["dim1"]
    if isinstance(first, int) and isinstance(second, int) and first > second:
        return {**given, "dim0": second, "dim1": first}
    return given


_last_two = fixed(dim0=-2, dim1=-1)

_PERMUTED: Final = (
    entry(
        "permute",
        Kind.MOVE,
        torch.permute,
        sig(lambda input, dims: None),
        alias=True,
        tidy=in_tuples("dims"),
        methods=spellings(("permute",), lambda input, *dims: None),
    ),
    entry(
        "transpose",
        Kind.MOVE,
        torch.transpose,
        sig(lambda input, dim0, dim1: None),
        alias=True,
        functions=spellings((torch.swapaxes, torch.swapdims), lambda input, dim0, dim1: None)
        | spellings((torch.adjoint,), lambda input: None, read=_last_two),
        methods=spellings(("transpose", "swapaxes", "swapdims"), lambda input, dim0, dim1: None)
        | spellings(
            ("transpose_", "swapaxes_", "swapdims_"), lambda input, dim0, dim1: None, inplace=True
        )
        | spellings(("adjoint",), lambda input: None, read=_last_two),
        attributes=spellings(("mT", "mH"), lambda input: None, read=_last_two),
        tidy=_smaller_first,
    ),
    entry(
        "t",
        Kind.MOVE,
        reverse_dims,
        sig(lambda input: None),
        alias=True,
        functions=spellings((torch.t,), lambda input: None),
        methods=spellings(("t",), lambda input: None)
        | spellings(("t_",), lambda input: None, inplace=True),
        attributes=spellings(("T", "H"), lambda input: None),
    ),
    entry(
        "movedim",
        Kind.MOVE,
        torch.movedim,
        sig(lambda input, source, destination: None),
        alias=True,
        tidy=in_tuples("source", "destination"),
        functions=spellings((torch.moveaxis,), lambda input, source, destination: None),
        methods=spellings(("movedim", "moveaxis"), lambda input, source, destination: None),
    ),
)

_CUT: Final = (
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
        attributes=spellings(("values",), lambda input: None, read=fixed(index=0))
        | spellings(("indices",), lambda input: None, read=fixed(index=1)),
    ),
    entry(
        "diagonal",
        Kind.MOVE,
        torch.diagonal,
        sig(lambda input, offset=0, dim1=0, dim2=1: None),
        alias=True,
        methods=spellings(("diagonal",), lambda input, offset=0, dim1=0, dim2=1: None),
    ),
    entry(
        "unfold",
        Kind.MOVE,
        tensor_methods.unfold,
        sig(lambda input, dimension, size, step: None),
        alias=True,
        methods=spellings(("unfold",), lambda input, dimension, size, step: None),
    ),
)

_FORMATS: Final = (
    *(None, torch.contiguous_format, torch.preserve_format),
    *(torch.channels_last, torch.channels_last_3d),
)

_SAME: Final = (
    entry(
        "contiguous",
        Kind.MOVE,
        torch.Tensor.contiguous,
        sig(lambda input: None),
        alias=True,
        absorb={"memory_format": _FORMATS},
        methods=spellings(
            ("contiguous",), lambda input, memory_format=torch.contiguous_format: None
        ),
    ),
    entry(
        "detach",
        Kind.MOVE,
        torch.detach,
        sig(lambda input: None),
        alias=True,
        methods=spellings(("detach",), lambda input: None),
        attributes=spellings(("data",), lambda input: None),
    ),
    entry(
        "clone",
        Kind.MOVE,
        torch.clone,
        sig(lambda input: None),
        absorb={"memory_format": _FORMATS},
        functions=spellings(
            (torch.clone,), lambda input, memory_format=torch.preserve_format: None
        ),
        methods=spellings(("clone",), lambda input, memory_format=torch.preserve_format: None),
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
        attributes=spellings(("shape",), lambda input: None),
    ),
    entry(
        "dim",
        Kind.SHAPE,
        tensor_methods.dim,
        sig(lambda input: None),
        functions=spellings((torch.Tensor.dim,), lambda input: None),
        methods=spellings(("dim", "ndimension"), lambda input: None),
        attributes=spellings(("ndim",), lambda input: None),
    ),
    entry(
        "numel",
        Kind.SHAPE,
        torch.numel,
        sig(lambda input: None),
        methods=spellings(("numel", "nelement"), lambda input: None),
    ),
)

VIEWS: Final = (*_SHAPED, *_PERMUTED, *_CUT, *_SAME, *_QUESTIONS)
