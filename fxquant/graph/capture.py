"""Capture: from a module to a torch.fx graph whose nodes know their path and source line.

The ladder's first rung is symbolic tracing with example values; see :mod:`fxquant.graph.tracer`.
"""

from __future__ import annotations

import contextlib
import keyword
import threading
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fxquant.errors import TraceError
from fxquant.graph.attention_modules import open_modules, settle_activations
from fxquant.graph.copies import deep_copy
from fxquant.graph.info import info
from fxquant.graph.patches import patched
from fxquant.graph.proxies import ValueDependentError
from fxquant.graph.signature import Binding, bind_example
from fxquant.graph.tracer import Retracer, Tracer, user_line

_LOCK: Final = threading.RLock()
"""fx patches ``nn.Module.__call__`` for the whole process while it traces."""

SYMBOLIC: Final = "torch.fx symbolic tracing"


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Args:
        module: the graph module; its parameters are those of the copy that was traced.
        rung: which way of capturing was used.
        bound: arguments of ``forward`` that were bound to a value.
    """

    module: fx.GraphModule
    rung: str
    bound: dict[str, Any]


def bind_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Which arguments of ``forward`` are not tensors, or are left out, and their values.

    Args:
        model: the model.
        args: positional example inputs; empty when there is no example.
        kwargs: keyword example inputs.

    Raises:
        TraceError: the example does not fit ``forward``.
    """
    return bind_example(model, args, kwargs).bound


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    evaluate: bool = False,
) -> Captured:
    """Turn ``model`` into a graph module by symbolic tracing.

    Args:
        model: the model; a copy of it is traced and it is never changed.
        args: positional example inputs, if there are any.
        kwargs: keyword example inputs.
        evaluate: whether the copy is put in eval mode first.

    Raises:
        TraceError: a branch depends on a tensor, or the model cannot be traced for another
            reason; the message holds the user's line.

    Example:
        >>> capture(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).rung
        'torch.fx symbolic tracing'
    """
    binding = bind_example(model, args, kwargs or {})
    try:
        module = trace(_ready(model, evaluate), binding, type(model).__name__)
    # Anything may go wrong inside a user's forward that is fed proxies; all of it means
    # the same to them: this model, at this line, cannot be traced.
    except Exception as error:
        if not binding.given or runs(model, evaluate, args, kwargs or {}):
            raise TraceError(_explain(model, error)) from error
        # An example the model cannot take is calibration's to name; tracing does not need it.
        module = _without_example(model, evaluate, binding, error)
    return Captured(module, SYMBOLIC, binding.bound)


def _ready(model: nn.Module, evaluate: bool) -> nn.Module:
    root = copied(model)
    return root.eval() if evaluate else root


def runs(model: nn.Module, evaluate: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy of ``model`` runs on the example; anything the user's code raises is no."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            nn.Module.__call__(_ready(model, evaluate), *args, **kwargs)
        except Exception:  # noqa: BLE001 - the user's own code may fail in any way
            return False
    return True


def _without_example(
    model: nn.Module, evaluate: bool, binding: Binding, first: Exception
) -> fx.GraphModule:
    plain = replace(binding, given=False)
    try:
        return trace(_ready(model, evaluate), plain, type(model).__name__)
    except Exception:  # noqa: BLE001 - as above; the first error says more
        raise TraceError(_explain(model, first)) from first


def trace(root: nn.Module, binding: Binding, name: str) -> fx.GraphModule:
    """Trace ``root`` itself; its buffers are put back as they were.

    Args:
        root: a copy that belongs to the graph module from now on.
        binding: how it is called.
        name: the class name of the graph module.
    """
    _settle_parametrizations(root)
    open_modules(root)
    with _LOCK, _left_as_found(root, binding):
        tracer = Tracer(binding, capture.__code__)
        with patched(root, tracer.is_mine):
            graph = tracer.trace(root)
    graph._tracer_cls = Retracer
    for node in graph.nodes:
        # Annotations may be strings, which the pickle of a graph module cannot import.
        node.type = None
    _check_names(graph)
    return fx.GraphModule(root, graph, name)


def _check_names(graph: fx.Graph) -> None:
    """torch.fx writes a graph as Python code, where ``self.lambda`` cannot stand.

    Raises:
        TraceError: a module or parameter in use is named by a Python keyword.
    """
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        words = [part for part in str(node.target).split(".") if keyword.iskeyword(part)]
        if words:
            raise TraceError(
                f"{node.target} ({info(node).source or 'in forward'}) is named by the Python "
                f"keyword {words[0]!r}, and torch.fx cannot write code that reads it: give it "
                f"another name, such as {words[0] + '_'!r}"
            )


@contextlib.contextmanager
def _left_as_found(root: nn.Module, binding: Binding) -> Generator[None]:
    """Buffers, random state and grad mode, which running the example may change."""
    if not binding.given:
        yield
        return
    modules = list(root.modules())
    buffers = [(m._buffers, dict(m._buffers)) for m in modules]
    values = [(b, b.detach().clone()) for b in root.buffers()]
    devices = {b.device for b in (*root.buffers(), *root.parameters()) if b.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            yield
        finally:
            for registry, before in buffers:
                registry.clear()
                registry.update(before)
            for buffer, value in values:
                buffer.copy_(value)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; computed tensors that a module keeps are copied without their history."""
    kept = [value for module in model.modules() for value in vars(module).values()]
    computed = [v for v in kept if isinstance(v, torch.Tensor) and not v.is_leaf]
    made = deep_copy(model, {id(value): value.detach().clone() for value in computed})
    settle_activations(model, made)
    return made


def _settle_parametrizations(root: nn.Module) -> None:
    """Replace computed weights (weight norm, ...) by their value: static weights stay static."""
    for module in [m for m in root.modules() if parametrize.is_parametrized(m)]:
        with torch.no_grad():
            values = {name: getattr(module, name).clone() for name in module.parametrizations}  # type: ignore[union-attr]  # is_parametrized() said so
        # Not remove_parametrizations(): it changes the class, which a copy shares with the user's
        # own module.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))


def _explain(model: nn.Module, error: BaseException) -> str:
    where = user_line(error, error.__traceback__)
    why = "a branch depends on what a tensor holds" if isinstance(error, ValueDependentError) else (
        str(error)
    )  # fmt: skip
    return (
        f"{type(model).__name__} cannot be traced into a graph: {why}\n"
        f"  at {where}\n"
        "Ways out: compute the condition from arguments that are not tensors and give them in "
        "example_inputs; or move the branch out of the model; or quantize the submodules that "
        "do trace on their own."
    )
