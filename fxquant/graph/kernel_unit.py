"""Calling a user's int8 kernel from a graph: what it receives, and the module that calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.graph.info import QType


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantized tensor as a kernel receives it: ``real = (codes - zero_point) * scale``.

    Args:
        codes: uint8 or int8, any shape; not to be written to.
        scale: real units per code.
        zero_point: the code that means 0.0.
        quant_min: smallest code in use.
        quant_max: largest code in use.

    Example:
        >>> Codes(torch.tensor([1, 3], dtype=torch.uint8), 0.5, 1, 0, 255).real
        tensor([0., 1.])
    """

    codes: Tensor
    scale: float
    zero_point: int
    quant_min: int
    quant_max: int

    @property
    def steps(self) -> Tensor:
        """``codes - zero_point`` as int32: multiply them by integers, then by the scales."""
        return self.codes.to(torch.int32) - self.zero_point

    @property
    def real(self) -> Tensor:
        """What the codes stand for, float32."""
        return self.steps.to(torch.float32) * self.scale


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A convolution or linear as a kernel receives it: ``real_weight = weight * scale``.

    A batch norm after it is folded in already.

    Args:
        weight: int8 codes, shaped as the layer's weight.
        scale: float32, one for each output channel, or one.
        axis: the output channels of ``weight``; ``None`` where there is one scale.
        bias: float32, one for each output channel, or ``None``.
        options: ``stride``, ``padding`` and the like; attributes of this object, too.
    """

    weight: Tensor
    scale: Tensor
    axis: int | None
    bias: Tensor | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options", {})
        if name in options:
            return options[name]
        raise AttributeError(f"a layer of a kernel has no {name!r}: it has {sorted(options)}")


@dataclass(frozen=True)
class LayerPlace:
    """Where :class:`KernelUnit` keeps an integer layer.

    Args:
        axis: as in :class:`IntegerLayer`.
        options: as in :class:`IntegerLayer`.
    """

    axis: int | None
    options: Mapping[str, Any]


class KernelUnit(nn.Module):
    """Calls a user's kernel on codes.

    Args:
        kernel: the user's function.
        inputs: name and type of each input, in the order of the call; ``None`` is float.
        outputs: types of what it returns.
        layers: integer layers by name.
        constants: other modules, numbers and options by name.

    Raises:
        TypeError: the kernel returns something else than codes of the declared types.
    """

    def __init__(
        self,
        kernel: Callable[..., Any],
        inputs: tuple[tuple[str, QType | None], ...],
        outputs: tuple[QType, ...],
        layers: Mapping[str, IntegerLayer],
        constants: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.inputs = inputs
        self.outputs = outputs
        self.layers: dict[str, LayerPlace] = {}
        for name, layer in layers.items():
            self.layers[name] = LayerPlace(layer.axis, dict(layer.options))
            tensors = (("weight", layer.weight), ("scale", layer.scale), ("bias", layer.bias))
            for part, tensor in tensors:
                self.register_buffer(f"{name}_{part}", tensor)
        self.constants = {k: v for k, v in constants.items() if not isinstance(v, nn.Module)}
        self.modules_by_name = {k: v for k, v in constants.items() if isinstance(v, nn.Module)}
        for name, module in self.modules_by_name.items():
            self.add_module(f"module_{name}", module)

    @property
    def kernel_name(self) -> str:
        """The name of the user's function, for reports."""
        return str(getattr(self.kernel, "__name__", type(self.kernel).__name__))

    def forward(self, *tensors: Tensor) -> Any:
        """Codes (and float tensors) in the order of ``inputs``; codes, or a tuple of them."""
        given: dict[str, Any] = dict(self.constants)
        given.update({name: self._modules[f"module_{name}"] for name in self.modules_by_name})
        given.update({name: self._layer(name, place) for name, place in self.layers.items()})
        for (name, qtype), tensor in zip(self.inputs, tensors, strict=True):
            given[name] = tensor if qtype is None else _codes(tensor, qtype)
        if len(self.outputs) == 1:
            found = self.kernel(**given, output=self.outputs[0])
            return self._checked(found, self.outputs[0])
        found = self.kernel(**given, outputs=self.outputs)
        if not isinstance(found, tuple | list) or len(found) != len(self.outputs):
            raise TypeError(
                f"kernel {self.kernel_name} returns {type(found).__name__}: it must return a tuple "
                f"of {len(self.outputs)} tensors"
            )
        return tuple(self._checked(f, q) for f, q in zip(found, self.outputs, strict=True))

    def _checked(self, found: Any, qtype: QType) -> Tensor:
        if isinstance(found, Tensor) and found.dtype == qtype.dtype:
            return found
        what = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(
            f"kernel {self.kernel_name} returns {what}: it must return codes, {qtype.dtype}"
        )

    def _layer(self, name: str, place: LayerPlace) -> IntegerLayer:
        weight, scale = self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_scale")
        bias = self._buffers[f"{name}_bias"]
        return IntegerLayer(weight, scale, place.axis, bias, place.options)

    def extra_repr(self) -> str:
        """The kernel, for ``print(model)``."""
        return self.kernel_name


def _codes(tensor: Tensor, qtype: QType) -> Codes:
    return Codes(tensor, qtype.scale, qtype.zero_point, qtype.quant_min, qtype.quant_max)
