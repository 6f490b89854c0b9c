"""Int8 activations as uint8, 128 higher: the same numbers, for kernels that read uint8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.graph.edit import Edit, Editor
from fxquant.graph.info import QType, info
from fxquant.passes.convert import Convert
from fxquant.passes.share_scales import ShareScales
from fxquant.passes.unsigned_codes import UnsignedCodes, unsigned
from fxquant.spec import QConfig, QSpec
from tests.backends.lockstep import check_ops
from tests.helpers import measured, run

SYMMETRIC = QSpec("int8", symmetric=True)
AFFINE = QSpec("int8")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions with a relu, a sum, a pad, a pool and a concatenation on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(16, 4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        z = torch.relu(self.b(y) + y)
        z = torch.cat(
            [F.max_pool2d(F.pad(z, (1, 1, 1, 1)), 2), F.max_pool2d(self.a(x), 2, padding=1)], 1
        )
        return self.c(z)


def ranges(spec: QSpec) -> GraphModule:
    return measured(Net().eval(), X, overrides=(("*", QConfig(activation=spec)),))


def types(module: GraphModule) -> dict[str, QType]:
    found = {node.name: info(node).qtype for node in module.graph.nodes}
    return {name: qtype for name, qtype in found.items() if qtype is not None}


def edits(module: GraphModule, *, reads_unsigned: bool = True) -> list[Edit]:
    editor = Editor(module)
    UnsignedCodes(reads_unsigned).run(editor)
    return editor.log


@pytest.mark.parametrize("spec", [SYMMETRIC, AFFINE], ids=["symmetric", "affine"])
def test_every_type_is_that_of_the_same_numbers(spec: QSpec) -> None:
    module = ranges(spec)
    before = types(module)
    assert len(edits(module)) == len(before) > 4
    for name, after in types(module).items():
        old = before[name]
        assert (after.dtype, after.quant_min, after.quant_max) == (torch.uint8, 0, 255)
        assert (after.scale, after.high) == (old.scale, old.high)
        # The code that a symmetric range leaves out is in use.
        assert after.low == old.low - (old.scale if spec.symmetric else 0.0)


def test_the_numbers_are_those_of_int8() -> None:
    spec = QSpec("int8", symmetric=True, observer="minmax")
    signed, moved = ranges(spec), run(ranges(spec), UnsignedCodes(reads_unsigned=True))
    wanted, found = (run(module, ShareScales(), Convert())(X) for module in (signed, moved))
    assert torch.equal(found, wanted)


def test_few_bits_stay_few() -> None:
    qtype = QType(0.5, 0, -7, 7, torch.int8)
    assert unsigned(qtype) == QType(0.5, 128, 121, 135, torch.uint8)


def test_other_backends_and_other_types_are_left_alone() -> None:
    module = ranges(SYMMETRIC)
    assert edits(module, reads_unsigned=False) == []
    assert edits(ranges(QSpec())) == []


def test_it_is_idempotent() -> None:
    module = ranges(SYMMETRIC)
    assert edits(module)
    assert edits(module) == []


def test_kernels_of_the_users_keep_the_type_that_was_asked_for() -> None:
    seen: list[torch.dtype] = []

    def kernel(x: Any, conv: Any, output: Any) -> Tensor:
        seen.extend((x.codes.dtype, output.dtype))
        weight = conv.weight * conv.scale.view(-1, 1, 1, 1)
        real = torch.tanh(F.conv2d(x.real, weight, conv.bias))
        codes = (real / output.scale).round() + output.zero_point
        return codes.clamp(output.quant_min, output.quant_max).to(output.dtype)

    @fxquant.pattern(kernel=kernel)
    def conv_tanh(x: Tensor, conv: nn.Conv2d) -> Tensor:
        return torch.tanh(conv(x))

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3)
    )
    config = QConfig(activation=SYMMETRIC)
    q = fxquant.quantize(net.eval(), [X], qconfig=config, patterns=(conv_tanh,), backend="x86")
    q(X)
    assert set(seen) == {torch.int8}
    kernels = {op.path: (op.reads[0], op.kernel) for op in fxquant.report(q).ops}
    assert str(kernels["0"][0]).startswith("uint8") and kernels["0"][1].startswith("X86")


@pytest.mark.parametrize("spec", [SYMMETRIC, AFFINE], ids=["symmetric", "affine"])
def test_kernels_run_on_them(spec: QSpec) -> None:
    checked = check_ops(Net().eval(), X, qconfig=QConfig(activation=spec))
    kinds = " ".join(checked.kernels)
    assert "X86Conv" in kinds or "X86Stem" in kinds
    assert all(op.int8 for op in fxquant.report(checked.lowered).ops)
