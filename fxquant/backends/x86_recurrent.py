"""Recurrent layers on integer kernels.

One product for the inputs of all steps; then, for each step, one product with the hidden state
and as few passes over the gates as eager torch allows.

A sequence gets the same bits alone and in a batch: integer sums are exact, and of the functions
of gates torch's tanh gives the same bits wherever in a tensor a number stands. Its sigmoid does so
in whole vectors only. So gates that have one are padded to whole vectors, with units whose state
stays 0, and taken in pieces that it does not divide among threads. An LSTM takes sigmoids for its
tanh too: see :mod:`fxquant.backends.x86_lstm_loop`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.backends.x86_lstm_loop import fastest_lstm_loop
from fxquant.backends.x86_pairs import has_vnni
from fxquant.backends.x86_row_codes import RowCodes
from fxquant.backends.x86_row_sums import ByteSums, RowSums
from fxquant.numerics.integer_recurrent import IntegerRecurrent
from fxquant.numerics.qparams import SMALLEST_SCALE
from fxquant.numerics.recurrence import Cell
from fxquant.numerics.recurrent import STATE, Kind, State

_ORDER: Final[dict[Kind, tuple[int, ...]]] = {"LSTM": (0, 1, 3, 2), "GRU": (0, 1, 2)}
"""Blocks of a weight in the order computed with: those of sigmoids first."""
_VECTOR: Final = 32
"""Numbers that torch's kernels take at a time, at most: two vectors of AVX512."""
_MOST: Final = torch.tensor(float(STATE.quant_max), device="cpu")
_MANY: Final = 8
"""Rows of inputs from which oneDNN's kernel was measured faster than FBGEMM's (VNNI, 2 threads)."""
_UNDIVIDED: Final = 32736
"""Numbers that are too few for torch to divide a call among threads; a multiple of 32."""

_room: Final = functools.partial(torch.empty, device="cpu")
"""Memory ``[rows, width]``, whatever torch's default device is."""


@dataclass(frozen=True)
class _Product:
    """A weight and what its integer sums are multiplied by.

    Args:
        sums: the integer kernel.
        scale: float32 ``[outputs]``.
        bias: float32 ``[outputs]``, zeros where there is none.
        totals: float32 ``[outputs]``: the sums of each row of the weight.
    """

    sums: RowSums
    scale: Tensor
    bias: Tensor
    totals: Tensor


@dataclass(frozen=True)
class _Inputs:
    """The weight of inputs: as a product, but packed for few rows or for many when they come.

    Args:
        rows: makes rows of inputs bytes.
        few: the kernel for a few of them.
        many: and for many.
        scale: as of a product.
        bias: as of a product.
        totals: as of a product.
    """

    rows: RowCodes
    few: Callable[[], RowSums]
    many: Callable[[], ByteSums]
    scale: Tensor
    bias: Tensor
    totals: Tensor

    def sums(self, codes: Tensor) -> Tensor:
        """Of bytes, from each of which 128 is taken; the same from both kernels."""
        if codes.shape[0] >= _MANY and has_vnni():
            return self.many()(codes)
        few = self.few()
        room = few.room(codes.shape[0])
        room[:, : few.inputs] = codes[:, : few.inputs].to(torch.float32).sub_(128.0)
        return few(room)


@dataclass(frozen=True)
class _Packed:
    """One layer in one direction, as the kernels want it."""

    from_input: _Inputs
    from_state: _Product
    projection: _Product | None


