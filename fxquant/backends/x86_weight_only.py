"""Linears whose weight is only stored as integers, on x86.

    linear(x, dequantize_stored(codes, scale), bias)   ->   the same with kernels of torch

``torch._weight_int8pack_mm`` and ``torch._weight_int4pack_mm_for_cpu`` read the codes as they are:
they neither make a float weight nor read four bytes for each. What they are given decides how fast
they are: of bfloat16 rows they took 0.2 to 0.8 of the time of ``F.linear`` in float32 for up to 16
rows (one AVX512 core, 768 x 768 to 4096 x 4096; 0.3 to 1.0 with AVX2), of float32 rows 2 to 11
times as long. So rows are rounded to bfloat16 and sums come back in it, to 8 significant bits; they
are summed in float32, and scales of whole channels are multiplied into the sums in float32. Beside
the error of 8-bit weights, which is 20 dB louder, that is not seen.

The int8 kernel reads the weight anew for every few rows. For more, codes become bfloat16, which
holds them exactly, and one product in it is faster still where the processor has one. The int4
kernel is taken for any number: to unpack the weight for a product in float takes longer.

On a GPU the product in bfloat16 is taken for any number of rows: torch's int8 kernel there took
1.6 times as long for 1 row of 768, 2.3 for 1 of 4096, 79 for 128 and 400 for 1,024 (torch 2.11 on
an H200). Rows of float16 are rounded to bfloat16 everywhere: sums of codes pass what float16 holds.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.x86_layer_rules import put
from fxquant.backends.x86_pairs import asked_once, has_bfloat16
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import argument
from fxquant.numerics.stored import pack_nibbles, rows_of, unpack_nibbles
from fxquant.numerics.stored_tables import StoredParts
from fxquant.patterns.boundary import DEQUANTIZE_STORED
from fxquant.patterns.expr import op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule

FEW_ROWS: Final = 16
"""Rows of activations up to which the int8 kernel was measured faster than a product in float."""
_STEP: Final = 32
"""The int8 kernel reads rows of the weight in steps, and past their end where none is whole."""
_GROUPS: Final = (32, 64, 128, 256)
_OUTPUTS: Final = 16
"""What the int4 kernel takes: sizes of groups, and multiples of outputs."""
_MIDDLE: Final = 8
"""The code that the int4 kernel takes for 0."""
_FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
_NATIVE: Final = has_bfloat16()
"""Asked beforehand: a compiler does not look into the probes."""


def _multiplies_bfloat16(kind: str) -> bool:
    """Whether the processor, or the GPU, has products of bfloat16.

    Args:
        kind: of the device, such as ``"cpu"``.
    """
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "cpu" and _NATIVE


class StoredLinear(StoredParts):
    """``linear(x, codes * scale, bias)`` with one symmetric scale for each output channel.

    Args:
        parts: what holds the weight.
    """

    def __init__(self, parts: StoredParts) -> None:
        held = parts._buffers
        super().__init__(
            held["weight"], held["weight_scale"], None, parts.layout, parts.bits, held["bias"]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
        codes, scale = self.get_buffer("weight"), self.get_buffer("weight_scale")[:, 0]
        sums = self._sums(x, codes)
        # Where the sums are of 16 bits, they are wide while scale and bias are added to them.
        made = sums.to(torch.promote_types(sums.dtype, scale.dtype)).mul_(scale)
        bias = self._buffers["bias"]
        return (made if bias is None else made.add_(bias)).to(x.dtype)

    @staticmethod
    def _sums(x: Tensor, codes: Tensor) -> Tensor:
        """``linear(x, codes)``, in bfloat16 where that is faster."""
        if x.dtype not in _FLOATS or x.numel() == 0:
            return _product(x, codes, x.dtype)
        few = x.is_cpu and x.numel() <= FEW_ROWS * x.shape[-1]
        if few and x.shape[-1] % _STEP == 0:
            rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
            ones = torch.ones(len(codes), dtype=torch.bfloat16, device="cpu")
            return torch._weight_int8pack_mm(rows, codes, ones).view(*x.shape[:-1], -1)
        wide = torch.promote_types(x.dtype, torch.bfloat16)  # float32 for float16
        if _multiplies_bfloat16(x.device.type) and not few:
            wide = torch.bfloat16
        return _product(x, codes, wide)


def _product(x: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """``linear(x, codes)`` in ``dtype``, whatever autocast makes of products: float16, say."""
    kind = x.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return F.linear(x.to(dtype), codes.to(dtype))
    return F.linear(x.to(dtype), codes.to(dtype))


def unpacked_int4(packed: Tensor, width: int, block: int) -> Tensor:
    """The codes that ``_convert_weight_to_int4pack_for_cpu`` packed, 0 to 15, ``[rows, width]``.

    Args:
        packed: uint8 ``[rows, width / 2]``.
        width: how many codes a row has.
        block: how many rows stand together, column after column: the first half of them in the
            lower halves of bytes. What is left of the rows stands in pairs of neighbours.
    """
    full, flat = len(packed) // block * block, packed.view(-1)
    blocks = flat[: full * width // 2].view(-1, width, block // 2)
    pairs = flat[full * width // 2 :].view(width, (len(packed) - full) // 2)
    whole = torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2).reshape(full, width)
    rest = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1).t()
    return torch.cat((whole, rest))


@asked_once
def int4_block() -> int | None:
    """In how large blocks this torch packs rows on this processor; ``None`` if it is not known."""
    generator, width = torch.Generator().manual_seed(0), _STEP
    for block in (64, 32):
        for rows in range(_OUTPUTS, 10 * _OUTPUTS, _OUTPUTS):
            plain = torch.randint(0, 16, (rows, width), generator=generator, dtype=torch.int32)
            packed = torch._convert_weight_to_int4pack_for_cpu(plain, 1)
            if not torch.equal(unpacked_int4(packed, width, block), plain.to(torch.uint8)):
                break
        else:
            return block
    return None


class StoredInt4Linear(StoredParts):
    """``linear(x, (codes - zero_point) * scale, bias)`` with a scale for each group of codes.

    Codes are kept as the kernel of this processor reads them, and in state dicts and pickles as
    everywhere.

    Args:
        parts: what holds the weight, in codes of at most 4 bits.
        shared: whether another module holds the codes as they come too, and so may this.
    """

    def __init__(self, parts: StoredParts, *, shared: bool = False) -> None:
        held = parts._buffers
        super().__init__(
            held["weight"],
            held["weight_scale"],
            held["weight_zero_point"],
            parts.layout,
            parts.bits,
            held["bias"],
        )
        self.packed: Tensor | None = None
        self.shared = shared
        self.pack()

    def get_buffer(self, target: str) -> Tensor:
        """As ever; codes that are kept packed only are unpacked."""
        if target == "weight" and self._buffers["weight"] is None and self.packed is not None:
            return pack_nibbles(unpacked_int4(self.packed, self.layout[1], int4_block() or 0))
        return super().get_buffer(target)

    def pack(self) -> None:
        """Lay codes, scales and zero points out as the kernel of this processor reads them."""
        weight, scale = self.get_buffer("weight"), self.get_buffer("weight_scale")
        size, width, _ = self.layout
        self._call: tuple[Any, ...] = ()
        if not weight.is_cpu:
            return
        codes = unpack_nibbles(weight, width).to(torch.int32)
        self.packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        if int4_block() is not None and not self.shared:
            self._buffers["weight"] = None
        scale = scale.float().expand(len(weight), width // size)
        zeros = self._buffers["weight_zero_point"]
        # It computes (code - 8) * scale + shift.
        shift = torch.zeros_like(scale) if zeros is None else (_MIDDLE - zeros.float()) * scale
        steps = torch.stack((scale.t(), shift.t()), dim=-1).to(torch.bfloat16).contiguous()
        self._call = (self.packed, size, steps)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[..., in]`` to ``[..., out]``, in the dtype of ``x``."""
        bias = self._buffers["bias"]
        if not self._call or not x.is_cpu or x.dtype not in _FLOATS or x.numel() == 0:
            codes = self.get_buffer("weight").to(x.device)
            zeros = self._buffers["weight_zero_point"]
            real = rows_of(codes, self.get_buffer("weight_scale"), zeros, *self.layout)
            return F.linear(x, real.to(x.dtype), None if bias is None else bias.to(x.dtype))
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        sums = torch._weight_int4pack_mm_for_cpu(rows, *self._call).view(*x.shape[:-1], -1).float()
        return (sums if bias is None else sums.add_(bias)).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is laid out for this processor."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("_call", "packed")}
        return state | {"_buffers": {**self._buffers, "weight": self.get_buffer("weight")}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Lay it out for the processor that the copy is on."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.packed = None
        self.pack()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.get_buffer("weight")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._buffers["weight"] = self.get_buffer("weight")
        super()._load_from_state_dict(*args, **kwargs)
        self.pack()


def _has_kernel(match: Match) -> Reject | None:
    real, layer = match.node("real"), match.node("layer")
    parts = layer.graph.owning_module.get_submodule(_path(match))  # type: ignore[union-attr]  # graphs of passes have one
    if not isinstance(parts, StoredParts):
        return Reject("its weight is held by no stored layer", real)
    codes, scale = parts.get_buffer("weight"), parts.get_buffer("weight_scale")
    if codes.dtype != torch.int8 or scale.shape != (codes.shape[0], 1):
        return Reject("the kernel takes 8-bit codes with one scale for each output channel", real)
    if argument(real, "zero_point") is not None:
        return Reject("the kernel takes no zero points of weights", real)
    return None


def _has_int4_kernel(match: Match) -> Reject | None:
    real, layer = match.node("real"), match.node("layer")
    parts = layer.graph.owning_module.get_submodule(_path(match))  # type: ignore[union-attr]  # graphs of passes have one
    if not isinstance(parts, StoredParts):
        return Reject("its weight is held by no stored layer", real)
    size, width, packed = parts.layout
    if not packed:
        return Reject("the kernel takes codes of at most 4 bits", real)
    if size not in _GROUPS or width % size:
        return Reject(f"the kernel takes whole groups of {_GROUPS}, not {width} in {size}s", real)
    if len(parts.get_buffer("weight")) % _OUTPUTS or not parts.get_buffer("weight").is_cpu:
        return Reject(f"the kernel takes multiples of {_OUTPUTS} outputs, on a processor", real)
    return None


def _path(match: Match) -> str:
    return str(match.bound["w"].target).rpartition(".")[0]


def _lower(match: Match, editor: Editor) -> None:
    like = match.node("layer")
    parts = editor.module.get_submodule(_path(match))
    if not isinstance(parts, StoredParts):
        raise TypeError(f"{_path(match)} is no stored layer")
    codes = parts.get_buffer("weight")
    others = [module for module in editor.module.modules() if module is not parts]
    shared = any(module._buffers.get("weight") is codes for module in others)
    made = StoredInt4Linear(parts, shared=shared) if parts.layout[2] else StoredLinear(parts)
    put(match, editor, made, (match.bound["x"],), None, path=_path(match), like=like)


_WEIGHT: Final = op(DEQUANTIZE_STORED, var("w"), var("scale"), name="real", shared=True)

WEIGHT_ONLY_RULES: Final = (
    Rule(
        "x86-weight-only",
        op("linear", var("x"), _WEIGHT, name="layer"),
        _lower,
        (_has_kernel,),
    ),
)

INT4_RULES: Final = (
    Rule(
        "x86-weight-only-int4",
        op("linear", var("x"), _WEIGHT, name="layer"),
        _lower,
        (_has_int4_kernel,),
    ),
)
