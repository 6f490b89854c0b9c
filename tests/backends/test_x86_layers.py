"""The oneDNN layers against exact integer sums in float64: every geometry, activation, layout."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends import x86_layer_rules as rules
from fxquant.backends.x86_conv_plan import Geometry
from fxquant.backends.x86_layers import (
    PostOp,
    X86Conv,
    X86ConvSum,
    X86Layer,
    X86Linear,
    X86LinearSum,
)
from fxquant.graph.info import QType
from fxquant.numerics.integer import ConvGeometry, conv_reference, linear_reference
from fxquant.numerics.qparams import QParams
from tests.backends.oracles import (
    assert_layout_is_no_matter,
    assert_within,
    fitting,
    int8,
    qparams,
    real,
    some_codes,
    uint8,
    weight_codes,
)

Activation = Callable[[Tensor], Tensor]
NO_POST = PostOp()


@dataclass(frozen=True)
class Case:
    """A convolution to test."""

    rank: int = 2
    channels: tuple[int, int] = (5, 7)
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = True
    per_channel: bool = True
    zeros: tuple[int, int] = (113, 97)
    size: int = 9
    batch: int = 2

    @property
    def geometry(self) -> Geometry:
        stride, padding, dilation = (
            (value,) * self.rank for value in (self.stride, self.padding, self.dilation)
        )
        return Geometry(stride, padding, dilation, self.groups)

    @property
    def exact(self) -> ConvGeometry:
        return ConvGeometry(self.stride, self.padding, self.dilation, self.groups)


def weight_of(
    shape: tuple[int, ...], per_channel: bool, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None, QParams]:
    """Weight codes over the machine's whole range, scales that differ fourfold, a bias."""
    generator = torch.Generator().manual_seed(3)
    codes = weight_codes(*shape, pairs=shape[1] > 1, generator=generator)
    count = shape[0] if per_channel else 1
    scale = 0.002 + 0.006 * torch.rand(count, generator=generator)
    bias = 4 * torch.randn(shape[0], generator=generator) if with_bias else None
    zero = torch.zeros(count, dtype=torch.int32)
    described = QParams(scale, zero, -127, 127, torch.int8, 0 if per_channel else None)
    return codes, scale, bias, described


def conv_pair(
    case: Case, post: PostOp = NO_POST, activation: Activation | None = None
) -> tuple[X86Conv, Tensor, Tensor, QType]:
    """The layer, its input, the float64 result and the type it is written in."""
    cin, cout = case.channels
    shape = (cout, cin // case.groups, *(case.kernel,) * case.rank)
    codes, scale, bias, weight_q = weight_of(shape, case.per_channel, case.bias)
    reads = uint8(0.03, case.zeros[0])
    x = some_codes(case.batch, cin, *(case.size,) * case.rank)
    exact = conv_reference(
        x, qparams(reads), codes, weight_q, qparams(uint8()),
        bias=bias, geometry=case.exact, activation=activation,
    ).real  # fmt: skip
    writes = fitting(exact, case.zeros[1])
    layer = X86Conv(codes, scale, bias, reads, writes, post, case.geometry, tuple(x.shape))
    return layer, x, exact, writes


VARIANTS: dict[str, dict[str, int | bool | tuple[int, int]]] = {
    "plain": {},
    "no bias": {"bias": False},
    "per tensor": {"per_channel": False},
    "pointwise": {"kernel": 1, "padding": 0, "channels": (33, 17)},
    "valid": {"padding": 0},
    "wide padding": {"padding": 2},
    "stride": {"stride": 2},
    "stride past kernel": {"stride": 3, "kernel": 2, "padding": 0},
    "dilation": {"dilation": 2, "padding": 2},
    "dilation and stride": {"dilation": 2, "stride": 2, "padding": 3},
    "groups": {"groups": 3, "channels": (9, 12)},
    "depthwise": {"groups": 19, "channels": (19, 19)},
    "depthwise stride": {"groups": 16, "channels": (16, 16), "stride": 2},
    "depthwise twice as many": {"groups": 8, "channels": (8, 16)},
    "one channel": {"channels": (1, 1)},
    "many channels": {"channels": (67, 65), "size": 5},
    "large kernel": {"kernel": 5, "padding": 2},
    "one sample": {"batch": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rank", (1, 2, 3))
def test_conv_matches_float64(rank: int, variant: str) -> None:
    size = 5 if rank == 3 else 9
    options = {"size": size, **VARIANTS[variant]}
    layer, x, exact, writes = conv_pair(Case(rank=rank, **options))  # type: ignore[arg-type] # a mixed dict
    assert_within(layer(x), exact, writes)


@pytest.mark.parametrize("rank", (1, 2, 3))
@pytest.mark.parametrize("zeros", list(itertools.product((0, 128, 255), (0, 128, 255))))
def test_conv_with_extreme_zero_points(rank: int, zeros: tuple[int, int]) -> None:
    layer, x, exact, writes = conv_pair(Case(rank=rank, zeros=zeros, size=7))
    assert_within(layer(x), exact, writes)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 7), (64, 3), (3, 65)])
