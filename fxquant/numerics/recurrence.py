"""How recurrent layers are called: padded, packed or single sequences, through all their cells.

What one cell computes is left to others (:func:`fxquant.numerics.recurrent.run_layer`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fxquant.numerics.recurrent import Kind, State


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


class Recurrence:
    """The calls of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``; attributes are named as theirs."""

    mode: Kind
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    training: bool
    cells: tuple[Cell, ...]

    @property
    def width(self) -> int:
        """How wide a hidden state is."""
        return self.proj_size or self.hidden_size

    def run_cell(
        self, cell: Cell, x: Tensor, sizes: list[int], state: State
    ) -> tuple[Tensor, State]:
        """One layer in one direction; arguments and results as of :func:`run_layer`."""
        raise NotImplementedError

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


def _picked(state: State, order: Tensor | None) -> State:
    return state if order is None else tuple(part.index_select(1, order) for part in state)
