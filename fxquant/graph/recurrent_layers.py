"""Whole recurrent layers: which calls are calls of one, and what they multiply by in a step.

Cells are opened up (:mod:`fxquant.graph.recurrent_cells`); layers stay one op, whatever their
sequences are: padded, packed, or a single one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import Tensor, nn
from torch.fx import Node

from fxquant.graph.op_table import module_of

_LAYERS: Final[tuple[type[nn.RNNBase], ...]] = (nn.LSTM, nn.GRU, nn.RNN)
UNASKED: Final = "annotate-recurrent"
"""Who decided on int8 where nobody asked for this layer in particular: its cost is looked at."""


def recurrent_layer(node: Node) -> nn.RNNBase | None:
    """The layer that ``node`` calls, if it is an LSTM, GRU or RNN that computes as torch's own.

    Args:
        node: any node of a graph module.
    """
    if node.op != "call_module":
        return None
    module = module_of(node)
    if not isinstance(module, _LAYERS) or module._forward_hooks or module._forward_pre_hooks:
        return None
    standard = next(base for base in _LAYERS if isinstance(module, base))
    return module if type(module).forward is standard.forward else None


def recurrent_matrices(layer: nn.RNNBase) -> Iterator[tuple[str, Tensor | None]]:
    """The names of a layer's weights without its biases, and each as far as it is a parameter.

    Args:
        layer: a recurrent layer; what is computed in every call, as by weight normalization, is
            ``None``.
    """
    for name in layer._flat_weights_names:
        if name.startswith("weight"):
            yield name, layer._parameters.get(name)
