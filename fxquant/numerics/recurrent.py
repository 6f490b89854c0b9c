"""Recurrent layers quantized row by row at run time: what LSTM, GRU and RNN compute in int8.

    gates = W_ih rows(x_t) + b_ih + W_hh rows(h) + b_hh

where ``rows`` quantizes every row (every step of every sequence) in its own range and gives the
numbers back that its codes stand for. The weights are numbers that have codes; gates, hidden and
cell states are float32. This is the one definition: kernels are compared with it, and training
with fake-quantized weights runs it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.numerics.dynamic import qdq_rows
from fxquant.spec import QSpec

Kind = Literal["LSTM", "GRU", "RNN_TANH", "RNN_RELU"]
State = tuple[Tensor, ...]
"""``(h, c)`` of an LSTM, ``(h,)`` of the others; float32 ``[batch, width]``."""
Rows = Callable[[Tensor, QSpec], Tensor]

GATES: Final[dict[Kind, int]] = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""How many products with a state each kind needs."""
STATE: Final = QSpec("int8", symmetric=True, granularity="row", observer="runtime")
"""How hidden states are quantized: a gate times a tanh reaches as far below 0 as above."""


@dataclass(frozen=True)
class Weights:
    """Weights of one layer in one direction, float32, gates in torch's order.

    Args:
        from_input: ``[gates * hidden, input]``.
        from_state: ``[gates * hidden, width of h]``.
        input_bias: ``[gates * hidden]`` or ``None``.
        state_bias: likewise.
        projection: ``[width of h, hidden]`` of an LSTM with ``proj_size``, else ``None``.
    """

    from_input: Tensor
    from_state: Tensor
    input_bias: Tensor | None = None
    state_bias: Tensor | None = None
    projection: Tensor | None = None


def run_layer(
    kind: Kind,
    x: Tensor,
    sizes: Sequence[int],
    state: State,
    weights: Weights,
    spec: QSpec,
    *,
    reverse: bool = False,
    rows: Rows = qdq_rows,
) -> tuple[Tensor, State]:
    """Run one layer over all its steps, in one direction.

    Args:
        kind: which recurrence.
        x: float ``[sum(sizes), input]``: the rows of the first step, then of the second, ...
        sizes: how many sequences each step has, never growing; they are the first ones.
        state: where the sequences start.
        weights: the layer's weights.
        spec: how the rows of ``x`` are quantized.
        reverse: from the last step to the first.
        rows: quantizes rows; training passes one that lets gradients through.

    Returns:
        The hidden states of all steps ``[sum(sizes), width]``, laid out as ``x``, and the state
        in which each sequence ends.

    Example:
        >>> from fxquant.spec import ROWS
        >>> w = Weights(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
        >>> x, start = torch.tensor([[2.0], [1.0]]), (torch.zeros(1, 1),)
        >>> run_layer("RNN_RELU", x, [1, 1], start, w, ROWS)
        (tensor([[2.],
                [2.]]), (tensor([[2.]]),))
    """
    given = F.linear(rows(x, spec), weights.from_input, weights.input_bias).split(list(sizes))
    made: list[Tensor] = [x.new_empty(0)] * len(sizes)
    for at in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        size = sizes[at]
        now = step(kind, given[at], tuple(part[:size] for part in state), weights, rows)
        made[at] = now[0]
        # Sequences that have ended, or have not begun, keep the state they have.
        state = tuple(
            torch.cat((new, old[size:])) if size < old.shape[0] else new
            for new, old in zip(now, state, strict=True)
        )
    return torch.cat(made), state


def step(kind: Kind, given: Tensor, state: State, weights: Weights, rows: Rows) -> State:
    """The state after one step.

    Args:
        kind: which recurrence.
        given: what the input gives to the gates, ``[batch, gates * hidden]``.
        state: the state before.
        weights: the layer's weights.
        rows: quantizes rows.
    """
    h = state[0]
    more = F.linear(rows(h, STATE), weights.from_state, weights.state_bias)
    if kind == "LSTM":
        let_in, keep, fresh, out = (given + more).chunk(4, -1)
        c = torch.sigmoid(keep) * state[1] + torch.sigmoid(let_in) * torch.tanh(fresh)
        h = torch.sigmoid(out) * torch.tanh(c)
        if weights.projection is not None:
            h = F.linear(rows(h, STATE), weights.projection)
        return h, c
    if kind == "GRU":
        reset, update, fresh = given.chunk(3, -1)
        reset_more, update_more, fresh_more = more.chunk(3, -1)
        fresh = torch.tanh(fresh + torch.sigmoid(reset + reset_more) * fresh_more)
        return (fresh + torch.sigmoid(update + update_more) * (h - fresh),)
    total = given + more
    return (torch.tanh(total) if kind == "RNN_TANH" else torch.relu(total),)