def test_conv_of_odd_sizes(sizes: tuple[int, int]) -> None:
    codes, scale, bias, weight_q = weight_of((6, 4, 3, 3), True, True)
    reads, x = uint8(0.03, 90), some_codes(2, 4, *sizes)
    exact = conv_reference(
        x, qparams(reads), codes, weight_q, qparams(uint8()), bias=bias,
        geometry=ConvGeometry(padding=1),
    ).real  # fmt: skip
    writes = fitting(exact, 120)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    layer = X86Conv(codes, scale, bias, reads, writes, PostOp(), geometry, None)
    assert_within(layer(x), exact, writes)


def test_conv_geometry_may_differ_between_dimensions() -> None:
    codes, scale, bias, weight_q = weight_of((6, 4, 3, 2), True, True)
    reads, x = uint8(0.03, 90), some_codes(2, 4, 11, 10)
    stride, padding, dilation = (2, 1), (0, 1), (1, 3)
    exact = conv_reference(
        x, qparams(reads), codes, weight_q, qparams(uint8()), bias=bias,
        geometry=ConvGeometry(stride, padding, dilation),
    ).real  # fmt: skip
    writes = fitting(exact, 120)
    geometry = Geometry(stride, padding, dilation, 1)
    layer = X86Conv(codes, scale, bias, reads, writes, PostOp(), geometry, tuple(x.shape))
    assert_within(layer(x), exact, writes)


@pytest.mark.parametrize("rank", (1, 2, 3))
def test_conv_writes_float_and_int8_too(rank: int) -> None:
    layer, x, exact, _ = conv_pair(Case(rank=rank, size=6))

    def to(writes: QType | None) -> X86Conv:
        parts = (layer.weight, layer.weight_scale, layer.bias, layer.reads)
        return X86Conv(*parts, writes, PostOp(), layer.geometry, None)

    plain = to(None)(x)
    assert plain.dtype == torch.float32
    # Exact integer sum, then a scale and a bias in float32.
    torch.testing.assert_close(plain.double(), exact, rtol=1e-5, atol=1e-5)
    signed = fitting(exact, 0, int8())
    assert_within(to(signed)(x), exact, signed)


def test_accumulators_hold_the_largest_sums() -> None:
    """All weights and inputs at their ends: 255 * 127 * K, past 16 bits by far."""
    most = int(weight_codes(2, 512).max())
    weight = torch.full((2, 512, 3, 3), most, dtype=torch.int8)
    weight[1] = -most
    x = torch.full((1, 512, 3, 3), 255, dtype=torch.uint8)
    reads = uint8(1.0, 0)
    total = 255 * most * 512 * 9
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1)
    layer = X86Conv(weight, torch.ones(2), None, reads, None, PostOp(), geometry, None)
    assert layer(x).flatten().tolist() == [float(total), float(-total)]
    linear = X86Linear(weight.flatten(1), torch.ones(2), None, reads, None, PostOp())
    assert linear(x.flatten(1)).flatten().tolist() == [float(total), float(-total)]


