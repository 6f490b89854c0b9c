"""Kernels of ops on codes against the float op, in turns: where the cost table comes from.

Run as ``python -m benchmarks.ops_on_codes``. For every op: the float op alone, the float op between
a ``dequantize`` and a ``quantize``, and the kernel on codes; medians of interleaved rounds, two
threads, in microseconds. An op between int8 layers is worth it on codes where the last column is
below one.

A second table is of rows quantized at run time: by the rule in eager torch, as dynamic linears do
it on x86, a part of that, and for comparison one pass over the same memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from fxquant.backends.x86_layers import PostOp
from fxquant.backends.x86_norms import StatisticsCodes
from fxquant.backends.x86_ops import PairCodes, TableCodes
from fxquant.backends.x86_real import AffineCodes, RealCodes, SlopeCodes, SoftmaxCodes
from fxquant.backends.x86_reduce import AverageCodes
from fxquant.backends.x86_row_codes import RowCodes
from fxquant.backends.x86_transposed import TransposedGeometry, X86ConvTranspose
from fxquant.graph.info import QType
from fxquant.numerics.affine import dequantize, quantize
from fxquant.numerics.dynamic import byte_rows, byte_scales
from fxquant.spec import ROWS

READS = QType(0.02, 117, 0, 255, torch.uint8)
WRITES = QType(0.03, 121, 0, 255, torch.uint8)
Case = tuple[str, Tensor, Callable[[Tensor], Tensor], nn.Module]


def codes_of(*shape: int) -> Tensor:
    """Random codes, in the layout convolutions leave them in."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    return codes.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else codes


def norms(rows: Tensor, image: Tensor) -> list[Case]:
    """Norms and softmax."""
    c, width = image.shape[1], rows.shape[-1]
    ln, rms, gn = nn.LayerNorm(width), nn.RMSNorm(width), nn.GroupNorm(32, c)
    inorm, bn = nn.InstanceNorm2d(c, affine=True), nn.BatchNorm2d(c).eval()
    line = nn.BatchNorm1d(rows.shape[1]).eval()
    ones = torch.ones(c)
    return [
        ("layer_norm", rows, ln, StatisticsCodes("layer_norm", ln, READS, WRITES)),
        ("rms_norm", rows, rms, StatisticsCodes("rms_norm", rms, READS, WRITES)),
        ("group_norm", image, gn, StatisticsCodes("group_norm", gn, READS, WRITES)),
        ("instance_norm", image, inorm, StatisticsCodes("instance_norm", inorm, READS, WRITES)),
        ("batch_norm 1d", rows, line,
            AffineCodes(torch.ones(rows.shape[1]), torch.ones(rows.shape[1]), READS, WRITES,
                        channels=True)),
        ("batch_norm 2d affine", image, bn, AffineCodes(ones, ones, READS, WRITES, channels=True)),
        ("softmax", rows, lambda x: x.softmax(-1), SoftmaxCodes("softmax", -1, READS, WRITES)),
        ("normalize", rows, lambda x: F.normalize(x, dim=-1),
            RealCodes("normalize", {"p": 2.0, "dim": -1, "eps": 1e-12}, (READS,), WRITES)),
        ("local_response_norm", image, lambda x: F.local_response_norm(x, 5),
            RealCodes("local_response_norm",
                      {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 1.0}, (READS,), WRITES)),
    ]  # fmt: skip


def averages(image: Tensor) -> list[Case]:
    """Reductions, pools and interpolation."""

    def case(name: str, function: Callable[..., Tensor], **options: object) -> Case:
        kernel = AverageCodes(name.split(",")[0], dict(options), READS, WRITES)
        return name, image, lambda x: function(x, **options), kernel

    double = {"scale_factor": 2.0}
    return [
        case("mean", torch.mean, dim=(2, 3)),
        case("sum", torch.sum, dim=(2, 3)),
        case("avg_pool2d", F.avg_pool2d, kernel_size=2),
        case("avg_pool2d, padded", F.avg_pool2d, kernel_size=3, stride=1, padding=1),
        case("adaptive_avg_pool2d", F.adaptive_avg_pool2d, output_size=7),
        case("interpolate, bilinear", F.interpolate, mode="bilinear", **double),
        case("interpolate, bicubic", F.interpolate, mode="bicubic", **double),
        case("interpolate, area", F.interpolate, mode="area", size=(14, 14)),
    ]


