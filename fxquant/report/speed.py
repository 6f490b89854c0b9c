"""The whole-model speed check: is the int8 model faster than the float one, and if not, why."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import GraphModule, Node

from fxquant.graph.held_state import state_kept
from fxquant.graph.info import info
from fxquant.graph.view import what
from fxquant.numerics.fake_quantizer import FakeQuantizer
from fxquant.numerics.observers import Observer
from fxquant.record import Timing

_ROUNDS = 3
_MORE_ROUNDS = 12
_SLOWER = 1.1
_LONG = 1.0
"""Seconds that one look may take; where the first run of both takes longer, it has to do."""


def example_of(module: GraphModule) -> tuple[Any, ...] | None:
    """Random inputs of batch 1, of the shapes calibration saw; ``None`` where unknown."""
    made: list[Any] = []
    generator = torch.Generator().manual_seed(0)
    for node in module.graph.find_nodes(op="placeholder"):
        record = info(node)
        if node.args and record.value != "tensor":
            made.append(node.args[0])
            continue
        if not record.shape or record.qtype is None:
            return None
        sample = torch.rand((1, *record.shape[1:]), generator=generator)
        made.append(record.qtype.low + sample * (record.qtype.high - record.qtype.low))
    return tuple(made) if any(isinstance(value, Tensor) for value in made) else None


def in_order(
    module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    """Arguments of a call by place, as its graph takes them; ``None`` where that cannot be told.

    Args:
        module: the graph module.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    holes = [node for node in module.graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in holes]
    if any(name.startswith("*") for name in names) or len(args) > len(holes):
        return None
    if not set(kwargs) <= set(names[len(args) :]):
        return None
    rest = [
        kwargs.get(name, node.args[0] if node.args else None)
        for name, node in zip(names[len(args) :], holes[len(args) :], strict=True)
    ]
    return (*args, *rest)


def compare_speed(
    prepared: GraphModule, converted: GraphModule, inputs: tuple[Any, ...]
) -> Timing | None:
    """Time both models in turns, a few rounds.

    Args:
        prepared: the calibrated model; its observers and fake-quants are off meanwhile.
        converted: the quantized model.
        inputs: what both are fed.

    Returns:
        The best milliseconds of each, or ``None`` if the model does not run on ``inputs``.
    """
    try:
        with torch.no_grad(), state_kept(prepared, converted), _as_float(prepared):
            return _compare(prepared, converted, inputs)
    except (RuntimeError, IndexError, ValueError):
        # A model that fixes its batch size in its code does not run at batch 1; then no check.
        return None


@contextlib.contextmanager
def _as_float(prepared: GraphModule) -> Generator[None]:
    """Evaluation mode, with nothing watched and nothing fake-quantized; then all as before."""
    modes = [(module, module.training) for module in prepared.modules()]
    observers = [m for m in prepared.modules() if isinstance(m, Observer) and m.enabled]
    fakes = [m for m in prepared.modules() if isinstance(m, FakeQuantizer)]
    before = [(fake.observing, fake.quantizing) for fake in fakes]
    try:
        prepared.eval()
        for observer in observers:
            observer.enabled = False
        for fake in fakes:
            fake.observing = fake.quantizing = False
        yield
    finally:
        for fake, switches in zip(fakes, before, strict=True):
            fake.observing, fake.quantizing = switches
        for observer in observers:
            observer.enabled = True
        for module, training in modes:
            module.training = training


def _compare(prepared: GraphModule, converted: GraphModule, inputs: tuple[Any, ...]) -> Timing:
    clocks = _clocked(prepared, converted, inputs)
    real, codes = (sum(clock.spent.values()) * 1e3 for clock in clocks)
    if real + codes > 1e3 * _LONG:
        return Timing(real, codes, _slowest(*clocks) if codes > _SLOWER * real else ())
    real, codes = _best(prepared, converted, inputs, _ROUNDS)
    if codes > _SLOWER * real:
        # A busy machine can make anything look slow for a moment: look again before saying so.
        real, codes = _best(prepared, converted, inputs, _MORE_ROUNDS)
    slower = codes > _SLOWER * real
    return Timing(real, codes, _slowest(*_clocked(prepared, converted, inputs)) if slower else ())


def _best(
    prepared: GraphModule, converted: GraphModule, inputs: tuple[Any, ...], rounds: int
) -> tuple[float, float]:
    """The best milliseconds of each, run in turns, at least once."""
    pairs: list[tuple[float, float]] = []
    stop = time.perf_counter() + _LONG
    while not pairs or (len(pairs) < rounds and time.perf_counter() < stop):
        pairs.append((_seconds(lambda: prepared(*inputs)), _seconds(lambda: converted(*inputs))))
    return min(pair[0] for pair in pairs) * 1e3, min(pair[1] for pair in pairs) * 1e3


def _seconds(run: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    """Until GPUs are done: a call returns when its work is queued."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class _Clock(fx.Interpreter):
    """Runs a graph node by node and times each."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.spent: dict[str, float] = {}
        self.labels: dict[str, tuple[str, str]] = {}

    def run_node(self, n: Node) -> Any:
        """Time one node and book it under the first captured node it comes from."""
        start = time.perf_counter()
        value = super().run_node(n)
        _wait()
        key = next(iter(info(n).origins), n.name)
        self.spent[key] = self.spent.get(key, 0.0) + time.perf_counter() - start
        self.labels.setdefault(key, (info(n).path or n.name, what(n)))
        # What watches hands on what it saw, to nobody: kept, it would keep every activation.
        return value if n.users or n.op == "output" else None


def _clocked(
    prepared: GraphModule, converted: GraphModule, inputs: tuple[Any, ...]
) -> tuple[_Clock, _Clock]:
    clocks = (_Clock(prepared), _Clock(converted))
    for clock in clocks:
        clock.run(*inputs)
    return clocks


def _slowest(real: _Clock, codes: _Clock) -> tuple[tuple[str, str, float, float], ...]:
    rows = [
        (*codes.labels[key], spent * 1e6, real.spent.get(key, 0.0) * 1e6)
        for key, spent in codes.spent.items()
    ]
    losers = [row for row in rows if row[2] > row[3] and row[1] not in ("output", "placeholder")]
    losers.sort(key=lambda row: row[3] - row[2])
    return tuple(losers[:3])
