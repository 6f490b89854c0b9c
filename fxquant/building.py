"""Builds prepared and converted models: graph by graph, where a model is captured in pieces."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.arguments import ranks
from fxquant.backends.base import Backend
from fxquant.errors import ConfigError, TraceError
from fxquant.graph.capture import Captured, capture
from fxquant.graph.copies import deep_copy
from fxquant.graph.edit import Editor
from fxquant.graph.flow import asks_half, wanted
from fxquant.graph.op_table import op_of
from fxquant.graph.pieces import (
    Alone,
    Calls,
    is_alone,
    is_layer,
    joined,
    parts_of,
    prefix_paths,
    record_calls,
    users_path,
)
from fxquant.graph.recurrent_layers import as_called
from fxquant.graph.user_class import (
    UserModule,
    with_descriptions,
    with_user_class,
    with_user_class_of,
)
from fxquant.numerics.observers import Observer, summaries
from fxquant.passes.base import Pass
from fxquant.passes.configure import Selector, nothing_matches, predicate
from fxquant.patterns.rule import Rule
from fxquant.pipeline import first_snapshot
from fxquant.recipes import convert_recipe, prepare_recipe
from fxquant.record import OpRecord, Part, Record, Snapshot, attach, record_of
from fxquant.report.checks import nothing_int8, size_in_bytes
from fxquant.report.ops import read_ops, with_kernels
from fxquant.report.speed import example_of
from fxquant.spec import Mode, QConfig, Scheme

IN_FLOAT: Final = "left in float"
WITHOUT_DATA: Final[tuple[Scheme, ...]] = ("dynamic", "weight_only")
"""Schemes that need no calibration."""


@dataclass(frozen=True)
class Wishes:
    """What the user wants of a prepared model.

    Args:
        qconfig: the default configuration.
        overrides: selectors and what applies to them, in order.
        patterns: fusion rules beside the built-in ones.
        strict: raise where a module would have to stay the user's own code.
        mode: the mode the model is made in.
        borrow: let the prepared model read the user's own parameters: nobody else will see it.
        matched: the places of the overrides that matched something so far.
    """

    qconfig: QConfig = field(default_factory=QConfig)
    overrides: tuple[tuple[Selector, QConfig | None], ...] = ()
    patterns: tuple[Rule, ...] = ()
    strict: bool = False
    mode: Mode = "static"
    borrow: bool = False
    matched: set[int] = field(default_factory=set)


def build(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wishes: Wishes
) -> GraphModule:
    """Capture a model and run the prepare recipe over its graph, and over those of its parts.

    Args:
        model: the user's model; it is copied.
        args: positional example inputs.
        kwargs: keyword example inputs.
        wishes: configuration, overrides, patterns.

    Raises:
        TraceError: the model cannot be captured.
        ConfigError: an override matches nothing.
        LoweringError: nothing in the model can become int8.
    """
    module = _build(as_called(model), args, kwargs, wishes, "")
    if len(record_of(module).parts) > 1:
        _check_overrides(module, wishes)
    if not _has_work(module):
        raise nothing_int8(read_ops(module.graph), wishes.mode)
    return module.eval()


def _has_work(module: GraphModule) -> bool:
    """Whether something is to be calibrated, or was decided to become int8 without that."""
    if any(isinstance(m, Observer) for m in module.modules()):
        return True
    nodes = [n for m in module.modules() if isinstance(m, GraphModule) for n in m.graph.nodes]
    calls = [node for node in nodes if node.op.startswith("call")]
    if any(asks_half(node) and op_of(node) is not None for node in calls):
        return True
    return any(wanted(node, scheme) for node in nodes for scheme in WITHOUT_DATA)


def _build(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wishes: Wishes, path: str
) -> GraphModule:
    start = time.perf_counter()
    # A pattern's own kernel may do to a layer what it likes.
    borrow = wishes.borrow and not wishes.patterns
    captured = capture(
        model, args, kwargs, evaluate=True, strict=wishes.strict, borrow=borrow and not path
    )
    module = captured.module
    if path:
        prefix_paths(module, path, None if is_alone(model) else type(model))
    record = Record(wishes.mode, rung=captured.rung, bytes_before=size_in_bytes(model))
    record.snapshots.append(first_snapshot(module, time.perf_counter() - start))
    parts = _build_parts(captured, args, kwargs, wishes, path) if captured.leaves else []
    recipe = prepare_recipe(
        wishes.qconfig,
        wishes.overrides,
        wishes.patterns,
        ranks(model, args, kwargs),
        must_match=not path and not captured.leaves,
    )
    recipe.run(module, record)
    _note_overrides(module, wishes)
    inner = [(p.path, record_of(module.get_submodule(p.place))) for p in parts if p.place]
    record.snapshots = _joined(record.snapshots, [(at, r.snapshots) for at, r in inner])
    deeper = [
        replace(each, place=f"{part.place}.{each.place}") if each.place else each
        for part in parts
        if part.place
        for each in record_of(module.get_submodule(part.place)).parts[1:]
    ]
    record.parts = (Part(path, captured.rung, captured.why), *parts, *deeper)
    attach(module, record)
    return module.eval()


def _build_parts(
    captured: Captured,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wishes: Wishes,
    path: str,
) -> list[Part]:
    """Replace the parts of the leaves by graphs of their own, where that can be done."""
    module = captured.module
    children = {
        place: child for leaf, _ in captured.leaves for place, child in parts_of(module, leaf)
    }
    calls = record_calls(module, children, args, kwargs)
    made: list[Part] = []
    for place, child in children.items():
        if next(child.parameters(), None) is None:
            continue
        at = ".".join(filter(None, (path, users_path(place))))
        call = calls[place]
        if call.why:
            made.append(Part(at, IN_FLOAT, call.why))
            continue
        try:
            part = _build_part(child, call, wishes, at)
        except TraceError as error:
            if wishes.strict:
                raise
            made.append(Part(at, IN_FLOAT, str(error).splitlines()[0]))
            continue
        if _has_work(part):
            if call.reads:
                part = with_descriptions(part, child, call.reads)
            _put(module, child, part)
            record = record_of(part)
            made.append(Part(at, record.rung, record.parts[0].why, place))
        else:
            why = next((op.why for op in read_ops(part.graph) if op.why), "it has no float op")
            made.append(Part(at, IN_FLOAT, why))
    return made


def _build_part(child: nn.Module, call: Calls, wishes: Wishes, path: str) -> GraphModule:
    """A lone layer is called by a graph, so that it keeps its own path."""
    called = as_called(child, path.rpartition(".")[2])
    if called is not child:
        # Its user may ask it for its sizes, and call flatten_parameters() before every run.
        part = _build(called, call.args, call.kwargs or {}, wishes, path)
        return with_user_class(part, child)
    if not is_layer(child) or call.kwargs:
        return _build(child, call.args, call.kwargs or {}, wishes, path)
    return _build(Alone(path.rpartition(".")[2], child), call.args, {}, wishes, path)


def _put(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` stands: a shared module stands in several places."""
    for owner in list(module.modules()):
        for name, child in owner._modules.items():
            if child is old:
                owner._modules[name] = new


