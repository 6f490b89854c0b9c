"""A graph module that keeps what users call and read on their model, such as ``q.config``."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.fx.graph import PythonCode

from fxquant.errors import ConfigError, LoadError
from fxquant.graph.containers import can_be_imported, class_name, class_named
from fxquant.graph.edit import Editor
from fxquant.graph.info import KEY, NodeInfo, info
from fxquant.graph.reads import description
from fxquant.graph.tracer import READS

_CLASS: Final = "_fxquant_user_class"
_Known: TypeAlias = tuple[str, str, int, NodeInfo]
"""Op, target and number of arguments by place, to find a node again, and what is known of it."""
_KEPT: Final = "_user_preserved_attributes"
"""The key under which torch.fx keeps attributes through a copy."""


_SEALED: Final = "fxquant_sealed"
_EXECUTOR: Final = "fxquant_executor"


class Executor(Protocol):
    """Runs a graph module in its own way. Copies and pickles of it begin anew."""

    def __call__(
        self,
        module: GraphModule,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What ``forward``, the graph's own code, returns for these arguments."""

    def forget(self) -> None:
        """The graph is another one."""


class UserModule(GraphModule):
    """A graph module with the attributes and methods of the user's own class behind its own."""

    def seal(self, backend: str, cpu_only: bool) -> None:
        """Say that it is converted: which numbers it computes with is decided.

        Args:
            backend: what it was converted for.
            cpu_only: whether that runs on the CPU only.
        """
        self.meta[_SEALED] = (backend, cpu_only)

    def run_by(self, executor: Executor | None) -> None:
        """Let ``executor`` run it; with ``None`` the code of its graph runs, and nothing else.

        Copies and pickles take the executor along.
        """
        self.meta[_EXECUTOR] = executor

    def recompile(self) -> PythonCode:
        """Make code of the graph, as of any graph module."""
        made = super().recompile()
        kind = type(self)  # torch.fx makes a class for every graph module
        kind.forward = _executed(kind.forward)
        executor = self.__dict__.get("meta", {}).get(_EXECUTOR)
        if executor is not None:
            executor.forget()
        return made

    def train(self, mode: bool = True) -> Self:
        """As of any module; what is converted goes on computing as in evaluation mode."""
        if not self.meta.get(_SEALED):
            return super().train(mode)
        super().train(False)
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``.to()``, ``.float()``, ``.half()`` and ``.cuda()`` are made of.

        Raises:
            ConfigError: it is converted, and would be to compute with other numbers, or elsewhere.
        """
        sealed = self.meta.get(_SEALED)
        if not sealed:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return self
        backend, cpu_only = sealed
        probe = fn(torch.zeros(1))
        if probe.dtype is not torch.float32:
            raise ConfigError(
                f"this model is converted, and cannot be made {probe.dtype}: its integers come "
                "with float32 scales. For float ops in 16 bits quantize with mode='bfloat16' or "
                "'float16', or with overrides={...: 'bfloat16'}"
            )
        if cpu_only and probe.device.type != "cpu":
            raise ConfigError(
                f"this model is converted for backend {backend!r}, which runs on the CPU, and "
                f"cannot go to {probe.device}: convert it with backend='reference' or 'cuda' first"
            )
        # .float() is for models in 16 bits; here some ops may compute in them on purpose.
        kept = functools.partial(_in_own_dtype, fn)
        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = None if name.startswith("__") else self._of_class(name)
            if found is None:
                raise
            bind = getattr(found, "__get__", None)
            return found if bind is None else bind(self, type(self))

    def _user_class(self) -> type[nn.Module] | None:
        """The class of the user's model; ``None`` where a copy was loaded without that class."""
        name = self.__dict__.get(_CLASS)
        try:
            return class_named(name) if name else None
        except LoadError:
            return None

    def _of_class(self, name: str) -> Any:
        """What the user's class says."""
        cls = self._user_class()
        found = None if cls is None else inspect.getattr_static(cls, name, None)
        # It puts float weights into one piece of memory, and there are none.
        return _nothing if found is nn.RNNBase.flatten_parameters else found

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments, *_ = super().__reduce__()
        reads = tuple(str(n.target) for n in self.graph.nodes if n.op == "get_attr")
        held: dict[str, Any] = {**arguments[0], READS: reads}
        given = (type(self).__name__, rebuild, (held, *arguments[1:]), _known(self.graph))
        return restored, given


