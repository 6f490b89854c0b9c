"""Ops that compute in float between codes, beside the reference, in all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.graph.op_table import DEQUANTIZE, QUANTIZE, is_op
from tests.backends.lockstep import check_ops
from tests.backends.test_x86_rules import (
    CUBE,
    IMAGE,
    LINE,
    ROWS,
    Op,
    batches,
    int8_wherever_possible,
    pool,
    trained_norm,
)

__all__ = ["int8_wherever_possible"]  # a fixture: importing it is what makes it act here


def stirred(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Fresh weights of norms are ones and zeros, which would hide a lost factor."""

    def made() -> nn.Module:
        module = make()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return module.eval()

    return made


class Held(nn.Module):
    """Holds a tensor for the model."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def part(make: Callable[[], nn.Module]) -> tuple[tuple[str, Callable[[], nn.Module]], ...]:
    return (("n", stirred(make)),)


def tracking(channels: int) -> nn.Module:
    """An instance norm that uses the statistics of its training."""
    return nn.InstanceNorm3d(channels, affine=True, track_running_stats=True)


SCALE: Final = part(lambda: Held(8, 1, 1))

NORMS: Final[dict[str, Op]] = {
    "layer_norm": Op(lambda m, y, z: m.n(y), "StatisticsCodes", ROWS,
        part(lambda: nn.LayerNorm(8))),
    "layer_norm of more": Op(lambda m, y, z: m.n(y), "StatisticsCodes", IMAGE,
        part(lambda: nn.LayerNorm((8, 10, 10)))),
    "layer_norm plain": Op(lambda m, y, z: F.layer_norm(y, (8,)), "StatisticsCodes", ROWS),
    "layer_norm no bias": Op(lambda m, y, z: m.n(y), "StatisticsCodes", ROWS,
        part(lambda: nn.LayerNorm(8, bias=False))),
    "group_norm": Op(lambda m, y, z: m.n(y), "StatisticsCodes", IMAGE,
        part(lambda: nn.GroupNorm(2, 8))),
    "group_norm line": Op(lambda m, y, z: m.n(y), "StatisticsCodes", LINE,
        part(lambda: nn.GroupNorm(8, 8))),
    "instance_norm": Op(lambda m, y, z: m.n(y), "StatisticsCodes", IMAGE,
        part(lambda: nn.InstanceNorm2d(8))),
    "instance_norm affine": Op(lambda m, y, z: m.n(y), "StatisticsCodes", LINE,
        part(lambda: nn.InstanceNorm1d(8, affine=True))),
    "instance_norm tracking": Op(lambda m, y, z: m.n(y), "AffineCodes", CUBE,
        (("n", lambda: trained_norm(tracking)),)),
    "F.instance_norm": Op(lambda m, y, z: F.instance_norm(y), "StatisticsCodes", CUBE),
    "rms_norm": Op(lambda m, y, z: m.n(y), "StatisticsCodes", ROWS, part(lambda: nn.RMSNorm(8))),
    "rms_norm plain": Op(lambda m, y, z: F.rms_norm(y, (8,), eps=1e-3), "StatisticsCodes", ROWS),
    "batch_norm of rows": Op(lambda m, y, z: m.n(y.flip(1)), "AffineCodes", ROWS,
        (("n", lambda: trained_norm(nn.BatchNorm1d)),)),
    "batch_norm of a line": Op(lambda m, y, z: m.n(y.flip(1)), "AffineCodes", LINE,
        (("n", lambda: trained_norm(nn.BatchNorm1d)),)),
    "batch_norm of a cube": Op(lambda m, y, z: F.relu(m.n(y.flip(1))), "AffineCodes", CUBE,
        (("n", lambda: trained_norm(nn.BatchNorm3d)),)),
    "normalize": Op(lambda m, y, z: F.normalize(y), "RealCodes"),
    "local_response_norm": Op(lambda m, y, z: F.local_response_norm(y, 3), "RealCodes"),
    "softmax": Op(lambda m, y, z: y.softmax(1), "SoftmaxCodes"),
    "log_softmax": Op(lambda m, y, z: F.log_softmax(y, -1), "SoftmaxCodes", ROWS),
}  # fmt: skip

AVERAGES: Final[dict[str, Op]] = {
    "sum": Op(lambda m, y, z: y.sum((2, 3)), "AverageCodes"),
    "mean of all but one": Op(lambda m, y, z: y.mean((0, 2), keepdim=True), "AverageCodes"),
    "padded": Op(lambda m, y, z: F.avg_pool2d(y, 3, 1, 1), "AverageCodes"),
    "padded, not counted": Op(
        lambda m, y, z: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False), "AverageCodes"
    ),
    "ceil": Op(lambda m, y, z: F.avg_pool2d(y, 3, 2, ceil_mode=True), "AverageCodes"),
    "divisor": Op(lambda m, y, z: F.avg_pool2d(y, 2, divisor_override=3), "AverageCodes"),
    "padded line": Op(lambda m, y, z: F.avg_pool1d(y, 3, 2, 1), "AverageCodes", LINE),
    "padded cube": Op(lambda m, y, z: F.avg_pool3d(y, 3, 2, 1), "AverageCodes", CUBE),
    "bilinear": Op(
        lambda m, y, z: F.interpolate(y, scale_factor=2, mode="bilinear"), "AverageCodes"
    ),
    "bilinear, corners": Op(
        lambda m, y, z: F.interpolate(y, size=(7, 13), mode="bilinear", align_corners=True),
        "AverageCodes",
    ),
    "bilinear to the size of another": Op(
        lambda m, y, z: F.interpolate(y[:, :, ::2, ::2], size=z.shape[2:], mode="bilinear"),
        "AverageCodes",
    ),
    "bilinear to a computed size": Op(
        lambda m, y, z: F.interpolate(y, size=(y.shape[2] * 2, 7), mode="bilinear"), "AverageCodes"
    ),
    "bicubic": Op(lambda m, y, z: F.interpolate(y, size=(7, 5), mode="bicubic"), "AverageCodes"),
    "antialias": Op(
        lambda m, y, z: F.interpolate(y, size=(7, 5), mode="bilinear", antialias=True),
        "AverageCodes",
    ),
    "area": Op(lambda m, y, z: F.interpolate(y, size=(7, 5), mode="area"), "AverageCodes"),
    "linear": Op(
        lambda m, y, z: F.interpolate(y, scale_factor=1.5, mode="linear"), "AverageCodes", LINE
    ),
    "trilinear": Op(
        lambda m, y, z: F.interpolate(y, scale_factor=2, mode="trilinear"), "AverageCodes", CUBE
    ),
    "norm": Op(lambda m, y, z: y.norm(dim=1, keepdim=True), "RealCodes"),
    "vector_norm": Op(lambda m, y, z: torch.linalg.vector_norm(y, dim=(2, 3)), "RealCodes"),
}

ARITHMETIC: Final[dict[str, Op]] = {
    "glu": Op(lambda m, y, z: F.glu(y, 1), "RealCodes"),
    "prelu": Op(lambda m, y, z: m.n(pool(y)), "SlopeCodes", IMAGE, part(lambda: nn.PReLU(8))),
    "prelu of one": Op(lambda m, y, z: m.n(pool(y)), "SlopeCodes", IMAGE, part(nn.PReLU)),
    "div": Op(lambda m, y, z: pool(y) / (pool(z).abs() + 1), "RealCodes"),
    "maximum": Op(lambda m, y, z: torch.maximum(pool(y), pool(z)), "RealCodes"),
    "minimum": Op(lambda m, y, z: F.relu(pool(y).minimum(z[:, :1, :5, :5])), "RealCodes"),
    "addcmul": Op(
        lambda m, y, z: torch.addcmul(pool(y), pool(z), pool(z), value=0.5), "RealCodes"
    ),
    "addcdiv": Op(
        lambda m, y, z: pool(y).addcdiv(pool(z), pool(z).abs() + 1, value=0.5), "RealCodes"
    ),
    "lerp": Op(lambda m, y, z: torch.lerp(pool(y), pool(z), 0.3), "RealCodes"),
    "number minus": Op(lambda m, y, z: 1 - pool(y), "TableCodes"),
    "number over": Op(lambda m, y, z: 2 / (pool(y).relu() + 1), "TableCodes"),
    "layer scale": Op(lambda m, y, z: pool(y) * m.n.weight, "AffineCodes", IMAGE, SCALE),
    "position": Op(lambda m, y, z: F.relu(m.n.weight + pool(y)), "AffineCodes", IMAGE, SCALE),
    "minus constant": Op(lambda m, y, z: pool(y) - m.n.weight, "AffineCodes", IMAGE, SCALE),
    "constant minus": Op(
        lambda m, y, z: torch.sub(m.n.weight, pool(y), alpha=2), "AffineCodes", IMAGE, SCALE
    ),
    "over constant": Op(
        lambda m, y, z: pool(y) / (m.n.weight), "AffineCodes", IMAGE, part(lambda: Held(8, 1, 1))
    ),
    "constant over": Op(
        lambda m, y, z: m.n.weight / (pool(y).abs() + 0.5), "RealCodes", IMAGE, SCALE
    ),
    "constant made by a view": Op(
        lambda m, y, z: pool(y) * m.n.weight[:, None, None], "AffineCodes", IMAGE,
        part(lambda: Held(8)),
    ),
}  # fmt: skip

BROADCAST_SUMS: Final[dict[str, Op]] = {
    "conv + one per channel": Op(
        lambda m, y, z: m.n(y) + z.mean((2, 3), keepdim=True), "RealCodes", IMAGE,
        part(lambda: nn.Conv2d(8, 8, 3, padding=1)),
    ),
    "relu(linear + row)": Op(
        lambda m, y, z: F.relu(m.n(y) + z[:1]), "RealCodes", ROWS, part(lambda: nn.Linear(8, 8))
    ),
    "conv1d + y": Op(
        lambda m, y, z: m.n(y) + z, "RealCodes", LINE, part(lambda: nn.Conv1d(8, 8, 3, padding=1))
    ),
    "conv + constant": Op(
        lambda m, y, z: F.relu(m.n(y) + m.n.bias[:, None, None]), "float", IMAGE,
        part(lambda: nn.Conv2d(8, 8, 3, padding=1)),
    ),
}  # fmt: skip

CASES: Final = {**NORMS, **AVERAGES, **ARITHMETIC, **BROADCAST_SUMS}


@pytest.mark.parametrize("name", CASES)
def test_codes_are_the_references(name: str) -> None:
    case = CASES[name]
    found = check_ops(case.model(), *batches(case.shape))
    if case.kernel != "float":
        assert case.kernel in found.kernels, f"ran {sorted(found.kernels)}"
        left = [n for n in found.lowered.graph.nodes if is_op(n, QUANTIZE, DEQUANTIZE)]
        assert len(left) == 1, found.lowered.code  # the quantize of the input
    assert fxquant.report(found.lowered).coverage == 1.0


@pytest.mark.parametrize("name", ("conv + one per channel", "conv1d + y"))
def test_the_report_names_the_kernel_of_a_sum_that_broadcasts(name: str) -> None:
    """A sum that runs outside of the layer's kernel must not be reported as a part of it."""
    case = BROADCAST_SUMS[name]
    lowered = check_ops(case.model(), *batches(case.shape)).lowered
    (summed,) = (op for op in fxquant.report(lowered).ops if op.op.endswith("+add"))
    assert summed.kernel == "X86Conv + RealCodes"