class _Rows:
    """Adds the product of some rows and a weight to something.

    Args:
        product: the weight.
        rows: how many rows there are.
        guarded: whether rows may hold a NaN or an infinity.
    """

    def __init__(self, product: _Product, rows: int, guarded: bool) -> None:
        self._sums, self._scale = product.sums, product.scale
        self._room = product.sums.room(rows)
        self._codes = self._room[:, : product.sums.inputs]
        self._guarded = guarded
        self._single = rows == 1 and not guarded

    def add(self, rows: Tensor, base: Tensor, out: Tensor) -> None:
        """``out = base + rows @ weight``, each row quantized as :data:`STATE` says."""
        if self._single:
            low, high = torch.aminmax(rows)
            # As a Python number a scale spares three calls; it is rounded to float32 where used.
            scale = max(max(-low.item(), high.item()) / STATE.quant_max, SMALLEST_SCALE)
            torch.div(rows, scale, out=self._codes)
            torch.addcmul(base, self._sums(self._room), self._scale, value=scale, out=out)
            return
        scales = rows.abs().amax(1, True).div_(STATE.quant_max)
        if self._guarded:
            scales.add_(scales * 0.0)
        scales.clamp_min_(SMALLEST_SCALE)
        torch.div(rows, scales, out=self._codes)
        if self._guarded:
            self._codes.nan_to_num_(0.0, 0.0, 0.0)
        torch.addcmul(base, self._sums(self._room).mul_(scales), self._scale, out=out)


