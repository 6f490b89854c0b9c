"""Rows become bytes in one pass: the codes of the rule, whatever a row holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fxquant.backends import x86_row_codes
from fxquant.backends.x86 import X86
from fxquant.backends.x86_dynamic import X86DynamicLinear
from fxquant.backends.x86_row_codes import RowCodes
from fxquant.numerics.dynamic import byte_rows, byte_scales
from fxquant.spec import ROWS, QSpec

SYMMETRIC = QSpec("int8", symmetric=True, granularity="row", observer="runtime")
SIGNED = QSpec("int8", granularity="row", observer="runtime")
WHOLE = QSpec("uint8", observer="runtime")
SPECS = (ROWS, SYMMETRIC, SIGNED, WHOLE)

fused = pytest.mark.skipif(
    x86_row_codes.byte_kernel() is None, reason="this torch has no such kernel"
)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def differences(x: Tensor, spec: QSpec) -> Tensor:
    """Codes less those of the rule; scales and zero points must be the same to the last bit."""
    quantize = RowCodes(x.shape[1], spec)
    codes, scale, zero_point = quantize(x)
    wanted, *same = byte_rows(x, spec)
    assert torch.equal(scale.nan_to_num(), same[0].nan_to_num())
    assert torch.equal(zero_point, same[1])
    assert codes.dtype == torch.uint8
    assert codes.shape == (x.shape[0], x.shape[1] + quantize.extra)
    whole = scale.isfinite().expand(x.shape[0], 1).flatten()  # other rows have no codes
    return (codes[:, : x.shape[1]].int() - wanted.int())[whole]


@fused
@pytest.mark.parametrize("spec", SPECS)
def test_codes_are_those_of_the_rule_but_for_ties(spec: QSpec) -> None:
    x = torch.cat([rows(300, 64) + shift for shift in (-9.0, 0.0, 0.3, 50.0)])
    assert RowCodes(64, spec)._kernel is not None
    found = differences(x, spec)
    # Roundings of the ends, of their distance, its inverse and two more: within 2**-12 of a half
    # either side, on 76,800 numbers of which 2**-11 lie there at most.
    assert int(found.abs().max()) <= 1
    assert float((found != 0).float().mean()) < 2**-11


@fused
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-12, 1e-9, 1e-6, 1e-3, 1e30, 1e38])
def test_rows_of_any_size(spec: QSpec, size: float) -> None:
    x = rows(40, 32).clamp(-3, 3) * size
    x[3] = 0.0
    x[5] = rows(1, 32, seed=1)[0].clamp(0, 1) * 3.4e38
    found = differences(x, spec)
    assert int(found.abs().max()) <= 1
    assert float((found != 0).float().mean()) < 0.01  # a few of 1,280 numbers may lie near a half


@fused
@pytest.mark.parametrize("spec", [ROWS, SYMMETRIC, SIGNED])
def test_both_ends_of_a_row_may_round_up(spec: QSpec) -> None:
    x = torch.zeros(3, 64)
    x[:, 0], x[:, 63] = torch.tensor([-127.5, -0.5, -63.5]), torch.tensor([127.5, 254.5, 191.5])
    assert int(differences(x, spec).abs().max()) <= 1


@fused
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_touches_no_other(bad: float) -> None:
    x = rows(6, 32)
    quantize = RowCodes(32, ROWS)
    clean = quantize(x)[0]
    x[2, 7] = bad
    x[4] = 1e-30  # such rows are quantized by themselves
    codes, scale, _ = quantize(x)
    keep = [0, 1, 3, 5]
    assert torch.equal(codes[keep, :32], clean[keep, :32])
    assert scale.flatten().isnan().tolist() == [n == 2 for n in range(6)]


@pytest.mark.parametrize(
    ("width", "spec"), [(33, ROWS), (0, ROWS), (64, QSpec("uint8", 7, False, "row", "runtime"))]
)
def test_the_rule_itself_where_the_kernel_does_not_fit(width: int, spec: QSpec) -> None:
    x = rows(5, width)
    assert RowCodes(width, spec).extra == 0
    assert not differences(x, spec).any()


@pytest.mark.skipif(X86().missing() is not None, reason=str(X86().missing()))
@pytest.mark.parametrize("spec", [*SPECS, QSpec("uint8", 7, False, "row", "runtime")])
def test_with_and_without_the_kernel(spec: QSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-63, 64, (24, 96), generator=torch.Generator().manual_seed(1))
    parts = (codes.to(torch.int8), rows(24).abs() * 0.01, rows(24, seed=2), spec)
    x = rows(50, 96, seed=3) + 0.5
    found = X86DynamicLinear(*parts)(x)
    monkeypatch.setattr(x86_row_codes, "byte_kernel", lambda: None)
    wanted = X86DynamicLinear(*parts)(x)
    # A code of 96 may differ by one, in a row in fifty: 63 of sums of some thousand.
    noise = (found - wanted).double().pow(2).mean()
    assert 10 * math.log10(float(wanted.double().pow(2).mean() / noise.clamp(min=1e-30))) > 60


@pytest.mark.skipif(X86().missing() is not None, reason=str(X86().missing()))
def test_compilers_see_the_rule() -> None:
    codes = torch.randint(-63, 64, (24, 64), generator=torch.Generator().manual_seed(1))
    layer = X86DynamicLinear(codes.to(torch.int8), rows(24).abs(), None, ROWS)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        found, wanted = compiled(rows(4, 64)), layer(rows(4, 64))
    # As above: next to a half a code may differ by one.
    noise = (found - wanted).double().pow(2).mean()
    assert 10 * math.log10(float(wanted.double().pow(2).mean() / noise.clamp(min=1e-30))) > 60
    torch.compiler.reset()


@pytest.mark.parametrize("width", [64, 96, 1024, 1088])
def test_short_rows_are_bare_where_tiles_are_multiplied(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, width)
    monkeypatch.setattr(x86_row_codes, "has_tiles", lambda: False)
    wanted = RowCodes(width, ROWS)
    monkeypatch.setattr(x86_row_codes, "has_tiles", lambda: True)
    found = RowCodes(width, ROWS)
    if x86_row_codes.byte_kernel() is not None:
        assert found.extra == (0 if width in (64, 1024) else wanted.extra)
    for bare, whole in zip(found(x), wanted(x), strict=True):
        assert torch.equal(bare[:, :width], whole[:, :width])
    assert found(x)[0].shape == (5, width + found.extra)
    assert found(x)[0].is_contiguous()


def test_usual_rows_have_the_scales_of_the_rule_bit_for_bit() -> None:
    for seed, shift, size in ((0, 0.0, 1.0), (1, 5.0, 1e-4), (2, -3.0, 1e6), (3, 1.0, 1e-7)):
        x = (rows(500, 64, seed=seed) + shift) * size
        found = x86_row_codes._usual_scales(x)
        assert found is not None
        for made, wanted in zip(found, byte_scales(x, ROWS), strict=True):
            assert torch.equal(made, wanted)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 3e38])
def test_one_row_that_is_not_usual_sends_all_to_the_rule(number: float) -> None:
    x = rows(5, 64)
    assert x86_row_codes._usual_scales(x) is not None
    x[3, 7] = number
    assert x86_row_codes._usual_scales(x) is None
    x[3] = 0.0
    assert x86_row_codes._usual_scales(x) is None, "a row of zeros has the smallest scale"
