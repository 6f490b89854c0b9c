"""Lowered ops beside the reference, one at a time, on the same codes.

Every op stands between two layers, so that its input and its result are codes. At least 99.9 % of
the codes must be the reference's and none may be off by more than one; and each case says which
kernel must have run, so that an op which quietly falls back to float is noticed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant import recipes
from fxquant.backends.base import MEASURED, Cost
from fxquant.backends.reference import Reference
from fxquant.backends.x86 import X86
from fxquant.backends.x86_layer_rules import _TAKES, may_overwrite
from fxquant.graph.info import info
from fxquant.graph.op_table import DEQUANTIZE, QUANTIZE, is_op, op_named
from fxquant.patterns.units import ACTIVATIONS
from tests.backends.lockstep import Compared, both, check_ops, lockstep
from tests.helpers import One


@pytest.fixture(autouse=True)
def int8_wherever_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions cost so much here that whatever can run on codes does.

    What is worth it is another question, asked by the tests of the placing pass and of whole
    models; here every kernel is to be seen.
    """
    costs = dataclasses.replace(MEASURED, quantize=Cost(1e6, 0.0), dequantize=Cost(1e6, 0.0))
    for name, cls in (("x86", X86), ("reference", Reference)):
        monkeypatch.setitem(recipes._BACKENDS, name, functools.partial(cls, costs=costs))


_CONVS: Final = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def layer_for(like: Tensor, out: int) -> nn.Module:
    """A pointwise layer that reads a tensor of that shape."""
    if like.dim() in _CONVS:
        return _CONVS[like.dim()](like.shape[1], out, 1)
    return nn.Linear(like.shape[-1], out)


class Between(nn.Module):
    """``last(body(first(x), second(x)))``: the body reads codes and writes codes."""

    def __init__(self, body: Callable[..., Tensor], shape: tuple[int, ...], parts: Any) -> None:
        super().__init__()
        x = torch.randn(shape)
        self.first, self.second = layer_for(x, 8), layer_for(x, 8)
        for name, part in parts.items():
            setattr(self, name, part)
        self.body = body
        self.register_buffer("index", torch.tensor([3, 0, 0, 5]))
        self.eval()
        with torch.no_grad():
            found = body(self, self.first(x), self.second(x))
        self.last = layer_for(found, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.body(self, self.first(x), self.second(x)))
        return found


IMAGE: Final = (3, 6, 10, 10)
LINE: Final = (3, 6, 40)
CUBE: Final = (2, 6, 6, 6, 6)
ROWS: Final = (16, 24)


@dataclass(frozen=True)
class Op:
    """A case: what stands between the layers, and which kernel must run it."""

    body: Callable[..., Tensor]
    kernel: str
    shape: tuple[int, ...] = IMAGE
    parts: tuple[tuple[str, Callable[[], nn.Module]], ...] = ()

    def model(self) -> nn.Module:
        made = {name: make().eval() for name, make in self.parts}
        return Between(self.body, self.shape, made).eval()


def batches(shape: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(3)]


def trained_norm(cls: Callable[[int], nn.Module] = nn.BatchNorm2d, channels: int = 8) -> nn.Module:
    norm: Any = cls(channels)
    with torch.no_grad():
        norm.weight.uniform_(-1.5, 1.5)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.3, 2.0)
    return norm.eval()