def test_float_parts_of_a_unit_are_reported() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3), nn.Mish(), nn.Conv2d(8, 4, 1))
    lowered = check_ops(model.eval(), *batches(IMAGE)).lowered
    (unit,) = (op for op in fxquant.report(lowered).ops if op.op == "conv2d+mish")
    assert unit.kernel.startswith("X86Conv + float ")


@pytest.mark.parametrize("name", ("layer scale", "position", "over constant"))
def test_a_constant_is_never_observed(name: str) -> None:
    """It is exact in float: eight bits for a whole tensor would round small channels away."""
    prepared = fxquant.prepare(CASES[name].model(), example_inputs=(torch.randn(IMAGE),))
    assert not [n for n, _ in prepared.named_modules() if "n_weight" in n]


def test_other_sizes_and_batches_than_the_examples() -> None:
    def body(m: nn.Module, y: Tensor, z: Tensor) -> Tensor:
        return F.interpolate(F.avg_pool2d(y, 2), size=z.shape[2:], mode="bilinear") + z

    model = Op(body, "AverageCodes").model()
    lowered = check_ops(model, *batches(IMAGE)).lowered
    for shape in ((1, 6, 12, 8), (5, 6, 6, 16)):
        x = torch.randn(shape)
        with torch.no_grad():
            wanted = model(x)
        assert lowered(x).shape == wanted.shape
        # The scales come from other pictures: near is enough here, codes are checked above.
        assert float((lowered(x) - wanted).abs().mean()) < 0.05 * float(wanted.abs().max())
