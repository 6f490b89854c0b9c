"""The kernels of dynamic linears on a GPU: what their source computes, and what is done with it.

Where these tests run there is no GPU. The source is C++ that a compiler for processors takes too,
with four functions of CUDA's written out; with a GPU it is compiled there as well.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.backends import cuda_rows
from fxquant.backends.cuda import CudaDynamicLinear
from fxquant.backends.cuda_rows import kernels_fail, signed_rows
from fxquant.errors import SpeedWarning
from fxquant.numerics.dynamic import byte_rows
from fxquant.spec import ROWS, Dtype, Granularity, QSpec

COMPILER = shutil.which("g++") or shutil.which("clang++")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HOST = pytest.mark.skipif(COMPILER is None, reason="needs a compiler of C++")
KINDS: tuple[tuple[Dtype, int], ...] = (("uint8", 8), ("int8", 8), ("uint8", 5))
SHARED: tuple[Granularity, ...] = ("row", "tensor")
SPECS = [
    QSpec(dtype, bits=bits, symmetric=symmetric, granularity=each, observer="runtime")
    for dtype, bits in KINDS
    for symmetric in (False, True)
    for each in SHARED
]
HEAD = """
#include <cmath>
#include <cstring>
static int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
static float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
"""


@functools.cache
def on_the_processor(code: str, outputs: int = 1) -> Callable[..., Any]:
    """As torch.cuda.jiterator: the function is called for each element of what is broadcast."""
    found = re.search(r"(\w+)\(([^)]*)\) {", code)
    assert found is not None
    name, parameters = found[1], found[2].split(",")
    reads = [f"given[{i}][n]" for i in range(sum("&" not in each for each in parameters))]
    writes = [f"made[{i}][n]" for i in range(outputs)]
    call = f"{name}<float>({', '.join(reads + writes * (outputs > 1))});"
    line = call if outputs > 1 else f"{writes[0]} = {call}"
    loop = f"for (long n = 0; n < count; ++n) {line}"
    source = (
        f'{HEAD}{code}\nextern "C" void run(float** given, float** made, long count) {{ {loop} }}'
    )
    with tempfile.TemporaryDirectory() as home:
        file, built = Path(home, "kernel.cpp"), Path(home, "kernel.so")
        file.write_text(source)
        options = ["-O1", "-ffp-contract=off", "-shared", "-fPIC"]
        subprocess.run([str(COMPILER), *options, str(file), "-o", str(built)], check=True)
        run = ctypes.CDLL(str(built)).run

    def kernel(*tensors: Tensor) -> Any:
        assert len(tensors) == len(reads)
        given = [t.contiguous() for t in torch.broadcast_tensors(*(t.float() for t in tensors))]
        made = [torch.empty_like(given[0]) for _ in range(outputs)]
        pointers = [
            (ctypes.c_void_p * len(ts))(*(t.data_ptr() for t in ts)) for ts in (given, made)
        ]
        run(*pointers, ctypes.c_long(given[0].numel()))
        return tuple(made) if outputs > 1 else made[0]

    return kernel


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels run on the processor."""
    monkeypatch.setattr(cuda_rows, "_compiled", on_the_processor)
    kernels_fail.cache_clear()
    yield
    kernels_fail.cache_clear()


def values(spec: QSpec) -> Tensor:
    """Rows of every kind: zeros, of one sign, ties, tiny and huge ones, what is no number."""
    torch.manual_seed(0)
    rows = [torch.randn(16) * 10.0**power for power in (-44, -38, -3, 0, 4, 37)]
    rows += [torch.zeros(16), torch.rand(16) + 1, -torch.rand(16) - 1, torch.arange(16) / 2 - 3.5]
    rows += [torch.linspace(0, 255, 16) + 0.5, torch.full((16,), -7.25), -torch.zeros(16)]
    rows += [torch.randn(16) * torch.rand(1) for _ in range(200)]
    if spec.granularity == "row":
        for value in (float("nan"), float("inf"), -float("inf")):
            rows.append(torch.randn(16).index_fill_(0, torch.tensor([5]), value))
    return torch.stack(rows)


@HOST
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_are_quantized_as_everywhere(spec: QSpec, host: None) -> None:
    x = values(spec)
    wanted, scale, zero_point = byte_rows(x, spec)
    codes, found_scale, found_zero = signed_rows(x, spec)
    assert torch.equal(found_scale.nan_to_num(7.0), scale.nan_to_num(7.0))
    assert torch.equal(found_zero, zero_point - 128)
    rows = scale.isfinite().flatten() if spec.granularity == "row" else slice(None)
    assert codes.dtype == torch.int8
    assert torch.equal(codes[rows], (wanted ^ 128).view(torch.int8)[rows])


