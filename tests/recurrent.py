"""Recurrent layers to test with: float ones of every option, and their int8 twins."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fxquant.numerics.affine import quantize_weight
from fxquant.numerics.integer_recurrent import IntegerRecurrent
from fxquant.numerics.observers import weight_qparams
from fxquant.spec import DEFAULT_WEIGHT, ROWS, QSpec

KINDS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU", "projected")
PROJECTED = "ignore:LSTM with projections is not supported with oneDNN"
"""What torch says of its own float layer."""
Case = tuple[nn.RNNBase, Tensor, Any]


def float_layer(kind: str, width: int, hidden: int, *, seed: int = 0, **options: Any) -> nn.RNNBase:
    """A layer in eval mode whose weights are those of its seed."""
    torch.manual_seed(seed)
    if kind == "projected":
        return nn.LSTM(width, hidden, **{"proj_size": hidden // 2, **options}).eval()
    if kind.startswith("RNN"):
        return nn.RNN(width, hidden, nonlinearity=kind[4:].lower(), **options).eval()
    cls: Any = {"LSTM": nn.LSTM, "GRU": nn.GRU}[kind]
    made: nn.RNNBase = cls(width, hidden, **options).eval()
    return made


def integer_layer(layer: nn.RNNBase, bits: int = 7, reads: QSpec = ROWS) -> IntegerRecurrent:
    """The int8 twin of ``layer``; at 7 bits no pair of products can pass 16 bits."""
    spec = QSpec(DEFAULT_WEIGHT.dtype, bits, symmetric=True, granularity="channel")
    weights = {}
    for name, weight in layer.named_parameters():
        if name.startswith("weight"):
            qparams = weight_qparams(weight, spec, 0)
            weights[name] = (quantize_weight(weight, qparams).contiguous(), qparams.scale)
    return IntegerRecurrent(layer, weights, reads)


@st.composite
def layers(draw: st.DrawFn, least: int = 1) -> Case:
    """A layer at least so wide, an input that fits, and a state that fits, or none."""
    kind, both = draw(st.sampled_from(KINDS)), draw(st.booleans())
    depth, hidden = draw(st.integers(1, 2)), draw(st.integers(max(least, 2), 40))
    first, seed = draw(st.booleans()), draw(st.integers(0, 99))
    layer = float_layer(
        kind,
        draw(st.integers(least, 40)),
        hidden,
        seed=seed,
        num_layers=depth,
        bidirectional=both,
        batch_first=first,
        bias=draw(st.booleans()),
    )
    generator = torch.Generator().manual_seed(seed)
    steps, batch = draw(st.integers(1, 6)), draw(st.sampled_from([None, 0, 1, 3]))
    shape: tuple[int, ...] = (steps, layer.input_size)
    if batch is not None:
        shape = (batch, *shape) if first else (steps, batch, layer.input_size)
    x = torch.randn(shape, generator=generator)
    if not draw(st.booleans()):
        return layer, x, None
    count = depth * (2 if both else 1)
    widths = (layer.proj_size or hidden, hidden)[: 2 if layer.mode == "LSTM" else 1]
    middle = () if batch is None else (batch,)
    state = tuple(torch.rand(count, *middle, w, generator=generator) * 2 - 1 for w in widths)
    return layer, x, state if layer.mode == "LSTM" else state[0]


def flat(made: Any) -> list[Tensor]:
    """The output and the states that a layer returns, in a list."""
    out, ends = made
    return [out, *(ends if isinstance(ends, tuple) else (ends,))]


def decibels(wanted: Tensor, found: Tensor) -> float:
    """Signal to noise of ``found``, where ``wanted`` is the signal."""
    noise = float((wanted.detach() - found).double().square().sum())
    return 10 * math.log10(
        max(float(wanted.detach().double().square().sum()), 1e-30) / max(noise, 1e-30)
    )
