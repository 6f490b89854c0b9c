"""What a newcomer does with patterns of their own, from the definition to the int8 model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.custom.kernels import Codes, IntegerLayer, QType
from fxquant.errors import FxQuantWarning, PatternError
from fxquant.graph.kernel_unit import KernelUnit
from fxquant.numerics.observer import Observer
from tests.helpers import One, close_share, trained

BACKENDS = [b.name for b in fxquant.backends() if b.available and b.name != "cuda"]
"""Those with static int8: on a GPU that is the reference."""
X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def quantized(model: nn.Module, *patterns: Any, backend: str, x: Tensor = X, **more: Any) -> Any:
    q = fxquant.quantize(model, [x], patterns=patterns, backend=backend, **more)
    return q, fxquant.report(q)


def error(q: nn.Module, model: nn.Module, x: Tensor = X) -> float:
    with torch.no_grad():
        return close_share(q(x), model(x))


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.head(y * torch.sigmoid(y))


@fxquant.pattern
def conv_swish(x, conv: nn.Conv2d):  # type: ignore[no-untyped-def]  # as users write it
    y = conv(x)
    return y * torch.sigmoid(y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_times_its_sigmoid(backend: str) -> None:
    model = trained(Swish())
    q, report = quantized(model, conv_swish, backend=backend)
    op = report.ops[0]
    assert (op.op, op.parts, op.int8, op.path) == ("conv_swish", "conv2d+silu", True, "conv")
    assert op.by == "pattern conv_swish" and "test_custom_patterns.py" in op.why
    assert op.writes is not None
    if backend == "x86":
        assert op.kernel.startswith("X86") and "float" not in op.kernel
    # Two layers of 8 bits: each edge is off by half a code of 255, here of the largest value.
    assert error(q, model) < 0.03


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 32), nn.Linear(32, 4)
        self.gain = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc(x) * self.gain + 0.25))


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_mul_add_relu(backend: str) -> None:
    @fxquant.pattern
    def scaled(x, layer: nn.Linear, gain: nn.Parameter, shift: float):  # type: ignore[no-untyped-def]
        return torch.relu(layer(x) * gain + shift)

    model, x = Scaled().eval(), torch.randn(32, 16)
    q, report = quantized(model, scaled, backend=backend, x=x)
    assert [op.op for op in report.ops] == ["scaled", "linear"]
    # The gain goes into the layer; add and relu of a number are one function.
    assert report.ops[0].int8 and report.ops[0].parts == "linear+unary"
    assert error(q, model, x) < 0.03


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.left(y) * self.right(torch.sigmoid(y))


@fxquant.pattern
def forked(x, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
    y = conv(x)
    return y, torch.sigmoid(y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pattern_with_two_outputs(backend: str) -> None:
    model = Forked().eval()
    q, report = quantized(model, forked, backend=backend)
    by_path = {op.path: op for op in report.ops}
    assert by_path["stem"].op == "forked" and by_path["stem"].int8
    # Both results are codes: the two convolutions after it read them.
    assert by_path["left"].reads[0] is not None and by_path["right"].reads[0] is not None
    assert by_path["left"].reads != by_path["right"].reads
    assert error(q, model) < 0.05


def my_kernel(x: Codes, conv: IntegerLayer, output: QType) -> Tensor:
    """Integer products, one multiplication a channel, then the activation and new codes."""
    sums = F.conv2d(
        x.steps.double(), conv.weight.double(), None,
        conv.stride, conv.padding, conv.dilation, conv.groups,
    )  # fmt: skip
    y = sums * (x.scale * conv.scale.double()).view(-1, 1, 1)
    if conv.bias is not None:
        y += conv.bias.double().view(-1, 1, 1)
    y = y * torch.sigmoid(y)
    codes = (y / output.scale).round() + output.zero_point
    return codes.clamp(output.quant_min, output.quant_max).to(output.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pattern_with_a_kernel(backend: str) -> None:
    model = trained(Swish())
    unit = fxquant.Pattern(conv_swish.definition, kernel=my_kernel)
    q, report = quantized(model, unit, backend=backend)
    assert report.ops[0].kernel == "your my_kernel"
    assert [type(q.get_submodule("conv"))] == [KernelUnit]
    assert error(q, model) < 0.03
    plain, _ = quantized(model, conv_swish, backend=backend)
    with torch.no_grad():
        assert close_share(q(X), plain(X)) < 0.02
        assert torch.equal(copy.deepcopy(q)(X), q(X))
        assert q(X[:1]).shape == model(X[:1]).shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_with_two_outputs_and_a_number(backend: str) -> None:
    def codes(y: Tensor, q: Any) -> Tensor:
        return ((y / q.scale).round() + q.zero_point).clamp(q.quant_min, q.quant_max).to(q.dtype)

    def kernel(x, y, factor, outputs):  # type: ignore[no-untyped-def]
        total = x.real + y.real * factor
        return codes(total, outputs[0]), codes(torch.tanh(total), outputs[1])

    @fxquant.pattern(kernel=kernel)
    def mixed(x, y, factor: float):  # type: ignore[no-untyped-def]
        total = x + y * factor
        return total, torch.tanh(total)

    def body(m: Any, x: Any) -> Any:
        total = m.a(x) + m.b(x) * 0.5
        return m.c(total) + torch.tanh(total)

    parts = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(3, 8, 1), "c": nn.Conv2d(8, 8, 1)}
    model = One(body, **parts).eval()
    q, report = quantized(model, mixed, backend=backend)
    op = next(op for op in report.ops if op.op == "mixed")
    assert op.int8 and op.kernel == "your kernel"
    assert error(q, model) < 0.05


def wrong_kernel(x: Codes, conv: IntegerLayer, output: QType) -> Tensor:
    return (my_kernel(x, conv, output).to(torch.int32) + 2).clamp(0, 255).to(torch.uint8)


def float_kernel(x: Codes, conv: IntegerLayer, output: QType) -> Tensor:
    return x.real


def failing_kernel(x: Codes, conv: IntegerLayer, output: QType) -> Tensor:
    raise RuntimeError("mine")


def small_kernel(x: Codes, conv: IntegerLayer, output: QType) -> Tensor:
    return my_kernel(x, conv, output)[:, :1]


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (wrong_kernel, r"output 0 is up to 2 codes off .* the kernel gives \d+, the pattern \d+"),
        (float_kernel, "returns torch.float32: it must return codes, torch.uint8"),
        (failing_kernel, "RuntimeError: mine"),
        (small_kernel, r"it returns \(8, 1, 12, 12\), not \(8, 16, 12, 12\)"),
    ],
)
def test_a_kernel_is_compared_with_its_pattern(kernel: Any, why: str) -> None:
    unit = fxquant.Pattern(conv_swish.definition, kernel=kernel)
    with pytest.raises(PatternError, match=why):
        quantized(trained(Swish()), unit, backend="reference")


def test_an_override_leaves_a_unit_in_float() -> None:
    model = trained(Swish())
    unit = fxquant.Pattern(conv_swish.definition, kernel=my_kernel)
    q, report = quantized(model, unit, backend="reference", overrides={"conv": None, "bn": None})
    # An override that names a part splits the unit, and the history says so.
    assert not report.ops[0].int8
    assert any(rule == unit.name for rule, _, _ in fxquant.history(q).near())
    everything = {"conv": None, "bn": None, torch.sigmoid: None, torch.mul: None}
    q, report = quantized(model, unit, backend="reference", overrides=everything)
    assert not report.ops[0].int8


def test_layers_inside_a_unit_read_codes() -> None:
    pair = fxquant.Pattern([nn.Conv2d, nn.ReLU, nn.Conv2d], name="pair")
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Tanh()).eval()
    for backend in BACKENDS:
        q, report = quantized(net, pair, backend=backend)
        assert [op.op for op in report.ops[:2]] == ["pair (1 of 2)", "pair (2 of 2)"]
        assert all(op.int8 and op.reads[0] is not None for op in report.ops[:2])
        assert error(q, net) < 0.05


def test_a_unit_has_observers_at_its_edges_only() -> None:
    prepared = fxquant.prepare(trained(Swish()), example_inputs=X, patterns=[conv_swish])
    assert len([m for m in prepared.modules() if isinstance(m, Observer)]) == 2
    fused = fxquant.history(prepared)["fuse"]
    assert any(edit.rule == "conv_swish" for edit in fused.edits)


class Gated(nn.Module):
    """What replaces two linears: one wide linear, cut in two."""

    def __init__(self, a: nn.Linear, b: nn.Linear) -> None:
        super().__init__()
        self.both = nn.Linear(a.in_features, a.out_features + b.out_features)
        self.cut = a.out_features
        with torch.no_grad():
            self.both.weight.copy_(torch.cat([a.weight, b.weight]))
            self.both.bias.copy_(torch.cat([a.bias, b.bias]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)
        return y[..., : self.cut] * torch.sigmoid(y[..., self.cut :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replacement_is_quantized_as_any_part_of_a_model(backend: str) -> None:
    @fxquant.pattern(replacement=Gated)
    def gated(x, a: nn.Linear, b: nn.Linear):  # type: ignore[no-untyped-def]
        return a(x) * torch.sigmoid(b(x))

    def body(m: Any, x: Any) -> Any:
        return m.out(m.p(x) * m.q(x).sigmoid())

    parts = {"p": nn.Linear(16, 8), "q": nn.Linear(16, 8), "out": nn.Linear(8, 4)}
    model, x = One(body, **parts).eval(), torch.randn(16, 16)
    q, report = quantized(model, gated, backend=backend, x=x)
    layers = [op for op in report.ops if "linear" in op.op]
    assert len(layers) == 2 and all(op.int8 for op in layers)
    assert layers[0].weights == 16 * 16
    assert error(q, model, x) < 0.05


def test_a_replacement_may_be_a_function_of_the_bound_modules() -> None:
    def cheaper(x, conv, act):  # type: ignore[no-untyped-def]
        return act(conv(x)).clone() * 1.0

    @fxquant.pattern(replacement=cheaper)
    def unit(x, conv: nn.Conv2d, act: nn.LeakyReLU):  # type: ignore[no-untyped-def]
        return act(conv(x))

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 1)).eval()
    q, report = quantized(net, unit, backend="reference")
    assert report.ops[0].path == "0"
    assert error(q, net) < 0.05


@pytest.mark.parametrize(
    ("replacement", "why"),
    [
        (lambda x, conv: torch.relu(conv(x)) + 1e-2, "computes something else: output 0 differs"),
        (lambda x, conv: conv(x)[:, :1], "returns"),
        (lambda x, conv: (conv(x), conv(x)), "returns 2 tensors"),
        (lambda x, conv: conv.nothing(x), "cannot be made at"),
    ],
)
def test_a_replacement_must_compute_the_same(replacement: Any, why: str) -> None:
    @fxquant.pattern(replacement=replacement)
    def unit(x, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
        return torch.relu(conv(x))

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    with pytest.raises(PatternError, match=why):
        quantized(net, unit, backend="reference")


def test_a_replacement_that_cannot_be_compared_says_so() -> None:
    @fxquant.pattern(replacement=lambda x: torch.tanh(x).reshape(-1, 12))
    def unit(x):  # type: ignore[no-untyped-def]
        return torch.tanh(x.reshape(-1, 12))

    def body(m: Any, x: Any) -> Any:
        return torch.tanh(m.a(x).reshape(-1, 12))

    model = One(body, a=nn.Linear(16, 24)).eval()
    with pytest.warns(FxQuantWarning, match="was not compared"):
        quantized(model, unit, backend="reference", x=torch.randn(8, 16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_as_both_inputs(backend: str) -> None:
    def kernel(x, y, output):  # type: ignore[no-untyped-def]
        codes = (torch.tanh(x.real * y.real) / output.scale).round() + output.zero_point
        return codes.clamp(output.quant_min, output.quant_max).to(output.dtype)

    def product(x, y):  # type: ignore[no-untyped-def]
        return torch.tanh(x * y)

    def body(m: Any, x: Any) -> Any:
        y = m.conv(x)
        return m.head(torch.tanh(y * y))

    model = One(body, conv=nn.Conv2d(3, 8, 1), head=nn.Conv2d(8, 4, 1)).eval()
    replaced = fxquant.Pattern(product, replacement=lambda y, x: torch.tanh(y * x), name="other")
    for unit in (fxquant.Pattern(product, kernel=kernel), replaced):
        q, _ = quantized(model, unit, backend=backend)
        assert error(q, model) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_unit_without_a_layer_is_one_call(backend: str) -> None:
    @fxquant.pattern
    def attend(q, k, v, scale: float):  # type: ignore[no-untyped-def]
        return torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1) @ v

    def body(m: Any, x: Any) -> Any:
        scores = torch.matmul(m.q(x), m.k(x).mT) * 0.25
        return m.o(F.softmax(scores, -1).matmul(m.v(x)))

    model = One(body, **{name: nn.Linear(16, 16) for name in "qkvo"}).eval()
    x = torch.randn(4, 10, 16)
    q, report = quantized(model, attend, backend=backend, x=x)
    op = next(op for op in report.ops if op.op == "attend")
    assert op.int8 and len(op.reads) == 3 and None not in op.reads and op.writes is not None
    assert op.kernel == ("UnitCodes" if backend == "x86" else "reference")
    assert error(q, model, x) < 0.05
    with torch.no_grad():
        assert q(x[:1, :3]).shape == model(x[:1, :3]).shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_prepares_the_input_of_a_layer_still_moves_codes(backend: str) -> None:
    @fxquant.pattern
    def joined(x, y, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
        return torch.tanh(conv(torch.cat([x, y], 1)))

    def body(m: Any, x: Any) -> Any:
        return m.o(torch.tanh(m.c(torch.cat([m.a(x), m.b(x)], dim=1))))

    parts = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(3, 8, 1), "c": nn.Conv2d(16, 8, 1)}
    model = One(body, **parts, o=nn.Conv2d(8, 4, 1)).eval()
    q, report = quantized(model, joined, backend=backend)
    assert [op.op for op in report.ops] == ["conv2d", "conv2d", "cat", "joined", "conv2d"]
    assert all(op.int8 for op in report.ops)
    assert error(q, model) < 0.05


def test_squeeze_and_excitation_is_two_units() -> None:
    @fxquant.pattern
    def excite(x, down: nn.Conv2d, up: nn.Conv2d):  # type: ignore[no-untyped-def]
        return x * torch.sigmoid(up(torch.relu(down(F.adaptive_avg_pool2d(x, 1)))))

    def body(m: Any, x: Any) -> Any:
        y = m.a(x)
        s = m.down(F.adaptive_avg_pool2d(y, (1, 1)))
        return m.o(y * m.up(s.relu()).sigmoid())

    parts = {"a": nn.Conv2d(3, 8, 3), "down": nn.Conv2d(8, 4, 1), "up": nn.Conv2d(4, 8, 1)}
    model = One(body, **parts, o=nn.Conv2d(8, 4, 1)).eval()
    for backend in BACKENDS:
        q, report = quantized(model, excite, backend=backend)
        named = [op.op for op in report.ops if op.op.startswith("excite")]
        assert named == ["excite (1 of 2)", "excite (2 of 2)"]
        assert error(q, model) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_with_kernels_are_copied_and_pickled(backend: str) -> None:
    unit = fxquant.Pattern(conv_swish.definition, kernel=my_kernel)
    q, _ = quantized(trained(Swish()), unit, backend=backend)
    with torch.no_grad():
        wanted = q(X)
        assert torch.equal(copy.deepcopy(q)(X), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(q))(X), wanted)
    assert {"conv.conv_weight", "conv.conv_scale", "conv.conv_bias"} <= set(q.state_dict())


@pytest.mark.parametrize("last", [nn.MaxPool2d(2), nn.Flatten(), nn.AdaptiveAvgPool2d(1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_unit_may_end_with_any_op(last: nn.Module, backend: str) -> None:
    unit = fxquant.Pattern([nn.Conv2d, nn.ReLU, type(last)], name="mine")
    tail = nn.Linear(8 * 10 * 10, 4) if isinstance(last, nn.Flatten) else nn.Conv2d(8, 4, 1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), last, tail).eval()
    q, report = quantized(net, unit, backend=backend)
    assert [op.op for op in report.ops] == ["mine", type(tail).__name__.lower()]
    assert all(op.int8 for op in report.ops)
    assert error(q, net) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_with_optional_parts_options_and_odd_names(backend: str) -> None:
    def kernel(x, conv, output, act=None):  # type: ignore[no-untyped-def]
        weight = conv.weight.float() * conv.scale.view(-1, 1, 1, 1)
        y = F.conv2d(x.real, weight, conv.bias, conv.stride, conv.padding)
        y = y if act is None else F.leaky_relu(y, act.negative_slope)
        codes = (y / output.scale).round() + output.zero_point
        return codes.clamp(output.quant_min, output.quant_max).to(output.dtype)

    @fxquant.pattern(kernel=kernel)
    def unit(x, conv: nn.Conv2d, act: nn.LeakyReLU | None):  # type: ignore[no-untyped-def]
        y = conv(x)
        return act(y) if act is not None else y

    shared = nn.Conv2d(8, 8, 3)
    net = nn.Sequential()
    net.add_module("<img src=x onerror=alert(1)>", nn.Conv2d(3, 8, 1))
    net.add_module("\x1b[31m", nn.LeakyReLU(0.3))
    for name in ("first", "second"):
        net.add_module(name, shared)
        net.add_module(f"{name}_act", nn.LeakyReLU(0.1))
    net.add_module("last", nn.Conv2d(8, 4, 1))
    q, report = quantized(trained(net), unit, backend=backend)
    assert [op.kernel for op in report.ops] == ["your kernel"] * 4
    assert error(q, net) < 0.06


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_units_in_modes_without_codes_between_ops(mode: Any) -> None:
    @fxquant.pattern(kernel=lambda x, layer, scale, output: None)
    def unit(x, layer: nn.Linear, scale: float):  # type: ignore[no-untyped-def]
        return torch.relu(layer(x) * scale)

    def body(m: Any, x: Any) -> Any:
        return m.b(torch.relu(m.a(x) * 2.0))

    model, x = One(body, a=nn.Linear(64, 64), b=nn.Linear(64, 8)).eval(), torch.randn(16, 64)
    q = fxquant.quantize(model, mode=mode, example_inputs=x, patterns=[unit], backend="reference")
    report = fxquant.report(q)
    assert [op.op for op in report.ops] == ["unit", "linear"]
    assert "the kernel of pattern 'unit' reads codes" in fxquant.explain(q, "a").ops[0].why
    assert error(q, model, x) < 0.03


def wave(y: Tensor) -> Tensor:
    """An activation that no library has a name for."""
    return y * torch.tanh(0.5 * y + 0.1)


@fxquant.pattern
def conv_wave(x, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
    return wave(conv(x))


@fxquant.pattern
def residual_wave(x, y, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
    return wave(conv(x) + y)


@fxquant.pattern
def sum_wave(x, y):  # type: ignore[no-untyped-def]
    return wave(x + y)


@fxquant.pattern
def wave_and_itself(x, conv: nn.Conv2d):  # type: ignore[no-untyped-def]
    y = conv(x)
    return y, wave(y)


@fxquant.pattern
def waved_twice(x, a: nn.Conv2d, b: nn.Conv2d):  # type: ignore[no-untyped-def]
    return wave(b(wave(a(x))))


@fxquant.pattern
def gated_wave(x, a: nn.Conv2d, b: nn.Conv2d):  # type: ignore[no-untyped-def]
    return a(x) * wave(b(x))


def _norm(m: Any, x: Any) -> Any:
    return m.out(wave(m.bn(m.a(x))))


def _sum(m: Any, x: Any) -> Any:
    y = m.a(x)
    return m.out(wave(m.b(y) + y))


def _both(m: Any, x: Any) -> Any:
    y = m.a(x)
    return m.out(y) + m.c(wave(y))


def _twice(m: Any, x: Any) -> Any:
    return m.out(wave(m.b(wave(m.a(x)))))


def _gate(m: Any, x: Any) -> Any:
    return m.out(m.a(x) * wave(m.c1(x)))


WAVES = [
    (conv_wave, _norm, ["conv_wave", "conv_wave (table)"]),
    (residual_wave, _sum, ["residual_wave", "residual_wave (table)"]),
    (wave_and_itself, _both, ["wave_and_itself", "wave_and_itself (table)"]),
    (
        waved_twice,
        _twice,
        [f"waved_twice ({n})" for n in ("1 of 2", "table", "2 of 2", "table")],
    ),
    # What goes on in float with others would have to be made float again.
    (gated_wave, _gate, ["gated_wave"]),
    # Without a layer the sum is left to whatever kernel makes it, here that of a convolution.
    (sum_wave, _sum, ["sum_wave"]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("unit", "body", "names"), WAVES, ids=[w[0].name for w in WAVES])
def test_an_activation_without_a_kernel_is_a_table(
    unit: fxquant.Pattern, body: Any, names: list[str], backend: str
) -> None:
    parts: dict[str, nn.Module] = {
        "a": nn.Conv2d(3, 8, 3, padding=1), "bn": nn.BatchNorm2d(8), "b": nn.Conv2d(8, 8, 1),
        "c": nn.Conv2d(8, 8, 1), "c1": nn.Conv2d(3, 8, 1), "out": nn.Conv2d(8, 8, 1),
    }  # fmt: skip
    model = trained(One(body, **parts))
    q, report = quantized(model, unit, backend=backend)
    found = [op for op in report.ops if op.op.startswith(unit.name)]
    assert [op.op for op in found] == names
    assert all(op.int8 and op.by.startswith(f"pattern {unit.name}") for op in found)
    tables = [op for op in found if op.parts == "unary"]
    assert len(tables) == {"waved_twice": 2, "gated_wave": 0}.get(unit.name, 1)
    if backend == "x86":
        assert all(op.kernel == "TableCodes" for op in tables)
        # Codes between the layer and its table, as without the pattern.
        plain, _ = quantized(model, backend=backend)
        if tables:
            with torch.no_grad():
                assert torch.equal(q(X), plain(X))
    # Up to four layers of 8 bits: each edge is off by half a code of 255.
    assert error(q, model) < 0.05


def test_one_activation_after_a_layer_stays_with_it() -> None:
    unit = fxquant.Pattern([nn.Conv2d, nn.Mish], name="mished")
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Mish(), nn.Conv2d(8, 8, 3)).eval()
    _, report = quantized(net, unit, backend="reference")
    assert [op.op for op in report.ops] == ["mished", "conv2d"]


def test_a_unit_with_a_kernel_stays_whole() -> None:
    def kernel(x: Codes, conv: IntegerLayer, output: QType) -> Tensor:
        y = F.conv2d(x.steps.double(), conv.weight.double()) * (x.scale * conv.scale.double()).view(
            -1, 1, 1
        )
        y = wave(y + conv.bias.double().view(-1, 1, 1))  # type: ignore[union-attr]
        codes = (y / output.scale).round() + output.zero_point
        return codes.clamp(output.quant_min, output.quant_max).to(output.dtype)

    unit = fxquant.Pattern(conv_wave.definition, kernel=kernel)
    net = One(lambda m, x: m.out(wave(m.a(x))), a=nn.Conv2d(3, 8, 3), out=nn.Conv2d(8, 8, 1))
    _, report = quantized(net.eval(), unit, backend="reference")
    assert report.ops[0].kernel == "your kernel" and report.ops[0].op == "conv_wave"


def test_a_dynamic_unit_stays_whole() -> None:
    @fxquant.pattern
    def linear_wave(x, layer: nn.Linear):  # type: ignore[no-untyped-def]
        return wave(layer(x))

    net = One(lambda m, x: m.out(wave(m.a(x))), a=nn.Linear(8, 8), out=nn.Linear(8, 8)).eval()
    q = fxquant.quantize(net, mode="dynamic", patterns=[linear_wave], backend="reference")
    assert [op.op for op in fxquant.report(q).ops] == ["linear_wave", "linear"]


def test_a_table_inside_a_unit_is_trained_as_one() -> None:
    net = One(_norm, a=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), out=nn.Conv2d(8, 8, 1))
    prepared = fxquant.prepare(net, mode="qat", example_inputs=X, patterns=[conv_wave]).train()
    prepared(X).square().mean().backward()
    made = fxquant.convert(prepared, backend="reference")
    assert [op.op for op in fxquant.report(made).ops][:2] == WAVES[0][2]
    assert fxquant.verify(prepared, made, [X]).ok
