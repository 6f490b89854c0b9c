"""Kernels of stored weights against float64, and against the reference; when they are taken."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant import QConfig, QSpec
from fxquant.backends import x86_weight_only
from fxquant.backends.x86 import X86
from fxquant.backends.x86_weight_only import (
    FEW_ROWS,
    StoredInt4Linear,
    StoredLinear,
    int4_block,
)
from fxquant.numerics.stored import dequantize_stored
from fxquant.report.checks import size_in_bytes

pytestmark = pytest.mark.skipif(X86().missing() is not None, reason=str(X86().missing()))

EPS = 2.0**-9
"""What rounding to bfloat16 is off by, of the number that is rounded."""


def four(group: int, *, symmetric: bool = True, bits: int = 4) -> QConfig:
    granularity: Any = "group" if group else "channel"
    kind: Any = "int8" if symmetric else "uint8"
    spec = QSpec(kind, bits, symmetric, granularity, "minmax", group)
    return QConfig(activation=None, weight=spec)


CONFIGS = {
    "int8": QConfig(activation=None),
    "groups of 32": four(32),
    "groups of 64": four(64),
    "groups of 128": four(128),
    "uneven groups": four(32, symmetric=False),
    "channels of 4 bits": four(0),
    "3 bits": four(32, bits=3),
}


def layer(name: str, outputs: int = 48, inputs: int = 128, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias)).eval()
    return fxquant.quantize(model, mode="weight_only", qconfig=CONFIGS[name], backend="x86")


def stored(q: nn.Module) -> StoredLinear | StoredInt4Linear:
    return next(m for m in q.modules() if isinstance(m, StoredLinear | StoredInt4Linear))


def weight_of(held: StoredLinear | StoredInt4Linear) -> tuple[Tensor, Tensor]:
    """The real weight, and the steps between its codes, in float64."""
    size, width, packed = held.layout
    codes, scale = held.get_buffer("weight"), held.get_buffer("weight_scale")
    zeros = held._buffers["weight_zero_point"]
    shape = (len(codes), width)
    real = dequantize_stored(codes, scale, zeros, size, shape, packed)
    steps = scale.double().repeat_interleave(size, 1)[:, :width].expand(shape)
    return real.double(), steps


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(128,), (1, 128), (FEW_ROWS, 128), (FEW_ROWS + 1, 128), (2, 30, 128)]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_within_the_roundings_to_bfloat16(name: str, shape: tuple[int, ...], bias: bool) -> None:
    q = layer(name, bias=bias)
    held = stored(q)
    assert isinstance(held, StoredLinear if name == "int8" else StoredInt4Linear)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight, steps = weight_of(held)
    offset = held._buffers["bias"]
    wanted = F.linear(x.double(), weight, None if offset is None else offset.double())
    found = q(x)
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    # Rows are rounded, sums are; of groups the scales are, and 8 steps or fewer that are added.
    sizes = weight.abs() * (1 if name == "int8" else 2) + (0 if name == "int8" else 8) * steps
    limit = F.linear(x.double().abs(), sizes) * EPS + wanted.abs() * EPS
    offset_size = 0 if offset is None else offset.abs() * EPS
    assert bool(((found - wanted).abs() <= 1.02 * limit + offset_size + 1e-6).all())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_is_forty_five_decibels_away(name: str) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 256), torch.randn(64, 256)
    nn.init.normal_(linear.weight)
    model = nn.Sequential(linear).eval()
    made, truth = (
        fxquant.quantize(model, mode="weight_only", qconfig=CONFIGS[name], backend=b)(x)
        for b in ("x86", "reference")
    )
    noise = (made - truth).double().square().sum()
    assert 10 * math.log10(truth.double().square().sum() / noise) > 45
    # Few rows take another kernel.
    few = fxquant.quantize(model, mode="weight_only", qconfig=CONFIGS[name], backend="x86")(x[:3])
    noise = (few - truth[:3]).double().square().sum()
    assert 10 * math.log10(truth[:3].double().square().sum() / noise) > 45


@pytest.mark.parametrize("name", ["groups of 32", "uneven groups"])
def test_rows_of_four_bits_are_the_same_alone_and_in_any_batch(name: str) -> None:
    q, x = layer(name), torch.randn(67, 128, generator=torch.Generator().manual_seed(1))
    together = q(x)
    for place in (0, 1, 31, 66):
        assert torch.equal(q(x[place : place + 1])[0], together[place])
    assert torch.equal(q(x.flip(0)), together.flip(0))


@pytest.mark.parametrize("name", ["int8", "groups of 32", "uneven groups"])
def test_copies_loaded_weights_and_other_inputs(name: str) -> None:
    q, x = layer(name), torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    wanted = q(x)
    for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(twin(x), wanted)
        empty = {k: torch.zeros_like(v) for k, v in q.state_dict().items()}
        twin.load_state_dict(empty)
        assert not torch.equal(twin(x), wanted)
        twin.load_state_dict(q.state_dict())
        assert torch.equal(twin(x), wanted)
    assert torch.equal(q(x.t().contiguous().t()), wanted)
    assert q(x[:0]).shape == (0, 48)
    half = q(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), q(x.bfloat16().float()), rtol=2.0**-7, atol=1e-6)
    assert q(x.double()).dtype == torch.float64 if name != "int8" else True
    x[2, 3] = math.inf
    assert q(x)[[0, 1, 3, 4]].isfinite().all() and not q(x)[2].isfinite().all()


def test_a_table_that_is_a_layer_too_is_stored_once() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(48, 64), nn.Linear(64, 48, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            made: Tensor = self.head(self.table(ids))
            return made

    q = fxquant.quantize(Words().eval(), mode="weight_only", qconfig="weight-only-int4")
    assert isinstance(q.get_submodule("head"), StoredInt4Linear)
    for made in (q, copy.deepcopy(q)):
        state = made.state_dict()
        assert state["head.weight"].data_ptr() == state["table.weight"].data_ptr()


@pytest.mark.parametrize("outputs", [16, 48, 64, 80, 144])
def test_codes_of_four_bits_are_kept_once(outputs: int) -> None:
    q = layer("groups of 32", outputs, 96)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, outputs)).eval()
    truth = fxquant.quantize(
        model, mode="weight_only", qconfig=CONFIGS["groups of 32"], backend="reference"
    )
    held = stored(q)
    assert int4_block() in (32, 64)
    assert held._buffers["weight"] is None
    states = q.state_dict(), truth.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert size_in_bytes(q) == size_in_bytes(truth)
    # Where the layout is not known, codes are kept as they come too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(x86_weight_only, "int4_block", lambda: None)
        other = layer("groups of 32", outputs, 96)
        assert stored(other)._buffers["weight"] is not None
        x = torch.randn(3, 96)
        assert torch.equal(copy.deepcopy(other)(x), q(x))


@pytest.mark.parametrize(
    ("outputs", "inputs", "why"), [(50, 128, "multiples of 16"), (48, 100, "whole groups")]
)
def test_what_the_kernel_does_not_take_runs_as_the_reference(
    outputs: int, inputs: int, why: str
) -> None:
    q = layer("groups of 32", outputs, inputs)
    assert not any(isinstance(m, StoredInt4Linear) for m in q.modules())
    assert any(why in reason for _, _, reason in fxquant.history(q).near("x86-weight-only-int4"))
    x = torch.randn(3, inputs)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs)).eval()
    truth = fxquant.quantize(
        model, mode="weight_only", qconfig=CONFIGS["groups of 32"], backend="reference"
    )
    assert torch.equal(q(x), truth(x))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rows", [3, FEW_ROWS + 1])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_of_codes_do_not_pass_what_float16_holds(
    native: bool, rows: int, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(x86_weight_only, "_multiplies_bfloat16", lambda _: native)
    torch.manual_seed(0)
    # 4096 codes of 60 and more, each times 20: far more than 65504.
    layer = nn.Linear(4096, 32)
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.0).mul_(0.01)
    made = fxquant.quantize(model.eval(), mode="weight_only", backend="x86")
    stored = next(module for module in made.modules() if isinstance(module, StoredLinear))
    x = torch.full((rows, 4096), 20.0, dtype=torch.float32 if autocast else torch.float16)
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        found = stored(x)
    assert found.dtype == x.dtype
    # Eight bits of weights, and of rows.
    torch.testing.assert_close(found.float(), model(x.float()), rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_compile_as_one_graph(name: str, rows: int) -> None:
    """What the processor has was asked beforehand: a compiler does not look into the probes."""
    q, x = layer(name), torch.randn(rows, 128)
    compiled = torch.compile(q, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), q(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), q(x))