CONV_ACTIVATIONS: dict[str, tuple[PostOp, Activation]] = {
    "relu": (PostOp("relu"), torch.relu),
    "relu6": (PostOp("hardtanh", (0.0, 6.0)), F.relu6),
    "hardtanh": (PostOp("hardtanh", (-8.5, 9.5)), lambda x: F.hardtanh(x, -8.5, 9.5)),
    "hardswish": (PostOp("hardswish"), F.hardswish),
    "silu": (PostOp("swish"), F.silu),
}
LINEAR_ACTIVATIONS: dict[str, tuple[PostOp, Activation]] = {
    **CONV_ACTIVATIONS,
    "gelu": (PostOp("gelu", (), "none"), F.gelu),
    "gelu tanh": (PostOp("gelu", (), "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "leaky_relu": (PostOp("leaky_relu", (0.2,)), lambda x: F.leaky_relu(x, 0.2)),
    "tanh": (PostOp("tanh"), torch.tanh),
}
POST_OPS = {name: post for name, (post, _) in LINEAR_ACTIVATIONS.items()} | {
    "sigmoid": PostOp("sigmoid"),
    "hardsigmoid": PostOp("hardsigmoid"),
    "elu": PostOp("elu", (1.0,)),
    "mish": PostOp("mish"),
    "abs": PostOp("abs"),
    "exp": PostOp("exp"),
    "sqrt": PostOp("sqrt"),
    "square": PostOp("square"),
    "log": PostOp("log"),
}
"""Every post-op torch has a name for, with its canonical op."""


@pytest.mark.parametrize("zero", (0, 77, 255))
@pytest.mark.parametrize("name", CONV_ACTIVATIONS)
def test_conv2d_with_activation(name: str, zero: int) -> None:
    post, activation = CONV_ACTIVATIONS[name]
    # Relu in code 255 would leave nothing but that code: nothing positive has one.
    zero = 40 if zero == 255 and name in ("relu", "relu6") else zero
    layer, x, exact, writes = conv_pair(Case(zeros=(113, zero)), post, activation)
    assert_within(layer(x), exact, writes)


def test_conv1d_with_relu() -> None:
    layer, x, exact, writes = conv_pair(Case(rank=1, size=65), PostOp("relu"), torch.relu)
    assert_within(layer(x), exact, writes)


def test_conv3d_with_relu_clamps_at_the_zero_point() -> None:
    layer, x, exact, writes = conv_pair(Case(rank=3, size=5, zeros=(113, 60)))
    layer.floor = writes.zero_point
    assert_within(layer(x), exact.relu(), writes)


def linear_pair(
    post: PostOp = NO_POST,
    activation: Activation | None = None,
    *,
    reads: QType | None = None,
    zero: int = 97,
    shape: tuple[int, ...] = (6, 37),
    per_channel: bool = True,
    with_bias: bool = True,
) -> tuple[X86Linear, Tensor, Tensor, QType]:
    """As :func:`conv_pair`; 23 features out."""
    reads = reads or uint8(0.03, 113)
    codes, scale, bias, weight_q = weight_of((23, shape[-1]), per_channel, with_bias)
    x = some_codes(*shape, qtype=reads)
    exact = linear_reference(
        x, qparams(reads), codes, weight_q, qparams(uint8()), bias=bias, activation=activation
    ).real
    writes = fitting(exact, zero)
    return X86Linear(codes, scale, bias, reads, writes, post), x, exact, writes


@pytest.mark.parametrize("zero", (0, 77, 255))
@pytest.mark.parametrize("name", LINEAR_ACTIVATIONS)
def test_linear_with_activation(name: str, zero: int) -> None:
    post, activation = LINEAR_ACTIVATIONS[name]
    zero = 40 if zero == 255 and name in ("relu", "relu6") else zero
    layer, x, exact, writes = linear_pair(post, activation, zero=zero)
    assert_within(layer(x), exact, writes)


@pytest.mark.parametrize("shape", [(37,), (1, 37), (2, 3, 37), (2, 3, 4, 37), (5, 1), (3, 513)])
def test_linear_of_any_rank_and_size(shape: tuple[int, ...]) -> None:
    layer, x, exact, writes = linear_pair(shape=shape)
    assert_within(layer(x), exact, writes)


@pytest.mark.parametrize("per_channel", (True, False))
@pytest.mark.parametrize("with_bias", (True, False))
@pytest.mark.parametrize("zero", (0, 128, 255))
def test_linear_scales_bias_zero_points(per_channel: bool, with_bias: bool, zero: int) -> None:
    for reads in (uint8(0.03, zero), int8(0.03, zero - 128)):
        layer, x, exact, writes = linear_pair(
            reads=reads, zero=zero, per_channel=per_channel, with_bias=with_bias
        )
        assert_within(layer(x), exact, writes)


def test_linear_writes_float_and_int8_too() -> None:
    layer, x, exact, _ = linear_pair()
    plain = X86Linear(layer.weight, layer.weight_scale, layer.bias, layer.reads, None, PostOp())
    # Exact integer sum, then a scale and a bias in float32.
    torch.testing.assert_close(plain(x).double(), exact, rtol=1e-5, atol=1e-5)
    writes = fitting(exact, 5, int8())
    signed = X86Linear(layer.weight, layer.weight_scale, layer.bias, layer.reads, writes, PostOp())
    assert_within(signed(x), exact, writes)


def runs(layer: str, post: PostOp) -> bool:
    """Whether torch's kernel of ``layer`` has a post-op."""
    probe: X86Layer
    if layer == "linear":
        probe, x, _, _ = linear_pair()
    else:
        probe, x, _, _ = conv_pair(Case(rank=int(layer[4]), size=4))
    probe.post = post
    probe.pack()
    try:
        probe(x)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("layer", ("conv1d", "conv2d", "conv3d", "linear"))
def test_the_table_of_activations_is_what_torch_has(layer: str) -> None:
    """Both ways: nothing in the table that torch refuses, nothing left out that it can."""
    can = {name.split()[0] for name, post in POST_OPS.items() if runs(layer, post)}
    assert can == set(rules._TAKES[layer])


def test_every_activation_of_the_table_is_tested() -> None:
    tested = {name.split()[0] for name in LINEAR_ACTIVATIONS}
    assert set(rules._POST) == tested == {n for names in rules._TAKES.values() for n in names}


@pytest.mark.parametrize("rank", (1, 2, 3))
def test_conv_layouts(rank: int) -> None:
    layer, x, _, _ = conv_pair(Case(rank=rank, channels=(6, 8), size=6, batch=3))
    assert_layout_is_no_matter(layer, x)


def test_linear_layouts() -> None:
    layer, x, _, _ = linear_pair(shape=(3, 4, 37))
    assert_layout_is_no_matter(layer, x)


@pytest.mark.parametrize("rank", (1, 2, 3))
def test_conv_of_an_empty_batch(rank: int) -> None:
    layer, x, exact, writes = conv_pair(Case(rank=rank, size=5))
    empty = layer(x[:0])
    assert empty.shape == (0, *exact.shape[1:])
    assert empty.dtype == writes.dtype


def test_linear_of_an_empty_batch() -> None:
    layer, x, exact, writes = linear_pair(shape=(2, 3, 37))
    assert layer(x[:0]).shape == (0, *exact.shape[1:])
    assert layer(x[:, :0]).shape == (2, 0, 23)
    assert layer(x[:0]).dtype == writes.dtype


def test_a_conv_packed_for_one_shape_runs_on_others() -> None:
    layer, _, _, _ = conv_pair(Case(size=9))
    unpacked = copy.deepcopy(layer)
    unpacked.shape = None
    unpacked.pack()
    for shape in ((1, 5, 3, 17), (4, 5, 20, 20), (2, 5, 9, 9)):
        x = some_codes(*shape)
        assert torch.equal(layer(x), unpacked(x))


# Sums


def conv_sum(
    other_zero: int, post: PostOp, cls: type[X86ConvSum] = X86ConvSum
) -> tuple[X86ConvSum, Tensor, Tensor, Tensor, QType]:
    """The layer, its two inputs, the float64 result and its type."""
    plain, x, exact, _ = conv_pair(Case(channels=(5, 9), size=9))
    other_type = uint8(0.07, other_zero)
    other = some_codes(*exact.shape, qtype=other_type, seed=5)
    total = exact + real(other, other_type)
    total = total.relu() if post.name == "relu" else total
    writes = fitting(total, 90)
    layer = cls(
        plain.weight, plain.weight_scale, plain.bias, plain.reads, writes, post, plain.geometry,
        tuple(x.shape), other=other_type,
    )  # fmt: skip
    return layer, x, other, total, writes


@pytest.mark.parametrize("post", [PostOp(), PostOp("relu")], ids=str)
@pytest.mark.parametrize("zero", (0, 128, 255))
def test_conv_sum_matches_float64(zero: int, post: PostOp) -> None:
    layer, x, other, total, writes = conv_sum(zero, post)
    for given in (other.clone(), other.clone(memory_format=torch.channels_last)):
        assert_within(layer(x, given), total, writes)


def test_conv_sum_writes_over_what_it_adds() -> None:
    layer, x, other, _, _ = conv_sum(128, PostOp())
    there = other.contiguous(memory_format=torch.channels_last).clone(
        memory_format=torch.preserve_format
    )
    result = layer(x, there)
    assert torch.equal(result, there)
    assert not torch.equal(there, other)


@pytest.mark.parametrize("name", ("contiguous", "transposed", "offset", "strided", "swapped"))
def test_conv_sum_of_any_layout(name: str) -> None:
    from_layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "contiguous": lambda t: t.contiguous(),
        "transposed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "offset": lambda t: F.pad(t, (2, 1))[..., 2:-1],
        "strided": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
        "swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    }
    layer, x, other, total, writes = conv_sum(128, PostOp("relu"))
    assert_within(layer(from_layouts[name](x), from_layouts[name](other)), total, writes)


def test_conv_sum_with_an_expanded_operand() -> None:
    layer, x, other, _, _ = conv_sum(128, PostOp())
    one = other[:1, :1]
    wanted = layer(x, one.expand_as(other).contiguous())
    assert torch.equal(layer(x, one.expand_as(other)), wanted)
    assert torch.equal(one, other[:1, :1])


def test_sums_of_empty_batches() -> None:
    layer, x, other, _, _ = conv_sum(128, PostOp("relu"))
    assert layer(x[:0], other[:0]).shape == other[:0].shape
    linear, a, b, _, _ = linear_sum(PostOp("relu"))
    assert linear(a[:0], b[:0]).shape == b[:0].shape


def linear_sum(
    post: PostOp, shape: tuple[int, ...] = (3, 4, 37), zero: int = 128
) -> tuple[X86LinearSum, Tensor, Tensor, Tensor, QType]:
    plain, x, exact, _ = linear_pair(shape=shape)
    other_type = uint8(0.07, zero)
    other = some_codes(*exact.shape, qtype=other_type, seed=5)
    total = exact + real(other, other_type)
    total = total.relu() if post.name == "relu" else total
    writes = fitting(total, 90)
    layer = X86LinearSum(
        plain.weight, plain.weight_scale, plain.bias, plain.reads, writes, post, other=other_type
    )
    return layer, x, other, total, writes


@pytest.mark.parametrize("post", [PostOp(), PostOp("relu")], ids=str)
@pytest.mark.parametrize("zero", (0, 128, 255))
@pytest.mark.parametrize("shape", [(5, 37), (3, 4, 37), (1, 513)])
def test_linear_sum_matches_float64(zero: int, post: PostOp, shape: tuple[int, ...]) -> None:
    layer, x, other, total, writes = linear_sum(post, shape, zero)
    given = other.clone()
    result = layer(x, given)
    assert_within(result, total, writes)
    assert torch.equal(result, given), "the sum is written over its operand"
    turned = other.transpose(0, 1).contiguous().transpose(0, 1)
    assert_within(layer(x, turned), total, writes)


# State


def every_layer() -> list[tuple[X86Layer, tuple[Tensor, ...]]]:
    conv, x, _, _ = conv_pair(Case())
    conv_plus, a, b, _, _ = conv_sum(128, PostOp("relu"))
    linear, y, _, _ = linear_pair()
    linear_plus, c, d, _, _ = linear_sum(PostOp())
    return [(conv, (x,)), (conv_plus, (a, b)), (linear, (y,)), (linear_plus, (c, d))]


def run(layer: X86Layer, inputs: tuple[Tensor, ...]) -> Tensor:
    result: Tensor = layer(*(value.clone() for value in inputs))
    return result


@pytest.mark.parametrize("index", range(4))
def test_copies_and_pickles_give_the_same_codes(index: int) -> None:
    layer, inputs = every_layer()[index]
    wanted = run(layer, inputs)
    assert torch.equal(run(copy.deepcopy(layer), inputs), wanted)
    assert torch.equal(run(pickle.loads(pickle.dumps(layer)), inputs), wanted)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), inputs), wanted)


