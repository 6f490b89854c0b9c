"""What users call: report, explain, history, diff and compare of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.calibration.binding import bind_batch
from fxquant.errors import ConfigError
from fxquant.graph.capture import capture
from fxquant.graph.diff import GraphState, graph_state
from fxquant.graph.held_state import random_kept
from fxquant.graph.pieces import joined
from fxquant.graph.settle import uncompiled, unwrapped
from fxquant.passes.configure import Selector
from fxquant.record import Snapshot, is_recorded, record_of
from fxquant.report.compare import Comparison, compare_models
from fxquant.report.diff import ModelDiff, diff_models, measured_noise
from fxquant.report.explain import Explainer
from fxquant.report.explained import Explanation
from fxquant.report.history import History
from fxquant.report.metered import Feed
from fxquant.report.report import Report
from fxquant.report.verified import Verification
from fxquant.report.verify import verify_models

Comparable = nn.Module | Snapshot | GraphState


def report(model: nn.Module) -> Report:
    """What became of every op of a model: int8 or float and why, types, kernels, sizes.

    Args:
        model: what ``quantize`` or ``convert`` returned.

    Raises:
        ConfigError: fxquant did not make it.

    Example:
        >>> import torch, fxquant.api
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
        >>> q = fxquant.api.quantize(net, [torch.randn(8, 4)], backend="reference")
        >>> report(q).coverage
        1.0
    """
    return Report(record_of(_model(model, "report")))


def explain(model: nn.Module, selector: Selector) -> Explanation:
    """Why an op is int8 or float, who decided that, what nearly fitted, and what would change it.

    Args:
        model: what ``quantize``, ``prepare`` or ``convert`` returned.
        selector: a path, a glob, ``"re:..."``, the name of a node, a module class, or a function
            such as ``torch.add``; a path of a module stands for all that is inside it.

    Raises:
        ConfigError: fxquant did not make the model, or the selector names nothing in it.

    Example:
        >>> import torch, fxquant.api
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).eval()
        >>> batches, wish = [torch.randn(8, 4)], {"1": None}
        >>> q = fxquant.api.quantize(net, batches, backend="reference", overrides=wish)
        >>> print(next(iter(explain(q, "1"))).by)
        override '1'
    """
    given = _model(model, "explain")
    return Explainer(given, record_of(given)).explain(selector)


def history(model: nn.Module) -> History:
    """Every pass that made a model: its edits, its time, the graph before and after.

    Args:
        model: what ``quantize``, ``prepare`` or ``convert`` returned.

    Raises:
        ConfigError: fxquant did not make it.

    Example:
        >>> import torch, fxquant.api
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
        >>> history(fxquant.api.prepare(net))[0].name
        'capture'
    """
    return History(record_of(_model(model, "history")))


def diff(
    a: Comparable,
    b: Comparable | None = None,
    *,
    data: Any = None,
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
    example_inputs: Any = None,
) -> ModelDiff:
    """What has to change in ``a`` to get ``b``, node by node.

    Args:
        a: a model, or a snapshot of a history. A model that is no graph is captured in eval mode.
        b: the same; ``None`` compares the first and the last snapshot of ``a``.
        data: batches, where ``a`` is a float model and ``b`` was made of it: both run on them, and
            what changed is shown with its SQNR against float.
        transform: turns an item of ``data`` into what the model is fed.
        max_batches: how many batches to use.
        example_inputs: what a model that is captured is fed, as a batch of ``data`` would be, for
            one that asks for sizes or branches on values; ``data`` needs none. The parts of a
            module that branches on values are compared where fxquant made both models, or with
            ``data``.

    Raises:
        ConfigError: ``a`` or ``b`` is something else, or ``b`` is left out and fxquant did not
            make ``a``.
        TraceError: a model cannot be captured.

    Example:
        >>> relu, gelu = torch.nn.Sequential(nn.ReLU()), torch.nn.Sequential(nn.GELU())
        >>> [change.kind for change in diff(relu, gelu).changes]
        ['replaced']
    """
    if data is not None:
        return _diff_with_noise(a, b, Feed(data, transform, max_batches))
    if transform is not None or max_batches is not None:
        raise ConfigError("transform and max_batches are about data: pass data=... to diff() too")
    if b is not None:
        # Of a model of the user's in pieces only the outer graph is captured here.
        whole = all(isinstance(each, GraphModule | Snapshot | GraphState) for each in (a, b))
        one, other = (_state(m, n, example_inputs, whole) for m, n in ((a, "a"), (b, "b")))
        return diff_models(one, other)
    if isinstance(a, Snapshot | GraphState):
        raise ConfigError(
            f"diff() got one {type(a).__name__}: pass two, or one model that fxquant made"
        )
    snapshots = record_of(_model(a, "diff")).snapshots
    return diff_models(snapshots[0].state, snapshots[-1].state)


def _diff_with_noise(a: Comparable, b: Comparable | None, feed: Feed) -> ModelDiff:
    if not isinstance(a, nn.Module) or not isinstance(b, nn.Module):
        raise ConfigError(
            "diff() with data runs two models: pass the float model, what quantize() made of it, "
            "and the data"
        )
    with torch.inference_mode(False), random_kept(a, b):
        noise = measured_noise(uncompiled(a), b, feed)
    snapshots = record_of(b).snapshots
    return diff_models(snapshots[0].state, _state(b, "b")).with_noise(noise)


def compare(
    model: nn.Module,
    quantized: nn.Module,
    data: Any,
    *,
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
) -> Comparison:
    """How far each op of a quantized model is from float, and which ops the output's error is of.

    In one pass over the data: for every op the SQNR, cosine and largest error of its result, with
    all errors before it and by itself; the SQNR of its weight; and its share of the error of the
    output, to first order, by one backward pass a batch through the float model. Only sums are
    kept from one batch to the next; a batch needs about the memory of three training steps.

    Args:
        model: the float model that ``quantized`` was made from; it is never changed.
        quantized: what ``quantize`` or ``convert`` returned, in any mode, for any backend; or what
            ``prepare(model, mode="qat")`` did, which rounds as the converted model will.
        data: a DataLoader, or an iterable or generator of batches, as for ``calibrate``.
        transform: turns an item of ``data`` into what the model is fed.
        max_batches: how many batches to use.

    Raises:
        ConfigError: ``quantized`` was not made from ``model``, or computes in float.
        CalibrationError: no batch, or a batch that does not fit.

    Example:
        >>> import torch, fxquant.api
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval()
        >>> batches = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]
        >>> q = fxquant.api.quantize(net, batches, backend="reference")
        >>> compare(net, q, batches).worst(1)[0].op
        'linear+relu'
    """
    with torch.inference_mode(False), random_kept(model, quantized):
        return compare_models(uncompiled(model), quantized, Feed(data, transform, max_batches))


def verify(
    prepared: nn.Module,
    converted: nn.Module,
    data: Any,
    *,
    transform: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
) -> Verification:
    """Whether a converted model computes what was trained, op by op, to one code; for CI.

    Both run on the same batches in evaluation mode, and every op of the converted model reads what
    the trained one has there, so that each is held to account for itself alone. One code is what
    a float32 sum and an exact integer sum may differ by where a result lies between two codes.

    Args:
        prepared: what ``prepare(model, mode="qat")`` returned, trained; it is left as it is.
        converted: what ``convert(prepared)`` returned, for any backend.
        data: a DataLoader, or an iterable or generator of batches, as for ``calibrate``.
        transform: turns an item of ``data`` into what the model is fed.
        max_batches: how many batches to use.

    Returns:
        ``.ok``, ``.worst`` code difference, ``.failures``, ``.to_dict()``; ``str()`` is a table.

    Raises:
        ConfigError: the models do not belong together, or fake-quant is off.
        CalibrationError: no batch, or a batch that does not fit.

    Example:
        >>> import torch, fxquant.api
        >>> batch, net = torch.ones(2, 4), torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> prepared = fxquant.api.prepare(net, mode="qat", example_inputs=batch)
        >>> made = prepared(batch)  # in earnest: training
        >>> converted = fxquant.api.convert(prepared, backend="reference")
        >>> verify(prepared, converted, [batch]).ok
        True
    """
    with torch.inference_mode(False), random_kept(prepared, converted):
        feed = Feed(data, transform, max_batches)
        return verify_models(unwrapped(prepared), unwrapped(converted), feed)


def _model(given: object, name: str) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    raise ConfigError(
        f"{name}() got a {type(given).__name__}: pass the model that quantize(), prepare() or "
        "convert() returned"
    )


def _with_parts(module: GraphModule) -> GraphState:
    """The graph of a model and those of the parts of modules that stay the user's own code."""
    outer = graph_state(module.graph)
    parts = record_of(module).placed() if is_recorded(module) else ()
    graphs = [(part.path, module.get_submodule(part.place)) for part in parts]
    return joined(
        outer, [(path, _with_parts(g)) for path, g in graphs if isinstance(g, GraphModule)]
    )


def _state(given: object, name: str, example: Any = None, whole: bool = True) -> GraphState:
    if isinstance(given, GraphState):
        return given
    if isinstance(given, Snapshot):
        return given.state
    if isinstance(given, GraphModule):
        return _with_parts(given) if whole else graph_state(given.graph)
    if isinstance(given, nn.Module) and not isinstance(given, torch.jit.ScriptModule):
        args, kwargs = ((), {}) if example is None else bind_batch(given, example, 0)
        return graph_state(capture(given, args, kwargs, evaluate=True).module.graph)
    raise ConfigError(
        f"diff() cannot compare {name}, a {type(given).__name__}: pass an nn.Module, a GraphModule "
        "or a snapshot of history(model)"
    )
