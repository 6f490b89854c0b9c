"""The loop over the steps of an LSTM, written so that torch's own interpreter can run it.

For one sequence a step is fourteen small calls, and half of its time is Python's. TorchScript's
interpreter takes a fifth less for the same calls, with the same bits. It is deprecated: where it
is gone, Python runs the same function.
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
    sigmoids: List[Tensor],  # noqa: UP006
    gates: Tensor,
    room: Tensor,
    shape: Tensor,
    packed: Tensor,
    offsets: Tensor,
    zeros: Tensor,
    scale: Tensor,
    guarded: bool,
    most: int,
    least: float,
) -> Tensor:
    """Run the steps; returns the hidden state after the last.

    Args:
        state: hidden state, ``[rows, hidden]``.
        cell: cell state, likewise; written over.
        given: what the input gives to the gates of each step, ``[rows, 4 * hidden]``.
        made: where the hidden state of each step is written.
        sigmoids: pieces of the first three blocks of ``gates``.
        gates: memory for the gates.
        room: as :meth:`fxquant.backends.x86_row_sums.RowSums.room` gives it.
        shape: the first argument of FBGEMM's kernel after that, and so on.
        packed: the weight as that kernel wants it.
        offsets: sums of its rows.
        zeros: the bias of that kernel.
        scale: what sums are multiplied by, ``[4 * hidden]``.
        guarded: whether states may hold a NaN or an infinity.
        most: the largest code.
        least: the smallest scale.
    """
    hidden = cell.shape[1]
    codes = room[:, :hidden]
    let_in, keep = gates[:, :hidden], gates[:, hidden : 2 * hidden]
    out, fresh = gates[:, 2 * hidden : 3 * hidden], gates[:, 3 * hidden :]
    for at in range(len(given)):
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
        for piece in sigmoids:
            piece.sigmoid_()
        fresh.tanh_()
        cell.mul_(keep).addcmul_(let_in, fresh)
        state = made[at]
        torch.tanh(cell, out=state)
        state.mul_(out)
    return state


@functools.cache
def fastest_lstm_loop() -> Callable[..., Tensor]:
    """:func:`lstm_loop`, by TorchScript's interpreter where there is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            scripted: Callable[..., Tensor] = torch.jit.script(lstm_loop)
    except (AttributeError, RuntimeError, NotImplementedError):
        return lstm_loop
    return scripted