def conv3x3(**more: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(8, 8, 3, padding=1, **more)


# A pool in front keeps an op from fusing with the layer before it.
def pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


CONV = (("conv", conv3x3()),)
CONVS = (("conv", conv3x3()), ("other", conv3x3()))
LINEAR = (("linear", lambda: nn.Linear(8, 8)),)
NORM = (("norm", trained_norm),)

SUMS: Final[dict[str, Op]] = {
    "conv + y": Op(lambda m, y, z: m.conv(y) + y, "X86ConvSum", parts=CONV),
    "y + conv": Op(lambda m, y, z: y + m.conv(y), "X86ConvSum", parts=CONV),
    "relu(conv + y)": Op(lambda m, y, z: F.relu(m.conv(y) + y), "X86ConvSum", parts=CONV),
    "relu(y + conv)": Op(lambda m, y, z: F.relu(y + m.conv(y)), "X86ConvSum", parts=CONV),
    "conv + conv": Op(lambda m, y, z: m.conv(y) + m.other(z), "X86ConvSum", parts=CONVS),
    "relu(conv + conv)": Op(
        lambda m, y, z: torch.add(m.conv(y), m.other(z)).relu(), "X86ConvSum", parts=CONVS
    ),
    "conv += y": Op(lambda m, y, z: m.conv(y).add_(y), "X86ConvSum", parts=CONV),
    "conv + relu(y)": Op(lambda m, y, z: m.conv(y) + F.relu(z), "X86ConvSum", parts=CONV),
    "linear + y": Op(lambda m, y, z: m.linear(y) + y, "X86LinearSum", ROWS, LINEAR),
    "relu(y + linear)": Op(lambda m, y, z: F.relu(z + m.linear(y)), "X86LinearSum", ROWS, LINEAR),
}

PAIRS: Final[dict[str, Op]] = {
    "add": Op(lambda m, y, z: pool(y) + pool(z), "PairCodes"),
    "add relu": Op(lambda m, y, z: F.relu(pool(y) + pool(z)), "PairCodes"),
    "add itself": Op(lambda m, y, z: pool(y) + pool(y), "PairCodes"),
    "add alpha": Op(lambda m, y, z: torch.add(pool(y), pool(z), alpha=0.5), "PairCodes"),
    "sub": Op(lambda m, y, z: pool(y) - pool(z), "PairCodes"),
    "sub relu": Op(lambda m, y, z: F.relu(pool(y) - pool(z)), "PairCodes"),
    "sub alpha": Op(lambda m, y, z: torch.sub(pool(y), pool(z), alpha=2), "PairCodes"),
    "mul": Op(lambda m, y, z: pool(y) * pool(z), "PairCodes"),
    "mul relu": Op(lambda m, y, z: F.relu(pool(y) * pool(z)), "PairCodes"),
    "square by mul": Op(lambda m, y, z: pool(y) * pool(y), "PairCodes"),
    "gate": Op(lambda m, y, z: y * F.adaptive_avg_pool2d(z, 1), "GateCodes"),
    "gate first": Op(lambda m, y, z: F.adaptive_avg_pool2d(z, 1) * y, "GateCodes"),
    "gated relu": Op(lambda m, y, z: (y * F.adaptive_avg_pool2d(z, 1)).relu(), "PairCodes"),
    "gate of pixels": Op(lambda m, y, z: y * z.mean(1, keepdim=True), "PairCodes"),
    "gate of the batch": Op(lambda m, y, z: y * z.mean((0, 2, 3), keepdim=True), "PairCodes"),
    "add a row": Op(lambda m, y, z: pool(y) + z[:, :, :1, :5], "PairCodes"),
    "conv - y": Op(lambda m, y, z: m.conv(y) - y, "PairCodes", parts=CONV),
    "add number": Op(lambda m, y, z: pool(y) + 0.75, "TableCodes"),
    "number minus": Op(lambda m, y, z: pool(y) - 2, "TableCodes"),
    "times number": Op(lambda m, y, z: pool(y) * -1.5, "TableCodes"),
    "number times": Op(lambda m, y, z: 3 * pool(y), "getitem"),
    "divided": Op(lambda m, y, z: pool(y) / 2.5, "getitem"),
    "add number relu": Op(lambda m, y, z: F.relu(pool(y) + 0.75), "TableCodes"),
    "conv, times number": Op(lambda m, y, z: y * 0.5, "getitem"),
    "times number, then added": Op(lambda m, y, z: m.conv(y) + z * 0.5, "getitem", parts=CONV),
    "times number, then joined": Op(lambda m, y, z: torch.cat([y * 1.5, z], 1) * 2, "getitem"),
    "norm": Op(lambda m, y, z: m.norm(pool(y)), "NormCodes", parts=NORM),
    "norm relu": Op(lambda m, y, z: F.relu(m.norm(pool(y))), "NormCodes", parts=NORM),
}

JOINS: Final[dict[str, Op]] = {
    "cat": Op(lambda m, y, z: torch.cat([y, z], 1), "cat"),
    "cat of three": Op(lambda m, y, z: torch.cat((y, z, y), dim=1), "cat"),
    "cat of itself": Op(lambda m, y, z: torch.cat([y, y], 1), "cat"),
    "cat of other scales": Op(lambda m, y, z: torch.cat([pool(y), pool(m.conv(z))], 1), "cat",
        parts=(("conv", lambda: _loud(nn.Conv2d(8, 8, 1))),)),
    "cat along height": Op(lambda m, y, z: torch.cat([y, z], -2), "cat"),
    "stack": Op(lambda m, y, z: torch.stack([y, z], 2), "stack"),
}  # fmt: skip


def _loud(conv: nn.Conv2d) -> nn.Conv2d:
    """Values twenty times as large as its neighbours'."""
    with torch.no_grad():
        conv.weight.mul_(20.0)
    return conv


POOLS: Final[dict[str, Op]] = {
    "avg_pool1d": Op(lambda m, y, z: F.avg_pool1d(y, 3), "AverageCodes", LINE),
    "avg_pool2d": Op(lambda m, y, z: F.avg_pool2d(y, 2), "AverageCodes"),
    "avg_pool2d stride": Op(lambda m, y, z: F.avg_pool2d(y, (3, 2), stride=1), "AverageCodes"),
    "avg_pool3d": Op(lambda m, y, z: F.avg_pool3d(y, 2), "AverageCodes", CUBE),
    "adaptive_avg_pool1d": Op(lambda m, y, z: F.adaptive_avg_pool1d(y, 7), "AverageCodes", LINE),
    "adaptive_avg_pool2d": Op(lambda m, y, z: F.adaptive_avg_pool2d(y, 1), "AverageCodes"),
    "adaptive to 3 by 4": Op(lambda m, y, z: F.adaptive_avg_pool2d(y, (3, 4)), "AverageCodes"),
    "adaptive with None": Op(lambda m, y, z: F.adaptive_avg_pool2d(y, (3, None)), "AverageCodes"),
    "adaptive_avg_pool3d": Op(lambda m, y, z: F.adaptive_avg_pool3d(y, 2), "AverageCodes", CUBE),
    "mean": Op(lambda m, y, z: y.mean((2, 3)), "AverageCodes"),
    "mean keepdim": Op(lambda m, y, z: y.mean(dim=[2, 3], keepdim=True), "AverageCodes"),
    "mean of one": Op(lambda m, y, z: torch.mean(y, -1), "AverageCodes"),
    "max_pool1d": Op(lambda m, y, z: F.max_pool1d(y, 3, padding=1), "MaxPoolCodes", LINE),
    "max_pool2d": Op(lambda m, y, z: F.max_pool2d(y, 2), "MaxPoolCodes"),
    "max_pool2d padded": Op(lambda m, y, z: F.max_pool2d(y, 3, 2, padding=1), "MaxPoolCodes"),
    "max_pool2d dilated": Op(lambda m, y, z: F.max_pool2d(y, 3, 1, 0, 2), "MaxPoolCodes"),
    "max_pool2d ceil": Op(lambda m, y, z: F.max_pool2d(y, 3, 2, ceil_mode=True), "MaxPoolCodes"),
    "max_pool3d": Op(lambda m, y, z: F.max_pool3d(y, 2), "MaxPoolCodes", CUBE),
    "adaptive_max_pool1d": Op(
        lambda m, y, z: F.adaptive_max_pool1d(y, 7), "AdaptiveMaxPoolCodes", LINE
    ),
    "adaptive_max_pool2d": Op(lambda m, y, z: F.adaptive_max_pool2d(y, 3), "AdaptiveMaxPoolCodes"),
    "adaptive_max_pool3d": Op(
        lambda m, y, z: F.adaptive_max_pool3d(y, 2), "AdaptiveMaxPoolCodes", CUBE
    ),
}

MOVES: Final[dict[str, Op]] = {
    "reshape": Op(lambda m, y, z: y.reshape(y.shape[0], 4, 2, -1), "reshape"),
    "view": Op(lambda m, y, z: y.view(-1, 8, 5, 20), "reshape"),
    "flatten": Op(lambda m, y, z: torch.flatten(y, 1), "flatten"),
    "flatten space": Op(lambda m, y, z: y.flatten(2), "flatten"),
    "permute": Op(lambda m, y, z: y.permute(0, 2, 3, 1), "permute"),
    "transpose": Op(lambda m, y, z: y.transpose(1, 2), "transpose"),
    "swapaxes": Op(lambda m, y, z: torch.swapaxes(y, 2, 3), "transpose"),
    "squeeze": Op(lambda m, y, z: y[:, :, :1].squeeze(2), "squeeze"),
    "unsqueeze": Op(lambda m, y, z: y.unsqueeze(2), "unsqueeze"),
    "expand": Op(lambda m, y, z: y[:, :, :1].expand(-1, -1, 7, -1), "expand"),
    "narrow": Op(lambda m, y, z: y.narrow(1, 2, 5), "narrow"),
    "select": Op(lambda m, y, z: y.select(2, 3), "select"),
    "slice": Op(lambda m, y, z: y[:, 1:7, ::2, -4:], "getitem"),
    "index": Op(lambda m, y, z: y[:, 1:, 2], "getitem"),
    "new axis": Op(lambda m, y, z: y[:, :, None], "getitem"),
    "contiguous": Op(lambda m, y, z: y.transpose(2, 3).contiguous(), "transpose"),
    "repeat": Op(lambda m, y, z: y.repeat(1, 2, 1, 1), "repeat"),
    "flip": Op(lambda m, y, z: y.flip(3), "flip"),
    "roll": Op(lambda m, y, z: torch.roll(y, 3, dims=1), "roll"),
    "index_select": Op(lambda m, y, z: y.index_select(1, m.index), "index_select"),
    "clone": Op(lambda m, y, z: y.flip(2).clone(), "flip"),
    "pad": Op(lambda m, y, z: F.pad(y, (1, 2, 0, 1)), "pad"),
    "pad value": Op(lambda m, y, z: F.pad(y, (1, 2), value=0.4), "pad"),
    "pad reflect": Op(lambda m, y, z: F.pad(y, (1, 2, 2, 1), mode="reflect"), "pad"),
    "pad replicate": Op(lambda m, y, z: F.pad(y, (1, 2, 2, 1), mode="replicate"), "pad"),
    "pad circular": Op(lambda m, y, z: F.pad(y, (1, 2, 2, 1), mode="circular"), "pad"),
    "pad negative": Op(lambda m, y, z: F.pad(y, (-1, 2)), "pad"),
    "pixel_shuffle": Op(lambda m, y, z: F.pixel_shuffle(y, 2), "pixel_shuffle_codes"),
    "pixel_unshuffle": Op(lambda m, y, z: F.pixel_unshuffle(y, 2), "pixel_unshuffle_codes"),
    "channel_shuffle": Op(lambda m, y, z: F.channel_shuffle(y, 4), "channel_shuffle"),
    "nearest": Op(lambda m, y, z: F.interpolate(y, scale_factor=2), "interpolate"),
    "nearest to size": Op(lambda m, y, z: F.interpolate(y, size=(7, 13)), "interpolate"),
    "nearest-exact": Op(
        lambda m, y, z: F.interpolate(y, size=(7, 13), mode="nearest-exact"), "interpolate"
    ),
    "cat of chunks": Op(lambda m, y, z: torch.cat(y.chunk(2, 2), 1), "cat"),
    "stack of parts": Op(lambda m, y, z: torch.stack(y.unbind(2), 2), "stack"),
    "chunk": Op(lambda m, y, z: y.chunk(2, 1)[1], "getitem"),
    "split": Op(lambda m, y, z: torch.split(y, [3, 5], 1)[1], "getitem"),
    "split in equal parts": Op(lambda m, y, z: y.split(3, 2)[0], "getitem"),
    "unbind": Op(lambda m, y, z: y.unbind(2)[4], "getitem"),
    "both halves": Op(
        lambda m, y, z: torch.cat([y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1), "cat"
    ),
    "half processed": Op(lambda m, y, z: torch.cat([y.chunk(2, 1)[0], m.part(y.chunk(2, 1)[1])], 1),
        "cat", parts=(("part", lambda: nn.Conv2d(4, 4, 1)),)),
}  # fmt: skip

IN_FLOAT: Final[dict[str, Op]] = {
    "unknown": Op(lambda m, y, z: torch.cumsum(y, 1), "float"),
    "spread": Op(lambda m, y, z: y.var(1, keepdim=True), "float"),
}  # fmt: skip
"""Ops without an int8 form or kernel: they must run anyway, and the report must say so."""

CASES: Final = {**SUMS, **PAIRS, **JOINS, **POOLS, **MOVES}


def _kernels(model: nn.Module, *data: Tensor, **options: Any) -> dict[str, list[Compared]]:
    return check_ops(model, *data, **options).kernels


def _convolutions(kernels: dict[str, list[Compared]]) -> int:
    """How many layers ran on a kernel for convolutions, pointwise ones being linear layers."""
    return sum(len(kernels.get(name, ())) for name in ("X86Conv", "X86Pointwise"))


def checked(case: Op) -> GraphModule:
    """Hold all ops of the case to the reference; return the x86 model."""
    model = case.model()
    found = check_ops(model, *batches(case.shape))
    if case.kernel != "float":
        assert case.kernel in found.kernels, f"ran {sorted(found.kernels)}"
    return found.lowered


@pytest.mark.parametrize("name", CASES)
def test_ops_on_codes_are_the_references(name: str) -> None:
    converted = checked(CASES[name])
    report = fxquant.report(converted)
    assert report.coverage == 1.0, str(report)
    inside = [n for n in converted.graph.nodes if is_op(n, QUANTIZE, DEQUANTIZE)]
    assert [n.op for n in converted.graph.nodes].count("placeholder") == 1
    # One at the input; the last layer writes float itself.
    assert len(inside) == 1, converted.code


@pytest.mark.parametrize("name", IN_FLOAT)
def test_ops_without_a_kernel_run_in_float_and_say_so(name: str) -> None:
    converted = checked(IN_FLOAT[name])
    left = [op for op in fxquant.report(converted).ops if not op.int8]
    assert left
    assert all(op.why for op in left)
    assert all(op.int8 for op in fxquant.report(converted).ops if op.op.startswith("conv"))


UNARY_ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "threshold": {"threshold": 0.1, "value": 0.0},
    "clamp": {"min": -0.3, "max": 0.8},
    "pow": {"exponent": 2},
    "hardtanh": {"min_val": -0.5, "max_val": 0.6},
    "leaky_relu": {"negative_slope": 0.2},
    "power_of": {"base": 1.5},
    "rsub": {"other": 0.7},
}
DOMAINS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    **{
        name: lambda x: x.relu() + 0.5
        for name in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "lgamma")
    },
    **{name: lambda x: x.tanh() * 0.8 for name in ("asin", "acos", "atanh", "erfinv")},
    "logit": lambda x: x.sigmoid(),
    "acosh": lambda x: x.relu() + 1.1,
    "tan": lambda x: x.tanh(),
}
"""What keeps the inputs of a function where it is defined, and finite."""