def _joined(
    outer: Sequence[Snapshot], inner: Sequence[tuple[str, Sequence[Snapshot]]]
) -> list[Snapshot]:
    """Snapshots of the same passes over a graph and over its parts, as those of one graph."""
    if not inner:
        return list(outer)
    made = []
    for place, snapshot in enumerate(outer):
        beside = [(path, snapshots[place]) for path, snapshots in inner]
        made.append(
            replace(
                snapshot,
                edits=(*snapshot.edits, *(e for _, s in beside for e in s.edits)),
                seconds=snapshot.seconds + sum(s.seconds for _, s in beside),
                state=joined(snapshot.state, [(path, s.state) for path, s in beside]),
                near=(*snapshot.near, *(miss for _, s in beside for miss in s.near)),
            )
        )
    return made


def _note_overrides(module: GraphModule, wishes: Wishes) -> None:
    for place, (selector, _) in enumerate(wishes.overrides):
        if any(map(predicate(selector), _calls(module))):
            wishes.matched.add(place)


def _calls(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if node.op.startswith("call")]


def _check_overrides(module: GraphModule, wishes: Wishes) -> None:
    """A selector has to match somewhere in the model, in whichever part."""
    for place, (selector, _) in enumerate(wishes.overrides):
        if place not in wishes.matched:
            graphs = [m for m in module.modules() if isinstance(m, GraphModule)]
            raise ConfigError(
                nothing_matches(selector, [node for graph in graphs for node in _calls(graph)])
            )


