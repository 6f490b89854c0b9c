"""The module that recurrent layers become: int8 weights, rows quantized at run time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fxquant.numerics.affine import dequantize_weight
from fxquant.numerics.recurrent import Kind, State, Weights, run_layer
from fxquant.spec import QSpec

_SAME: Final = (
    *("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"),
    *("bidirectional", "proj_size"),
)
"""Attributes that a user's code may ask a recurrent layer for."""
MATRICES: Final = ("weight_ih", "weight_hh", "weight_hr")
_BIASES: Final = ("bias_ih", "bias_hh")


@dataclass(frozen=True)
class Cell:
    """One layer in one direction.

    Args:
        layer: which layer, from 0.
        reverse: whether it runs from the last step to the first.
    """

    layer: int
    reverse: bool

    @property
    def suffix(self) -> str:
        """What torch appends to the names of its weights."""
        return f"_l{self.layer}{'_reverse' if self.reverse else ''}"


def cells_of(layers: int, both: bool) -> Iterator[Cell]:
    """The cells of a recurrent layer, in the order of its states."""
    for layer in range(layers):
        yield Cell(layer, False)
        if both:
            yield Cell(layer, True)


class IntegerRecurrent(nn.Module):
    """``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` with int8 weights, on every device.

    It is called as the layer it stands for, packed sequences and unbatched inputs included.

    Args:
        layer: the float layer.
        weights: int8 codes and float32 scales ``[channels]`` or ``[1]`` of its matrices, by name.
        reads: how the rows of inputs are quantized.

    Example:
        >>> gru = nn.GRU(2, 3)
        >>> names = ("weight_ih_l0", "weight_hh_l0")
        >>> codes = {n: (getattr(gru, n).mul(99).char(), torch.tensor([1 / 99])) for n in names}
        >>> made = IntegerRecurrent(gru, codes, QSpec(granularity="row", observer="runtime"))
        >>> [tuple(part.shape) for part in made(torch.zeros(4, 1, 2))]
        [(4, 1, 3), (1, 1, 3)]
    """

    mode: Kind
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

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
            self._hold(name, codes)
            self._hold(f"{name}_scale", scale)
        for cell in self.cells:
            for name in (f"{bias}{cell.suffix}" for bias in _BIASES):
                bias = layer._parameters.get(name)
                self._hold(name, None if bias is None else bias.detach().clone())
        self.train(layer.training)

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        self.register_parameter(name, tensor)

    @property
    def width(self) -> int:
        """How wide a hidden state is."""
        return self.proj_size or self.hidden_size

    def flatten_parameters(self) -> None:
        """Does nothing: users call it on float layers, whose memory cuDNN wants in one piece."""

    def matrices(self) -> tuple[str, ...]:
        """The names of its integer weights."""
        names = (f"{kind}{cell.suffix}" for cell in self.cells for kind in MATRICES)
        return tuple(name for name in names if name in self._parameters)

    def stored(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Codes of a weight and its scales, as they are stored."""
        return self.get_parameter(name), self.get_parameter(f"{name}_scale")

    def matrix(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes of a weight, and one scale for each of its rows."""
        codes, scale = self.stored(name)
        return codes, scale.expand(codes.shape[0])

    def _weights(self, cell: Cell) -> Weights:
        real: list[Tensor | None] = []
        for kind in MATRICES:
            name = f"{kind}{cell.suffix}"
            held = name in self._parameters
            real.append(dequantize_weight(*self.matrix(name), 0) if held else None)
        first, second = real[0], real[1]
        if first is None or second is None:
            raise TypeError(f"cell {cell} has no weights")
        biases = [self._parameters[f"{bias}{cell.suffix}"] for bias in _BIASES]
        return Weights(first, second, biases[0], biases[1], real[2])

    def run_cell(
        self, cell: Cell, x: Tensor, sizes: list[int], state: State
    ) -> tuple[Tensor, State]:
        """One layer in one direction; arguments and results as of :func:`run_layer`."""
        weights = self._weights(cell)
        return run_layer(self.mode, x, sizes, state, weights, self.reads, reverse=cell.reverse)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As :meth:`torch.nn.LSTM.forward`, :meth:`torch.nn.GRU.forward`, ..."""
        if isinstance(input, PackedSequence):
            sizes = input.batch_sizes.tolist()
            state = self._start(hx, input.data, sizes[0], input.sorted_indices)
            rows, ends = self._layers(input.data, sizes, state)
            ends = _picked(ends, input.unsorted_indices)
            made = PackedSequence(
                rows, input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
            return made, self._given_back(ends)
        if input.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: expected a 2-D or 3-D input, got {input.dim()}-D")
        single, first = input.dim() == 2, self.batch_first and input.dim() == 3
        x = input.transpose(0, 1) if first else input.unsqueeze(1) if single else input
        steps, batch = x.shape[0], x.shape[1]
        if steps == 0:
            raise RuntimeError(f"{self.mode}: expected a sequence length larger than 0")
        if single and hx is not None:
            hx = self._map(hx, lambda part: part.unsqueeze(1))
        state = self._start(hx, x, batch, None)
        rows, ends = self._layers(x.reshape(steps * batch, x.shape[2]), [batch] * steps, state)
        out = rows.view(steps, batch, rows.shape[-1])
        if single:
            return out.squeeze(1), self._given_back(tuple(part.squeeze(1) for part in ends))
        return (out.transpose(0, 1) if first else out), self._given_back(ends)

    def _layers(self, x: Tensor, sizes: list[int], state: State) -> tuple[Tensor, State]:
        """All layers over rows of steps; states are ``[layers * directions, batch, width]``."""
        ends: list[State] = []
        directions = 2 if self.bidirectional else 1
        for place, cell in enumerate(self.cells):
            if place % directions == 0:
                if place and self.dropout and self.training:
                    x = F.dropout(x, self.dropout)
                made: list[Tensor] = []
            out, end = self.run_cell(cell, x, sizes, tuple(part[place] for part in state))
            made.append(out)
            ends.append(end)
            if len(made) == directions:
                x = torch.cat(made, -1) if directions > 1 else out
        return x, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))

    def _start(self, hx: Any, x: Tensor, batch: int, order: Tensor | None) -> State:
        """The states the sequences start in, in the order of their rows; checked."""
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"{self.mode}: the input has {x.shape[-1]} features, and the layer takes "
                f"{self.input_size}"
            )
        widths = (self.width, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
        if hx is None:
            return tuple(
                torch.zeros(len(self.cells), batch, width, device=x.device) for width in widths
            )
        state = tuple(hx) if self.mode == "LSTM" else (hx,)
        for part, width in zip(state, widths, strict=True):
            wanted = (len(self.cells), batch, width)
            if tuple(part.shape) != wanted:
                raise RuntimeError(
                    f"{self.mode}: expected a hidden state of shape {wanted}, got "
                    f"{tuple(part.shape)}"
                )
        return _picked(tuple(part.to(torch.float32) for part in state), order)

    def _map(self, hx: Any, function: Any) -> Any:
        return tuple(map(function, hx)) if self.mode == "LSTM" else function(hx)

    def _given_back(self, state: State) -> Any:
        return state if self.mode == "LSTM" else state[0]

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(model)``."""
        sizes = f"{self.mode}, {self.input_size}, {self.hidden_size}, layers={self.num_layers}"
        options = [f"proj_size={self.proj_size}"] if self.proj_size else []
        options += [name for name in ("batch_first", "bidirectional") if getattr(self, name)]
        return ", ".join([sizes, *options, "int8 per channel, rows at run time"])


def _picked(state: State, order: Tensor | None) -> State:
    return state if order is None else tuple(part.index_select(1, order) for part in state)
