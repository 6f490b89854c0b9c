"""``mode="dynamic"`` from the outside: no data, rows that stand alone, mixed with other schemes."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backends.x86 import X86
from fxquant.backends.x86_pairs import products_saturate
from fxquant.errors import CalibrationError, FxQuantWarning, SpeedWarning
from fxquant.record import Timing, record_of
from fxquant.report import checks
from fxquant.report.speed import _Clock

BACKENDS = ["reference"] if X86().missing() is not None else ["reference", "x86"]


def sqnr(found: Tensor, wanted: Tensor) -> float:
    noise = (found - wanted).double().pow(2).mean()
    return float((10 * torch.log10(wanted.double().pow(2).mean() / noise)).detach())


def seeded(net: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(p[0].numel(), 1) ** 0.5)
    return net.eval()


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Attention whose query, key and value read one tensor."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, 48), nn.Linear(48, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = torch.zeros(1, ids.shape[1]).masked_fill(ids[:1] == 0, -1e9)
        mixed = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), mask)
        return self.norm(x + F.gelu(self.out(mixed)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["dynamic", "dynamic-symmetric"])
def test_a_linear_keeps_thirty_decibels(backend: str, preset: str) -> None:
    net = seeded(nn.Sequential(nn.Linear(256, 256)))
    q = fxquant.quantize(net, mode="dynamic", qconfig=preset, backend=backend)
    x = numbers(64, 256)
    assert sqnr(q(x), net(x)) > 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention(backend: str) -> None:
    net, ids = seeded(Block()), torch.arange(14).view(2, 7)
    q = fxquant.quantize(net, mode="dynamic", backend=backend)
    assert sqnr(q(ids), net(ids)) > 30
    ops = {op["path"]: op for op in fxquant.report(q).to_dict()["ops"]}
    assert all(ops[name]["runs"] == "int8" for name in ("embed", "query", "key", "value", "out"))
    assert ops["query"]["weight"] == "int8 per channel 0"
    attention = [op for op in ops.values() if op["op"] == "scaled_dot_product_attention"]
    assert [op["runs"] for op in attention] == ["float"]
    kinds = [type(m).__name__ for m in q.modules()]
    if backend == "x86":
        assert kinds.count("X86DynamicLinear") == 2  # query, key and value are one product
        assert ops["value"]["kernel"] == "X86DynamicLinear"


class Scores(nn.Module):
    """Attention under a causal mask of -1e9 or -inf, of torch or written out."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.qkv, self.out, self.style = nn.Linear(32, 96), nn.Linear(32, 32), style

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        if self.style == "sdpa":
            mask = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)
            made = F.scaled_dot_product_attention(q, k, v, mask)
        elif self.style == "bmm":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            scores = torch.bmm(q, k.mT) / math.sqrt(8) + torch.where(hidden, -1e9, 0.0)
            made = torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, 4))
        else:
            scores = (q @ k.transpose(2, 3) / math.sqrt(8)).masked_fill(hidden, -1e9)
            made = torch.matmul(scores.softmax(-1), v)
        return self.out(made.transpose(1, 2).flatten(2))


ASKED = {"sdpa": F.scaled_dot_product_attention, "bmm": torch.bmm, "@": torch.matmul}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("style", ASKED)
def test_products_by_choice(style: str, mode: Any, backend: str) -> None:
    net, x = seeded(Scores(style)), numbers(2, 9, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpeedWarning)
        q = fxquant.quantize(
            net,
            [x] if mode == "static" else None,
            mode=mode,
            example_inputs=x,
            overrides={ASKED[style]: "dynamic"},
            backend=backend,
        )
    # A mask in a range would leave 0 dB; eight bits four times over leave more than 30.
    assert sqnr(q(x), net(x)) > 30
    ops = fxquant.report(q).to_dict()["ops"]
    found = [op for op in ops if op["op"].startswith("matmul")]
    assert [op["runs"] for op in found] == ["int8", "int8"]
    assert all(op["runs"] == "float" for op in ops if "softmax" in op["op"])
    if backend == "x86" and not products_saturate():
        assert {op["kernel"] for op in found} == {"X86DynamicProduct"}
        if mode == "dynamic":
            assert torch.equal(q(x[1:]), q(x)[1:])
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(other(x), q(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish])
def test_what_follows_comes_after_the_scale(backend: str, act: type[nn.Module]) -> None:
    net = seeded(nn.Sequential(nn.Linear(64, 64), act(), nn.Linear(64, 8)))
    q = fxquant.quantize(net, mode="dynamic", backend=backend)
    x = numbers(16, 64)
    assert sqnr(q(x), net(x)) > 30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convs_by_sample(backend: str, rank: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    net = nn.Sequential(conv(4, 8, 3, padding=1), norm(8), nn.ReLU(), conv(8, 8, 3, groups=4))
    net = net.eval()
    q = fxquant.quantize(net, mode="dynamic", backend=backend)
    x = numbers(3, 4, *(7,) * rank) + 1
    assert sqnr(q(x), net(x)) > 30
    x[1] *= 100
    assert sqnr(q(x)[0], net(x)[0]) > 30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convs_by_sample(backend: str, rank: int) -> None:
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    net = nn.Sequential(
        conv(4, 8, 3, stride=2, padding=1, output_padding=1),
        norm(8),
        nn.ReLU(),
        conv(8, 6, 2, groups=2, dilation=2),
    ).eval()
    q = fxquant.quantize(net, mode="dynamic", backend=backend)
    x = numbers(3, 4, *(5,) * rank) + 1
    assert sqnr(q(x), net(x)) > 30
    x[1] *= 100
    assert sqnr(q(x)[0], net(x)[0]) > 30
    ops = [op for op in fxquant.report(q).to_dict()["ops"] if op["op"].startswith("conv_transpose")]
    assert [op["runs"] for op in ops] == ["int8", "int8"]
    if backend == "x86":
        assert all(op["kernel"].startswith("X86DynamicConvTranspose") for op in ops)
        assert torch.equal(q(x[2:]), q(x)[2:])


def test_x86_and_reference_agree() -> None:
    if "x86" not in BACKENDS:
        pytest.skip("no x86 backend here")
    net, x = seeded(nn.Sequential(nn.Linear(64, 63), nn.ReLU(), nn.Linear(63, 9))), numbers(5, 64)
    prepared = fxquant.prepare(net, mode="dynamic")
    found, wanted = (fxquant.convert(prepared, backend=b)(x) for b in ("x86", "reference"))
    # Where processors add pairs in 16 bits their weights have 7 bits, and the reference's 8.
    least = 30 if X86().saturates_pairs else 100
    assert sqnr(found, wanted) > least


def test_modes_mix() -> None:
    net = seeded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)))
    data, x = [numbers(4, 3, 8, 8)], numbers(4, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxQuantWarning)
        static = fxquant.quantize(net, data, overrides={nn.Linear: "dynamic"}, backend="reference")
        dynamic = fxquant.quantize(
            net, data, mode="dynamic", overrides={"0": fxquant.QConfig()}, backend="reference"
        )
    for q in (static, dynamic):
        assert sqnr(q(x), net(x)) > 30
        text = q.code
        assert "quantize_at_run_time" in text and "dequantize" in text
        assert [op["runs"] for op in fxquant.report(q).to_dict()["ops"] if op["weight"]] == [
            "int8",
            "int8",
        ]
    with pytest.raises(CalibrationError, match="override"):
        fxquant.quantize(net, mode="dynamic", overrides={"0": fxquant.QConfig()})


