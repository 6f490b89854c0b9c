"""Capture: from a module to a torch.fx graph whose nodes know their path and source line.

A ladder: symbolic tracing with example values (:mod:`fxquant.graph.tracer`), ``torch.export``
(:mod:`fxquant.graph.export`), and pieces around modules that stay the user's own code
(:mod:`fxquant.graph.pieces`).
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

from fxquant.errors import TraceError
from fxquant.graph.attention_modules import open_modules, settle_activations
from fxquant.graph.copies import deep_copy
from fxquant.graph.export import export_graph
from fxquant.graph.held_state import random_kept
from fxquant.graph.info import info
from fxquant.graph.names import check_names
from fxquant.graph.patches import patched
from fxquant.graph.pieces import WHOLE, whole_graph
from fxquant.graph.proxies import CaughtError, TransformError, ValueDependentError
from fxquant.graph.read_only import ReadOnly, WriteError, borrowed, give_back
from fxquant.graph.settle import settle
from fxquant.graph.signature import Binding, bind_example
from fxquant.graph.spare_guards import Traced, asks_batch, merged, other_batches
from fxquant.graph.tracer import Retracer, Tracer, user_line

_LOCK: Final = threading.RLock()
"""fx patches ``nn.Module.__call__`` for the whole process while it traces."""

SYMBOLIC: Final = "torch.fx symbolic tracing"
EXPORT: Final = "torch.export"
PIECES: Final = "torch.fx symbolic tracing, in pieces"


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Args:
        module: the graph module; its parameters are those of the copy that was traced.
        rung: which way of capturing was used.
        bound: arguments of ``forward`` that were bound to a value.
        leaves: modules that stay the user's own code, by path in ``module``, and why.
        why: why not by symbolic tracing, where another way was used.
        root: the copy that was traced, whose modules and parameters the graph module calls.
    """

    module: fx.GraphModule
    rung: str
    bound: dict[str, Any]
    leaves: tuple[tuple[str, str], ...] = ()
    why: str = ""
    root: nn.Module | None = None


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
    train: bool = False,
    strict: bool = False,
    borrow: bool = False,
) -> Captured:
    """Turn ``model`` into a graph module: the ladder of ways, the first that works.

    Symbolic tracing; ``torch.export``, unless it is a value that decides a branch; and last the
    innermost module that cannot be traced stays the user's own code, a leaf of the graph.

    Args:
        model: the model; a copy of it is traced and it is never changed.
        args: positional example inputs, if there are any.
        kwargs: keyword example inputs.
        evaluate: whether the copy is put in eval mode first.
        train: whether it is put in training mode first, unless it is in that mode already.
        strict: raise where a module would have to stay the user's own code.
        borrow: let the graph hold the very memory of the model's parameters where nothing writes
            to it, for a graph that does not outlive the call it is made in.

    Raises:
        TraceError: the model cannot be traced, and there is no example, or ``strict``; the message
            holds the user's line. Or a name in it cannot stand in code.

    Example:
        >>> capture(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).rung
        'torch.fx symbolic tracing'
    """
    check_names(model)
    binding = bind_example(model, args, kwargs or {})
    mode = False if evaluate else (True if train else None)
    climb = _Climb(model, args, kwargs or {}, binding, mode)
    twins = borrowed(model) if borrow else {}
    if twins:
        with contextlib.suppress(WriteError):
            return climb.run(strict, twins)
    return climb.run(strict)


