"""Spelling cases: products of matrices and attention."""

from __future__ import annotations

from typing import Any, Final

import torch

from tests.graph.spelling import Case, Shape

_SQUARE: Final[Shape] = (4, 4)
_BATCH: Final[Shape] = (2, 4, 4)


def _both(function: Any, value: Any) -> dict[Any, Any]:
    """The same for a function and the method of its name."""
    return {function: value, function.__name__: value}


MATMULS: Final[dict[str, Case]] = {
    "matmul": Case(
        _BATCH,
        shapes={
            **_both(torch.mm, _SQUARE),
            **_both(torch.mv, _SQUARE),
        },
        partners={**_both(torch.mv, (4,))},
    ),
    "addmm": Case(
        _SQUARE,
        {"beta": 0.5, "alpha": 2},
        parameters={"mat1": _SQUARE, "mat2": _SQUARE},
        shapes={**_both(torch.baddbmm, _BATCH)},
        held={
            **_both(torch.baddbmm, {"mat1": _BATCH, "mat2": _BATCH}),
        },
    ),
    "addbmm": Case(
        _SQUARE,
        {"beta": 0.5, "alpha": 2},
        parameters={"batch1": _BATCH, "batch2": _BATCH},
    ),
    "einsum": Case(_BATCH, {"equation": "bij,bjk->bik"}, joins=2),
    "tensordot": Case(_SQUARE, {"dims": 1}),
    "inner": Case(_BATCH),
    "bilinear": Case((2, 4), parameters={"input2": (2, 3), "weight": (5, 4, 3), "bias": (5,)}),
    "scaled_dot_product_attention": Case(
        (2, 3, 5, 4),
        {
            "attn_mask": None,
            "dropout_p": 0.0,
            "is_causal": True,
            "scale": 0.3,
            "enable_gqa": False,
        },
        parameters={"key": (2, 3, 5, 4), "value": (2, 3, 5, 4)},
    ),
    "attention_mask": Case(
        (2, 3, 4), {"mask": torch.zeros(3, 4), "padding": None, "heads": 2, "extra": 1}
    ),
    "attention_weights": Case((2, 3, 4), {"mask": None, "average": False}),
    "attention_scores": Case((2, 3, 3), {"mask": None, "is_causal": True, "scale": 0.3}),
    "append_row": Case((2, 3, 4), parameters={"row": (2, 1, 4)}),
}