def test_data_is_not_needed_and_that_is_said() -> None:
    net = seeded(nn.Sequential(nn.Linear(8, 8)))
    with pytest.warns(FxQuantWarning, match="needs no calibration data"):
        fxquant.quantize(net, [numbers(4, 8)], mode="dynamic", backend="reference")


def test_examples_give_shapes() -> None:
    net = seeded(nn.Sequential(nn.Linear(8, 16)))
    known = fxquant.quantize(
        net, mode="dynamic", example_inputs=(numbers(4, 8),), backend="reference"
    )
    unknown = fxquant.quantize(net, mode="dynamic", backend="reference")
    macs = [fxquant.report(q).to_dict()["ops"][0]["macs"] for q in (known, unknown)]
    assert macs == [4 * 8 * 16, None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_weights_copies_and_state(backend: str) -> None:
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    net = seeded(nn.Sequential(first, nn.Tanh(), second))
    before, x = copy.deepcopy(net.state_dict()), numbers(3, 32)
    q = fxquant.quantize(net, mode="dynamic", backend=backend)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    wanted = q(x)
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert torch.equal(other(x), wanted)
    with torch.inference_mode():
        assert torch.equal(q(x), wanted)
    assert q(x[:0]).shape == (0, 32)
    assert torch.equal(q(x[0]), wanted[0]) or backend == "reference"


def test_what_leaves_the_model_lies_together_in_memory() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x) * self.c(x)

    net, x = seeded(Net()), numbers(3, 8)
    q = fxquant.quantize(net, mode="dynamic")
    assert all(part.is_contiguous() for part in q(x))
    assert sqnr(q(x)[0], net(x)[0]) > 30 and sqnr(q(x)[1], net(x)[1]) > 25


class Options(nn.Module):
    """Takes its inputs by name, leaves some out, and writes into one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, x: Tensor, y: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        x.add_(1.0)
        made: Tensor = self.layer(x if y is None else y) * scale
        return made


def test_an_example_is_timed_and_a_slower_model_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []

    def compare(prepared: nn.Module, converted: nn.Module, inputs: tuple[object, ...]) -> Timing:
        seen.append(inputs)
        assert torch.isfinite(converted(*inputs)).all()
        assert torch.isfinite(prepared(*inputs)).all()
        return Timing(1.0, 2.0, (("layer", "X86DynamicLinear", 2000.0, 1000.0),))

    monkeypatch.setattr(checks, "compare_speed", compare)
    x = torch.randn(2, 8)
    given = x.clone()
    with pytest.warns(SpeedWarning, match="example inputs: 2.000 ms against 1.000 ms"):
        q = fxquant.quantize(
            Options(8).eval(), mode="dynamic", example_inputs={"x": given, "scale": 3.0}
        )
    assert [type(each) for each in seen[0]] == [Tensor, type(None), float]
    assert "one forward of the example: 1.000 ms in float, 2.000 ms" in fxquant.report(q).summary
    assert record_of(q).inputs is None
    fxquant.quantize(Options(8).eval(), mode="dynamic")
    fxquant.quantize(Options(8).eval(), mode="dynamic", example_inputs=x, backend="reference")
    assert len(seen) == 1


def test_the_speed_check_keeps_no_activations() -> None:
    net = seeded(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh()))
    prepared = fxquant.prepare(net, mode="dynamic", example_inputs=numbers(3, 8))
    clock = _Clock(prepared)
    clock.run(numbers(3, 8))
    kept = [value for value in clock.env.values() if value is not None]
    assert len(kept) == 1  # the result


def test_the_example_is_fed_once_as_it_is() -> None:
    """Whatever the speed check does, it does to copies."""
    x = torch.zeros(2, 8)
    fxquant.quantize(Options(8).eval(), mode="dynamic", example_inputs=x, backend="reference")
    once = x.clone()
    y = torch.zeros(2, 8)
    fxquant.quantize(Options(8).eval(), mode="dynamic", example_inputs=y)
    assert torch.equal(y, once)