class X86Recurrent(IntegerRecurrent):
    """A recurrent layer on integer kernels; on another device it computes as the reference.

    Args:
        layer: the reference that it stands for.
    """

    def __init__(self, layer: IntegerRecurrent) -> None:
        weights = {name: layer.stored(name) for name in layer.matrices()}
        super().__init__(layer, weights, layer.reads)
        self._packed: dict[Cell, _Packed] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is packed, which is made again where it is needed."""
        return {**self.__dict__, "_packed": {}}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = {}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed = {}
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def pack(self, cell: Cell) -> _Packed:
        """What the kernels want of one layer in one direction; made once."""
        if cell not in self._packed:
            first = f"weight_hr{cell.suffix}" if self.proj_size else ""
            self._packed[cell] = _Packed(
                self._inputs(f"weight_ih{cell.suffix}", f"bias_ih{cell.suffix}"),
                self._product(f"weight_hh{cell.suffix}", f"bias_hh{cell.suffix}", gates=True),
                self._product(first, "", gates=False) if first else None,
            )
        return self._packed[cell]

    @property
    def padded(self) -> int:
        """How many units a layer is computed with."""
        whole = _VECTOR if self.mode in _ORDER else 1
        return -(-self.hidden_size // whole) * whole

    def _inputs(self, weight: str, bias: str) -> _Inputs:
        codes, scale, shift = self._parts(weight, bias, gates=True)
        rows = RowCodes(codes.shape[1], self.reads)

        def again() -> Tensor:
            return self._parts(weight, bias, gates=True)[0].contiguous()

        few = functools.cache(lambda: RowSums(again()))
        many = functools.cache(lambda: ByteSums(again(), rows.extra))
        return _Inputs(rows, few, many, scale.contiguous(), shift, _totals(codes))

    def _product(self, weight: str, bias: str, *, gates: bool) -> _Product:
        codes, scale, shift = self._parts(weight, bias, gates=gates)
        return _Product(RowSums(codes.contiguous()), scale.contiguous(), shift, _totals(codes))

    def _parts(self, weight: str, bias: str, *, gates: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and bias, in the order and with the padding that is computed with."""
        codes, scale = self.matrix(weight)
        held = self._buffers.get(bias)
        shift = torch.zeros(codes.shape[0], device="cpu") if held is None else held.detach()
        codes, scale = codes.detach(), scale.detach()
        more = self.padded - self.hidden_size
        if codes.shape[1] == self.hidden_size and not weight.startswith("weight_ih"):
            codes = F.pad(codes, (0, more))
        if gates and self.mode in _ORDER:
            order = _ORDER[self.mode]
            codes, scale, shift = (
                torch.cat(
                    [
                        torch.cat((block, block.new_zeros(more, *block.shape[1:])))
                        for block in (part.chunk(len(order))[at] for at in order)
                    ]
                )
                for part in (codes, scale, shift)
            )
            if self.mode == "LSTM":  # whose last gate is wanted doubled, which is exact
                for part in (scale, shift):
                    part[-self.padded :] *= 2.0
        return codes, scale, shift

    def run_cell(
        self, cell: Cell, x: Tensor, sizes: list[int], state: State
    ) -> tuple[Tensor, State]:
        """As :func:`fxquant.numerics.recurrent.run_layer`."""
        if not x.is_cpu or not x.shape[0]:
            return super().run_cell(cell, x, sizes, state)
        with torch.no_grad():
            packed = self.pack(cell)
            given = self._from_input(packed, x)
            total = sum((part.sum() for part in state), given.sum())
            # Of the three, only relu may grow without bound from finite numbers.
            guarded = self.mode == "RNN_RELU" or not bool(torch.isfinite(total))
            width = self.proj_size or self.padded
            out = _room(x.shape[0], width)
            wide = (width, self.padded)[: len(state)]
            ends = tuple(
                F.pad(part.detach(), (0, to - part.shape[1]))
                for part, to in zip(state, wide, strict=True)
            )
            steps = _Steps(given.split(sizes), out.split(sizes), sizes, cell.reverse, ends)
            run = {"LSTM": self._lstm, "GRU": self._gru}.get(self.mode, self._rnn)
            run(packed, steps, guarded)
            return self._own(out, self.width), tuple(
                self._own(part, own)
                for part, own in zip(ends, (self.width, self.hidden_size), strict=False)
            )

    @staticmethod
    def _own(part: Tensor, width: int) -> Tensor:
        return part if part.shape[1] == width else part[:, :width].contiguous()

    def _from_input(self, packed: _Packed, x: Tensor) -> Tensor:
        """What the inputs of all steps give to the gates, biases included."""
        product = packed.from_input
        codes, scale, zero_point = product.rows(x)
        total = product.sums(codes)
        if not self.reads.symmetric:
            total.addcmul_(128.0 - zero_point, product.totals)
        # What is added to the sums of states later is a bias too, but in a GRU it is multiplied.
        bias = product.bias if self.mode == "GRU" else product.bias + packed.from_state.bias
        return torch.addcmul(bias, total.mul_(scale), product.scale)

    def _lstm(self, packed: _Packed, steps: _Steps, guarded: bool) -> None:
        product, hidden = packed.from_state, self.padded
        kernel = product.sums.legacy
        if kernel is None or packed.projection is not None:
            self._lstm_in_parts(packed, steps, guarded)
            return
        loop = fastest_lstm_loop()
        for rows, times in steps.runs():
            given, made = [list(part) for part in zip(*times, strict=True)]
            gates, bounded = _room(rows, 4 * hidden), _room(rows, hidden)
            cell = steps.ends[1][:rows].mul_(2.0)
            steps.state = loop(
                steps.state,
                cell,
                given,
                made,
                gates,
                _pieces(gates),
                _pieces(cell),
                bounded,
                _pieces(bounded),
                product.sums.room(rows),
                *kernel,
                product.scale,
                guarded,
                _MOST,
                SMALLEST_SCALE,
            )
            cell.mul_(0.5)

    def _lstm_in_parts(self, packed: _Packed, steps: _Steps, guarded: bool) -> None:
        """As :func:`fxquant.backends.x86_lstm_loop.lstm_loop`, with other products."""
        hidden = self.padded
        for rows, times in steps.runs():
            product = _Rows(packed.from_state, rows, guarded).add
            last = packed.projection
            project = None if last is None else _Rows(last, rows, guarded).add
            gates, bounded = _room(rows, 4 * hidden), _room(rows, hidden)
            let_in, keep, out, fresh = gates.chunk(4, 1)
            cell, state = steps.ends[1][:rows].mul_(2.0), steps.state
            pieces = list(zip(_pieces(cell), _pieces(bounded), strict=True))
            gate_pieces = _pieces(gates)
            for given, made in times:
                product(state, given, gates)
                for piece in gate_pieces:
                    piece.sigmoid_()
                cell.mul_(keep).addcmul_(let_in, fresh, value=4.0).sub_(let_in, alpha=2.0)
                for piece, where in pieces:
                    torch.sigmoid(piece, out=where)
                if project is None or last is None:
                    torch.addcmul(out.neg(), out, bounded, value=2.0, out=made)
                else:
                    torch.addcmul(out.neg(), out, bounded, value=2.0, out=bounded)
                    project(bounded, last.bias, made)
                state = made
            steps.state = state
            cell.mul_(0.5)

    def _gru(self, packed: _Packed, steps: _Steps, guarded: bool) -> None:
        hidden, bias = self.padded, packed.from_state.bias
        for rows, times in steps.runs():
            product = _Rows(packed.from_state, rows, guarded).add
            gates = _room(rows, 3 * hidden)
            reset, update, more = gates.chunk(3, 1)
            sums, sigmoids = gates[:, : 2 * hidden], _pieces(gates[:, : 2 * hidden])
            fresh, state = _room(rows, hidden), steps.state
            for given, made in times:
                product(state, bias, gates)
                sums.add_(given[:, : 2 * hidden])
                for piece in sigmoids:
                    piece.sigmoid_()
                torch.addcmul(given[:, 2 * hidden :], reset, more, out=fresh)
                fresh.tanh_()
                torch.addcmul(fresh, update, state - fresh, out=made)
                state = made
            steps.state = state

    def _rnn(self, packed: _Packed, steps: _Steps, guarded: bool) -> None:
        activate = torch.Tensor.tanh_ if self.mode == "RNN_TANH" else torch.Tensor.relu_
        for rows, times in steps.runs():
            product = _Rows(packed.from_state, rows, guarded).add
            state = steps.state
            for given, made in times:
                product(state, given, made)
                activate(made)
                state = made
            steps.state = state


