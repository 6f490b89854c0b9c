"""Diffs of models: what graphs tell, the noise that was measured, and the page."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Final

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.counterparts import results_kept
from fxquant.graph.diff import SYMBOLS, GraphDiff, GraphState, diff_states
from fxquant.record import Record
from fxquant.report.html.diff_page import diff_page
from fxquant.report.html.fragment import fragment
from fxquant.report.html.page import saved
from fxquant.report.metered import Feed, metered

_COLUMNS: Final = ("", "change", "path", "what", "detail", "dB")


@dataclass(frozen=True)
class ModelDiff(GraphDiff):
    """The differences of two graphs, with a page to look at them; false if there are none."""

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, title: str = "Graph diff"
    ) -> str:
        """One self-contained page: both graphs drawn as one dataflow, and every change.

        It works offline, in light and dark, by keyboard, and runs nothing but its own script:
        names of modules are text in it, whatever they hold.

        Args:
            path: the file to write, whole or not at all; ``None`` writes none.
            title: the heading.

        Returns:
            The page.

        Raises:
            OSError: the file cannot be written.
        """
        return saved(diff_page(self, title), path)

    def _repr_html_(self) -> str:
        rows = []
        for change in self.changes:
            value = self.sqnr(change)
            what = " -> ".join(
                " + ".join(node.what for node in nodes if node.op != "get_attr")
                for nodes in (change.before, change.after)
                if nodes
            )
            noise = "" if value is None else f"{value:.1f}"
            rows.append(
                (SYMBOLS[change.kind], change.kind, change.path, what, change.detail, noise)
            )
        return fragment(_COLUMNS, rows, self.summary, ("dB",))


def diff_models(a: GraphState, b: GraphState) -> ModelDiff:
    """What has to change in ``a`` to get ``b``, as something to look at."""
    made = diff_states(a, b)
    return ModelDiff(**{field.name: getattr(made, field.name) for field in fields(made)})


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

    def results(captured: GraphModule, _record: Record, made: GraphModule) -> list[Node]:
        return results_kept(captured.graph, made.graph)

    meter = metered("diff", model, quantized, feed, results).meter
    return meter.noise()
