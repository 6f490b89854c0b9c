"""The module that recurrent layers become: int8 weights, rows quantized at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor, nn

from fxquant.numerics.affine import dequantize_weight
from fxquant.numerics.recurrence import Cell, Recurrence, cells_of
from fxquant.numerics.recurrent import State, Weights, run_layer
from fxquant.spec import QSpec

_SAME: Final = (
    *("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"),
    *("bidirectional", "proj_size"),
)
"""Attributes that a user's code may ask a recurrent layer for."""
MATRICES: Final = ("weight_ih", "weight_hh", "weight_hr")
_BIASES: Final = ("bias_ih", "bias_hh")


class IntegerRecurrent(Recurrence, nn.Module):
    """``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` with int8 weights, on every device.

    It is called as the layer it stands for, packed sequences and unbatched inputs included.

    Args:
        layer: the float layer.
        weights: int8 codes and float32 scales ``[channels]`` or ``[1]`` of its matrices, by name.
        reads: how the rows of inputs are quantized.

    Example:
        >>> import torch
        >>> gru = nn.GRU(2, 3)
        >>> names = ("weight_ih_l0", "weight_hh_l0")
        >>> codes = {n: (getattr(gru, n).mul(99).char(), torch.tensor([1 / 99])) for n in names}
        >>> made = IntegerRecurrent(gru, codes, QSpec(granularity="row", observer="runtime"))
        >>> [tuple(part.shape) for part in made(torch.zeros(4, 1, 2))]
        [(4, 1, 3), (1, 1, 3)]
    """

    def __init__(
        self,
        layer: nn.RNNBase | IntegerRecurrent,
        weights: Mapping[str, tuple[Tensor, Tensor]],
        reads: QSpec,
    ) -> None:
        super().__init__()
        for name in _SAME:
            setattr(self, name, getattr(layer, name))
        self.reads = reads
        self.cells = tuple(cells_of(self.num_layers, self.bidirectional))
        for name, (codes, scale) in weights.items():
            # Buffers: integers cannot require gradients, and what users do to parameters may.
            self.register_buffer(name, codes)
            self.register_buffer(f"{name}_scale", scale)
        for cell in self.cells:
            for name in (f"{bias}{cell.suffix}" for bias in _BIASES):
                bias = getattr(layer, name, None)
                self.register_buffer(name, None if bias is None else bias.detach().clone())
        self.train(layer.training)

    def flatten_parameters(self) -> None:
        """Does nothing: users call it on float layers, whose memory cuDNN wants in one piece."""

    def matrices(self) -> tuple[str, ...]:
        """The names of its integer weights."""
        names = (f"{kind}{cell.suffix}" for cell in self.cells for kind in MATRICES)
        return tuple(name for name in names if name in self._buffers)

    def stored(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes of a weight and its scales, as they are stored."""
        return self.get_buffer(name), self.get_buffer(f"{name}_scale")

    def matrix(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes of a weight, and one scale for each of its rows."""
        codes, scale = self.stored(name)
        return codes, scale.expand(codes.shape[0])

    def _weights(self, cell: Cell) -> Weights:
        real: list[Tensor | None] = []
        for kind in MATRICES:
            name = f"{kind}{cell.suffix}"
            held = name in self._buffers
            real.append(dequantize_weight(*self.matrix(name), 0) if held else None)
        first, second = real[0], real[1]
        if first is None or second is None:
            raise TypeError(f"cell {cell} has no weights")
        biases = [self._buffers[f"{bias}{cell.suffix}"] for bias in _BIASES]
        return Weights(first, second, biases[0], biases[1], real[2])

    def run_cell(
        self, cell: Cell, x: Tensor, sizes: list[int], state: State
    ) -> tuple[Tensor, State]:
        """One layer in one direction; arguments and results as of :func:`run_layer`."""
        weights = self._weights(cell)
        return run_layer(self.mode, x, sizes, state, weights, self.reads, reverse=cell.reverse)

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(model)``."""
        sizes = f"{self.mode}, {self.input_size}, {self.hidden_size}, layers={self.num_layers}"
        options = [f"proj_size={self.proj_size}"] if self.proj_size else []
        options += [name for name in ("batch_first", "bidirectional") if getattr(self, name)]
        return ", ".join([sizes, *options, "int8 per channel, rows at run time"])