def unary(name: str) -> Callable[[Tensor], Tensor]:
    target: Any = op_named(name).target
    return lambda x: target(x, **UNARY_ARGUMENTS.get(name, {}))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_unary_op_alone_is_a_table(name: str) -> None:
    function = unary(name)

    def body(m: nn.Module, y: Tensor, z: Tensor) -> Tensor:
        real = pool(y)
        return function(DOMAINS[name](real) if name in DOMAINS else real)

    converted = checked(Op(body, "TableCodes"))
    assert fxquant.report(converted).coverage == 1.0


LAYERS: Final[dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "conv1d": (lambda: nn.Conv1d(8, 8, 3, padding=1), LINE),
    "conv2d": (lambda: nn.Conv2d(8, 8, 3), IMAGE),
    "conv3d": (lambda: nn.Conv3d(8, 8, 3, padding=1), CUBE),
    "linear": (lambda: nn.Linear(8, 9), ROWS),
}
KINDS: Final[dict[str, Callable[[], nn.Module]]] = {
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "depthwise": lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),
    "dilated": lambda: nn.Conv2d(8, 8, 3, dilation=2, padding=2),
    "strided": lambda: nn.Conv2d(8, 8, 3, stride=(2, 3), padding=1),
    "pointwise": lambda: nn.Conv2d(8, 5, 1, bias=False),
    "padding same": lambda: nn.Conv2d(8, 8, 3, padding="same"),
    "padding same, even": lambda: nn.Conv2d(8, 8, 4, padding="same", dilation=2),
    "padding valid": lambda: nn.Conv2d(8, 8, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(8, 8, 3, padding=(2, 1), padding_mode="replicate"),
    "circular": lambda: nn.Conv2d(8, 8, 3, padding=2, padding_mode="circular"),
}


