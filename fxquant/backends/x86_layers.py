"""Layers that call torch's built-in oneDNN int8 operators (``torch.ops.onednn``) on plain tensors.

``state_dict``, ``deepcopy`` and pickles see the plain integer weight and nothing else; the packed
form that the kernels want is made from it, never stored. Linears keep the packed form alone, from
which the plain one can be had back: two forms of a weight would be half as large as the float one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.backends.x86_conv_plan import Geometry, Plan, first_column, plan_of
from fxquant.backends.x86_packed import note_saved, saved_of, unpacked_linear, unpacks_exactly
from fxquant.graph.info import QType

_ONEDNN: Final = torch.ops.onednn
_PACKED: Final = ("_call", "_endings", "_head", "_kernel", "packed", "plan")
"""Attributes that :meth:`X86Layer.pack` makes; torch's operators cannot be pickled either."""


@dataclass(frozen=True)
class PostOp:
    """What a kernel does to its sums before it writes them.

    Args:
        name: the operator's own name for it: ``none``, ``relu``, ``gelu``, ...
        scalars: its numbers.
        algorithm: its variant, where it has any.
    """

    name: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""


class X86Layer(nn.Module):
    """An int8 layer: codes in, codes or float out.

    Args:
        weight: int8 codes, shaped as in the float layer.
        scale: float32 ``[channels]`` or ``[1]``.
        bias: float32 ``[channels]`` or ``None``.
        reads: type of the input codes.
        writes: type of the output codes, or ``None`` for float32.
        post: what follows the sum inside the kernel.
        packed: the weight as another linear packed it, which shares it.
    """

    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        reads: QType,
        writes: QType | None,
        post: PostOp,
        packed: Tensor | None = None,
    ) -> None:
        super().__init__()
        # A buffer that a property reads: register_buffer() refuses the name.
        shared = packed is not None and unpacks_exactly()
        self._buffers["weight"] = None if shared else weight
        self.packed: Tensor | None = packed if shared else None
        self.keeps_plain = False
        self.weight_shape = tuple(weight.shape)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self.reads, self.writes, self.post = reads, writes, post
        self.real = torch.float32
        # A relu whose kernel has none: codes below the zero point are the negative numbers.
        self.floor: int | None = None
        self._call: tuple[Any, ...] = ()

    @property
    def weight(self) -> Tensor:
        """int8 codes, shaped as in the float layer; made anew where only packed ones are kept."""
        plain = self._buffers["weight"]
        if plain is not None:
            return plain
        if self.packed is None:
            raise TypeError(f"this {type(self).__name__} has no weight")
        inputs = math.prod(self.weight_shape[1:])
        return unpacked_linear(self.packed)[:, :inputs].contiguous().view(self.weight_shape)

    def pack(self) -> None:
        """Rebuild what the kernel wants from the buffers."""
        raise TypeError(f"{type(self).__name__} does not define pack()")

    def keep_plain(self, weight: Tensor) -> None:
        """Keep the plain weight, which a table keeps anyway, so that files hold it once."""
        self.keeps_plain, self._buffers["weight"] = True, weight

    def packed_linear(self, extra: int = 0) -> Tensor:
        """The weight as the linear kernel wants it; from now on the only form that is kept.

        Args:
            extra: inputs that the kernel is given more, and is to multiply by 0.
        """
        plain = self._buffers["weight"]
        if plain is None and self.packed is not None:
            return self.packed
        matrix = F.pad(self.weight.flatten(1), (0, extra)) if extra else self.weight.flatten(1)
        packed: Tensor = _ONEDNN.qlinear_prepack(matrix, None)
        self.packed = packed
        if unpacks_exactly() and not self.keeps_plain:
            self._buffers["weight"] = None
        return packed

    def write_real(self, dtype: torch.dtype) -> None:
        """Write ``dtype``, which is rounded to inside the kernel, instead of float32."""
        self.real = dtype
        self.pack()

    def _output(self) -> tuple[float, int, torch.dtype]:
        if self.writes is None:
            return 1.0, 0, self.real
        return self.writes.scale, self.writes.zero_point, self.writes.dtype

    def _ending(self, other: QType | None = None) -> tuple[Any, ...]:
        """The last arguments of every kernel: its output, what it adds, and its post-op."""
        added = () if other is None else (other.scale, other.zero_point, "sum", 1.0)
        post = (self.post.name, list(self.post.scalars), self.post.algorithm)
        return (*self._output(), *added, *post)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what :meth:`pack` makes, which cannot be copied or pickled."""
        state = {key: value for key, value in self.__dict__.items() if key not in _PACKED}
        return state | {"_buffers": {**self._buffers, "weight": self.weight}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the packed form of a copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._call, self.packed = (), None
        self.pack()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # First, as it stands where it is kept; and one tensor for all that share what is packed.
        plain = saved_of(self.packed) if self._buffers["weight"] is None else None
        if plain is None or tuple(plain.shape) != self.weight_shape:
            plain = self.weight
        destination[f"{prefix}weight"] = plain
        if self.packed is not None:
            note_saved(self.packed, plain)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._buffers["weight"] = self.weight
        super()._load_from_state_dict(*args, **kwargs)
        self.pack()

    def extra_repr(self) -> str:
        """Shapes, types and post-op, for ``print(model)``."""
        after = f", {self.post.name}" if self.post.name != "none" else ""
        made = self.writes or str(self.real).removeprefix("torch.")
        return f"{self.weight_shape}{after}, {self.reads} -> {made}"


class X86Conv(X86Layer):
    """A convolution of 1, 2 or 3 dimensions."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        reads: QType,
        writes: QType | None,
        post: PostOp,
        geometry: Geometry,
        shape: tuple[int, ...] | None,
    ) -> None:
        super().__init__(weight, scale, bias, reads, writes, post)
        self.geometry = geometry
        # The packer takes the shape of a batch only; without one it decides for any.
        self.shape = shape if shape is None or len(shape) == weight.dim() else None
        self._unbatched = weight.dim() - 1
        self.pack()

    def _planned(self) -> Plan:
        """How the kernel is given this convolution."""
        return plan_of(self.weight_shape, self.geometry, self.reads.zero_point)

    def _kernel_weight(self) -> Tensor:
        """The weight as the kernel is given it."""
        return self.plan.weight(self.weight)

    def _packed(self) -> Tensor:
        packed: Tensor = _ONEDNN.qconv_prepack(
            self._kernel_weight(),
            self.weight_scale,
            self.reads.scale,
            self.plan.zero_point,
            *self.plan.geometry.walk,
            self._kernel_shape(),
        )
        return packed

    def _kernel_shape(self) -> list[int] | None:
        """The shape of the codes that the layout of the weight is chosen for."""
        return self.plan.shape(self.shape)

    def _given(self) -> tuple[Any, ...]:
        """The first arguments of every kernel after the codes."""
        zeros = torch.zeros(self.weight_scale.numel(), dtype=torch.int32, device="cpu")
        return self.reads.scale, self.plan.zero_point, self._packed(), self.weight_scale, zeros

    def _walked(self) -> tuple[Any, ...]:
        """The arguments that follow: the bias, and how the kernel walks."""
        bias = self.plan.bias(self.bias, self.weight, self.weight_scale, self.reads.scale)
        return (bias, *self.plan.geometry.walk)

    def pack(self) -> None:
        """Reorder the weight and lay out the call's constant arguments."""
        self.plan = self._planned()
        self._kernel: Callable[..., Tensor] = _ONEDNN.qconv_pointwise.default
        self._call = (*self._given(), *self._walked(), *self._ending())

    def _nothing(self, codes: Tensor) -> Tensor:
        """The result of an empty batch, for which some kernels return a wrong shape."""
        g, convs = self.geometry, (F.conv1d, F.conv2d, F.conv3d)
        real, weight = (t.to("meta", torch.float32) for t in (codes, self.weight))
        conv = convs[weight.dim() - 3]
        like = conv(real, weight, None, g.stride, g.padding, g.dilation, g.groups)
        return codes.new_empty(like.shape, dtype=self._output()[2])

    def forward(self, codes: Tensor) -> Tensor:
        """One kernel call; ``codes`` uint8 ``[batch, channels, ...]``, or without the batch."""
        if codes.dim() == self._unbatched:
            return self.forward(codes.unsqueeze(0)).squeeze(0)
        if codes.numel() == 0:
            return self._nothing(codes)
        result = self.plan.run(self._kernel, codes, *self._call)
        return result if self.floor is None else result.clamp_(min=self.floor)


