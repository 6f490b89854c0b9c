"""Annotate recurrent layers: which of them may run in int8, in every mode that has activations.

One fixed scale for the state at every step would cost accuracy. So where other ops are static,
recurrent layers too are quantized row by row at run time, which needs no calibration.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import nn
from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.info import Decision, NodeInfo, info
from fxquant.graph.recurrent_layers import UNASKED, recurrent_layer, recurrent_matrices
from fxquant.graph.verify import Stage
from fxquant.numerics.finite import all_finite
from fxquant.numerics.integer import INT32_MAX
from fxquant.passes.base import Pass
from fxquant.spec import ROWS, QConfig

_WIDEST: Final = INT32_MAX // (255 * 127)


@dataclass(frozen=True)
class AnnotateRecurrent(Pass):
    """Write a decision into the record of every call of an LSTM, GRU or RNN."""

    name: ClassVar[str] = "annotate-recurrent"
    needs: ClassVar[Stage] = Stage.ANNOTATED
    gives: ClassVar[Stage] = Stage.ANNOTATED

    def run(self, editor: Editor) -> None:
        """Layer by layer; those of a static configuration get one that works at run time."""
        with editor.rule("annotate-recurrent"):
            for node in editor.graph.nodes:
                layer = recurrent_layer(node)
                if layer is None:
                    continue
                decision, config = decide(node, layer)
                editor.annotate(node, decision=decision, config=config)


def decide(node: Node, layer: nn.RNNBase) -> tuple[Decision, QConfig | None]:
    """Whether a call of ``layer`` may run in int8, and the configuration it gets.

    Args:
        node: the call.
        layer: what it calls.
    """
    record = info(node)
    config = record.config
    if record.decision is not None and record.decision.int8:
        return record.decision, config
    if config is None or config.scheme == "float":
        return Decision(False, "it was asked to stay float", record.configured_by), config
    why = _cannot(layer, config)
    if why is not None:
        return Decision(False, why, "annotate"), config
    name = type(layer).__name__
    if config.scheme == "dynamic":
        said = f"{name} has a dynamic form"
        return Decision(True, said, record.configured_by), config
    said = f"{name} is quantized row by row at run time: its state has no range known beforehand"
    return Decision(True, said, _who(record)), dataclasses.replace(config, activation=ROWS)


def _who(record: NodeInfo) -> str:
    asked = record.configured_by.startswith("override ")
    return record.configured_by if asked else UNASKED


def _cannot(layer: nn.RNNBase, config: QConfig) -> str | None:
    if config.scheme == "weight_only":
        return "recurrent layers have no weight-only form; mode='dynamic' stores int8 weights too"
    if config.weight is None:
        return "its weight was asked to stay float"
    for name, weight in recurrent_matrices(layer):
        if weight is None:
            return f"its {name} is computed in every call"
        if weight.dtype != torch.float32:
            return f"its {name} is {weight.dtype}, and int8 kernels are made from float32"
        if not all_finite(weight):
            return f"its {name} holds NaN or infinity"
        if weight.shape[1] > _WIDEST:
            return "the sum of its products could pass 32 bits"
    return None