def _layer_case(
    make: Callable[[], nn.Module], shape: tuple[int, ...], act: str, kernel: str = ""
) -> GraphModule:
    function = unary(act) if act else torch.clone

    def body(m: Any, y: Tensor, z: Tensor) -> Tensor:
        return function(m.layer(y))

    kernel = kernel or ("X86Linear" if shape == ROWS else "X86Conv")
    return checked(Op(body, kernel, shape, (("layer", make),)))


@pytest.mark.parametrize("act", ["", *(n for n in ACTIVATIONS if n not in DOMAINS)])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_with_every_activation(layer: str, act: str) -> None:
    converted = _layer_case(*LAYERS[layer], act)
    assert fxquant.report(converted).weight_coverage == 1.0
    floats = [n for n in converted.graph.nodes if is_op(n, QUANTIZE)]
    fused = act in ("", *_TAKES[layer]) or (layer, act) == ("conv3d", "relu")
    # Where the kernel has the activation nothing is left but the quantize of the input.
    assert (len(floats) == 1) is fused, converted.code


@pytest.mark.parametrize("act", ("", "relu", "silu"))
@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_of_every_kind(kind: str, act: str) -> None:
    kernel = "X86Pointwise" if kind == "pointwise" else "X86Conv"
    converted = _layer_case(KINDS[kind], IMAGE, act, kernel)
    assert fxquant.report(converted).coverage == 1.0


