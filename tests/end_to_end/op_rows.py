"""The 46 rows of ops that a quantizer is asked for, each in the spellings people use.

A body gets the model (for its parameters and layers) and what an int8 layer made; another int8
layer reads what the body returns. Pictures are ``[2, 8, 8, 8]``, rows ``[2, 6, 16]``, signals
``[2, 8, 16]``, volumes ``[2, 8, 4, 6, 6]``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

import fxquant

Body = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        bodies: the spellings; a layer stands for a call of it.
        given: what the bodies get: ``image``, ``rows``, ``signal``, ``volume`` or ``ids``.
        parts: makes the layers and parameters that the bodies use.
        floats: ops that may stay in float, each with a part of the reason that must be given.
        asked: overrides; for what is faster in float as one kernel, and int8 only where asked for.
        ends: whether the result is the model's, because no layer can read it.
    """

    bodies: tuple[Body, ...]
    given: str = "image"
    parts: Callable[[], dict[str, Any]] = dict
    floats: dict[str, str] = field(default_factory=dict)
    asked: dict[Any, fxquant.QConfig] = field(default_factory=dict)
    ends: bool = False


def _p(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / math.sqrt(max(shape[-1], 1)))


def _linear() -> dict[str, Any]:
    return {"w": _p(16, 16), "v": _p(16), "layer": nn.Linear(16, 16)}


def _conv(rank: int, groups: int = 1, transposed: bool = False) -> Callable[[], dict[str, Any]]:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    ups = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def make() -> dict[str, Any]:
        layer: Any = (ups if transposed else kinds)[rank - 1](8, 8, 3, groups=groups)
        return {"layer": layer, "w": layer.weight, "v": layer.bias, "groups": groups}

    return make


def _norm(shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "w": nn.Parameter(torch.rand(shape) + 0.5),
        "v": nn.Parameter(0.1 * torch.randn(shape)),
        "mean": nn.Parameter(0.1 * torch.randn(shape), requires_grad=False),
        "var": nn.Parameter(torch.rand(shape) + 0.5, requires_grad=False),
    }


def _heads(x: Any) -> Any:
    return x.unflatten(-1, (4, 4)).transpose(1, 2)


def _group_shuffle(m: Any, x: Any) -> Any:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def _iadd(m: Any, x: Any) -> Any:
    y = m.other(x)
    y += x
    return y


def _imul(m: Any, x: Any) -> Any:
    y = m.other(x)
    y *= x
    return y


def _isub(m: Any, x: Any) -> Any:
    y = m.other(x)
    y -= x
    return y


def _attention(**options: Any) -> dict[str, Any]:
    return {"mha": nn.MultiheadAttention(16, 4, batch_first=True, **options)}


def _other() -> dict[str, Any]:
    return {"other": nn.Conv2d(8, 8, 1), "gate": nn.Linear(8, 8)}


_INDEX: Final = torch.tensor([3, 1, 0, 2, 5])
_SCORES: Final = {"attention_scores": "", "softmax": "", "unflatten": "", "transpose": ""}
"""Between its two products, attention is float."""
_OPENED: Final = {F.scaled_dot_product_attention: fxquant.QConfig()}