def _totals(codes: Tensor) -> Tensor:
    """The sum of each row of a weight."""
    return codes.sum(1, dtype=torch.int32).to(torch.float32)


def _pieces(gates: Tensor) -> list[Tensor]:
    """Views that torch takes in whole vectors and by one thread each."""
    columns = min(gates.shape[1], _UNDIVIDED)
    rows = max(1, _UNDIVIDED // columns)
    return [piece for part in gates.split(rows) for piece in part.split(columns, 1)]


class _Steps:
    """The steps of a layer, in runs of as many sequences each.

    Args:
        given: what the input gives to the gates of each step.
        made: where the hidden state of each step is written.
        sizes: how many sequences each step has.
        reverse: from the last to the first.
        ends: the states, written over: a sequence has its own until it begins and once it ends.
    """

    def __init__(
        self,
        given: Sequence[Tensor],
        made: Sequence[Tensor],
        sizes: list[int],
        reverse: bool,
        ends: State,
    ) -> None:
        self._given, self._made, self._sizes = given, made, sizes
        self._order = list(range(len(sizes)))[:: -1 if reverse else 1]
        self.ends = ends
        self.state = ends[0][:0]

    def runs(self) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
        """How many rows, and the steps that have so many; ``state`` is theirs meanwhile."""
        at = 0
        while at < len(self._order):
            rows, first = self._sizes[self._order[at]], at
            while at < len(self._order) and self._sizes[self._order[at]] == rows:
                at += 1
            before = self.state.shape[0]
            if rows > before:
                self.state = torch.cat((self.state, self.ends[0][before:rows]))
            elif rows < before:
                self.ends[0][rows:before] = self.state[rows:]
                self.state = self.state[:rows]
            yield rows, [(self._given[i], self._made[i]) for i in self._order[first:at]]
        self.ends[0][: self.state.shape[0]] = self.state