def lower(prepared: GraphModule, backend: Backend) -> GraphModule:
    """Run the convert recipe over a calibrated model, and over its parts.

    Args:
        prepared: what :func:`build` made, calibrated; left as it is.
        backend: what it is converted for.
    """
    record = record_of(prepared)
    observers = [m for m in prepared.modules() if isinstance(m, Observer)]
    made = copy.copy(record)
    made.snapshots = []
    made.origin = None
    made.backend = backend.name
    made.observers = summaries([observer for observer in observers if observer.seen])
    made.unseen = tuple(observer.path for observer in observers if not observer.seen)

    def watch(step: Pass, editor: Editor) -> None:
        if step.name == "read-ranges":
            made.inputs = example_of(editor.module) or record.inputs
        if step.name == "cast-floats":
            made.ops = read_ops(editor.graph)

    # After the summaries: the copy takes along the ranges they found.
    converted = _working_copy(prepared)
    if record.mode == "qat":
        converted.eval()
    convert_recipe(backend, trained=record.mode == "qat").run(converted, made, watch=watch)
    made.ops = with_kernels(made.ops, converted.graph, backend.name)
    done: list[tuple[str, Record]] = []
    for part in record.placed():
        inside = _submodule(prepared, part.place)
        inner = with_user_class_of(lower(inside, backend), inside)
        _put(converted, _submodule(converted, part.place), inner)
        done.append((part.path, record_of(inner)))
    _own_tensors(converted, prepared)
    steps = len(made.snapshots)
    tails = [(path, each.snapshots[-steps:]) for path, each in done]
    made.snapshots = [*record.snapshots, *_joined(made.snapshots, tails)]
    made.ops = (*_without_parts(made.ops, record), *(op for _, each in done for op in each.ops))
    made.bytes_after = size_in_bytes(converted)
    attach(converted, made)
    return converted


def let_run(converted: GraphModule, backend: Backend) -> None:
    """Give a converted model, and its parts, the executor of its backend.

    Args:
        converted: what :func:`lower` made.
        backend: what it was lowered for.
    """
    executor = backend.executor
    if executor is None:
        return
    for module in converted.modules():
        if isinstance(module, UserModule):
            module.run_by(executor())


def _submodule(module: GraphModule, place: str) -> GraphModule:
    found = module.get_submodule(place)
    if not isinstance(found, GraphModule):
        raise ConfigError(f"{place} was a graph when the model was prepared, and now is replaced")
    return found


def _without_parts(ops: tuple[OpRecord, ...], record: Record) -> tuple[OpRecord, ...]:
    """A leaf is one float op, and its parts are counted by themselves."""
    if len(record.parts) < 2 and not record.parts[0].why:
        return ops
    why = f"it stays the model's own code: {record.parts[0].why}"
    known = [part.path for part in record.parts[1:]]
    return tuple(
        replace(op, why=why, by="capture", weights=0)
        if not op.int8 and (not op.path or any(path.startswith(f"{op.path}.") for path in known))
        else op
        for op in ops
    )


def _working_copy(prepared: GraphModule) -> GraphModule:
    """A copy that still shares float tensors and observers: most are about to go."""
    observers = [module for module in prepared.modules() if isinstance(module, Observer)]
    shared = (*prepared.parameters(), *prepared.buffers(), *observers, record_of(prepared))
    return deep_copy(prepared, {id(each): each for each in shared})


def _own_tensors(converted: GraphModule, prepared: GraphModule) -> None:
    """Give what stayed float memory of its own, frozen parameters and plain buffers included."""
    held = (*prepared.parameters(), *prepared.buffers())
    shared, places = {id(tensor) for tensor in held}, {_place(tensor) for tensor in held}
    own: dict[int, Any] = {}
    for module in converted.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for name, tensor in registry.items():
                if tensor is None:
                    continue
                if id(tensor) in shared or (_place(tensor) and _place(tensor) in places):
                    # One memo for all: what was one tensor twice still is.
                    registry[name] = copy.deepcopy(tensor, own)
        if isinstance(module, nn.RNNBase):
            # It keeps its weights in a list beside.
            names = module._flat_weights_names
            module._flat_weights = [getattr(module, name, None) for name in names]


def _place(tensor: Tensor) -> int:
    """Where its memory begins; 0 for what has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