@pytest.mark.parametrize("shape", [(16, 24), (4, 5, 24), (2, 3, 4, 24), (24,)], ids=str)
def test_linears_of_every_rank(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 7), nn.GELU()).eval()
    kernels = _kernels(model, *batches(shape))
    assert len(kernels["X86Linear"]) == 2


UNBATCHED: Final[dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]] = {
    "conv1d": (lambda: nn.Conv1d(6, 6, 3, padding=1), (6, 20)),
    "conv2d": (lambda: nn.Conv2d(6, 6, 3, padding=1), (6, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 6, 3, padding=1), (6, 5, 6, 7)),
    "pointwise": (lambda: nn.Conv2d(6, 6, 1), (6, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 6, 3, padding=1), (6, 9, 8)),
}


@pytest.mark.parametrize("kind", UNBATCHED)
def test_convolutions_without_a_batch(kind: str) -> None:
    """torch takes a single picture too, calibrated on one or on batches."""
    make, shape = UNBATCHED[kind]
    model = One(lambda m, x: m.c(F.relu(m.b(m.a(x)) + x)), a=make(), b=make(), c=make()).eval()
    check_ops(model, *batches(shape))
    lowered = check_ops(model, *batches((4, *shape))).lowered
    x = torch.randn(shape)
    assert torch.equal(lowered(x), lowered(x.unsqueeze(0)).squeeze(0))


