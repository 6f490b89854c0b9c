"""Kernels that add products in pairs of 16 bits: what keeps the promise is exact, what does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends import x86_pairs
from fxquant.backends.x86 import X86
from fxquant.backends.x86_conv_plan import Geometry
from fxquant.backends.x86_layers import PostOp, X86Conv, X86Linear
from fxquant.backends.x86_matmul import ProductCodes
from fxquant.backends.x86_pairs import integer_product, layers_saturate, products_saturate
from fxquant.backends.x86_pointwise import X86Pointwise
from fxquant.backends.x86_transposed import TransposedGeometry, X86ConvTranspose
from fxquant.numerics.integer import pair_saturates
from tests.backends.oracles import int8, uint8

Kernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From weight codes ``[outputs, inputs]`` and input codes ``[rows, inputs]`` to sums and truth."""

INPUTS: Final = 32
KEPT: Final = {
    "two of the largest": (64, 64),
    "one large, one small": (127, 1),
    "unequal": (100, 28),
    "negative": (-64, -64),
    "large and negative": (-127, -1),
    "both signs": (127, -127),
}
PAST: Final = {
    "positive": (65, 64),
    "large": (127, 127),
    "unequal": (127, 2),
    "negative": (-65, -64),
}


def _conv(rank: int, kernel: int, groups: int) -> Kernel:
    def run(weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        count = weight.shape[0]
        filters = weight.view(count, -1, *(1,) * rank).expand(-1, -1, *(kernel,) * rank)
        filters = filters.repeat(groups, *(1,) * (rank + 1)).contiguous()
        pixels = codes.repeat(1, groups).view(len(codes), -1, *(1,) * rank)
        pixels = pixels.expand(-1, -1, *(5,) * rank).contiguous()
        walk = Geometry((1,) * rank, (kernel // 2,) * rank, (1,) * rank, groups)
        scale = torch.ones(len(filters))
        layer = X86Conv(filters, scale, None, uint8(1.0, 0), None, PostOp(), walk, None)
        conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        real = conv(pixels.double(), filters.double(), None, 1, kernel // 2, 1, groups)
        return layer(pixels), real

    return run


def _transposed(weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    filters = weight.t()[..., None, None].expand(-1, -1, 3, 3).contiguous()
    pixels = codes[..., None, None].expand(-1, -1, 4, 4).contiguous()
    walk = TransposedGeometry((2, 2), (1, 1), (1, 1), (1, 1), 1)
    scale = torch.ones(filters.shape[1])
    layer = X86ConvTranspose(filters, scale, None, uint8(1.0, 0), None, PostOp(), walk)
    return layer(pixels), F.conv_transpose2d(pixels.double(), filters.double(), None, 2, 1, 1)


def _linear(weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.ones(len(weight))
    layer = X86Linear(weight, scale, None, uint8(1.0, 0), None, PostOp())
    return layer(codes), codes.double() @ weight.double().t()


def _signed_linear(weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels move int8 inputs up to uint8 by themselves, and take that out of the sum again."""
    scale = torch.ones(len(weight))
    signed = (codes.int() - 128).to(torch.int8)
    layer = X86Linear(weight, scale, None, int8(1.0, 0), None, PostOp())
    return layer(signed), signed.double() @ weight.double().t()


def _pointwise(weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.ones(len(weight))
    filters = weight[..., None, None]
    layer = X86Pointwise(filters, scale, None, uint8(1.0, 0), None, PostOp())
    pixels = codes[..., None, None].expand(-1, -1, 3, 3).contiguous()
    return layer(pixels), F.conv2d(pixels.double(), filters.double())


KERNELS: Final[dict[str, Kernel]] = {
    **{f"conv{rank}d": _conv(rank, 3, 1) for rank in (1, 2, 3)},
    **{f"conv{rank}d of one pixel": _conv(rank, 1, 1) for rank in (1, 2, 3)},
    **{f"conv{rank}d in groups": _conv(rank, 3, 2) for rank in (1, 2, 3)},
    "conv_transpose2d": _transposed,
    "pointwise": _pointwise,
    "linear": _linear,
    "linear of int8": _signed_linear,
}


def _rows(pair: tuple[int, int]) -> Tensor:
    """Every place that two weights can have among the inputs, next to each other and not."""
    weight = torch.zeros(4 * (INPUTS - 1), INPUTS, dtype=torch.int8)
    for row in range(len(weight)):
        first, apart = row % (INPUTS - 1), 1 + row // (INPUTS - 1)
        weight[row, first], weight[row, (first + apart) % INPUTS] = pair
    return weight


def _same(found: Tensor, real: Tensor) -> bool:
    # Sums below 2**24 are whole numbers in float32.
    return torch.equal(found.double(), real)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pair", KEPT)
def test_what_keeps_the_promise_is_exact(kernel: str, pair: str) -> None:
    weight = _rows(KEPT[pair])
    assert not bool(pair_saturates(weight).any())
    codes = torch.full((2, INPUTS), 255, dtype=torch.uint8)
    codes[1] = torch.arange(INPUTS) * 37 % 256
    assert _same(*KERNELS[kernel](weight, codes))


@pytest.mark.parametrize("kernel", KERNELS)
def test_many_weights_at_their_bound_are_exact(kernel: str) -> None:
    weight = torch.full((8, INPUTS), 64, dtype=torch.int8)
    weight[1::2] *= -1
    weight[2:4, ::2] *= -1
    codes = torch.full((2, INPUTS), 255, dtype=torch.uint8)
    assert _same(*KERNELS[kernel](weight, codes))


@pytest.mark.parametrize("pair", PAST)
@pytest.mark.parametrize("kernel", KERNELS)
def test_right_past_the_bound_products_are_lost(kernel: str, pair: str) -> None:
    """On a machine whose kernels add pairs; so the bound is not lower than it need be."""
    weight = _rows(PAST[pair])
    assert bool(pair_saturates(weight).all())
    codes = torch.full((2, INPUTS), 255, dtype=torch.uint8)
    assert _same(*KERNELS[kernel](weight, codes)) is not X86().saturates_pairs


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize(("groups", "times"), [(1, 1), (1, 16), (16, 1), (19, 1), (8, 2)])
@pytest.mark.parametrize("step", (1, 2))
def test_sums_over_one_input_channel_have_no_pairs(
    rank: int, groups: int, times: int, step: int
) -> None:
    weight = torch.full((groups * times, 1, *(3,) * rank), 127, dtype=torch.int8)
    weight[::2] *= -1
    pixels = torch.full((1, groups, *(7,) * rank), 255, dtype=torch.uint8)
    walk = Geometry((step,) * rank, (1,) * rank, (1,) * rank, groups)
    scale = torch.ones(len(weight))
    layer = X86Conv(weight, scale, None, uint8(1.0, 0), None, PostOp(), walk, None)
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    assert _same(layer(pixels), conv(pixels.double(), weight.double(), None, step, 1, 1, groups))


def test_transposed_sums_over_one_input_channel_have_no_pairs() -> None:
    weight = torch.full((16, 1, 4, 4), 127, dtype=torch.int8)
    pixels = torch.full((1, 16, 5, 5), 255, dtype=torch.uint8)
    walk = TransposedGeometry((2, 2), (1, 1), (0, 0), (1, 1), 16)
    layer = X86ConvTranspose(weight, torch.ones(1), None, uint8(1.0, 0), None, PostOp(), walk)
    real = F.conv_transpose2d(pixels.double(), weight.double(), None, 2, 1, 0, 16)
    assert _same(layer(pixels), real)


def test_products_are_exact_where_they_are_lowered() -> None:
    a, b = (torch.full((8, 8), 255, dtype=torch.uint8) for _ in range(2))
    found = ProductCodes(uint8(1.0, 0), uint8(1.0, 0), None)(a, b)
    assert bool((found == 255 * 255 * 8).all()) is not products_saturate()


CAPPED: Final = """
import warnings

import torch
from torch import nn
from fxquant.backends import x86_pairs
from fxquant.backends.x86 import X86
from fxquant.errors import SpeedWarning
from fxquant.numerics.integer import pair_saturates
from tests.backends.lockstep import check_ops

warnings.simplefilter("ignore", SpeedWarning)
assert X86().saturates_pairs
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(),
    nn.Conv2d(16, 32, 1), nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.ReLU(),
    nn.ConvTranspose2d(32, 16, 2, stride=2),
    nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
).eval()
with torch.no_grad():
    for layer in model:
        if hasattr(layer, "weight"):
            layer.weight.abs_()  # sums of pairs of one sign: what saturates first
checked = check_ops(model, *(torch.rand(4, 3, 12, 12) for _ in range(3)))
kernels = {"X86Stem", "X86Conv", "X86Pointwise", "X86ConvTranspose", "X86Linear"}
assert kernels <= set(checked.kernels), checked.kernels
for path in ("0", "4", "6", "11"):
    assert not pair_saturates(checked.lowered.get_submodule(path).weight).any(), path
assert not pair_saturates(checked.lowered.get_submodule("8").weight, axis=1).any()
assert int(checked.lowered.get_submodule("2").weight.abs().amax()) == 127
"""


def test_a_machine_without_vnni_gets_weights_that_it_can_multiply() -> None:
    """oneDNN is held to AVX2 from outside, so that every x86 machine can play such a one."""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CAPPED],
        cwd=root, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_answer_does_not_change() -> None:
    assert layers_saturate() is layers_saturate() is X86().saturates_pairs


def test_a_torch_whose_product_takes_signed_codes_only_multiplies_exactly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product, seen = torch._int_mm, []

    def signed_only(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        if a.dtype != torch.int8:
            raise RuntimeError("int_mm_out_cpu: Expected self dtype to be of type int8")
        seen.append(a)
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "_int_mm", signed_only)
    monkeypatch.setattr(x86_pairs, "TAKES_UNSIGNED", False)
    products_saturate.cache_clear()
    torch.manual_seed(0)
    b = torch.randint(-128, 128, (70, 5), dtype=torch.int8)
    for low, dtype in ((0, torch.uint8), (-128, torch.int8)):
        a = torch.randint(low, low + 256, (9, 70)).to(dtype)
        a[0], a[1] = low, low + 255
        exact = (a.long() @ b.long()).to(torch.int32)
        assert torch.equal(integer_product(a, b), exact)
        out = torch.empty(9, 5, dtype=torch.int32)
        assert torch.equal(integer_product(a, b, out), exact)
        assert torch.equal(out, exact)
    assert len(seen) == 4
    assert products_saturate() in (True, False)
    products_saturate.cache_clear()