class _Climb:
    """One way after the other, until one works."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        binding: Binding,
        train: bool | None,
    ) -> None:
        self._model = model
        self._example = (args, kwargs)
        self._binding = binding
        self._train = train
        self._root: nn.Module | None = None
        self._leaves: dict[str, str] = {}

    def run(self, strict: bool, twins: dict[int, nn.Parameter] | None = None) -> Captured:
        """Trace; each failure makes one more module a leaf.

        Args:
            strict: raise instead.
            twins: parameters that a graph of the whole model may borrow.

        Raises:
            WriteError: it would write to them.
        """
        while True:
            lent = {} if self._leaves or not twins else twins
            tracer = self._tracer(self._binding)
            try:
                traced = self._traced(self._binding, tracer, lent)
            except WriteError:
                raise
            # Anything may go wrong inside a user's forward that is fed proxies; all of it means
            # the same to them: this model, at this line, cannot be traced.
            except Exception as error:  # noqa: BLE001 - user code under proxies, see above
                done = self._after(error, tracer.innermost(), strict)
                if done is not None:
                    return done
                continue
            traced = self._spared(traced, lent)
            self._root = traced.root
            give_back(traced.module, lent)
            return self._captured(traced.module, PIECES if self._leaves else SYMBOLIC)

    def _tracer(self, binding: Binding) -> Tracer:
        return Tracer(binding, capture.__code__, frozenset(self._leaves))

    def _traced(self, binding: Binding, tracer: Tracer, lent: dict[int, nn.Parameter]) -> Traced:
        with ReadOnly(lent) if lent else contextlib.nullcontext() as guard:
            root = self._copy(lent)
            module = trace(root, binding, tracer, type(self._model).__name__)
        if guard is not None and guard.raised:
            raise WriteError
        return Traced(module, root, tracer.rank_of)

    def _spared(self, first: Traced, lent: dict[int, nn.Parameter]) -> Traced:
        """The trace without a guard of the batch size that was shown to change nothing."""
        if not self._binding.given or not asks_batch(first.module.graph):
            return first
        for args, kwargs in other_batches(*self._example):
            try:
                binding = bind_example(self._model, args, kwargs)
                found = merged(first, self._traced(binding, self._tracer(binding), lent))
            # As above; what the model does with fewer samples is its own affair.
            except Exception:  # noqa: BLE001 - user code under proxies
                continue
            if found is not None:
                return found
        return first

    def _captured(self, module: fx.GraphModule, rung: str) -> Captured:
        leaves = tuple(self._leaves.items())
        why = "; ".join(self._leaves.values())
        return Captured(module, rung, self._binding.bound, leaves, why, self._root)

    def _after(self, error: Exception, where: str, strict: bool) -> Captured | None:
        """What to do about a failure: another way, or one more leaf (``None``)."""
        if not self._binding.given:
            raise TraceError(_explain(self._model, error, hint=True)) from error
        if not self._leaves and not runs(self._copy(), *self._example):
            # An example the model cannot take is calibration's to name; tracing needs none.
            made = self._without_example(error)
            return Captured(made, SYMBOLIC, self._binding.bound, root=self._root)
        if not isinstance(error, ValueDependentError | TransformError):
            exported = self._export()
            if exported is not None:
                why = _line(error)
                return Captured(exported, EXPORT, self._binding.bound, (), why)
        if strict:
            raise TraceError(_explain(self._model, error)) from error
        if not where or where in self._leaves:
            self._leaves = {WHOLE: _line(error)}
            module = whole_graph(self._copy(), self._binding, type(self._model).__name__)
            return self._captured(module, PIECES)
        self._leaves[where] = _line(error)
        return None

    def _copy(self, twins: dict[int, nn.Parameter] | None = None) -> nn.Module:
        root = self._root = copied(self._model, twins)
        if self._train is False:
            return root.eval()
        # What is frozen in a model that is training stays so.
        return root.train() if self._train and not root.training else root

    def _export(self) -> fx.GraphModule | None:
        if self._leaves:
            return None
        try:
            with _LOCK:
                return export_graph(prepared_copy(self._copy()), *self._example)
        except TraceError:
            return None

    def _without_example(self, first: Exception) -> fx.GraphModule:
        plain = replace(self._binding, given=False)
        tracer = Tracer(plain, capture.__code__)
        try:
            return trace(self._copy(), plain, tracer, type(self._model).__name__)
        except Exception:  # noqa: BLE001 - as above; the first error says more
            raise TraceError(_explain(self._model, first)) from first


def runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``model`` runs on the example; anything the user's code raises is no."""
    with random_kept(model), torch.no_grad():
        try:
            nn.Module.__call__(model, *args, **kwargs)
        except Exception:  # noqa: BLE001 - the user's own code may fail in any way
            return False
    return True


def prepared_copy(root: nn.Module) -> nn.Module:
    """``root`` with computed weights settled and attention opened, as tracing wants it."""
    settle(root)
    open_modules(root)
    return root


def trace(root: nn.Module, binding: Binding, tracer: Tracer, name: str) -> fx.GraphModule:
    """Trace ``root`` itself; its buffers are put back as they were.

    Args:
        root: a copy that belongs to the graph module from now on.
        binding: how it is called.
        tracer: records it.
        name: the class name of the graph module.
    """
    prepared_copy(root)
    with _LOCK, _left_as_found(root, binding), patched(root, tracer.is_mine):
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
    # Those that are scripted keep their registries to themselves.
    modules = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]
    buffers = [(m._buffers, dict(m._buffers)) for m in modules]
    values = [(b, b.detach().clone()) for b in root.buffers()]
    with random_kept(root), torch.no_grad():
        try:
            yield
        finally:
            for registry, before in buffers:
                registry.clear()
                registry.update(before)
            for buffer, value in values:
                buffer.copy_(value)


def copied(model: nn.Module, twins: dict[int, nn.Parameter] | None = None) -> nn.Module:
    """A deep copy; computed tensors that a module keeps are copied without their history.

    Args:
        model: the user's model.
        twins: what stands in the copy for some of its parameters, by their ids.
    """
    kept = [value for module in model.modules() for value in vars(module).values()]
    computed = [v for v in kept if isinstance(v, torch.Tensor) and not v.is_leaf]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in computed}
    made = deep_copy(model, memo | (twins or {}))
    settle_activations(model, made)
    return made


def _line(error: Exception) -> str:
    """Why tracing ended, and the user's line."""
    if isinstance(error, ValueDependentError):
        return f"a branch depends on what a tensor holds, at {error}"
    if isinstance(error, CaughtError):
        return f"an op fails on the example and the code goes on without it, at {error}"
    where = user_line(error, error.__traceback__)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}, at {where}"


def _explain(model: nn.Module, error: Exception, hint: bool = False) -> str:
    if isinstance(error, ValueDependentError):
        why, where = "a branch depends on what a tensor holds", str(error)
    else:
        why, where = str(error), user_line(error, error.__traceback__)
    example = (
        "pass example_inputs: with an example, questions about sizes are answered, and a module "
        "that branches on values keeps its own code while its parts are quantized; or "
    )
    return (
        f"{type(model).__name__} cannot be traced into a graph: {why}\n"
        f"  at {where}\n"
        f"Ways out: {example if hint else ''}compute the condition from arguments that are not "
        "tensors and give them in example_inputs; or move the branch out of the model; or quantize "
        "the submodules that do trace on their own."
    )