@pytest.mark.parametrize("preset", ("default", "qnnpack"))
def test_weights_per_tensor_and_per_channel(preset: str) -> None:
    model = Op(lambda m, y, z: F.relu(m.conv(y)), "X86Conv", parts=CONV).model()
    kernels = _kernels(model, *batches(IMAGE), qconfig=preset)
    assert [len(kernels[name]) for name in ("X86Pointwise", "X86Conv")] == [2, 1]


# What is summed over must be free


class Residual(nn.Module):
    """``conv(y) + y`` where the user reads ``y`` again in a way of their own."""

    def __init__(self, again: Callable[..., Any]) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.middle, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.again = again

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.again(self, y, self.conv(self.middle(y)) + y)


READS_AGAIN: Final[dict[str, tuple[Callable[..., Any], bool]]] = {
    "not at all": (lambda m, y, s: m.last(s), True),
    "by a layer after the sum": (lambda m, y, s: m.last(s) + m.last(y), False),
    "by a sum after the sum": (lambda m, y, s: m.last(s) * y, False),
    "as a result of the model": (lambda m, y, s: (m.last(s), y), False),
    "through a view": (lambda m, y, s: m.last(s) * y.flatten(2).view(y.shape), False),
    "through a slice": (lambda m, y, s: m.last(s)[:, :, 1:] * y[:, :, 1:], False),
}