def _executed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of a graph module, run by its executor if it has one."""

    def run(self: UserModule, *args: Any, **kwargs: Any) -> Any:
        executor = self.meta.get(_EXECUTOR)
        if executor is None or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        return executor(self, functools.partial(forward, self), args, kwargs)

    # torch.compile counts what it compiled by the code, and gives up where one has too many forms.
    run.__code__ = run.__code__.replace()
    return functools.wraps(forward)(run)


def _in_own_dtype(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    return change(tensor).to(tensor.dtype)


def _nothing(module: nn.Module) -> None:
    """Stands for methods that have nothing to do here."""


def _known(graph: Graph) -> tuple[_Known, ...]:
    """What is known of each node, for a pickle: classes and functions go by their names."""
    records = [info(node) for node in graph.nodes]
    # Functions of the user's patterns have done their work where nodes are lowered.
    done = any(record.reads is not None or record.writes is not None for record in records)
    return tuple(
        (
            node.op,
            str(node.target),
            len(node.args),
            dataclasses.replace(
                record,
                owners=tuple(owner for owner in record.owners if can_be_imported(owner[1])),
                part=None if done else record.part,
            ),
        )
        for node, record in zip(graph.nodes, records, strict=True)
    )


def _remember(module: GraphModule, known: tuple[_Known, ...]) -> None:
    """Write down what a pickle kept; torch writes the code of a graph, and traces that again."""
    _put_inputs_in_order(module, [target for op, target, *_ in known if op == "placeholder"])
    # Reading an attribute may have moved, or happen twice; all else stands where it stood.
    held = {target: record for op, target, _, record in known if op == "get_attr"}
    calls = [entry for entry in known if entry[0] != "get_attr"]
    nodes = [node for node in module.graph.nodes if node.op != "get_attr"]
    if [node.op for node in nodes] != [op for op, *_ in calls]:
        return
    editor = Editor(module)
    for node, (_, _, placed, record) in zip(nodes, calls, strict=True):
        node.meta[KEY] = record
        # Functions that are wrapped for tracing name arguments that stood by place.
        named = list(node.kwargs.items())
        moved = max(0, placed - len(node.args))
        if moved:
            args = (*node.args, *(value for _, value in named[:moved]))
            with editor.rule("restore"):
                editor.set_call(node, node.target, args, dict(named[moved:]))
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target in held:
            node.meta[KEY] = held[node.target]


def _put_inputs_in_order(module: GraphModule, targets: list[str]) -> None:
    """Tracing puts what can be given by name only before ``*args``, and that is another call."""
    found = {str(node.target): node for node in module.graph.find_nodes(op="placeholder")}
    if list(found) == targets or set(found) != set(targets):
        return
    for before, after in itertools.pairwise(targets):
        found[before].append(found[after])
    module.recompile()


def restored(
    name: str,
    rebuild: Callable[..., GraphModule],
    arguments: tuple[Any, ...],
    known: tuple[_Known, ...],
    kind: type[UserModule] = UserModule,
) -> UserModule:
    """A module from a pickle: what ``__reduce__`` put there, as ``kind``."""
    plain = rebuild(*arguments)
    made = _made(plain, plain.graph, name, kind)
    _remember(made, known)
    made.meta.update(arguments[0].get("meta", {}))
    for key, value in plain.__dict__.items():
        if key not in made.__dict__ and key != READS:
            made.__dict__[key] = value
    if made.meta.get(_SEALED):
        made.train(made.training)
    return made


def _made(
    root: nn.Module, graph: Graph, name: str, kind: type[UserModule] = UserModule
) -> UserModule:
    made = kind(root, graph, name)
    made.train(root.training)
    return made


def with_user_class(
    module: GraphModule, model: nn.Module, kind: type[UserModule] = UserModule
) -> UserModule:
    """``module`` as one that has the attributes and methods of ``model`` too.

    Args:
        module: the graph module; its submodules and tensors are taken over.
        model: the user's model. Its attributes that hold no module and no tensor are copied.
        kind: the class of the result.
    """
    made = _made(module, module.graph, type(module).__name__, kind)
    made.meta = dict(module.meta)
    kept: dict[str, Any] = {_CLASS: class_name(type(model))}
    for name, value in vars(model).items():
        if name.startswith("_") or name == "training" or name in made.__dict__ or _holds(value):
            continue
        kept[name] = _copied(value)
    made.meta[_KEPT] = kept
    made.__dict__.update(kept)
    for name, value in module.__dict__.items():
        made.__dict__.setdefault(name, value)
    return made


def with_user_class_of(module: GraphModule, other: GraphModule) -> UserModule:
    """``module`` with the attributes and methods that ``other`` was given."""
    made = _made(module, module.graph, type(module).__name__)
    made.meta = dict(module.meta)
    kept = other.meta.get(_KEPT, {})
    made.meta[_KEPT] = kept
    made.__dict__.update(kept)
    for name, value in module.__dict__.items():
        made.__dict__.setdefault(name, value)
    return made


def with_descriptions(module: GraphModule, model: nn.Module, names: Iterable[str]) -> GraphModule:
    """``module``, which answers what code around it asks of tensors that ``model`` has.

    Args:
        module: stands where ``model`` stood.
        model: has the tensors.
        names: their names; types, devices and sizes are kept, numbers are not.
    """
    made = module if isinstance(module, UserModule) else with_user_class(module, model)
    described = {name: description(getattr(model, name)) for name in names}
    made.meta[_KEPT] = {**made.meta.get(_KEPT, {}), **described}
    made.__dict__.update(described)
    return made


def _holds(value: Any) -> bool:
    """Whether it is a module or tensor, or a container of some."""
    if isinstance(value, tuple | list | set):
        return any(_holds(item) for item in value)
    if isinstance(value, dict):
        return any(_holds(item) for item in value.values())
    return isinstance(value, nn.Module | Tensor)


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    # What cannot be copied (a lock, a file) is shared: the user's class decides what may raise.
    except Exception:  # noqa: BLE001
        return value
