"""Diffs of models: what graphs tell, and the noise that was measured."""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.counterparts import results_kept
from fxquant.record import Record
from fxquant.report.metered import Feed, metered


def measured_noise(model: nn.Module, quantized: nn.Module, feed: Feed) -> dict[str, float]:
    """SQNR in decibels of every value that stands for a float one, by the name of its node.

    Args:
        model: the float model.
        quantized: what was made of it.
        feed: the data.

    Raises:
        ConfigError: ``quantized`` was not made from ``model``.
        CalibrationError: no batch, or a batch that does not fit.
    """

    def results(captured: GraphModule, _record: Record) -> list[Node]:
        assert isinstance(quantized, GraphModule)
        return results_kept(captured.graph, quantized.graph)

    meter = metered("diff", model, quantized, feed, results).meter
    return meter.noise()