@pytest.mark.parametrize("index", range(4))
def test_state_is_the_plain_integer_weight(index: int) -> None:
    layer, _ = every_layer()[index]
    state = layer.state_dict()
    assert set(state) == {"weight", "weight_scale", "bias"}
    assert state["weight"].dtype == torch.int8
    assert not list(layer.parameters())
    assert len(pickle.dumps(layer)) < 5 * state["weight"].numel() + 8192, "the packed form is kept"


@pytest.mark.parametrize("index", range(4))
def test_loading_a_state_packs_it(index: int) -> None:
    layer, inputs = every_layer()[index]
    other = copy.deepcopy(layer)
    other.load_state_dict({name: torch.zeros_like(t) for name, t in layer.state_dict().items()})
    assert not torch.equal(run(other, inputs), run(layer, inputs))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(run(other, inputs), run(layer, inputs))


def test_layers_print_what_they_are() -> None:
    layer, _, _, _ = conv_pair(Case(), PostOp("relu"), torch.relu)
    assert "(7, 5, 3, 3), relu, uint8(scale=0.03, zero_point=113) -> uint8(" in repr(layer)
    plain = X86Linear(
        torch.ones(2, 3, dtype=torch.int8), torch.ones(2), None, uint8(), None, PostOp()
    )
    assert "-> float32" in repr(plain)