_LAYERS: Final[dict[str, Row]] = {
    "linear": Row(
        (
            lambda m, x: m.layer(x),
            lambda m, x: F.linear(x, m.w, m.v),
            lambda m, x: F.linear(input=x, weight=m.w),
            lambda m, x: torch.relu(m.layer(x)),
            lambda m, x: F.gelu(m.layer(x)),
            lambda m, x: m.layer(x) + x,
        ),
        "rows",
        _linear,
    ),
    "conv1d": Row(
        (
            lambda m, x: m.layer(x),
            lambda m, x: F.conv1d(x, m.w, m.v, padding=1),
            lambda m, x: torch.conv1d(x, m.w).relu(),
        ),
        "signal",
        _conv(1),
    ),
    "conv2d": Row(
        (
            lambda m, x: m.layer(x),
            lambda m, x: F.conv2d(input=x, weight=m.w, bias=m.v, stride=2),
            lambda m, x: torch.conv2d(x, m.w, None, 1, 1),
        ),
        "image",
        _conv(2),
    ),
    "conv3d": Row(
        (
            lambda m, x: m.layer(x),
            lambda m, x: F.conv3d(x, m.w, m.v, padding=1),
            lambda m, x: torch.conv3d(x, m.w),
        ),
        "volume",
        _conv(3),
    ),
    "conv_transpose": Row(
        (
            lambda m, x: m.layer(x),
            lambda m, x: F.conv_transpose2d(x, m.w, m.v, stride=2),
            lambda m, x: torch.conv_transpose2d(x, m.w, stride=2, padding=1).relu(),
        ),
        "image",
        _conv(2, transposed=True),
    ),
}

_PRODUCTS: Final[dict[str, Row]] = {
    "matmul": Row(
        (
            lambda m, x: x @ x.transpose(1, 2),
            lambda m, x: torch.matmul(x, x.mT),
            lambda m, x: x.matmul(other=x.transpose(-1, -2)),
            lambda m, x: operator.matmul(_heads(x), _heads(x).transpose(2, 3)),
            lambda m, x: x @ m.w,
        ),
        "rows",
        _linear,
    ),
    "bmm, addmm, baddbmm": Row(
        (
            lambda m, x: torch.bmm(x, x.transpose(1, 2)),
            lambda m, x: x.bmm(x.mT),
            lambda m, x: torch.addmm(m.v, x.flatten(0, 1), m.w),
            lambda m, x: torch.baddbmm(x[:, :, :6], x, x.transpose(1, 2)),
            lambda m, x: x[:, :, :6].baddbmm(x, x.transpose(1, 2), beta=0.5),
        ),
        "rows",
        _linear,
    ),
    "einsum": Row(
        (
            lambda m, x: torch.einsum("bid,bjd->bij", x, x),
            lambda m, x: torch.einsum("bhid,bhjd->bhij", _heads(x), _heads(x)),
            lambda m, x: torch.einsum("bid,de->bie", x, m.w),
        ),
        "rows",
        _linear,
    ),
    "scaled_dot_product_attention": Row(
        (
            lambda m, x: F.scaled_dot_product_attention(_heads(x), _heads(x), _heads(x)),
            lambda m, x: F.scaled_dot_product_attention(
                query=_heads(x), key=_heads(x), value=_heads(x), is_causal=True
            ),
        ),
        "rows",
        floats=_SCORES,
        asked=_OPENED,
    ),
    "nn.MultiheadAttention": Row(
        (
            lambda m, x: m.mha(x, x, x, need_weights=False)[0],
            lambda m, x: m.mha(query=x, key=x, value=x)[0],
        ),
        "rows",
        _attention,
        {**_SCORES, "attention_weights": ""},
        _OPENED,
    ),
    "LSTM": Row(
        (lambda m, x: m.rnn(x)[0],),
        "rows",
        lambda: {"rnn": nn.LSTM(16, 12, batch_first=True)},
        {"getitem": ""},
    ),
    "GRU": Row(
        (lambda m, x: m.rnn(x)[0],),
        "rows",
        lambda: {"rnn": nn.GRU(16, 12, batch_first=True)},
        {"getitem": ""},
    ),
    "RNN, cells": Row(
        (
            lambda m, x: m.rnn(x)[0],
            lambda m, x: m.gru(x[:, 0]),
            lambda m, x: m.lstm(x[:, 0])[0],
            lambda m, x: m.cell(x[:, 0], m.cell(x[:, 1])),
        ),
        "rows",
        lambda: {
            "rnn": nn.RNN(16, 12, batch_first=True),
            "gru": nn.GRUCell(16, 12),
            "lstm": nn.LSTMCell(16, 12),
            "cell": nn.RNNCell(16, 12),
        },
        {"getitem": ""},
    ),
    "Embedding, EmbeddingBag": Row(
        (
            lambda m, x: m.emb(x),
            lambda m, x: F.embedding(x, m.emb.weight),
            lambda m, x: m.bag(x),
        ),
        "ids",
        lambda: {"emb": nn.Embedding(20, 16), "bag": nn.EmbeddingBag(20, 16)},
    ),
}

