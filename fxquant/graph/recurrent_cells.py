"""Recurrent cells opened up: two linears and a few elementwise ops, instead of one opaque op.

A cell is one step, so a model that calls it says itself how its state travels; the linears are
where its work is. Whole recurrent layers stay closed: their loop over steps is one kernel.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from fxquant.graph.layers import linear_of


class _Gates(nn.RNNCellBase):
    """What the three cells share: the products of the input and of the state."""

    from_input: nn.Linear
    from_state: nn.Linear

    def install(self) -> None:
        """Make the linears over the cell's own parameters."""
        biases: dict[str, Any] = self._parameters
        self.add_module("from_input", linear_of(self.weight_ih, biases["bias_ih"]))
        self.add_module("from_state", linear_of(self.weight_hh, biases["bias_hh"]))

    def total(self, input: Tensor, state: Tensor | None) -> Tensor:
        """Input and state weighted and added up; without a state only its bias is left."""
        weighted: Tensor = self.from_input(input)
        if state is not None:
            more: Tensor = self.from_state(state)
            return weighted + more
        bias = self._parameters["bias_hh"]
        return weighted if bias is None else weighted + self.bias_hh


class _RNNCell(_Gates, nn.RNNCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """As :meth:`torch.nn.RNNCell.forward`."""
        total = self.total(input, hx)
        return torch.tanh(total) if self.nonlinearity == "tanh" else torch.relu(total)


class _LSTMCell(_Gates, nn.LSTMCell):
    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`torch.nn.LSTMCell.forward`."""
        total = self.total(input, None if hx is None else hx[0])
        let_in, keep, fresh, out = total.chunk(4, -1)
        cell = torch.sigmoid(let_in) * torch.tanh(fresh)
        if hx is not None:
            cell = torch.sigmoid(keep) * hx[1] + cell
        return torch.sigmoid(out) * torch.tanh(cell), cell


class _GRUCell(_Gates, nn.GRUCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """As :meth:`torch.nn.GRUCell.forward`."""
        reset, update, fresh = self.from_input(input).chunk(3, -1)
        if hx is not None:
            reset_state, update_state, fresh_state = self.from_state(hx).chunk(3, -1)
            update = torch.sigmoid(update + update_state)
            fresh = torch.tanh(fresh + torch.sigmoid(reset + reset_state) * fresh_state)
            return (1 - update) * fresh + update * hx
        if self._parameters["bias_hh"] is not None:
            reset_bias, update_bias, fresh_bias = self.bias_hh.chunk(3, -1)
            fresh = fresh + torch.sigmoid(reset + reset_bias) * fresh_bias
            update = update + update_bias
        return (1 - torch.sigmoid(update)) * torch.tanh(fresh)


CELLS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.RNNCell: _RNNCell,
    nn.LSTMCell: _LSTMCell,
    nn.GRUCell: _GRUCell,
}
"""Each cell, and the class that has its parameters and a ``forward`` that can be traced."""
