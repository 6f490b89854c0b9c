"""Products of codes: exact against float64, in every shape and type of codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.backends.x86_matmul import ProductCodes
from fxquant.graph.info import QType
from fxquant.numerics.affine import quantize
from tests.helpers import qtype

SHAPES = [
    ((3, 4), (4, 5)),
    ((2, 3, 4), (2, 4, 5)),
    ((2, 3, 7, 16), (2, 3, 16, 9)),
    ((2, 1, 7, 16), (3, 16, 9)),
    ((2, 3, 4), (4, 5)),
    ((3, 4), (2, 4, 5)),
    ((4,), (4, 5)),
    ((4,), (4,)),
    ((3, 4), (4,)),
    ((2, 3, 4), (4,)),
    ((0, 3, 4), (4, 5)),
    ((2, 0, 4), (2, 4, 5)),
    ((1, 1), (1, 1)),
    ((64, 257), (257, 33)),
]
TYPES = [
    (qtype(0.02, 3), qtype(0.01, 200)),
    (qtype(0.02, 0), qtype(0.01, 128)),
    (qtype(0.02, 128), qtype(0.01, 0, torch.int8)),
    (qtype(0.02, -7, torch.int8), qtype(0.01, 11, torch.int8)),
    (qtype(0.02, 5, torch.int8), qtype(0.01, 77)),
]


def codes(shape: tuple[int, ...], kind: QType) -> Tensor:
    """Random codes over the whole range."""
    drawn = torch.randint(kind.quant_min, kind.quant_max + 1, shape)
    return drawn.to(kind.dtype)


def exact(a: Tensor, b: Tensor, kinds: tuple[QType, QType]) -> Tensor:
    """The product in float64, in which it is exact."""
    left, right = (
        (c.double() - k.zero_point) * k.scale for c, k in zip((a, b), kinds, strict=True)
    )
    return torch.matmul(left, right)


@pytest.mark.parametrize("kinds", TYPES, ids=lambda k: f"{k[0].dtype}-{k[1].dtype}")
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_float_results_are_exact_to_rounding(shapes: Any, kinds: tuple[QType, QType]) -> None:
    a, b = codes(shapes[0], kinds[0]), codes(shapes[1], kinds[1])
    found, wanted = ProductCodes(*kinds, None)(a, b), exact(a, b, kinds)
    assert found.shape == wanted.shape and found.dtype == torch.float32
    # The sum is an exact integer; two float32 roundings follow.
    assert torch.allclose(found.double(), wanted, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("writes", [qtype(0.5, 100), qtype(0.3, 0, torch.int8)])
def test_codes_are_those_of_the_exact_product(writes: QType) -> None:
    kinds = TYPES[0]
    a, b = codes((2, 40, 64), kinds[0]), codes((2, 64, 30), kinds[1])
    real = exact(a, b, kinds)
    out = (writes.scale, writes.zero_point, writes.quant_min, writes.quant_max, writes.dtype)
    found, wanted = ProductCodes(*kinds, writes)(a, b), quantize(real, *out)
    assert found.dtype == writes.dtype
    difference = (found.int() - wanted.int()).abs()
    # Only a product within float32 rounding of the middle between two codes may differ.
    assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 1e-3


def test_the_largest_sums_that_are_taken_fit() -> None:
    kinds = (qtype(1.0, 255), qtype(1.0, 255))
    a, b = (torch.zeros(shape, dtype=torch.uint8) for shape in ((1, 33025), (33025, 1)))
    assert float(ProductCodes(*kinds, None)(a, b)) == pytest.approx(33025 * 255**2, rel=1e-7)


def test_operands_of_any_strides() -> None:
    kinds = TYPES[0]
    a, b = codes((2, 6, 3, 8), kinds[0]).transpose(1, 2), codes((2, 5, 3, 8), kinds[1])
    b = b.permute(0, 2, 3, 1)
    found = ProductCodes(*kinds, None)(a, b)
    assert torch.allclose(found.double(), exact(a, b, kinds), rtol=3e-7, atol=1e-9)