_ARITHMETIC: Final[dict[str, Row]] = {
    "add": Row(
        (
            lambda m, x: m.other(x) + x,
            lambda m, x: torch.add(m.other(x), x),
            lambda m, x: torch.add(m.other(x), other=x, alpha=2),
            lambda m, x: m.other(x).add(x),
            lambda m, x: m.other(x).add_(x, alpha=0.5).relu(),
            lambda m, x: operator.add(x, x),
            lambda m, x: x + x.mean((2, 3), keepdim=True),
            lambda m, x: 2 + x,
            _iadd,
        ),
        parts=_other,
    ),
    "mul": Row(
        (
            lambda m, x: m.other(x) * x,
            lambda m, x: torch.mul(m.other(x), x),
            lambda m, x: torch.multiply(x, other=m.other(x)),
            lambda m, x: m.other(x).mul(x),
            lambda m, x: x * m.gate(x.mean((2, 3))).sigmoid()[:, :, None, None],
            lambda m, x: x.mul(0.5),
            _imul,
        ),
        parts=_other,
    ),
    "sub, div": Row(
        (
            lambda m, x: m.other(x) - x,
            lambda m, x: torch.sub(m.other(x), x, alpha=2),
            lambda m, x: m.other(x).sub(x),
            lambda m, x: torch.subtract(x, 0.5),
            lambda m, x: 1 - x,
            lambda m, x: x / 3,
            lambda m, x: torch.div(x, 0.5),
            lambda m, x: x.div_(2.0),
            _isub,
        ),
        parts=_other,
    ),
    "pow, sqrt, exp, neg, abs": Row(
        (
            lambda m, x: x.pow(2),
            lambda m, x: x**2,
            lambda m, x: torch.pow(x, exponent=3),
            lambda m, x: x.relu().sqrt(),
            lambda m, x: torch.exp(x),
            lambda m, x: -x,
            lambda m, x: torch.abs(x),
            lambda m, x: x.abs_(),
        )
    ),
    "relu, relu6, hardtanh, clamp": Row(
        (
            lambda m, x: torch.relu(x + 1),
            lambda m, x: F.relu(x + 1, inplace=True),
            lambda m, x: (x + 1).relu_(),
            lambda m, x: F.relu6(x),
            lambda m, x: F.hardtanh(x, -1.0, 1.0),
            lambda m, x: x.clamp(min=0),
            lambda m, x: torch.clip(x, -1, 1),
        )
    ),
    "leaky_relu, prelu, elu": Row(
        (
            lambda m, x: F.leaky_relu(x, 0.1),
            lambda m, x: m.leaky(x),
            lambda m, x: m.prelu(x),
            lambda m, x: F.prelu(x, m.slope),
            lambda m, x: m.slopes(x),
            lambda m, x: F.elu(x),
        ),
        parts=lambda: {
            "leaky": nn.LeakyReLU(0.2),
            "prelu": nn.PReLU(),
            "slopes": nn.PReLU(8),
            "slope": nn.Parameter(torch.tensor([0.2])),
        },
    ),
    "sigmoid, tanh, hardsigmoid, hardswish": Row(
        (
            lambda m, x: torch.sigmoid(x),
            lambda m, x: x.sigmoid(),
            lambda m, x: F.tanh(x),
            lambda m, x: x.tanh_(),
            lambda m, x: F.hardsigmoid(x),
            lambda m, x: F.hardswish(x),
        )
    ),
    "gelu, silu, mish, softplus, selu": Row(
        (
            lambda m, x: F.gelu(x, approximate="tanh"),
            lambda m, x: F.silu(x),
            lambda m, x: x * torch.sigmoid(x),
            lambda m, x: F.mish(x),
            lambda m, x: x * torch.tanh(F.softplus(x)),
            lambda m, x: F.softplus(x, beta=2),
            lambda m, x: torch.selu(x),
        )
    ),
    "softmax": Row(
        (
            lambda m, x: torch.softmax(x, 1),
            lambda m, x: F.softmax(x, dim=-1),
            lambda m, x: x.softmax(dim=1),
            lambda m, x: m.layer(x),
        ),
        "rows",
        lambda: {"layer": nn.Softmax(dim=-1)},
    ),
}