@HOST
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (17, 64, 24), (20, 9, 1), (40, 2048, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_linears_give_the_same_bits(
    spec: QSpec, shape: tuple[int, int, int], bias: bool, host: None
) -> None:
    """At sizes that the product takes, and at those that are filled up for it."""
    rows, inputs, outputs = shape
    torch.manual_seed(inputs)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    held = torch.randn(outputs) if bias else None
    layer = CudaDynamicLinear(weight, torch.rand(outputs) + 0.01, held, spec)
    x = torch.randn(rows, inputs)
    x[0] = 0.0
    assert torch.equal(layer._fused(x), layer._plain(x))
    assert torch.equal(layer._fused(x.bfloat16()), layer._plain(x.bfloat16()))


@HOST
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_device_is_asked_before_it_is_trusted(
    spec: QSpec, host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = torch.device("cpu")
    assert kernels_fail(here, spec) is None

    def other(old: str, new: str) -> str | None:
        """What is found where the source is another."""
        kernels_fail.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(
                cuda_rows,
                "_compiled",
                lambda code, outputs=1: on_the_processor(code.replace(old, new), outputs),
            )
            with pytest.warns(SpeedWarning, match="give other numbers"):
                return kernels_fail(here, spec)

    for old, new in (
        ("* T(0)", "* T(0) + T(1e-3)"),  # the scale
        ("+ int(zero)", "+ int(zero) + 1"),  # the codes
        ("8 * i", "24 - 8 * i"),  # their order
        # Zero points in sums; symmetric codes of 8 bits have none.
        *([] if spec.symmetric and spec.bits == 8 else [("- int(zero)", "+ int(zero)")]),
        ("weight);", "weight) * T(2);"),  # without a bias
        ("weight), bias", "weight), -bias"),
    ):
        assert other(old, new) == (
            "kernels of torch.cuda.jiterator give other numbers than eager torch"
        ), old


def test_where_kernels_cannot_be_compiled_eager_torch_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(code: str, outputs: int = 1) -> Callable[..., Any]:
        def kernel(*_: Tensor) -> Tensor:
            raise RuntimeError("nvrtc: error: failed to open libnvrtc-builtins.so\nmore")

        return kernel

    monkeypatch.setattr(cuda_rows, "_compiled", refuse)
    kernels_fail.cache_clear()
    with pytest.warns(SpeedWarning, match="eager torch on this GPU"):
        found = kernels_fail(torch.device("cpu"), ROWS)
    assert found == (
        "kernels of torch.cuda.jiterator fail: nvrtc: error: failed to open libnvrtc-builtins.so"
    )
    kernels_fail.cache_clear()


@GPU
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_on_a_gpu_results_are_those_of_the_processor(spec: QSpec) -> None:
    assert kernels_fail(torch.device("cuda", torch.cuda.current_device()), spec) is None
    torch.manual_seed(0)
    for rows, inputs, outputs in ((1, 8, 8), (3, 5, 7), (17, 64, 24), (20, 9, 1), (40, 2048, 16)):
        weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        layer = CudaDynamicLinear(weight, torch.rand(outputs), torch.randn(outputs), spec)
        x = torch.randn(rows, inputs)
        wanted = layer(x)
        layer.cuda()
        assert layer._fuses(x.cuda())
        assert torch.equal(layer(x.cuda()).cpu(), wanted)
        assert torch.equal(layer._plain(x.cuda()).cpu(), wanted)
        assert torch.equal(layer(x.cuda().t().contiguous().t()).cpu(), wanted)
        halves = layer(x.cuda().half())
        assert torch.equal(halves, layer(x.cuda().half().float()))
    x = values(spec)
    wanted, scale, zero_point = byte_rows(x, spec)
    codes, found_scale, found_zero = signed_rows(x.cuda(), spec)
    assert torch.equal(found_scale.cpu().nan_to_num(7.0), scale.nan_to_num(7.0))
    assert torch.equal(found_zero.cpu(), zero_point - 128)
    known = scale.isfinite().flatten() if spec.granularity == "row" else slice(None)
    assert torch.equal(codes.cpu()[known], (wanted ^ 128).view(torch.int8)[known])
