"""The CUDA backend on a processor: its modules call what runs on both; where it is chosen."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxquant
from fxquant.backends.cuda import Cuda, CudaDynamicLinear, product_fails
from fxquant.backends.x86_weight_only import StoredLinear
from fxquant.errors import ConfigError
from fxquant.numerics.dynamic import quantize_rows
from fxquant.spec import PRESETS, ROWS, QSpec

SYMMETRIC = PRESETS["dynamic-symmetric"].activation
SPECS = [ROWS, SYMMETRIC, QSpec(granularity="tensor", observer="runtime")]


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    """What the product does on a device is asked once, and some tests replace it."""
    product_fails.cache_clear()
    yield
    product_fails.cache_clear()


def _layer(outputs: int, inputs: int, spec: QSpec | None, bias: bool = True) -> CudaDynamicLinear:
    assert spec is not None
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    held = torch.randn(outputs) if bias else None
    return CudaDynamicLinear(weight, torch.rand(outputs) + 0.01, held, spec)


def _exact(layer: CudaDynamicLinear, x: Tensor) -> Tensor:
    """In float64, from the real numbers that the codes stand for."""
    codes, scale, zero_point = quantize_rows(x, layer.spec)
    real = (codes.double() - zero_point) * scale.double()
    weight = layer.weight.double() * layer.weight_scale.double()[:, None]
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(real, weight, bias)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(SPECS),
    st.lists(st.integers(0, 20), max_size=2),
    st.integers(1, 40),
    st.integers(1, 33),
    st.booleans(),
)
def test_products_are_exact_at_every_size(
    spec: QSpec, batch: list[int], inputs: int, outputs: int, bias: bool
) -> None:
    """Sizes that the kernel takes on a GPU, and those that have to be filled up for it."""
    torch.manual_seed(inputs + 100 * outputs)
    layer, x = _layer(outputs, inputs, spec, bias), torch.randn(*batch, inputs)
    made, exact = layer(x), _exact(layer, x)
    assert made.shape == exact.shape
    # One rounding each of the sum, of two products and of the bias' sum: 4 * 2**-24, of numbers
    # that the bias may cancel in part. Where the integer sum is 0, what float64 makes of it is not.
    limit = 2.0**-22 * (exact.abs() + (0 if layer.bias is None else 2 * layer.bias.abs())) + 1e-12
    assert bool(((made - exact).abs() <= limit).all())


@pytest.mark.parametrize(
    "shape",
    [
        *((1, 8, 8), (3, 5, 7), (16, 64, 8), (17, 64, 24), (40, 9, 16)),
        *((0, 8, 8), (20, 0, 3), (20, 8, 0)),
    ],
)
def test_the_kernel_is_given_what_it_takes_on_a_gpu(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, inputs, outputs = shape
    product, seen, strides = torch._int_mm, [], []

    def int_mm(codes: Tensor, weight: Tensor) -> Tensor:
        strides.append((codes.stride(), weight.stride()))
        seen.append((tuple(codes.shape), tuple(weight.shape), codes.dtype, weight.dtype))
        return product(codes, weight)

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    layer = _layer(outputs, inputs, ROWS)
    layer(torch.randn(rows, inputs))
    (m, k), (k2, n), *dtypes = seen[0]
    assert m > 16
    assert k == k2
    assert k % 8 == 0 and k > 0
    assert n % 8 == 0 and n > 0
    assert dtypes == [torch.int8, torch.int8]
    # Rows one after the other, the weight the transposed of one that lies so.
    assert strides == [((k, 1), (1, k))]


def test_inputs_of_any_strides_lie_right_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _layer(8, 16, ROWS), torch.randn(16, 20)
    wanted = layer(x.t().contiguous())
    product = torch._int_mm

    def strict(codes: Tensor, weight: Tensor) -> Tensor:
        assert codes.is_contiguous() and weight.t().is_contiguous()
        return product(codes, weight)

    monkeypatch.setattr(torch, "_int_mm", strict)
    assert torch.equal(layer(x.t()), wanted)
    wide = torch.randn(20, 32)
    assert torch.equal(layer(wide[:, ::2]), layer(wide[:, ::2].clone()))


def test_a_device_without_the_product_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul\n")

    def wrong(codes: Tensor, weight: Tensor) -> Tensor:
        return torch.zeros(len(codes), weight.shape[1], dtype=torch.int32)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.manual_seed(0)
    model, ids = Net().eval(), torch.randint(0, 11, (3, 4))
    truth = fxquant.quantize(model, mode="dynamic", backend="reference", example_inputs=ids)(ids)
    for product, why in ((refuse, "CUBLAS_STATUS_NOT_SUPPORTED"), (wrong, "is wrong on cpu")):
        product_fails.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_int_mm", product)
            made = fxquant.quantize(model, mode="dynamic", backend="cuda", example_inputs=ids)
            assert torch.equal(made(ids), truth)
        assert why in str(product_fails(torch.device("cpu")))
        assert any(why in reason for _, _, reason in fxquant.history(made).near())
    product_fails.cache_clear()
    assert product_fails(torch.device("cpu")) is None


def test_rows_do_not_depend_on_each_other_and_zeros_stay_zero() -> None:
    torch.manual_seed(0)
    layer, x = _layer(12, 24, ROWS, bias=False), torch.randn(30, 24)
    x[3] = 0.0
    x[5, 2], x[7, 1] = float("nan"), float("inf")
    made = layer(x)
    assert not made[3].any()
    assert bool(made[[5, 7]].isnan().all())
    assert not made[[0, 1, 2, 4, 6]].isnan().any()
    assert torch.equal(layer(x[10:11]), made[10:11])
    assert torch.equal(layer(x.bfloat16())[0], layer(x.bfloat16().float())[0])


def test_copies_and_loaded_weights_compute_the_same() -> None:
    torch.manual_seed(0)
    layer, other, x = _layer(8, 16, ROWS), _layer(8, 16, ROWS), torch.randn(5, 16)
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


class Net(nn.Module):
    """Linears that share what they read, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(11, 20), nn.Linear(20, 28)
        self.second, self.last = nn.Linear(20, 28, bias=False), nn.Linear(28, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        made: Tensor = self.last(torch.tanh(self.first(x)) * self.second(x))
        return made


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_whole_models_do_as_the_reference(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.manual_seed(0)
    model, ids = Net().eval(), torch.randint(0, 11, (3, 4))
    made, truth = (
        fxquant.quantize(model, mode=mode, backend=name, example_inputs=ids)  # type: ignore[arg-type]  # a Mode
        for name in ("cuda", "reference")
    )
    torch.testing.assert_close(made(ids), truth(ids), rtol=1e-5, atol=1e-5)
    kind = CudaDynamicLinear if mode == "dynamic" else StoredLinear
    assert sum(isinstance(module, kind) for module in made.modules()) == 3
    assert "cuda" in fxquant.report(made).summary


def test_it_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert Cuda().missing() == "this torch is built without CUDA"
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert Cuda().missing() == "torch finds no CUDA device"
    named = {each.name: each for each in fxquant.backends()}
    assert not named["cuda"].available
    with pytest.raises(ConfigError, match="no CUDA device"):
        fxquant.quantize(Net().eval(), mode="dynamic", backend="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Cuda().missing() is None
    monkeypatch.delattr(torch, "_int_mm")
    assert "torch._int_mm" in str(Cuda().missing())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_on_a_gpu(mode: str) -> None:
    torch.manual_seed(0)
    model, ids = Net().eval().cuda(), torch.randint(0, 11, (3, 4), device="cuda")
    made = fxquant.quantize(model, mode=mode, example_inputs=ids)  # type: ignore[arg-type]  # a Mode
    truth = fxquant.quantize(model, mode=mode, backend="reference", example_inputs=ids)  # type: ignore[arg-type]  # a Mode
    # Rows are rounded to bfloat16 before a stored weight: 2**-9 of each of what is summed.
    limit = 1e-4 if mode == "dynamic" else 1e-2
    torch.testing.assert_close(made(ids), truth(ids), rtol=1e-4, atol=limit)
    assert "cuda" in fxquant.report(made).summary
