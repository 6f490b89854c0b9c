"""The small float ops that opened attention modules call; each is one node of a graph."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def _traced(*tensors: Any) -> bool:
    """Whether a call comes from tracing, which records it as one node."""
    return has_torch_function(tensors)


def attention_mask(
    query: Tensor,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    *,
    heads: int,
    extra: int = 0,
) -> Tensor:
    """Merge the masks of ``nn.MultiheadAttention`` into one that is added to the scores.

    Args:
        query: float ``[..., heads, length, head]``; only its dtype and rank are read.
        mask: bool (true is masked) or float, ``[length, keys]`` or ``[batch * heads, length,
            keys]``.
        padding: bool (true is masked) or float, ``[batch, keys]`` or ``[keys]``.
        heads: number of heads.
        extra: how many keys without a mask follow.

    Returns:
        Float, broadcastable to ``[..., heads, length, keys + extra]``.

    Example:
        >>> attention_mask(torch.zeros(1, 2, 3), padding=torch.tensor([False, True]), heads=1)
        tensor([[[0., -inf]]])
    """
    if _traced(query, mask, padding):
        merged: Tensor = handle_torch_function(
            attention_mask, (query, mask, padding), query, mask, padding, heads=heads, extra=extra
        )
        return merged
    parts = []
    if mask is not None:
        added = _additive(mask, query.dtype)
        if added.dim() == 3:
            added = added.unflatten(0, (-1, heads))
        parts.append(added if added.dim() <= query.dim() else added.squeeze(0))
    if padding is not None:
        parts.append(_additive(padding, query.dtype).unsqueeze(-2).unsqueeze(-2))
    if not parts:
        raise ValueError("attention_mask needs a mask or a padding mask")
    total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return F.pad(total, (0, extra)) if extra else total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None = None, *, average: bool = True
) -> Tensor:
    """The weights that ``nn.MultiheadAttention`` returns beside its result.

    Args:
        query: float ``[..., heads, length, head]``.
        key: float ``[..., heads, keys, head]``.
        mask: what :func:`attention_mask` gives, or ``None``.
        average: whether to average over the heads.

    Returns:
        Float ``[..., length, keys]``, or ``[..., heads, length, keys]``.

    Example:
        >>> attention_weights(torch.zeros(2, 1, 4), torch.zeros(2, 2, 4))
        tensor([[0.5000, 0.5000]])
    """
    if _traced(query, key, mask):
        made: Tensor = handle_torch_function(
            attention_weights, (query, key, mask), query, key, mask, average=average
        )
        return made
    scores = torch.matmul(query * math.sqrt(1.0 / query.shape[-1]), key.transpose(-2, -1))
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return weights.mean(dim=-3) if average else weights


def attention_scores(
    products: Tensor,
    query: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scale and mask products of queries and keys, as ``scaled_dot_product_attention`` does.

    Args:
        products: float ``[..., length, keys]``.
        query: float ``[..., length, head]``; only its last size is read.
        mask: bool (true takes part) or float, broadcastable to the scores.
        is_causal: whether keys after the query are masked.
        scale: factor of the products, by default ``1 / sqrt(head)``.

    Returns:
        Float ``[..., length, keys]``.

    Example:
        >>> attention_scores(torch.ones(2, 2), torch.ones(2, 4), is_causal=True)
        tensor([[0.5000,   -inf],
                [0.5000, 0.5000]])
    """
    if _traced(products, query, mask):
        made: Tensor = handle_torch_function(
            attention_scores, (products, query, mask), products, query, mask, is_causal, scale
        )
        return made
    scores = products * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.tril().logical_not(), -math.inf)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(mask.logical_not(), -math.inf)
    return scores + mask


def append_row(heads: Tensor, row: Tensor) -> Tensor:
    """Append one row to the keys or values of every head.

    Args:
        heads: float ``[..., heads, keys, head]``.
        row: float ``[heads, 1, head]``.

    Returns:
        Float ``[..., heads, keys + 1, head]``.

    Example:
        >>> append_row(torch.zeros(3, 2, 4, 5), torch.ones(2, 1, 5)).shape
        torch.Size([3, 2, 5, 5])
    """
    if _traced(heads, row):
        made: Tensor = handle_torch_function(append_row, (heads, row), heads, row)
        return made
    return torch.cat([heads, row.expand(*heads.shape[:-3], *row.shape)], dim=-2)
