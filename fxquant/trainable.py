"""Builds models prepared for quantization-aware training, from float or calibrated ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxquant.arguments import ranks
from fxquant.backends.base import Backend
from fxquant.building import Wishes, build
from fxquant.calibration.data import USER_FAILURES
from fxquant.calibration.example import refused_example
from fxquant.errors import CalibrationError, CalibrationWarning, ConfigError, warn_user
from fxquant.graph.both_modes import capture_both
from fxquant.graph.capture import copied
from fxquant.graph.held import device_of
from fxquant.graph.held_state import random_kept, state_kept
from fxquant.graph.info import info, write_info
from fxquant.graph.op_table import module_of, module_op, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.recurrent_layers import as_called
from fxquant.graph.user_class import with_user_class
from fxquant.graph.user_tree import TrainableModule, adopt_tree
from fxquant.graph.view import tensor_sources
from fxquant.numerics.fake_quantizer import FakeQuantize, FakeQuantizer
from fxquant.numerics.finite import all_finite
from fxquant.numerics.observers import Observer
from fxquant.passes.fake_quantize import HOME
from fxquant.pipeline import first_snapshot
from fxquant.recipes import fake_quantize_recipe, training_recipe
from fxquant.record import KEY, Part, Record, attach, record_of
from fxquant.report.checks import nothing_int8, size_in_bytes
from fxquant.report.ops import read_ops

_MOVES: Final = (Kind.MOVE, Kind.SPLIT, Kind.PICK)


@dataclass(frozen=True)
class Origin:
    """What a prepared model was made of: training may start from there, with its ranges.

    Args:
        model: the float model, a copy that nobody changes. It shares its weights with the prepared
            model wherever that has them as they were.
        args: positional example inputs.
        kwargs: keyword example inputs.
        wishes: configuration, overrides, patterns.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    wishes: Wishes

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The class of a user's model need not be importable where a pickle of its graph is read.
        return _nothing, ()


def _nothing() -> None:
    """What a pickle keeps of an origin."""


def build_from_copy(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wishes: Wishes
) -> GraphModule:
    """As :func:`build`, and the result remembers what it was made of.

    Args:
        model: the user's model; it is copied.
        args: positional example inputs.
        kwargs: keyword example inputs.
        wishes: configuration, overrides, patterns.
    """
    own = copied(model)
    made = build(own, args, kwargs, replace(wishes, borrow=True))
    # Copies: a model may write into what it is fed.
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    record_of(made).origin = Origin(own, args, kwargs, wishes)
    return made


def origin_of(model: nn.Module) -> Origin | None:
    """What a model was made of, if it is one that was prepared in static mode.

    Raises:
        CalibrationError: it was not calibrated.
    """
    if not isinstance(model, GraphModule) or KEY not in model.meta:
        return None
    origin = record_of(model).origin
    if not isinstance(origin, Origin):
        return None
    check_calibrated(model, "training starts from its ranges")
    return origin


def check_calibrated(prepared: nn.Module, before: str) -> None:
    """Refuse observers none of which has seen anything.

    Raises:
        CalibrationError: so it is; says what is to be done before what.
    """
    observers = [m for m in prepared.modules() if isinstance(m, Observer)]
    if observers and not any(observer.seen for observer in observers):
        raise CalibrationError(
            f"no observer has seen any data: call fxquant.calibrate(prepared, data) before {before}"
        )


def build_trainable(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wishes: Wishes,
    backend: Backend,
) -> GraphModule:
    """Capture a model for training and insert fake-quants.

    Args:
        model: the user's model; it is copied, and the copy is left in the mode it is in.
        args: positional example inputs.
        kwargs: keyword example inputs.
        wishes: configuration, overrides, patterns.
        backend: what it will be converted for.

    Raises:
        TraceError: the model cannot be captured as one graph for both modes.
        ConfigError: an override matches nothing, or a name of the model is in the way.
        LoweringError: nothing in the model can become int8.
    """
    if hasattr(model, HOME):
        raise ConfigError(
            f"the model has an attribute called {HOME!r}, which is where fake-quants are kept: "
            "give it another name"
        )
    start = time.perf_counter()
    model = as_called(model)
    both = capture_both(model, args, kwargs)
    module, root = both.captured.module, both.captured.root
    if root is None:
        raise TypeError("the captured copy is missing")
    record = Record(wishes.mode, rung=both.captured.rung, bytes_before=size_in_bytes(model))
    record.snapshots.append(first_snapshot(module, time.perf_counter() - start))
    known = ranks(model, args, kwargs)
    drop = frozenset(both.droppers)
    recipe = training_recipe(wishes.qconfig, wishes.overrides, wishes.patterns, known, drop)
    recipe.run(module, record)
    if args or kwargs:
        _see_shapes(module, args, kwargs)
    fake_quantize_recipe(backend, both.droppers).run(module, record)
    if not any(isinstance(m, FakeQuantizer) for m in module.modules()):
        raise nothing_int8(read_ops(module.graph))
    _put_with(model, module)
    record.parts = (Part("", both.captured.rung),)
    attach(module, record)
    made = with_user_class(module, model, TrainableModule)
    if not isinstance(made, TrainableModule):
        raise TypeError(f"{type(made).__name__} does not keep the user's modules")
    adopt_tree(made, root, model, HOME)
    return made


