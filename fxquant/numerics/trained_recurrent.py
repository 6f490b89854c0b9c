"""Recurrent layers whose weights may be given with the call: what training puts in their place.

They compute what the int8 layers will (:mod:`fxquant.numerics.recurrent`): rows of inputs and
states are quantized in their own range, and gradients pass that as if it were not there, since
nothing is clipped. Without rounded weights they are torch's own layers, with torch's kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fxquant.numerics.fake_rows import trained_rows
from fxquant.numerics.recurrence import Cell, Recurrence, cells_of
from fxquant.numerics.recurrent import State, Weights, run_layer
from fxquant.spec import QSpec

_COPIED: Final = ("mode", "input_size", "hidden_size", "num_layers", "batch_first", "dropout",
                  "bidirectional", "proj_size", "training")  # fmt: skip


class _Run(Recurrence):
    """One call of a layer, with the weights it was given."""

    def __init__(self, layer: nn.RNNBase, reads: QSpec, given: Mapping[str, Tensor]) -> None:
        for name in _COPIED:
            setattr(self, name, getattr(layer, name))
        self.cells = tuple(cells_of(self.num_layers, self.bidirectional))
        self._reads = reads
        self._held: dict[str, Tensor] = {**dict(layer.named_parameters(recurse=False)), **given}

    def run_cell(
        self, cell: Cell, x: Tensor, sizes: list[int], state: State
    ) -> tuple[Tensor, State]:
        """One layer in one direction."""
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        first, second, *others = (self._held.get(f"{kind}{cell.suffix}") for kind in kinds)
        if first is None or second is None:
            raise TypeError(f"cell {cell} has no weights")
        weights = Weights(first, second, *others)
        options: dict[str, Any] = {"reverse": cell.reverse, "rows": trained_rows}
        return run_layer(self.mode, x, sizes, state, weights, self._reads, **options)


class _Trained(nn.RNNBase):
    takes_given_weights: ClassVar[bool] = True
    """How others tell that the class of a user's layer was changed for training."""
    reads: QSpec

    def forward(self, input: Any, hx: Any = None, **given: Tensor) -> Any:
        """As the class's own, with other weights where some are given."""
        if all(weight is self._parameters[name] for name, weight in given.items()):
            return super().forward(input, hx)
        data = input.data if isinstance(input, PackedSequence) else input
        with torch.autocast(data.device.type, enabled=False):
            return _Run(self, self.reads, given).forward(input.to(torch.float32), hx)


class TrainedLSTM(_Trained, nn.LSTM):
    """An ``nn.LSTM`` whose weights may be given."""


class TrainedGRU(_Trained, nn.GRU):
    """An ``nn.GRU`` whose weights may be given."""


class TrainedRNN(_Trained, nn.RNN):
    """An ``nn.RNN`` whose weights may be given."""


_TRAINED: Final[dict[type[nn.RNNBase], type[_Trained]]] = {
    nn.LSTM: TrainedLSTM,
    nn.GRU: TrainedGRU,
    nn.RNN: TrainedRNN,
}


def take_given_matrices(layer: nn.RNNBase, reads: QSpec) -> None:
    """Let a layer take its weights with the call.

    Args:
        layer: of a copied model, and computing as torch's own; its class changes, nothing else.
        reads: how rows of its input are quantized.
    """
    if not isinstance(layer, _Trained):
        base = next(plain for plain in _TRAINED if isinstance(layer, plain))
        layer.__class__ = _TRAINED[base]
    layer.reads = reads


def with_matrices(layer: nn.RNNBase, twin: nn.RNNBase, given: Mapping[str, Tensor]) -> None:
    """Make a copy of a trained layer torch's own layer again, with other weights.

    Args:
        layer: what was trained.
        twin: a copy of it that shares its parameters; changed in place.
        given: its weights by name.
    """
    twin.__class__ = next(plain for plain, made in _TRAINED.items() if isinstance(layer, made))
    del twin.__dict__["reads"]
    for name, weight in given.items():
        twin._parameters[name] = nn.Parameter(weight, requires_grad=False)
    # It keeps its weights in a list beside.
    twin._flat_weights = [getattr(twin, name, None) for name in twin._flat_weights_names]
