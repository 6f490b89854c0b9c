"""The tracer: records ops with path and source, runs each on the example, and collects guards."""

from __future__ import annotations

import linecache
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from fxquant.graph.answers import Answers, may_drop_dims
from fxquant.graph.containers import kind_of, rebuild, take_apart
from fxquant.graph.info import KEY, NodeInfo, ValueKind
from fxquant.graph.proxies import (
    SCALARS,
    CaughtError,
    Held,
    NoValueError,
    Proxy,
    WritingProxy,
    is_proxy,
    values_of,
)
from fxquant.graph.random_drops import RandomDrop
from fxquant.graph.signature import Arguments, Binding


class Tracer(Answers, fx.Tracer):
    """Symbolic tracing with example values.

    Args:
        binding: the arguments of ``forward``, and their example values where there are any.
        stop: code of the function above which stands the caller, who wrote no op.
        leaves: paths of modules that are called and not traced into.
    """

    def __init__(
        self, binding: Binding, stop: CodeType, leaves: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=())
        self.live = binding.given
        self.proxy_buffer_attributes = binding.given
        self._binding = binding
        self._leaves = leaves
        self._stop = stop
        self._thread = threading.get_ident()
        self._own: dict[CodeType, bool] = {}
        self._calls: dict[str, int] = {}
        self._running = False
        self._failed: tuple[str, str] | None = None
        self._places: dict[int, str] = {}

    def is_mine(self) -> bool:
        """Whether this thread traces, and is not just running an op on the example."""
        return threading.get_ident() == self._thread and not self._running

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record a call; models that other threads run meanwhile are none of its business."""
        if not self.is_mine():
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own layers, what is scripted, and what could not be traced."""
        if module_qualified_name in self._leaves:
            return True
        if isinstance(m, RandomDrop | torch.jit.ScriptModule):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def innermost(self) -> str:
        """After a failure: the path of the innermost module that ran; empty for the root."""
        stack = getattr(self, "module_stack", {})
        if not stack and self._failed:
            return self._failed[1]
        return str(next(reversed(stack.values()))[0]) if stack else ""

    def path_of_module(self, mod: nn.Module) -> str:
        """The path of a module; one kept in a plain list gets a place under the root."""
        known: dict[nn.Module, str] = self.submodule_paths or {}
        if mod in known:
            return known[mod]
        base = f"unregistered_{type(mod).__name__.lower()}"
        count = sum(path.startswith(base) for path in known.values())
        path = f"{base}_{count}"
        self.root.add_module(path, mod)
        known.update({each: f"{path}.{name}" if name else path for name, each in
                      mod.named_modules()})  # fmt: skip
        self.submodule_paths = known
        return path

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """The same for attributes, whose reading fx patches for the whole process too."""
        if not self.is_mine() or not isinstance(attr_val, Tensor) or is_proxy(attr_val):
            return attr_val
        if not isinstance(attr_val, nn.Parameter) and not self.proxy_buffer_attributes:
            return attr_val
        place = self._place_of(attr_val)
        if place is None:
            return attr_val
        if place not in parameter_proxy_cache:
            parameter_proxy_cache[place] = self.create_proxy("get_attr", place, (), {})
        return parameter_proxy_cache[place]

    def _place_of(self, tensor: Tensor) -> str | None:
        if not self._places:
            named = (*self.root.named_parameters(), *self.root.named_buffers())
            self._places = {id(each): name for name, each in reversed(named)}
        return self._places.get(id(tensor))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that carry values."""
        return Proxy(node, self)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for tensors; bound arguments keep a guarded placeholder."""
        positional, keyword = Arguments(self, self._binding).make()

        def call(*args: Any) -> Any:
            result = root_fn(*args, **keyword)
            if self._failed:
                raise CaughtError(self._failed[0])
            self.settle_facts()
            return result

        return call, [self.root, *positional]

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        """Record an op, run it on the example, and give what Python may go on with."""
        if self._asked:
            self.settle_indices()
        proxy: Any = super().create_proxy(kind, target, args, kwargs, name, type_expr)
        if not self.live or kind == "placeholder":
            return proxy
        try:
            given, named = values_of(args), values_of(kwargs)
        except NoValueError:
            return proxy
        value = self._run(kind, target, given, named)
        return self.hold(proxy, value, *self.flags_of(kind, target, args, kwargs, value))

    def hold(self, proxy: Any, value: Any, constant: bool, data: bool) -> Any:
        """Let a proxy carry a value; what is no tensor, number or container is the value itself."""
        if value is None or isinstance(value, str | torch.dtype | torch.layout):
            return value
        proxy._held = Held(value, constant, data)
        record: NodeInfo = proxy.node.meta[KEY]
        proxy.node.meta[KEY] = record.seen_as(_kind(value), integral=_is_integral(value))
        if isinstance(value, Tensor):
            self._ranks[proxy.node] = value.dim()
            if may_drop_dims(proxy.node):
                self._dropped[proxy.node] = value.dim()
        if kind_of(value) in ("dict", "data"):
            return self.opened(proxy, value)
        return proxy

    def _run(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        self._running, done = True, False
        try:
            value = self._called(kind, target, args, kwargs)
            done = True
            return value
        finally:
            self._running = False
            if not done and not self._failed:
                self._failed = (self.text(), self.innermost())

    def _called(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        found: Any = self.root
        for part in str(target).split("."):
            found = getattr(found, part)
        return found(*args, **kwargs) if kind == "call_module" else found

    def create_arg(self, a: Any) -> Any:
        """Containers of other classes than ``tuple``, ``list`` and ``dict`` are put together."""
        if is_proxy(a):
            return a.node
        if self.live and type(a) not in _FX_TYPES and any(True for _ in _inside(a)):
            leaves: list[Any] = []
            spec = take_apart(a, _is_leaf, leaves, objects=True)
            if spec is not None:
                args = (spec, *[self.create_arg(leaf) for leaf in leaves])
                return self.create_node("call_function", rebuild, args, {})
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Every node knows where in the user's model and source it comes from."""
        node: fx.Node = super().create_node(*args, **kwargs)
        owners = tuple((path, cls) for path, cls in self.module_stack.values() if path)
        path = owners[-1][0] if owners else ""
        if node.op == "call_function" or node.op == "call_method":
            leaf = getattr(node.target, "__name__", str(node.target))
            path = self._numbered(f"{path}.{leaf}" if path else leaf)
        elif node.op in ("placeholder", "get_attr", "call_module"):
            path = str(node.target)
        node.meta[KEY] = NodeInfo(
            path=path,
            source=self.line(),
            origins=(node.name,),
            owners=tuple((p, c) for p, c in owners if isinstance(c, type)),
        )
        return node

    def _numbered(self, path: str) -> str:
        """The second ``add`` of a module is ``add_1``: a path names one op."""
        count = self._calls.get(path, 0)
        self._calls[path] = count + 1
        return f"{path}_{count}" if count else path

    def line(self) -> str:
        """The user's line that runs now, ``file.py:12``."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._stop:
            code = frame.f_code
            own = self._own.get(code)
            if own is None:
                own = self._own[code] = is_user_file(code.co_filename)
            if own:
                return f"{code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back
        return ""

    def text(self) -> str:
        """The user's line that runs now, with what it says: ``file.py:12: if x:``."""
        line = self.line()
        file, _, number = line.rpartition(":")
        said = linecache.getline(file, int(number)).strip() if number else ""
        return f"{line}: {said}" if said else line


READS: Final = "_fxquant_reads"
"""Where a pickle keeps the names of the tensors that its code reads, in order."""


class Retracer(fx.Tracer):
    """What unpickling a graph module traces its code anew with.

    Buffers stay attributes: as tensors they would meet proxies that torch cannot read.
    """

    proxy_buffer_attributes = True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Each read is a node, under the name that stood there: of tied tensors all have one."""
        if not isinstance(attr_val, Tensor) or is_proxy(attr_val):
            return attr_val
        targets = self.root.__dict__.get(READS, ())
        for place, target in enumerate(targets):
            if target.rpartition(".")[2] == attr and _held_at(self.root, target) is attr_val:
                # Code reads in the order of the graph.
                self.root.__dict__[READS] = targets[place + 1 :]
                return self.create_proxy("get_attr", target, (), {})
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that may be written to: ``x[:, 0] = 1`` is a line of that code."""
        return WritingProxy(node, self)


def _held_at(root: nn.Module, target: str) -> Any:
    """What stands at a path; found without reading attributes, which is what is being traced."""
    found: Any = root
    *owners, leaf = target.split(".")
    for name in owners:
        found = None if found is None else found._modules.get(name)
    if found is None:
        return None
    held = found._parameters.get(leaf)
    return found._buffers.get(leaf) if held is None else held


def _kind(value: Any) -> ValueKind:
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, torch.Size):
        return "sizes"
    if isinstance(value, (*SCALARS, torch.device)):
        return "scalar"
    if isinstance(value, tuple | list):
        # One of sequences that come sorted by length has no indices to sort them by.
        if isinstance(value, PackedSequence) or all(isinstance(item, Tensor) for item in value):
            return "tensors"
        # What an LSTM returns is a tensor and a pair of them: neither.
        return "sizes" if all(isinstance(item, SCALARS) for item in value) else "unknown"
    return "unknown"


def _is_integral(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list) else (value,)
    return bool(parts) and all(
        isinstance(part, Tensor) and not (part.is_floating_point() or part.is_complex())
        for part in parts
    )


_FX_TYPES: Final = (tuple, list, dict, slice, range, torch.Size)


def _is_leaf(value: Any) -> bool:
    return is_proxy(value) or isinstance(value, Tensor)


def _inside(value: Any, depth: int = 0) -> Any:
    """Proxies anywhere inside, attributes of objects included."""
    if is_proxy(value) or depth > _DEEP:
        if is_proxy(value):
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _inside(item, depth + 1)
    elif isinstance(value, dict):
        for item in (*value.values(), *vars(value).values()) if hasattr(value, "__dict__") else (
            value.values()
        ):  # fmt: skip
            yield from _inside(item, depth + 1)
    elif hasattr(value, "__dict__") and not (isinstance(value, Tensor) or callable(value)):
        for item in vars(value).values():
            yield from _inside(item, depth + 1)


_DEEP: Final = 6


_TORCH_DIR: Final = os.path.join(str(torch.__path__[0]), "")
_OWN_DIR: Final = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def is_user_file(filename: str) -> bool:
    """Whether code of that file is neither torch's nor fxquant's."""
    return not filename.startswith((_TORCH_DIR, _OWN_DIR, "<"))


def user_line(error: BaseException, files: TracebackType | None) -> str:
    """The innermost line of the user's own code in a traceback."""
    for entry in reversed(traceback.extract_tb(files)):
        if is_user_file(entry.filename):
            return f"{entry.filename}:{entry.lineno}: {entry.line}"
    return f"inside {type(error).__name__}"
