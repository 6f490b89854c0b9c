"""Data nobody hopes for: constants, zeros, tiny and huge values, NaN in use, empty batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.x86_stem import X86Stem
from fxquant.errors import CalibrationError, FxQuantError
from fxquant.graph.info import QType, info
from tests.end_to_end.models import images, residual

BACKENDS = ("x86", "reference")
TINY = torch.finfo(torch.float32).tiny


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def types(model: Any) -> list[QType]:
    """The types of all codes, the input's first, which a first layer may make by itself."""
    stems = [m.reads for m in model.modules() if isinstance(m, X86Stem)]
    return stems + [w for n in model.graph.nodes if (w := info(n).writes) is not None]


X = images()[0]
ODD_DATA: dict[str, Tensor] = {
    "all zero": torch.zeros_like(X),
    "constant": torch.full_like(X, 3.7),
    "negative constant": torch.full_like(X, -0.2),
    "one value": torch.where(X == X.max(), 5.0, 0.0),
    "far from zero": 100 + torch.rand_like(X),
    "huge": X * 1e30,
    "tiny": X * 1e-30,
    "subnormal": X * 1e-42,
    "one outlier": torch.where(X == X.max(), 1e6, X),
    "one pixel": X[:, :, :1, :1],
    "one sample": X[:1],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::fxquant.errors.CalibrationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ODD_DATA)
def test_odd_data_gives_valid_types_and_finite_results(kind: str, backend: str) -> None:
    data = ODD_DATA[kind]
    q = fxquant.quantize(small(), [data], backend=backend)
    for qtype in types(q):
        assert TINY <= qtype.scale < float("inf")
        assert qtype.quant_min <= qtype.zero_point <= qtype.quant_max
        assert qtype.low <= 0 <= qtype.high
    wanted, found = run(small(), data), run(q, data)
    assert torch.isfinite(found).all()
    if kind not in ("subnormal", "far from zero", "one outlier"):
        # Within what 8 bits over the range can do; the odd three waste most of their codes.
        assert float((found - wanted).abs().max()) <= 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_and_huge_channels(backend: str) -> None:
    model = small()
    with torch.no_grad():
        model.get_parameter("0.weight")[0] = 0.0
        model.get_parameter("0.bias")[0] = 0.0
        model.get_parameter("0.weight")[1] *= 1e-20
        model.get_parameter("0.weight")[2] *= 1e4
    found, wanted = run(fxquant.quantize(model, [X], backend=backend), X), run(model, X)
    assert torch.isfinite(found).all()
    assert float((found - wanted).abs().max()) <= 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_past_the_range_saturate(backend: str) -> None:
    q = fxquant.quantize(small(), images(), backend=backend)
    largest = types(q)[0].high
    for value in (3e9, 1e38, float("inf")):
        for sign in (1.0, -1.0):
            end = types(q)[0].low if sign < 0 else largest
            far, edge = torch.full_like(X, sign * value), torch.full_like(X, end)
            assert torch.equal(run(q, far), run(q, edge))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_use_harms_no_other_sample(backend: str) -> None:
    """NaN has no code: it becomes some number, never a crash, and stays in its own sample."""
    q = fxquant.quantize(small(), images(), backend=backend)
    x = X.clone()
    x[1] = float("nan")
    found, wanted = run(q, x), run(q, X)
    assert torch.isfinite(found).all()
    keep = [0, 2, 3]
    torch.testing.assert_close(found[keep], wanted[keep], rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_inputs(backend: str) -> None:
    q = fxquant.quantize(residual(), images(), backend=backend)
    assert run(q, X[:0]).shape == (0, 5)
    assert run(q, X[:0]).dtype == torch.float32


def test_empty_batches_in_the_data_are_passed_over() -> None:
    whole = fxquant.quantize(residual(), images(), backend="reference")
    holes = [images()[0], X[:0], *images()[1:]]
    with_holes = fxquant.quantize(residual(), holes, backend="reference")
    assert torch.equal(run(with_holes, X), run(whole, X))
    with pytest.raises(CalibrationError, match="empty"):
        fxquant.quantize(residual(), [X[:0]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_data_of_varying_sizes(backend: str) -> None:
    data = [torch.randn(2, 3, 8, 8), torch.randn(5, 3, 12, 9), torch.randn(1, 3, 33, 7)]
    q = fxquant.quantize(small(), data, backend=backend)
    for x in data:
        assert run(q, x).shape == run(small(), x).shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_inputs_raise_and_do_not_crash(backend: str) -> None:
    q = fxquant.quantize(residual(), images(), backend=backend)
    for x in (torch.randn(4, 5, 12, 12), torch.randn(4, 3), torch.randn(4, 3, 12, 12, 2)):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            run(q, x)


def test_wrong_inputs_never_end_the_process() -> None:
    """In a process of its own: native kernels answer some misuse with a crash."""
    program = """
import torch, warnings
warnings.simplefilter("ignore")
torch.set_num_threads(1)
import fxquant
from tests.end_to_end.models import images, residual
q = fxquant.quantize(residual(), images(), backend="x86")
for shape in ((4, 1, 12, 12), (4, 3, 0, 12), (3,), (0,), (4, 3, 1, 1), (3, 12, 12), (1, 64, 2, 2)):
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64):
        try:
            q(torch.zeros(shape, dtype=dtype))
        except Exception as error:
            assert str(error)
for layer in q.modules():
    if hasattr(layer, "weight_scale"):
        for shape in ((2, 999), (2, 8, 3), (1,), (0, 8), (2, 1, 5, 5)):
            for dtype in (torch.uint8, torch.int8, torch.float32):
                try:
                    layer(torch.zeros(shape, dtype=dtype))
                except Exception as error:
                    assert str(error)
print("alive")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "alive"


def test_a_failing_model_is_reported_with_the_batch() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.conv(x), x.view(4, 4, -1, 1)], 1)

    with pytest.raises(CalibrationError, match="failed on batch 0"):
        fxquant.quantize(Fails().eval(), images())


def test_hostile_names() -> None:
    """Layer names are user text: markup, escapes, statements."""
    model = nn.Sequential()
    for name in ("<img src=x onerror=alert(1)>", "\x1b[31mred", "a b", "import os;"):
        model.add_module(name, nn.Conv2d(3, 3, 1))
    data = images()
    q = fxquant.quantize(model.eval(), data)
    assert run(q, X).shape == X.shape
    text = str(fxquant.report(q)) + str(fxquant.diff(q)) + str(fxquant.history(q))
    assert "\x1b" not in text


def test_errors_of_this_package_say_what_where_and_how() -> None:
    with pytest.raises(FxQuantError) as error:
        fxquant.quantize(residual(), [X, torch.full_like(X, float("nan"))])
    message = str(error.value)
    assert "batch 1" in message and "'x'" in message and "clean the data" in message