_NORMS: Final[dict[str, Row]] = {
    "BatchNorm": Row(
        (
            lambda m, x: F.batch_norm(x + 1, m.mean, m.var, m.w, m.v),
            lambda m, x: F.relu(m.layer(F.max_pool2d(x, 2))),
        ),
        parts=lambda: {**_norm(8)(), "layer": nn.BatchNorm2d(8)},
    ),
    "LayerNorm": Row(
        (
            lambda m, x: F.layer_norm(x, (16,), m.w, m.v),
            lambda m, x: m.layer(x),
        ),
        "rows",
        lambda: {**_norm(16)(), "layer": nn.LayerNorm(16)},
    ),
    "GroupNorm": Row(
        (lambda m, x: F.group_norm(x, 2, m.w, m.v), lambda m, x: m.layer(x)),
        parts=lambda: {**_norm(8)(), "layer": nn.GroupNorm(4, 8)},
    ),
    "InstanceNorm": Row(
        (
            lambda m, x: F.instance_norm(x, weight=m.w, bias=m.v),
            lambda m, x: m.layer(x),
        ),
        parts=lambda: {**_norm(8)(), "layer": nn.InstanceNorm2d(8, affine=True)},
    ),
    "RMSNorm, normalize": Row(
        (
            lambda m, x: F.rms_norm(x, (16,), m.w),
            lambda m, x: m.layer(x),
            lambda m, x: F.normalize(x, dim=-1),
            lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.w,
        ),
        "rows",
        lambda: {**_norm(16)(), "layer": nn.RMSNorm(16)},
    ),
}

_POOLS: Final[dict[str, Row]] = {
    "MaxPool": Row(
        (
            lambda m, x: F.max_pool2d(x, 2),
            lambda m, x: torch.max_pool2d(x, kernel_size=3, stride=2, padding=1),
            lambda m, x: m.layer(x),
        ),
        parts=lambda: {"layer": nn.MaxPool2d(3, 2, ceil_mode=True)},
    ),
    "AvgPool, AdaptiveAvgPool": Row(
        (
            lambda m, x: F.avg_pool2d(x, 2),
            lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
            lambda m, x: F.adaptive_avg_pool2d(x, output_size=(2, 2)),
            lambda m, x: m.layer(x),
        ),
        parts=lambda: {"layer": nn.AdaptiveAvgPool2d(1)},
    ),
    "AdaptiveMaxPool": Row(
        (lambda m, x: F.adaptive_max_pool2d(x, 2), lambda m, x: m.layer(x)),
        parts=lambda: {"layer": nn.AdaptiveMaxPool2d((1, 1))},
    ),
    "mean, sum, amax": Row(
        (
            lambda m, x: x.mean((2, 3)),
            lambda m, x: torch.mean(x, dim=[-2, -1], keepdim=True),
            lambda m, x: x.sum(1, keepdim=True),
            lambda m, x: torch.sum(x, dim=(2, 3)),
            lambda m, x: x.amax((2, 3)),
            lambda m, x: torch.amax(x, dim=1, keepdim=True),
        )
    ),
}