def arithmetic(image: Tensor) -> list[Case]:
    """Sums, products, gates and tables."""
    c = image.shape[1]
    gamma, slope = torch.rand(c, 1, 1), torch.rand(c)
    table = torch.arange(256).to(torch.uint8)
    pairs: list[Case] = []
    both: dict[str, Callable[[Tensor], Tensor]] = {
        "div": lambda x: x / x,
        "maximum": lambda x: torch.maximum(x, x),
    }
    for name, function in both.items():
        kernel = RealCodes(name, {}, (READS, READS), WRITES)
        pairs.append((name, image, function, _Both(kernel)))
    add = PairCodes("add", False, READS, READS, WRITES)
    scale = AffineCodes(gamma, torch.zeros(()), READS, WRITES)
    chain = TableCodes(table, "chain", WRITES)
    return [
        ("add", image, lambda x: x + x, _Both(add)),
        *pairs,
        ("times a constant", image, lambda x: x * gamma, scale),
        ("prelu", image, lambda x: F.prelu(x, slope), SlopeCodes(slope, READS, WRITES)),
        ("glu", image, lambda x: F.glu(x, 1), RealCodes("glu", {"dim": 1}, (READS,), WRITES)),
        ("unary (x * sigmoid(1.7 x))", image, lambda x: x * torch.sigmoid(1.7 * x), chain),
    ]


class _Both(nn.Module):
    def __init__(self, pair: nn.Module) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, codes: Tensor) -> Tensor:
        return self.pair(codes, codes)


def transposed() -> list[Case]:
    """Transposed convolutions: the float layer alone is what they replace."""
    found: list[Case] = []
    convs: tuple[type[nn.Module], ...] = (
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
    for rank, cls, side in ((1, convs[0], 512), (2, convs[1], 28), (3, convs[2], 10)):
        layer = cls(64, 32, 4, stride=2, padding=1)
        weight = torch.randint(-127, 128, tuple(layer.get_parameter("weight").shape)).to(torch.int8)
        geometry = TransposedGeometry((2,) * rank, (1,) * rank, (0,) * rank, (1,) * rank, 1)
        kernel = X86ConvTranspose(
            weight, torch.full((32,), 1e-3), None, READS, WRITES, PostOp(), geometry
        )
        codes = codes_of(1, 64, *(side,) * rank)
        found.append((f"conv_transpose{rank}d", codes, layer, kernel))
    return found


def measure(calls: dict[str, Callable[[], object]], rounds: int = 60) -> dict[str, float]:
    """Median microseconds of each, in turns."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            spent[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(times) for name, times in spent.items()}


def row(case: Case) -> list[object]:
    """One line of the table."""
    name, codes, real, kernel = case
    x = dequantize(codes, READS.scale, READS.zero_point)
    out = (WRITES.scale, WRITES.zero_point, 0, 255, torch.uint8)
    found = measure({
        "float": lambda: real(x),
        "between": lambda: quantize(real(dequantize(codes, READS.scale, READS.zero_point)), *out),
        "codes": lambda: kernel(codes),
    })  # fmt: skip
    size = max(codes.numel(), kernel(codes).numel())
    return [
        name,
        size,
        *(round(found[key], 1) for key in ("float", "between", "codes")),
        round(1000 * found["codes"] / size, 2),
        round(1000 * found["float"] / size, 2),
        round(found["codes"] / found["float"], 2),
        round(found["codes"] / found["between"], 2),
    ]


HEADERS = (
    *("op", "elements", "float us", "dq+float+q us", "codes us"),
    *("codes ns", "float ns", "codes / float", "codes / between"),
)


ROW_HEADERS = ("rows", "width", "the rule us", "RowCodes us", "of it scales us", "one pass us")


def rows_at_run_time(count: int, width: int) -> list[object]:
    """One line of the second table."""
    x, room = torch.randn(count, width), torch.empty(count, width)
    fused = RowCodes(width, ROWS)
    found = measure({
        "rule": lambda: byte_rows(x, ROWS),
        "fused": lambda: fused(x),
        "scales": lambda: byte_scales(x, ROWS),
        "pass": lambda: torch.mul(x, 0.5, out=room),
    })  # fmt: skip
    return [count, width, *(round(spent, 1) for spent in found.values())]


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(2)
    rows, image = codes_of(1, 197, 768), codes_of(1, 64, 56, 56)
    cases = [*norms(rows, image), *averages(image), *arithmetic(image), *transposed()]
    with torch.no_grad():
        print(tabulate([row(case) for case in cases], headers=HEADERS, disable_numparse=True))
        sizes = ((1, 768), (128, 768), (128, 3072), (1024, 768))
        table = [rows_at_run_time(*size) for size in sizes]
        print("\n" + tabulate(table, headers=ROW_HEADERS, disable_numparse=True))


if __name__ == "__main__":
    main()
