"""Runs a float and a quantized model on the same batches, with a meter on their values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.calibration.binding import bind_batch, describe, moved
from fxquant.calibration.data import (
    USER_FAILURES,
    as_batches,
    check_options,
    is_function,
    refuse_empty,
    transformed,
)
from fxquant.errors import CalibrationError, ConfigError, FxQuantError, TraceError
from fxquant.graph.capture import capture
from fxquant.graph.edit import Editor
from fxquant.graph.recall import recall
from fxquant.graph.recurrent_layers import as_called
from fxquant.graph.state import graph_state
from fxquant.numerics.fake_quantizer import FakeQuantizer
from fxquant.passes.canonicalize import Canonicalize
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.unshare import Unshare
from fxquant.record import Record, record_of
from fxquant.report.meter import Meter
from fxquant.report.ops import read_ops


@dataclass(frozen=True)
class Feed:
    """Batches, and how they are fed.

    Args:
        data: a DataLoader, or an iterable or generator of batches.
        transform: turns an item of ``data`` into what the model is fed.
        max_batches: how many batches to use.
    """

    data: Any
    transform: Callable[[Any], Any] | None = None
    max_batches: int | None = None


@dataclass(frozen=True)
class Metered:
    """Two models that ran on the same batches.

    Args:
        captured: the float model's graph.
        made: the quantized model.
        record: the memory of the latter.
        meter: what was measured.
    """

    captured: GraphModule
    made: GraphModule
    record: Record
    meter: Meter


def metered(
    name: str,
    model: nn.Module,
    quantized: nn.Module,
    feed: Feed,
    results: Callable[[GraphModule, Record, GraphModule], Collection[Node]],
) -> Metered:
    """Run both models over the data, once.

    Args:
        name: the public call, for errors.
        model: the float model.
        quantized: what was made of it.
        feed: the data.
        results: which nodes of the captured graph to measure, given that and the record.

    Raises:
        ConfigError: ``quantized`` was not made from ``model``, or is not converted.
        CalibrationError: no batch, or a batch that does not fit.
    """
    made, record = _converted(name, model, quantized)
    check_options(feed.data, feed.transform, feed.max_batches)
    if is_function(feed.data):
        raise ConfigError(
            f"{name}() feeds the same batches to two models: pass the batches, not a function that "
            "feeds one"
        )
    with evaluating(made):
        return _run(model, made, record, feed, results)


def _run(
    model: nn.Module,
    made: GraphModule,
    record: Record,
    feed: Feed,
    results: Callable[[GraphModule, Record, GraphModule], Collection[Node]],
) -> Metered:
    run: Metered | None = None
    for args, kwargs in calls(made, feed):
        if run is None:
            captured = _captured_again(model, record, args, kwargs)
            wanted = dict.fromkeys(results(captured, record, made))
            run = Metered(captured, made, record, Meter(captured, made, wanted))
        try:
            run.meter.feed(args, kwargs)
        except FxQuantError:
            raise
        except USER_FAILURES as error:
            fed = describe(kwargs if kwargs else args[0] if len(args) == 1 else args)
            raise CalibrationError(
                f"the models failed on batch {run.meter.batches}, {fed}: {type(error).__name__}: "
                f"{error}. Check that shape and dtype are those the model is made for"
            ) from error
    if run is None:
        refuse_empty(feed.data)
    return run


def _converted(name: str, model: nn.Module, quantized: nn.Module) -> tuple[GraphModule, Record]:
    for which, given in (("the float model", model), ("the quantized model", quantized)):
        if not isinstance(given, nn.Module):
            raise ConfigError(
                f"{name}() got a {type(given).__name__} as {which}: pass the float model, what "
                "quantize() made of it, and batches"
            )
    record = record_of(quantized)
    if isinstance(quantized, GraphModule) and _rounds(quantized):
        return quantized, dataclasses.replace(record, ops=read_ops(quantized.graph))
    if not record.ops or not isinstance(quantized, GraphModule):
        raise ConfigError(
            "this model is not converted yet, and computes in float: pass what convert() returned"
        )
    if not recall(quantized.graph, record.snapshots[-1].state):
        raise ConfigError(
            "this model was changed after it was converted, or lost in a file what its nodes come "
            "from: pass the very model that quantize() or convert() returned"
        )
    return quantized, record


def _rounds(model: nn.Module) -> bool:
    """Whether it is a model in training that computes with rounding errors."""
    return any(isinstance(m, FakeQuantizer) and m.quantizing for m in model.modules())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """The model in evaluation mode; after it every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def calls(quantized: nn.Module, feed: Feed) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of each batch, on the model's device.

    Args:
        quantized: the model they are for.
        feed: the data.
    """
    devices = {tensor.device for tensor in (*quantized.parameters(), *quantized.buffers())}
    device = devices.pop() if len(devices) == 1 else None
    batches: Iterable[Any] = as_batches(feed.data)
    iterator = iter(batches)
    place = 0
    while feed.max_batches is None or place < feed.max_batches:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        fed = transformed(feed.transform, batch, place)
        yield moved(bind_batch(quantized, fed, place), device)
        place += 1


def _captured_again(
    model: nn.Module, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> GraphModule:
    """The float model's graph as the quantized model was made from, ready to be walked.

    Args:
        model: the float model; it is copied.
        record: the quantized model's memory.
        args: positional arguments of one call.
        kwargs: keyword arguments of one call.

    Raises:
        ConfigError: the quantized model was not made from ``model``.
    """
    first = record.snapshots[0].state
    tried: list[str] = []
    for example in ((args, kwargs), ((), {})):
        try:
            module = capture(as_called(model), *example, evaluate=True).module
        except TraceError as error:
            tried.append(str(error).splitlines()[0])
            continue
        nodes = graph_state(module.graph).nodes
        if [n.line for n in nodes] == [n.line for n in first.nodes[: len(nodes)]]:
            # Ops that write in place have no gradient; their canonical form has.
            for step in (Functionalize(), Unshare(), Canonicalize()):
                step.run(Editor(module))
            return module.eval()
        tried.append("its graph is another one")
    raise ConfigError(
        f"the quantized model was not made from this {type(model).__name__} ({tried[0]}): pass the "
        "float model that quantize() or prepare() was given, with data it can run on"
    )