_MOVES: Final[dict[str, Row]] = {
    "cat, stack": Row(
        (
            lambda m, x: torch.cat([m.other(x), x], 1),
            lambda m, x: torch.concat((x, m.other(x)), dim=1),
            lambda m, x: torch.concatenate([x, x], dim=1),
            lambda m, x: torch.stack((m.other(x), x), 1).flatten(1, 2),
        ),
        parts=_other,
    ),
    "split, chunk, unbind": Row(
        (
            lambda m, x: x.split(4, 1)[0] + x.split(4, 1)[1],
            lambda m, x: torch.cat(torch.chunk(x, 2, dim=1)[::-1], 1),
            lambda m, x: x.chunk(2, dim=1)[1],
            lambda m, x: torch.split(x, [3, 5], dim=1)[1],
            lambda m, x: x.unbind(2)[3],
            lambda m, x: torch.tensor_split(x, 2, dim=1)[0],
        )
    ),
    "slice, getitem, select, narrow": Row(
        (
            lambda m, x: x[:, 2:6],
            lambda m, x: x[..., ::2],
            lambda m, x: x[:, :, 0],
            lambda m, x: x[:, None, 1],
            lambda m, x: torch.narrow(x, 1, 0, 4),
            lambda m, x: x.narrow(dim=2, start=1, length=4),
            lambda m, x: x.select(2, 1),
        )
    ),
    "interpolate, Upsample": Row(
        (
            lambda m, x: F.interpolate(x, scale_factor=2),
            lambda m, x: F.interpolate(x, size=(12, 12), mode="bilinear", align_corners=False),
            lambda m, x: m.layer(x),
            lambda m, x: m.bilinear(x),
        ),
        parts=lambda: {
            "layer": nn.Upsample(scale_factor=2, mode="nearest"),
            "bilinear": nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        },
    ),
    "PixelShuffle": Row(
        (
            lambda m, x: F.pixel_shuffle(x, 2),
            lambda m, x: m.layer(x),
            lambda m, x: torch.pixel_unshuffle(x, downscale_factor=2),
        ),
        parts=lambda: {"layer": nn.PixelShuffle(2)},
    ),
    "ChannelShuffle": Row(
        (lambda m, x: m.layer(x), lambda m, x: F.channel_shuffle(x, 4), _group_shuffle),
        parts=lambda: {"layer": nn.ChannelShuffle(2)},
    ),
    "pad": Row(
        (
            lambda m, x: F.pad(x, (1, 1, 1, 1)),
            lambda m, x: F.pad(x, [0, 1, 0, 1], mode="reflect"),
            lambda m, x: F.pad(x, pad=(1, 1, 1, 1), mode="replicate"),
            lambda m, x: F.pad(x, (1, 1, 1, 1), "circular"),
            lambda m, x: F.pad(x, (-1, -1, 0, 0), value=1.0),
            lambda m, x: m.reflect(x),
            lambda m, x: m.zero(x),
        ),
        parts=lambda: {"reflect": nn.ReflectionPad2d(1), "zero": nn.ZeroPad2d(1)},
    ),
    "view, reshape, flatten, squeeze": Row(
        (
            lambda m, x: x.view(x.size(0), -1),
            lambda m, x: x.reshape((x.shape[0], 4, 2, 8, 8)).flatten(1, 2),
            lambda m, x: torch.reshape(x, (2, 8, 64)),
            lambda m, x: torch.flatten(x, 1),
            lambda m, x: x.flatten(start_dim=2),
            lambda m, x: m.flat(x),
            lambda m, x: x.unsqueeze(1).squeeze(1),
            lambda m, x: torch.unsqueeze(x, dim=0).squeeze(),
            lambda m, x: x.unflatten(1, (2, 4)).view_as(x),
        ),
        parts=lambda: {"flat": nn.Flatten()},
    ),
    "transpose, permute": Row(
        (
            lambda m, x: x.transpose(1, 3),
            lambda m, x: torch.transpose(x, dim0=2, dim1=3),
            lambda m, x: x.permute(0, 2, 3, 1),
            lambda m, x: torch.permute(x, (0, 3, 1, 2)),
            lambda m, x: x.permute(dims=(0, 1, 3, 2)).contiguous(),
            lambda m, x: x.movedim(1, -1),
            lambda m, x: torch.swapaxes(x, 1, 2),
            lambda m, x: x.mT,
        )
    ),
    "expand, repeat, tile": Row(
        (
            lambda m, x: x[:, :1].expand(-1, 8, -1, -1),
            lambda m, x: x[:, :1].expand_as(x),
            lambda m, x: x.repeat(1, 2, 1, 1),
            lambda m, x: torch.tile(x, (1, 1, 2)),
            lambda m, x: x.repeat_interleave(2, dim=2),
        )
    ),
    "gather, index_select, where, masked_fill": Row(
        (
            lambda m, x: torch.index_select(x, 1, m.index),
            lambda m, x: x.index_select(dim=1, index=m.index),
            lambda m, x: x[:, m.index],
            lambda m, x: torch.gather(x, 1, m.many),
            lambda m, x: torch.where(m.mask, x, m.other(x)),
            lambda m, x: torch.where(m.mask, x, 0.0),
            lambda m, x: x.masked_fill(m.mask, 0.5),
        ),
        parts=lambda: {
            **_other(),
            "index": nn.Buffer(_INDEX),
            "many": nn.Buffer(_INDEX.view(1, 5, 1, 1).repeat(2, 1, 8, 8)),
            "mask": nn.Buffer(torch.rand(8, 8) > 0.5),
        },
    ),
    "topk, argmax": Row(
        (
            lambda m, x: (torch.argmax(x, dim=1), m.other(x)),
            lambda m, x: (x.argmax(1, keepdim=True), m.other(x)),
            lambda m, x: m.other(x.topk(8, 1)[0]),
            lambda m, x: m.other(torch.topk(x, 8, dim=1).values),
        ),
        parts=_other,
        ends=True,
    ),
    "roll, unfold, flip": Row(
        (
            lambda m, x: torch.roll(x, shifts=(-1, 1), dims=(2, 3)),
            lambda m, x: x.roll(2, 1),
            lambda m, x: torch.flip(x, [3]),
            lambda m, x: x.flip(2, 3),
            lambda m, x: F.unfold(x, 3, padding=1),
            lambda m, x: x.unfold(3, 4, 2),
        )
    ),
    "dropout, identity": Row(
        (
            lambda m, x: m.drop(x),
            lambda m, x: F.dropout(x, 0.5, m.training),
            lambda m, x: m.same(x),
            lambda m, x: F.dropout2d(x, training=False),
        ),
        parts=lambda: {"drop": nn.Dropout(0.3), "same": nn.Identity()},
    ),
}

