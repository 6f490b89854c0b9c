"""What a converted model remembers of its making: the facts behind history, report and diff."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn
from torch.fx import GraphModule

from fxquant.errors import ConfigError
from fxquant.graph.diff import GraphState
from fxquant.graph.edit import Edit
from fxquant.graph.info import QType
from fxquant.graph.verify import Stage
from fxquant.numerics.observers import ObserverSummary

KEY: Final = "fxquant"
_ATTRIBUTE: Final = "_fxquant_record"


@dataclass(frozen=True)
class Snapshot:
    """One pass of a pipeline, as it ran.

    Args:
        name: the pass.
        stage: the stage it left the graph in.
        edits: what it changed, in order.
        seconds: how long it took, verification included.
        state: the graph after it; the graph before it is the previous snapshot's.
        near: nearest misses of its rules as ``(rule, path, reason)``.
        fits: how many ops had fitted in each of them.
    """

    name: str
    stage: Stage
    edits: tuple[Edit, ...]
    seconds: float
    state: GraphState
    near: tuple[tuple[str, str, str], ...] = ()
    fits: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshot:
        # Immutable all the way down; copies of a model share its history.
        return self


@dataclass(frozen=True)
class OpRecord:
    """What became of one op (a fused unit counts once).

    Args:
        path: module path in the user's model.
        op: the canonical ops, ``conv2d+relu``, or the name of the user's pattern.
        int8: whether it computes on codes.
        why: one sentence.
        by: the rule, override, pass or backend that decided.
        kernel: what runs it: a backend op, ``table``, ``reference``, ``float``.
        reads: types of its tensor inputs; ``None`` is float.
        weight: how its weight is stored, such as ``int8[channel 0]``; empty without a weight.
        writes: type of its result; ``None`` is float.
        source: the user's line.
        origins: names of the captured nodes it comes from.
        weights: number of weight elements.
        macs: multiply-accumulates on the first batch of calibration; ``None`` if not known.
        parts: the canonical ops, whatever it is called.
        stored: whether its weight is integers, and it computes in float.
    """

    path: str
    op: str
    int8: bool
    why: str
    by: str
    kernel: str
    reads: tuple[QType | None, ...] = ()
    weight: str = ""
    writes: QType | None = None
    source: str = ""
    origins: tuple[str, ...] = ()
    weights: int = 0
    macs: int | None = None
    parts: str = ""
    stored: bool = False


@dataclass(frozen=True)
class Timing:
    """One measured forward of the float and the quantized model on the example batch.

    Args:
        float_ms: milliseconds, best of a few.
        quantized_ms: milliseconds, best of a few.
        slowest: ``(path, op, quantized microseconds, float microseconds)`` of the ops that lose
            most, when the quantized model was slower.
    """

    float_ms: float
    quantized_ms: float
    slowest: tuple[tuple[str, str, float, float], ...] = ()


@dataclass(frozen=True)
class Part:
    """How one part of a model was captured.

    Args:
        path: where it stands in the user's model; empty for the model itself.
        rung: the way it was captured, or ``left in float``.
        why: why not by symbolic tracing as a whole; empty if it was.
        place: where its graph stands in the graph module; empty for the graph module itself.
    """

    path: str
    rung: str
    why: str = ""
    place: str = ""


@dataclass
class Record:
    """Everything a model made by fxquant remembers.

    Args:
        mode: the mode it was made in.
        backend: the backend it runs on; empty until converted.
        rung: how it was captured.
        parts: how each part was captured, the model itself first.
        snapshots: the passes so far; the first is the capture.
        ops: what became of each op; empty until converted.
        observers: what each observer saw; empty until converted.
        unseen: paths of sites calibration never reached.
        bytes_before: size of the float parameters and buffers.
        bytes_after: size of the converted parameters and buffers.
        timing: the speed check, when it ran.
        inputs: what the speed check feeds, random or an example; only while converting.
        origin: what a prepared model was made of, where training may start from it.
    """

    mode: str
    backend: str = ""
    rung: str = ""
    parts: tuple[Part, ...] = ()
    snapshots: list[Snapshot] = field(default_factory=list)
    ops: tuple[OpRecord, ...] = ()
    observers: tuple[ObserverSummary, ...] = ()
    unseen: tuple[str, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    timing: Timing | None = None
    inputs: tuple[Any, ...] | None = None
    origin: object | None = None

    def placed(self) -> tuple[Part, ...]:
        """The parts that are graphs of their own, but for those within another."""
        parts = [part for part in self.parts[1:] if part.place]
        return tuple(
            part
            for part in parts
            if not any(part.place.startswith(f"{other.place}.") for other in parts)
        )


def is_recorded(model: nn.Module) -> bool:
    """Whether fxquant made a model."""
    return isinstance(_found(model), Record)


def _found(model: nn.Module) -> object:
    return getattr(model, "meta", {}).get(KEY) or model.__dict__.get(_ATTRIBUTE)


def attach(module: GraphModule, record: Record) -> None:
    """Let a model remember how it was made.

    ``meta`` survives a copy of a graph module and an attribute survives its pickle; neither
    survives both.
    """
    module.meta[KEY] = record
    module.__dict__[_ATTRIBUTE] = record


def record_of(model: nn.Module) -> Record:
    """The record of a model that fxquant made.

    Raises:
        ConfigError: fxquant did not make it.
    """
    found = _found(model)
    if not isinstance(found, Record):
        raise ConfigError(
            f"{type(model).__name__} was not made by fxquant: pass what quantize(), prepare() or "
            "convert() returned"
        )
    return found
