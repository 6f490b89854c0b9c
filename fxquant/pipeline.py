"""Runs passes over a graph: verifies after each, times it, and records what it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule

from fxquant.errors import ConfigError
from fxquant.graph.diff import GraphState, graph_state
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.state import Known
from fxquant.graph.verify import Stage, verify
from fxquant.passes.base import Pass
from fxquant.record import Record, Snapshot

Observer = Callable[[Snapshot], None]


@dataclass(frozen=True)
class Pipeline:
    """A tuple of passes whose stages fit together.

    Args:
        passes: the passes, in order.

    Raises:
        ConfigError: a pass needs a stage that the ones before it do not give.

    Example:
        >>> from fxquant.passes.canonicalize import Canonicalize
        >>> len(Pipeline((Canonicalize(),)).passes)
        1
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        for earlier, later in zip(self.passes, self.passes[1:], strict=False):
            if later.needs != earlier.gives:
                raise ConfigError(
                    f"pass {later.name!r} needs a graph at stage {later.needs.name}, but "
                    f"{earlier.name!r} before it gives {earlier.gives.name}"
                )

    def run(
        self,
        module: GraphModule,
        record: Record,
        *,
        watch: Callable[[Pass, Editor], None] | None = None,
    ) -> None:
        """Run all passes over ``module`` and append one snapshot each to ``record``.

        Args:
            module: the graph module; changed in place and recompiled once at the end.
            record: gets the snapshots.
            watch: called after each pass with the pass and its editor.

        Raises:
            VerifyError: a pass broke a promise of its stage.
        """
        known: Known = {}
        for step in self.passes:
            start = time.perf_counter()
            editor = Editor(module)
            step.run(editor)
            verify(module, step.gives, step.name)
            if watch is not None:
                watch(step, editor)
            seconds = time.perf_counter() - start
            state = _state(editor, record, known)
            record.snapshots.append(_snapshot(step, editor, state, seconds))
        module.recompile()


def first_snapshot(module: GraphModule, seconds: float) -> Snapshot:
    """The graph as captured, before any pass."""
    return Snapshot("capture", Stage.CAPTURED, (), seconds, graph_state(module.graph))


def _snapshot(step: Pass, editor: Editor, state: GraphState, seconds: float) -> Snapshot:
    places = {node.name: info(node).path for node in editor.graph.nodes} if editor.misses else {}
    near = tuple((rule, places.get(at, at), why) for rule, at, why in editor.misses)
    log, fits = tuple(editor.log), tuple(editor.fits)
    return Snapshot(step.name, step.gives, log, seconds, state, near, fits)


def _state(editor: Editor, record: Record, known: Known) -> GraphState:
    """An unchanged graph shares the state of the snapshot before, an unchanged node its state."""
    if not editor.log and record.snapshots:
        return record.snapshots[-1].state
    return graph_state(editor.graph, known)