def _put_with(model: nn.Module, module: GraphModule) -> None:
    """Put fake-quants where the model is, before anybody asks for their parameters.

    Those of a model on several devices move to what they see when they first see it.
    """
    device = device_of(model)
    fakes = [each for each in module.modules() if isinstance(each, FakeQuantizer)]
    for fake in fakes if device is not None else ():
        fake.to(device)


def start_from(trainee: GraphModule, calibrated: GraphModule) -> None:
    """Let fake-quants begin with the ranges that observers of the same values found.

    Args:
        trainee: a model prepared for training, changed in place.
        calibrated: the same model, prepared in static mode and calibrated.
    """
    dropped = {
        origin
        for node in trainee.graph.find_nodes(op="call_module")
        if (op := module_op(module_of(node))) is not None and op.name == "dropout"
        for origin in info(node).origins
    }
    watched: dict[str, list[tuple[Node, Observer]]] = {}
    for node in calibrated.graph.find_nodes(op="call_module"):
        observer, value = module_of(node), node.args[0]
        if isinstance(observer, Observer) and observer.seen and isinstance(value, Node):
            # A folded norm comes last among the origins of its layer: the value is the norm's.
            # What only drops in training comes later still, and is an op of its own there.
            origins = info(value).origins
            last = [name for name in origins if name not in dropped][-1:]
            for name in (*last, *(name for name in origins if name in dropped)):
                watched.setdefault(name, []).append((value, observer))
    for node in trainee.graph.find_nodes(op="call_module"):
        fake, value = module_of(node), node.args[0]
        if isinstance(fake, FakeQuantize) and isinstance(value, Node):
            found = next(filter(None, (_observer(each, watched) for each in _made_of(value))), None)
            if found is not None:
                fake.start(found.qparams())


def _observer(value: Node, watched: dict[str, list[tuple[Node, Observer]]]) -> Observer | None:
    """The observer of a value, if it is known which one that is."""
    found = [pair for name in info(value).origins for pair in watched.get(name, ())]
    # One captured op may have become several, in the same way in both.
    same = [pair for pair in found if pair[0].name == value.name] or found
    return same[0][1] if len(same) == 1 else None


def _made_of(value: Node) -> Iterator[Node]:
    """A value, and what was only moved, or dropped at random, to make it: its range is no wider."""
    while True:
        yield value
        module = module_of(value) if value.op == "call_module" else None
        op = module_op(module) if module is not None else op_of(value)
        moves = op is not None and (op.name == "dropout" or op.kind in _MOVES)
        sources = tensor_sources(value) if moves else list(value.args[:1])
        if not (moves or isinstance(module, FakeQuantize)) or not isinstance(sources[0], Node):
            return
        value = sources[0]


def check_trained(prepared: nn.Module) -> None:
    """Refuse to convert a model that was not trained, or whose training diverged.

    Raises:
        CalibrationError: no fake-quant has seen data; a weight or a statistic is not finite.
    """
    fakes = [m for m in prepared.modules() if isinstance(m, FakeQuantize) and m.floating]
    unseen = [fake.path for fake in fakes if not fake.seen]
    if fakes and len(unseen) == len(fakes):
        raise CalibrationError(
            "no fake-quant has seen any data: train the prepared model for at least one step in "
            "training mode, or call fxquant.calibrate(prepared, data), before convert"
        )
    for name, tensor in (*prepared.named_parameters(), *prepared.named_buffers()):
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CalibrationError(
                f"{name} holds NaN or infinity, and so would every result: training diverged. Go "
                "back to a checkpoint before that, with a lower learning rate, or switch "
                "fake-quant on later"
            )
    if unseen:
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        warn_user(
            f"{len(unseen)} of {len(fakes)} values never were watched in training, and what reads "
            f"them stays float: {', '.join(unseen[:5])}{more}. Leave observers on for at least "
            "one step, or call fxquant.calibrate(prepared, data)",
            CalibrationWarning,
        )


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.numel():
            write_info(n, shape=tuple(value.shape))
        return value


def _see_shapes(module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the example once, in evaluation mode: costs are weighed and work is counted by sizes."""
    inputs = []
    left = list(args)
    for node in module.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name.startswith("*"):
            return
        if left:
            inputs.append(left.pop(0))
        elif name in kwargs:
            inputs.append(kwargs[name])
        elif node.args:
            inputs.append(node.args[0])
        else:
            return
    modes = [(each, each.training) for each in module.modules()]
    with torch.no_grad(), state_kept(module), random_kept(module):
        try:
            _Shapes(module.eval(), garbage_collect_values=True).run(*inputs)
        except USER_FAILURES as error:
            raise refused_example(module, args, kwargs, error) from error
        finally:
            for each, training in modes:
                each.training = training
