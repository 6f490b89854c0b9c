"""The loop over the steps of an LSTM, written so that torch's own interpreter can run it.

For one sequence a step is fifteen small calls, and half of its time is Python's. TorchScript's
interpreter takes a fifth less for the same calls, with the same bits. It is deprecated: where it
is gone, Python runs the same function.

torch's tanh takes twice as long for 512 numbers as its sigmoid for 2048 (torch 2.13, AVX512), and
tanh(x) = 2 sigmoid(2 x) - 1. So the gate that has a tanh comes doubled, cells are kept doubled, and
a step takes two sigmoids:

    d = keep * d + let_in * (4 fresh - 2)        h = out * (2 sigmoid(d) - 1)
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import List  # noqa: UP035 - TorchScript knows it by this name

import torch
from torch import Tensor


def lstm_loop(  # noqa: PLR0913 - TorchScript takes no object that could hold them
    state: Tensor,
    cell: Tensor,
    given: List[Tensor],  # noqa: UP006 - as above
    made: List[Tensor],  # noqa: UP006
    gates: Tensor,
    gate_pieces: List[Tensor],  # noqa: UP006
    cell_pieces: List[Tensor],  # noqa: UP006
    bounded: Tensor,
    bounded_pieces: List[Tensor],  # noqa: UP006
    room: Tensor,
    shape: Tensor,
    packed: Tensor,
    offsets: Tensor,
    zeros: Tensor,
    scale: Tensor,
    guarded: bool,
    most: Tensor,
    least: float,
) -> Tensor:
    """Run the steps; returns the hidden state after the last.

    Args:
        state: hidden state, ``[rows, hidden]``.
        cell: doubled cell state, likewise; written over.
        given: what the input gives to the gates of each step, ``[rows, 4 * hidden]``, doubled for
            the last of them.
        made: where the hidden state of each step is written.
        gates: memory for the gates, input, forget, output and cell.
        gate_pieces: all of it, in pieces that are taken in whole vectors by one thread.
        cell_pieces: ``cell``, likewise.
        bounded: memory as ``cell`` takes.
        bounded_pieces: its pieces.
        room: as :meth:`fxquant.backends.x86_row_sums.RowSums.room` gives it.
        shape: the first argument of FBGEMM's kernel after that, and so on.
        packed: the weight as that kernel wants it.
        offsets: sums of its rows.
        zeros: the bias of that kernel.
        scale: what sums are multiplied by, ``[4 * hidden]``, doubled for the last gate.
        guarded: whether states may hold a NaN or an infinity.
        most: the largest code; a tensor, as a number is made one in every call.
        least: the smallest scale.
    """
    hidden = cell.shape[1]
    codes = room[:, :hidden]
    let_in, keep = gates[:, :hidden], gates[:, hidden : 2 * hidden]
    out, fresh = gates[:, 2 * hidden : 3 * hidden], gates[:, 3 * hidden :]
    for at in range(len(given)):
        if state.shape[0] == 1:
            low, high = torch.aminmax(state)
            scales = torch.maximum(high, low.neg_()).div_(most)
        else:
            scales = state.abs().amax([1], True).div_(most)
        if guarded:
            scales.add_(scales * 0.0)
        scales.clamp_min_(least)
        torch.div(state, scales, out=codes)
        if guarded:
            codes.nan_to_num_(0.0, 0.0, 0.0)
        sums = torch.fbgemm_linear_int8_weight_fp32_activation(
            room, shape, packed, offsets, 1.0, 0, zeros
        )
        torch.addcmul(given[at], sums.mul_(scales), scale, out=gates)
        for piece in gate_pieces:
            piece.sigmoid_()
        cell.mul_(keep).addcmul_(let_in, fresh, value=4.0).sub_(let_in, alpha=2.0)
        for place in range(len(cell_pieces)):
            torch.sigmoid(cell_pieces[place], out=bounded_pieces[place])
        state = made[at]
        torch.addcmul(out.neg(), out, bounded, value=2.0, out=state)
    return state


@functools.cache
def fastest_lstm_loop() -> Callable[..., Tensor]:
    """:func:`lstm_loop`, by TorchScript's interpreter where there is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            scripted: Callable[..., Tensor] = torch.jit.script(lstm_loop)
    # TorchScript is deprecated: a torch without it runs the loop in Python.
    except (AttributeError, RuntimeError, NotImplementedError):
        return lstm_loop
    return scripted