@pytest.mark.parametrize("how", READS_AGAIN)
def test_a_residual_read_later_is_not_overwritten(how: str) -> None:
    again, free = READS_AGAIN[how]
    model = Residual(again).eval()
    data = batches(IMAGE)
    lowered, reference = both(model, *data)
    assert any(c.kernel == "X86ConvSum" for c in lockstep(lowered, reference, data[0]))
    clones = [n for n in lowered.graph.nodes if n.target is torch.clone]
    assert bool(clones) is not free
    # Running as a whole: what is overwritten too early would be off by far more than one code.
    wanted, found = reference(data[0]), lowered(data[0])
    step = max(info(n).writes.scale for n in lowered.graph.nodes if info(n).writes)  # type: ignore[union-attr]
    for a, b in zip(
        wanted if isinstance(wanted, tuple) else (wanted,),
        found if isinstance(found, tuple) else (found,),
        strict=True,
    ):
        assert float((a - b).abs().max()) <= 4 * step


def test_the_input_of_the_model_is_never_overwritten() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.last(self.conv(x) + x)
            return found

    x = torch.randn(IMAGE)
    lowered, _ = both(Plain().eval(), x)
    kept = x.clone()
    first = lowered(x)
    assert torch.equal(x, kept)
    assert torch.equal(lowered(x), first)


def test_a_layer_summed_with_its_own_input() -> None:
    """One memory to read from and to write to would go wrong within the kernel itself."""
    case = Op(lambda m, y, z: m.conv(y) + y, "X86ConvSum", parts=CONV)
    x = torch.randn(IMAGE)
    lowered, reference = both(case.model(), x)
    assert any(n.target is torch.clone for n in lowered.graph.nodes)
    with torch.no_grad():
        wanted = reference(x)
        # One code here and there, not whole pixels.
        assert float((lowered(x) - wanted).abs().mean()) <= 1e-3 * float(wanted.abs().max())


