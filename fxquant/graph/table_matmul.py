"""Op table: products of matrices that are both computed, and attention."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxquant.graph.attention_ops import (
    append_row,
    attention_mask,
    attention_scores,
    attention_weights,
)
from fxquant.graph.ops import Kind
from fxquant.graph.table_entry import entry, sig, spellings


def einsum(tensors: Sequence[Tensor], equation: str) -> Tensor:
    """``torch.einsum`` with its tensors first, as canonical calls have them.

    Args:
        tensors: the operands, one for each term of the equation.
        equation: as for :func:`torch.einsum`.

    Example:
        >>> einsum([torch.ones(2, 3), torch.ones(3)], "ij,j->i")
        tensor([3., 3.])
    """
    if has_torch_function(tuple(tensors)):
        made: Tensor = handle_torch_function(einsum, tuple(tensors), tensors, equation)
        return made
    return torch.einsum(equation, *tensors)


def add_matmul(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """``beta * input + alpha * (mat1 @ mat2)``: ``addmm`` and ``baddbmm`` in one.

    Args:
        input: float, broadcastable to the product.
        mat1: float ``[..., rows, inner]``.
        mat2: float ``[..., inner, columns]``.
        beta: factor of ``input``; where it is 0, NaN and infinity in ``input`` do not count.
        alpha: factor of the product.

    Example:
        >>> add_matmul(torch.ones(2), torch.eye(2), torch.eye(2), alpha=2)
        tensor([[3., 1.],
                [1., 3.]])
    """
    operands = (input, mat1, mat2)
    if has_torch_function(operands):
        made: Tensor = handle_torch_function(
            add_matmul, operands, *operands, beta=beta, alpha=alpha
        )
        return made
    # Torch's own functions where they take the operands: they may sum in another order, to a bit.
    for rank, function in ((2, torch.addmm), (3, torch.baddbmm)):
        if mat1.dim() == mat2.dim() == rank and mat1.shape[:-2] == mat2.shape[:-2]:
            return function(input, mat1, mat2, beta=beta, alpha=alpha)
    product = torch.matmul(mat1, mat2)
    product = product if alpha == 1 else product * alpha
    if beta == 0:
        return product
    return product + (input if beta == 1 else input * beta)


_PRODUCTS: Final = (
    entry(
        "matmul",
        Kind.ARITH,
        torch.matmul,
        sig(lambda input, other: None),
        tensors=("input", "other"),
        functions=spellings(
            (operator.matmul, operator.imatmul, torch.linalg.matmul, torch.mm, torch.bmm, torch.mv),
            lambda input, other: None,
        ),
        methods=spellings(("matmul", "mm", "bmm", "mv"), lambda input, other: None),
    ),
    entry(
        "addmm",
        Kind.FLOAT,
        add_matmul,
        sig(lambda input, mat1, mat2, *, beta=1, alpha=1: None),
        tensors=("input", "mat1", "mat2"),
        functions=spellings(
            (torch.addmm, torch.baddbmm),
            lambda input, mat1, mat2, *, beta=1, alpha=1: None,
        ),
        methods=spellings(("addmm", "baddbmm"), lambda input, mat1, mat2, *, beta=1, alpha=1: None),
    ),
    entry(
        "addbmm",
        Kind.FLOAT,
        torch.addbmm,
        sig(lambda input, batch1, batch2, *, beta=1, alpha=1: None),
        tensors=("input", "batch1", "batch2"),
        methods=spellings(("addbmm",), lambda input, batch1, batch2, *, beta=1, alpha=1: None),
    ),
    entry(
        "einsum",
        Kind.FLOAT,
        einsum,
        sig(lambda tensors, equation: None),
        tensors=("tensors",),
        functions=spellings((torch.einsum,), lambda equation, *tensors: None),
    ),
    entry(
        "tensordot",
        Kind.FLOAT,
        torch.tensordot,
        sig(lambda a, b, dims=2: None),
        tensors=("a", "b"),
        absorb={"out": (None,)},
        functions=spellings((torch.tensordot,), lambda a, b, dims=2, out=None: None),
    ),
    entry(
        "inner",
        Kind.FLOAT,
        torch.inner,
        sig(lambda input, other: None),
        tensors=("input", "other"),
        methods=spellings(("inner",), lambda input, other: None),
    ),
    entry(
        "bilinear",
        Kind.FLOAT,
        F.bilinear,
        sig(lambda input1, input2, weight, bias=None: None),
        tensors=("input1", "input2", "weight", "bias"),
    ),
)

_ATTENTION: Final = (
    entry(
        "scaled_dot_product_attention",
        Kind.FLOAT,
        F.scaled_dot_product_attention,
        sig(
            lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False: (
                None
            )
        ),
        tensors=("query", "key", "value"),
    ),
    entry(
        "attention_mask",
        Kind.FLOAT,
        attention_mask,
        sig(lambda query, mask=None, padding=None, *, heads, extra=0: None),
        tensors=("query",),
    ),
    entry(
        "attention_weights",
        Kind.FLOAT,
        attention_weights,
        sig(lambda query, key, mask=None, *, average=True: None),
        tensors=("query", "key"),
    ),
    entry(
        "attention_scores",
        Kind.FLOAT,
        attention_scores,
        sig(lambda products, query, mask=None, is_causal=False, scale=None: None),
        tensors=("products", "query"),
    ),
    entry(
        "append_row",
        Kind.FLOAT,
        append_row,
        sig(lambda heads, row: None),
        tensors=("heads", "row"),
    ),
)

MATMULS: Final = (*_PRODUCTS, *_ATTENTION)