class X86ConvSum(X86Conv):
    """``act(conv(x) + other)``, written over the memory of ``other``."""

    def __init__(self, *args: Any, other: QType, **kwargs: Any) -> None:
        self.other = other
        super().__init__(*args, **kwargs)

    def pack(self) -> None:
        """As for a plain convolution, with the sum's own scale."""
        self.plan = self._planned()
        self._kernel = _ONEDNN.qconv2d_pointwise.binary
        self._head = self._given()
        self._call = (*self._walked(), *self._ending(self.other))

    def forward(self, codes: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]  # nn.Module.forward is open to any arguments
        """One kernel call; ``other`` is uint8 shaped as the result, and is overwritten."""
        if codes.dim() == self._unbatched:
            return self.forward(codes.unsqueeze(0), other.unsqueeze(0)).squeeze(0)
        if codes.numel() == 0:
            return self._nothing(codes)
        codes = self.plan.codes(codes)
        narrow = self.plan.is_narrow(codes)
        if narrow:
            codes, other = self.plan.widened(codes), F.pad(other, (0, 1))
        total = other.contiguous(memory_format=torch.channels_last)
        result = self._kernel(codes, *self._head, total, *self._call)
        return first_column(result) if narrow else result


class X86Linear(X86Layer):
    """A linear layer over the last dimension."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        reads: QType,
        writes: QType | None,
        post: PostOp,
        packed: Tensor | None = None,
    ) -> None:
        super().__init__(weight, scale, bias, reads, writes, post, packed)
        self.pack()

    def pack(self) -> None:
        """Reorder the weight and lay out the call's constant arguments."""
        zeros = torch.zeros(self.weight_scale.numel(), dtype=torch.int32, device="cpu")
        self._kernel: Callable[..., Tensor] = _ONEDNN.qlinear_pointwise.default
        self._call = (
            self.reads.scale,
            self.reads.zero_point,
            self.packed_linear(),
            self.weight_scale,
            zeros,
            self.bias,
            *self._ending(),
        )

    def _nothing(self, codes: Tensor) -> Tensor:
        """The result of an empty batch, for which the kernel drops dimensions."""
        shape = (*codes.shape[:-1], self.weight_shape[0])
        return codes.new_empty(shape, dtype=self._output()[2])

    def forward(self, codes: Tensor) -> Tensor:
        """One kernel call; ``codes`` uint8 or int8 ``[..., features]``."""
        if codes.numel() == 0:
            return self._nothing(codes)
        result: Tensor = self._kernel(codes, *self._call)
        return result


class X86LinearSum(X86Linear):
    """``act(linear(x) + other)``, written over the memory of ``other``."""

    def __init__(self, *args: Any, other: QType, **kwargs: Any) -> None:
        self.other = other
        super().__init__(*args, **kwargs)

    def pack(self) -> None:
        """As for a plain linear, with the sum's own scale."""
        zeros = torch.zeros(self.weight_scale.numel(), dtype=torch.int32, device="cpu")
        self._kernel = _ONEDNN.qlinear_pointwise.binary
        self._head = (
            self.reads.scale,
            self.reads.zero_point,
            self.packed_linear(),
            self.weight_scale,
            zeros,
        )
        self._call = (
            self.bias,
            *self._ending(self.other),
        )

    def forward(self, codes: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]  # nn.Module.forward is open to any arguments
        """One kernel call; ``other`` is uint8 shaped as the result, and is overwritten."""
        if codes.numel() == 0:
            return self._nothing(codes)
        total = other.contiguous()
        result: Tensor = self._kernel(codes, *self._head, total, *self._call)
        return result
