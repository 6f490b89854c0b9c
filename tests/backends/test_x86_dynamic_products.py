"""Products quantized at run time: exact against float64, rows that stand alone, odd operands."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from fxquant.backends import x86_dynamic_products
from fxquant.backends.x86 import X86
from fxquant.backends.x86_dynamic_products import X86DynamicProduct
from fxquant.backends.x86_pairs import products_saturate
from fxquant.numerics.dynamic import qdq_rows, quantize_rows
from fxquant.spec import ROWS, QSpec
from tests.backends.test_x86_matmul import SHAPES

COLUMNS = QSpec("int8", symmetric=True, granularity="row", observer="runtime")
WHOLE = QSpec(observer="runtime")
WHOLE_RIGHT = QSpec("int8", symmetric=True, observer="runtime")
FIVE_BITS = QSpec("int8", bits=5, symmetric=True, granularity="row", observer="runtime")
SPECS = [(ROWS, COLUMNS), (COLUMNS, COLUMNS), (WHOLE, WHOLE_RIGHT), (ROWS, FIVE_BITS)]

pytestmark = [
    pytest.mark.skipif(X86().missing() is not None, reason=str(X86().missing())),
    pytest.mark.skipif(products_saturate(), reason="this processor adds products in pairs"),
]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(a: Tensor, b: Tensor, left: QSpec, right: QSpec) -> Tensor:
    """The product in float64 of the numbers that the codes stand for."""
    codes, scale, zero_point = quantize_rows(a, left)
    real = (codes.double() - zero_point) * scale.double()
    if b.dim() == 1:
        weight, steps, _ = quantize_rows(b, right)
        return torch.matmul(real, weight.double() * steps.double())
    weight, steps, _ = quantize_rows(b.mT, right)
    return torch.matmul(real, (weight.double() * steps.double()).mT)


@pytest.mark.parametrize("specs", SPECS, ids=lambda s: f"{s[0].dtype}-{s[0].granularity}")
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_products_are_exact_to_rounding(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], specs: tuple[QSpec, QSpec]
) -> None:
    a, b = numbers(*shapes[0]) + 0.5, numbers(*shapes[1], seed=1)
    found, wanted = X86DynamicProduct(*specs)(a, b), exact(a, b, *specs)
    assert found.dtype == torch.float32 and found.shape == torch.matmul(a, b).shape
    # The sum is an exact integer; it and two products are rounded to float32.
    assert torch.allclose(found.double(), wanted, rtol=3 * 2.0**-24, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 7, 3), (16, 64, 48), (33, 257, 17)])
def test_a_row_is_the_same_alone_and_in_any_batch(size: tuple[int, int, int]) -> None:
    rows, inner, columns = size
    product = X86DynamicProduct(ROWS, COLUMNS)
    a, b = numbers(2, rows, inner) * 3 + 1, numbers(2, inner, columns, seed=1)
    together = product(a, b)
    for place in (0, rows // 2, rows - 1):
        assert torch.equal(product(a[:, place : place + 1], b)[:, 0], together[:, place])
        assert torch.equal(product(a[1, place], b[1]), together[1, place])
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    assert torch.equal(product(a[:, order], b), together[:, order])
    assert torch.equal(product(a[1:], b[1:]), together[1:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_rows_and_columns_touch_no_other_and_zeros_stay_zero(bad: float) -> None:
    product = X86DynamicProduct(ROWS, COLUMNS)
    a, b = numbers(6, 8), numbers(8, 5, seed=1)
    clean = product(a, b)
    a[1, 3], a[4], b[2, 0], b[:, 3] = bad, 0.0, bad, 0.0
    found = product(a, b)
    assert found[1].isnan().all() and found[:, 0].isnan().all()
    assert not found[4, 1:].any() and not found[[0, 2, 3, 4, 5], 3].any()
    kept = torch.tensor([[0], [2], [3], [5]]), torch.tensor([1, 2, 4])
    assert torch.equal(found[kept], clean[kept])


def test_sums_that_could_pass_32_bits_are_made_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    product, a, b = X86DynamicProduct(ROWS, COLUMNS), numbers(3, 40), numbers(40, 5, seed=1)
    whole = product(a, b)
    monkeypatch.setattr(x86_dynamic_products, "_LONGEST", 39)
    found = product(a, b)
    assert torch.equal(found, torch.matmul(qdq_rows(a, ROWS), qdq_rows(b.mT, COLUMNS).mT))
    # 40 rounded products and their sum: 41 * 2**-24 of sums of at most some tens.
    assert torch.allclose(found, whole, atol=1e-4)
    longest = (2**31 - 1) // (255 * 128)
    # All codes at their ends: 255 and 127.
    ones = torch.ones(1, longest)
    monkeypatch.undo()
    assert float(product(ones, ones.mT)) == pytest.approx(longest, rel=1e-6)


def test_any_strides_dtypes_and_copies() -> None:
    product = X86DynamicProduct(ROWS, COLUMNS)
    a, b = numbers(2, 6, 3, 8).transpose(1, 2), numbers(2, 5, 3, 8, seed=1).permute(0, 2, 3, 1)
    wanted = product(a.contiguous(), b.contiguous())
    assert torch.equal(product(a, b), wanted)
    for twin in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert torch.equal(twin(a, b), wanted)
    with torch.inference_mode():
        assert torch.equal(product(a, b), wanted)
    half = a.bfloat16(), b.bfloat16()
    assert torch.equal(product(*half), product(half[0].float(), half[1].float()))
