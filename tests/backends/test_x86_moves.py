"""Moves on codes: exactly the reference's codes, in every form that torch allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.backends import x86_moves
from fxquant.graph.op_table import is_op
from fxquant.patterns.boundary import DEQUANTIZE, QUANTIZE
from tests.backends.lockstep import Checked, check_ops
from tests.backends.test_x86_rules import CUBE, IMAGE, LINE, Op, batches, checked


def _part(module: nn.Module) -> Any:
    return (("part", lambda: module),)


SELECTED: Final[dict[str, Op]] = {
    "list": Op(lambda m, y, z: y[:, [3, 0, -1]], "getitem_codes"),
    "list of rows": Op(lambda m, y, z: y[[2, 0, 0]], "getitem_codes"),
    "index tensor": Op(lambda m, y, z: y[:, m.index], "getitem_codes"),
    "two index tensors": Op(lambda m, y, z: y[:, m.index[:, None], m.index], "getitem_codes"),
    "ellipsis": Op(lambda m, y, z: y[..., 1:4], "getitem"),
    "ellipsis in the middle": Op(lambda m, y, z: y[:, ..., 2, None], "getitem"),
    "select": Op(lambda m, y, z: y.select(-1, -2), "select"),
    "narrow": Op(lambda m, y, z: torch.narrow(y, -1, 1, 4), "narrow"),
    "gather": Op(
        lambda m, y, z: y.gather(1, m.index[None, :, None, None].expand(3, -1, 10, 10)), "gather"
    ),
    "take_along_dim": Op(
        lambda m, y, z: torch.take_along_dim(y, m.index[None, :, None, None], 1),
        "take_along_dim_codes",
    ),
    "where a number": Op(
        lambda m, y, z: torch.where(m.index[:, None, None] > 2, y[:, :4], 0.0), "where_number_codes"
    ),
    "where after a number": Op(
        lambda m, y, z: torch.where(m.index[:, None, None] > 2, 0.1, y[:, :4]), "masked_fill_codes"
    ),
    "where": Op(
        lambda m, y, z: torch.where(m.index[:, None, None] > 2, y[:, :4], z[:, 4:]), "where_codes"
    ),
    "masked_fill": Op(lambda m, y, z: y.masked_fill(m.index.sum() > 100, 0.1), "masked_fill_codes"),
    "masked_fill of rows": Op(
        lambda m, y, z: y[:, :4].masked_fill(m.index[:, None, None] > 2, 0), "masked_fill_codes"
    ),
    "index_fill": Op(lambda m, y, z: y.index_fill(1, m.index, 0.1), "index_fill"),
    "tril": Op(lambda m, y, z: y.tril(), "tril_codes"),
    "triu": Op(lambda m, y, z: torch.triu(y, 1), "triu_codes"),
    "diagonal": Op(lambda m, y, z: y.diagonal(1, -2, -1)[..., None], "diagonal"),
}  # fmt: skip

MOVED: Final[dict[str, Op]] = {
    "view_as": Op(lambda m, y, z: y.flatten(2).view_as(z), "reshape"),
    "ravel": Op(lambda m, y, z: y.ravel().reshape(y.shape), "flatten"),
    "unflatten": Op(lambda m, y, z: y.unflatten(1, (2, 4)), "unflatten"),
    "nn.Unflatten": Op(
        lambda m, y, z: m.part(y), "unflatten", parts=_part(nn.Unflatten(1, (2, 4)))
    ),
    "nn.Flatten": Op(lambda m, y, z: m.part(y), "flatten", parts=_part(nn.Flatten(2))),
    "mT": Op(lambda m, y, z: y.mT, "transpose"),
    "T": Op(lambda m, y, z: y.flatten(1).T.reshape(8, -1, 3), "t"),
    "movedim": Op(lambda m, y, z: y.movedim(-1, 1), "movedim"),
    "expand_as": Op(lambda m, y, z: y[:, :, :1].expand_as(z), "expand"),
    "broadcast_to": Op(lambda m, y, z: torch.broadcast_to(y[:, :, :1], y.shape), "expand"),
    "tile": Op(lambda m, y, z: y.tile(2, 1), "tile"),
    "repeat_interleave": Op(lambda m, y, z: y.repeat_interleave(2, 1), "repeat_interleave_codes"),
    "repeat_interleave last": Op(
        lambda m, y, z: y.repeat_interleave(2, -1), "repeat_interleave_codes"
    ),
    "fliplr": Op(lambda m, y, z: torch.fliplr(y), "flip"),
    "rot90": Op(lambda m, y, z: torch.rot90(y, 1, (2, 3)), "rot90"),
    "roll": Op(lambda m, y, z: y.roll((2, -1), (2, 3)), "roll"),
    "unfold": Op(lambda m, y, z: y.unfold(2, 3, 2).unfold(3, 3, 2).flatten(-2), "unfold"),
    "im2col": Op(lambda m, y, z: F.unfold(y, (3, 2), (1, 2), 1, (2, 1)), "im2col_codes"),
    "nn.Unfold": Op(
        lambda m, y, z: m.part(y), "im2col_codes", parts=_part(nn.Unfold(3, padding=1))
    ),
    **{
        f"nn.{type(part).__name__}": Op(lambda m, y, z: m.part(y), "pad", parts=_part(part))
        for part in (
            nn.ZeroPad2d(1), nn.ConstantPad2d((1, 2, 0, 1), 0.1), nn.ReflectionPad2d(2),
            nn.ReplicationPad2d(1), nn.CircularPad2d(1), nn.CircularPad2d((1, 2, 0, 1)),
        )
    },
    "nn.ConstantPad1d": Op(
        lambda m, y, z: m.part(y), "pad", LINE, _part(nn.ConstantPad1d((1, 2), 0.0))
    ),
    "nn.ReplicationPad3d": Op(
        lambda m, y, z: m.part(y), "pad", CUBE, _part(nn.ReplicationPad3d(1))
    ),
    "nn.PixelShuffle": Op(
        lambda m, y, z: m.part(y), "pixel_shuffle_codes", parts=_part(nn.PixelShuffle(2))
    ),
    "nn.ChannelShuffle": Op(
        lambda m, y, z: m.part(y), "channel_shuffle", parts=_part(nn.ChannelShuffle(4))
    ),
    "detach": Op(lambda m, y, z: y.detach().flip(1), "flip"),
    "float": Op(lambda m, y, z: y.float().flip(1), "flip"),
    "to like": Op(lambda m, y, z: y.to(z).to(z.dtype).flip(1), "flip"),
}  # fmt: skip

CUT: Final[dict[str, Op]] = {
    "tensor_split": Op(lambda m, y, z: y.tensor_split(3, 1)[0], "getitem"),
    "tensor_split at": Op(lambda m, y, z: torch.tensor_split(y, (2, 5), dim=1)[1], "getitem"),
    "hsplit": Op(lambda m, y, z: y.hsplit(2)[1], "getitem"),
    "vsplit": Op(lambda m, y, z: torch.vsplit(y, [1])[1], "getitem"),
    "dsplit": Op(lambda m, y, z: torch.dsplit(y, 2)[0], "getitem"),
    "hstack": Op(lambda m, y, z: torch.hstack([y, z]), "hstack"),
    "vstack": Op(lambda m, y, z: torch.vstack([y, z]), "vstack"),
    "dstack": Op(lambda m, y, z: torch.dstack([y, z]), "dstack"),
    "max": Op(lambda m, y, z: y.max(1, keepdim=True)[0], "getitem"),
    "min values": Op(lambda m, y, z: torch.min(y, dim=1, keepdim=True).values, "getitem"),
    "topk": Op(lambda m, y, z: y.topk(3, 1).values, "getitem"),
    "sort": Op(lambda m, y, z: y.sort(1, descending=True)[0], "getitem"),
    "cummax": Op(lambda m, y, z: y.cummax(1)[0], "getitem"),
    "kthvalue": Op(lambda m, y, z: y.kthvalue(3, 1, keepdim=True)[0], "getitem"),
    "amax": Op(lambda m, y, z: y.amax((2, 3)), "amax"),
    "sorted by values": Op(
        lambda m, y, z: torch.take_along_dim(y, y.sort(1).indices, 1), "take_along_dim_codes"
    ),
    "largest channel": Op(
        lambda m, y, z: torch.take_along_dim(y, y.argmax(1, keepdim=True), 1), "argmax"
    ),
    "values and places": Op(
        lambda m, y, z: y.gather(1, y.topk(2, 1)[1]) .flip(1), "gather"
    ),
}  # fmt: skip

UNPOOLED: Final[dict[str, Op]] = {
    "pooled and back": Op(
        lambda m, y, z: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), [2, 2]),
        "max_unpool_codes",
    ),
    "nn.MaxUnpool2d": Op(
        lambda m, y, z: m.back(*m.part(y)), "max_unpool_codes",
        parts=(
            ("part", lambda: nn.MaxPool2d(2, return_indices=True)),
            ("back", lambda: nn.MaxUnpool2d(2)),
        ),
    ),
}  # fmt: skip
"""Pooling with indices is faster in float, so codes are made again for the way back."""

CASES: Final = {**SELECTED, **MOVED, **CUT}


@pytest.mark.parametrize("name", UNPOOLED)
def test_unpooling_gives_the_codes_of_the_reference(name: str) -> None:
    case = UNPOOLED[name]
    found = check_ops(case.model(), *batches(case.shape))
    assert all(one.worst == 0 for one in found.kernels[case.kernel])
    left = [op for op in fxquant.report(found.lowered).ops if not op.int8]
    assert all("indices" in op.why or "faster in float" in op.why for op in left)


@pytest.mark.parametrize("name", CASES)
def test_moves_give_the_codes_of_the_reference(name: str) -> None:
    case = CASES[name]
    model = case.model()
    found = check_ops(model, *batches(case.shape))
    assert case.kernel in found.kernels, f"ran {sorted(found.kernels)}"
    assert all(one.worst == 0 for one in found.kernels[case.kernel])
    report = fxquant.report(found.lowered)
    left = [op.op for op in report.ops if not op.int8 and "indices" not in op.why]
    assert set(left) <= {"gt"}, str(report)
    inside = [n for n in found.lowered.graph.nodes if is_op(n, QUANTIZE, DEQUANTIZE)]
    assert len(inside) == 1, found.lowered.code
    for count in (1, 0):
        _check_batch(model, found, torch.randn(count, *case.shape[1:]))


def _check_batch(model: nn.Module, found: Checked, x: Tensor) -> None:
    with torch.no_grad():
        try:
            wanted = model(x)
        except (RuntimeError, IndexError, ValueError):
            return  # torch does not allow it
        codes, real = found.lowered(x), found.reference(x)
    assert codes.shape == wanted.shape
    if codes.numel():
        # The layers around may differ by a code, the move between them by none.
        assert float((codes - real).abs().max()) <= 0.05 * float(wanted.abs().max())


OUTSIDE: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "pad": lambda y: F.pad(y, (1, 1), value=30.0),
    "masked_fill": lambda y: y.masked_fill(torch.eye(10) > 0, -30.0),
    "where": lambda y: torch.where(torch.eye(10) > 0, y, 30.0),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_constant_outside_the_range_stays_float(name: str) -> None:
    converted = checked(Op(lambda m, y, z: OUTSIDE[name](y), "float", IMAGE))
    (op,) = [op for op in fxquant.report(converted).ops if op.op == name]
    assert not op.int8
    assert "lies outside" in op.why


@pytest.mark.parametrize("value", [float("-inf"), -1e9, torch.finfo(torch.float32).min])
def test_masks_never_enter_a_range(value: float) -> None:
    def body(m: Any, y: Tensor, z: Tensor) -> Tensor:
        return y.masked_fill(torch.eye(10) > 0, value).softmax(-1)

    converted = checked(Op(body, "float", IMAGE))
    (op,) = [op for op in fxquant.report(converted).ops if op.op == "masked_fill"]
    assert not op.int8 and "mask" in op.why


@pytest.mark.parametrize("pick", ["max", "min", "topk", "sort", "cummax", "argmax", "argsort"])
@pytest.mark.parametrize("descending", [False, True])
def test_indices_of_codes_are_those_of_the_values(pick: str, descending: bool) -> None:
    """Also where values tie: both take the same one of them."""
    codes = torch.randint(100, 104, (3, 8, 40), dtype=torch.uint8)
    real = (codes.float() - 101) * 0.037
    options: dict[str, Any] = {"dim": -1}
    options |= {"k": 7, "largest": descending} if pick == "topk" else {}
    options |= {"descending": descending} if "sort" in pick else {}
    found, wanted = (getattr(torch, pick)(x, **options) for x in (codes, real))
    if isinstance(wanted, tuple):
        assert torch.equal(found[1], wanted[1])
        assert torch.equal((found[0].float() - 101) * 0.037, wanted[0])
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 4), (2, 3, 1), (2, 7, 4)])
@pytest.mark.parametrize("dim", [1, -2, None])
def test_take_along_dim_is_a_gather(shape: tuple[int, ...], dim: int | None) -> None:
    codes = torch.randint(0, 256, (2, 5, 4), dtype=torch.uint8)
    indices = torch.randint(0, 5, shape)
    found = x86_moves.take_along_dim_codes(codes, indices=indices, dim=dim)
    assert torch.equal(found, torch.take_along_dim(codes, indices, dim))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("last", [False, True])
def test_where_by_bits(dtype: torch.dtype, last: bool) -> None:
    low = torch.iinfo(dtype).min
    a, b = (torch.randint(low, low + 256, (2, 5, 7, 3)).to(dtype) for _ in range(2))
    if last:
        a = a.contiguous(memory_format=torch.channels_last)
    for shape in ((2, 5, 7, 3), (1, 1, 7, 3), (3,), ()):
        condition = torch.rand(shape) > 0.5
        found = x86_moves.where_codes(a, b, condition=condition)
        assert torch.equal(found, torch.where(condition, a, b))
        filled = x86_moves.masked_fill_codes(a, mask=condition, value=low + 7)
        assert torch.equal(filled, a.masked_fill(condition, low + 7))
    assert torch.equal(
        x86_moves.where_codes(a[:, :1], b, condition=condition), torch.where(condition, a[:, :1], b)
    )