ROWS: Final[dict[str, Row]] = {
    **_LAYERS, **_PRODUCTS, **_ARITHMETIC, **_NORMS, **_POOLS, **_MOVES,
}  # fmt: skip
"""All rows, by name."""

MORE: Final[dict[str, Row]] = {
    "conv2d": Row((lambda m, x: m.layer(x),), "image", _conv(2, groups=2)),
    "conv2d depthwise": Row((lambda m, x: m.layer(x),), "image", _conv(2, groups=8)),
    "conv_transpose 1d": Row((lambda m, x: m.layer(x),), "signal", _conv(1, transposed=True)),
    "conv_transpose 3d": Row((lambda m, x: m.layer(x),), "volume", _conv(3, transposed=True)),
    "conv_transpose grouped": Row((lambda m, x: m.layer(x),), "image", _conv(2, 4, True)),
    "pools 1d": Row((lambda m, x: F.max_pool1d(x, 2), lambda m, x: F.avg_pool1d(x, 2)), "signal"),
    "pools 3d": Row((lambda m, x: F.max_pool3d(x, 2), lambda m, x: F.avg_pool3d(x, 2)), "volume"),
    "BatchNorm 1d": Row((lambda m, x: m.n(x + 1),), "signal", lambda: {"n": nn.BatchNorm1d(8)}),
    "BatchNorm 3d": Row((lambda m, x: m.n(x + 1),), "volume", lambda: {"n": nn.BatchNorm3d(8)}),
}
"""The same ops in other ranks and groupings."""
