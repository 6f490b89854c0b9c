"""The reference backend: the Q/DQ graph as it stands, which everything else is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backends.reference import Reference
from fxquant.graph.info import info
from fxquant.graph.op_table import DEQUANTIZE, DEQUANTIZE_WEIGHT, QUANTIZE, is_op
from fxquant.numerics.affine import dequantize, quantize


def test_it_runs_everywhere_and_lowers_nothing() -> None:
    backend = Reference()
    assert backend.missing() is None
    assert backend.rules == ()
    assert not backend.saturates_pairs


def by_hand(q: torch.fx.GraphModule, model: nn.Sequential, x: Tensor) -> Tensor:
    """conv-relu-linear, quantized with the qparams of ``q`` in nothing but this arithmetic."""
    # What is flattened keeps its codes, so the second quantize and the last are one.
    first, second, *_ = [info(n).writes for n in q.graph.nodes if is_op(n, QUANTIZE)]
    assert first is not None and second is not None

    def rounded(weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        scale = (rows.abs().amax(1) / 127).view(-1, *[1] * (weight.dim() - 1))
        return (weight / scale).round().clamp(-127, 127) * scale

    def through(value: Tensor, scale: float, zero: int) -> Tensor:
        codes = ((value / scale).round() + zero).clamp(0, 255)
        return (codes - zero) * scale

    conv, linear = model[0], model[3]
    assert isinstance(conv, nn.Conv2d) and isinstance(linear, nn.Linear)
    y = through(x, first.scale, first.zero_point)
    y = F.conv2d(y, rounded(conv.weight), conv.bias).relu().flatten(1)
    y = through(y, second.scale, second.zero_point)
    return F.linear(y, rounded(linear.weight), linear.bias)


def test_its_numbers_are_the_formula() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).eval()
    x = torch.randn(4, 3, 6, 6)
    q = fxquant.quantize(model, [x], backend="reference")
    with torch.no_grad():
        # Float32 rounding of scales; a code on the edge would show as 0.02 and more.
        torch.testing.assert_close(q(x), by_hand(q, model, x), rtol=1e-4, atol=1e-4)


def test_every_quantize_feeds_a_dequantize_and_the_reverse() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Sigmoid()).eval()
    q = fxquant.quantize(model, [torch.randn(4, 3, 6, 6)], backend="reference")
    quantizes = [n for n in q.graph.nodes if is_op(n, QUANTIZE)]
    dequantizes = [n for n in q.graph.nodes if is_op(n, DEQUANTIZE)]
    weights = [n for n in q.graph.nodes if is_op(n, DEQUANTIZE_WEIGHT)]
    assert all(is_op(u, DEQUANTIZE) for n in quantizes for u in n.users)
    assert all(n.users for n in (*quantizes, *dequantizes, *weights))
    assert all(is_op(n.args[0], QUANTIZE) for n in dequantizes)
    for n in dequantizes:
        source = n.args[0]
        assert source.args[1:3] == n.args[1:3]
    # As many as the report says: one per code-valued input, one per int8 weight.
    ops = fxquant.report(q).ops
    assert len(weights) == sum(op.weight.startswith("int8") for op in ops) == 2
    assert len(quantizes) == sum(qtype is not None for op in ops for qtype in op.reads)


def test_it_runs_in_other_shapes_and_float_types_come_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    q = fxquant.quantize(model, [torch.randn(4, 3, 6, 6)], backend="reference")
    for shape in ((0, 3, 6, 6), (1, 3, 9, 5), (3, 6, 6)):
        found = q(torch.randn(shape))
        assert found.dtype == torch.float32
        assert found.shape == model(torch.randn(shape)).shape


def test_codes_between_ops_are_exactly_representable() -> None:
    """Quantizing what was dequantized gives the same code: for all 256, as the hub relies on."""
    codes = torch.arange(256).to(torch.uint8)
    for scale, zero in ((0.0123, 7), (3.3e-5, 255), (812.5, 0)):
        again = quantize(dequantize(codes, scale, zero), scale, zero, 0, 255, torch.uint8)
        assert torch.equal(again, codes)