def test_a_sum_that_broadcasts_is_no_sum_of_the_kernel() -> None:
    case = Op(lambda m, y, z: m.conv(y) + z[:, :, :1, :1], "X86Conv", parts=CONV)
    found = check_ops(case.model(), *batches(IMAGE))
    assert "X86ConvSum" not in found.kernels


def test_two_sums_over_one_residual() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(6, 8, 1)
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.last = nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            found: Tensor = self.last(torch.cat([self.a(y) + y, self.b(y) + y], 1))
            return found

    data = batches(IMAGE)
    found = check_ops(Twice().eval(), *data)
    assert len(found.kernels["X86ConvSum"]) == 2
    with torch.no_grad():
        wanted = found.reference(data[0])
        # One code here and there, not whole pixels.
        assert float((found.lowered(data[0]) - wanted).abs().mean()) <= 1e-3 * float(
            wanted.abs().max()
        )


def test_may_overwrite_refuses_views_inputs_and_later_readers() -> None:
    """On the Q/DQ graph itself, where the lowering asks it."""
    model = Residual(lambda m, y, s: m.last(s) + m.last(y)).eval()
    _, reference = both(model, *batches(IMAGE))
    graph = copy.deepcopy(reference).graph
    quantizes = [n for n in graph.nodes if is_op(n, QUANTIZE)]
    for codes in quantizes:
        (dq,) = (u for u in codes.users if is_op(u, DEQUANTIZE))
        readers = sorted(dq.users)
        last = readers[-1]
        following = next((q for q in quantizes if last < q), None)
        if following is not None:
            assert may_overwrite(codes, dq, following)
        if len(readers) > 1:
            assert not may_overwrite(codes, dq, readers[0])


def test_layers_that_write_float_are_lowered_too() -> None:
    """The last layer of a model: no quantize follows, and none is needed."""
    for tail in (nn.Conv2d(8, 5, 3), nn.Sequential(nn.Conv2d(8, 5, 3), nn.ReLU())):
        model = nn.Sequential(nn.Conv2d(6, 8, 1), tail).eval()
        data = batches(IMAGE)
        found = check_ops(model, *data)
        assert [len(found.kernels[k]) for k in ("X86Pointwise", "X86Conv")] == [1, 1]
        assert not any(is_op(n, DEQUANTIZE) for n in found.lowered.graph.nodes)


def test_narrow_codes_stay_within_their_range() -> None:
    """Kernels saturate at 0 and 255; a type of 7 bits is not theirs."""
    seven = fxquant.QConfig(activation=fxquant.QSpec("uint8", 7))
    model = Op(lambda m, y, z: F.relu(m.conv(y) + y), "", parts=CONV).model()
    data = batches(IMAGE)
    lowered, reference = both(model, *data, qconfig=seven)
    for one in lockstep(lowered, reference, data[0]):
        assert one.worst <= 1
    with torch.no_grad():
        wanted = reference(data[0])
        assert float((lowered(data[0]) - wanted).abs().max()) <= 0.05 * float(wanted.abs().max())


def test_int8_activations_go_to_linears() -> None:
    signed = fxquant.QConfig(activation=fxquant.QSpec("int8"))
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 7)).eval()
    kernels = _kernels(model, *batches(ROWS), qconfig=signed)
    assert len(kernels["X86Linear"]) == 2


def test_int8_activations_go_to_convs_stored_128_higher() -> None:
    signed = fxquant.QConfig(activation=fxquant.QSpec("int8"))
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 7, 1)).eval()
    kernels = _kernels(model, *batches(IMAGE), qconfig=signed)
    assert [len(kernels[name]) for name in ("X86Conv", "X86Pointwise")] == [1, 1]
