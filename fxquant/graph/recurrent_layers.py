"""Whole recurrent layers: which calls are calls of one, and what they multiply by in a step.

Cells are opened up (:mod:`fxquant.graph.recurrent_cells`); layers stay one op, whatever their
sequences are: padded, packed, or a single one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn
from torch.fx import Node

from fxquant.graph.info import info
from fxquant.graph.op_table import module_of
from fxquant.graph.pieces import Alone

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


class Called(Alone):
    """A model that is a recurrent layer, as one that calls it: traced, it would be no layer."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the layer's own."""
        return self[0](input, hx)


def as_called(model: nn.Module, name: str = "layer") -> nn.Module:
    """``model`` itself, or what calls it where it is a recurrent layer.

    Args:
        model: any module.
        name: what the layer is called there.

    Example:
        >>> type(as_called(nn.GRU(2, 3))).__name__, type(as_called(nn.Linear(2, 3))).__name__
        ('Called', 'Linear')
    """
    if type(model) not in _LAYERS or not isinstance(model, nn.RNNBase):
        return model
    made = Called(name, model)
    made.training = model.training
    return made


def recurrent_matrices(layer: nn.RNNBase) -> Iterator[tuple[str, Tensor | None]]:
    """The names of a layer's weights without its biases, and each as far as it is a parameter.

    Args:
        layer: a recurrent layer; what is computed in every call, as by weight normalization, is
            ``None``.
    """
    for name in layer._flat_weights_names:
        if name.startswith("weight"):
            yield name, layer._parameters.get(name)


def work_of(layer: nn.RNNBase) -> int:
    """Multiply-accumulates of one cell in one step, at batch 1."""
    cells = layer.num_layers * (2 if layer.bidirectional else 1)
    return sum(w.numel() for _, w in recurrent_matrices(layer) if w is not None) // cells


def why_slower(node: Node, layer: nn.RNNBase, real: float, codes: float) -> str | None:
    """Why a layer that nobody asked for in particular stays float; ``None`` if it does not.

    Args:
        node: a call that was decided to run in int8.
        layer: what it calls.
        real: microseconds of a step in float.
        codes: those in int8.
    """
    decision = info(node).decision
    if decision is None or decision.by != UNASKED or codes <= real:
        return None
    return (
        f"its float kernel is faster: about {real:.0f} us a step at batch 1, against "
        f"{codes:.0f} us in int8; mode='dynamic' or "
        f"overrides={{nn.{type(layer).__name__}: 'dynamic'}} make it int8 for its size"
    )
