"""Capture: from a module to a torch.fx graph whose nodes know their path and source line.

The ladder's first rung, symbolic tracing. What a call leaves out, and what is not a tensor, is
bound to its value and guarded at call time. The batch size stays symbolic.
"""

from __future__ import annotations

import inspect
import operator
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from fxquant.errors import TraceError
from fxquant.graph.attention_modules import open_modules, settle_activations
from fxquant.graph.copies import deep_copy
from fxquant.graph.info import KEY, NodeInfo

_LOCK: Final = threading.RLock()
"""fx patches ``nn.Module.__call__`` for the whole process while it traces."""


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


def check_bound(value: Any, expected: Any, name: str) -> None:
    """Refuse a call that changes an argument the graph was captured with.

    Raises:
        TraceError: the value differs.
    """
    if value is expected or (type(value) is type(expected) and value == expected):
        return
    raise TraceError(
        f"argument {name!r} is {value!r}, but this graph was captured with {expected!r}: the graph "
        f"holds only that case. Quantize again with {name}={value!r} in example_inputs"
    )


_PLAIN: Final = (bool, int, float, str, type(None))


class _Proxy(fx.Proxy):
    """A proxy that records in-place operators as such; torch.fx would drop the write."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Tracer(fx.Tracer):
    """Symbolic tracing that records paths, owners and source lines."""

    def __init__(self, bound: dict[str, Any]) -> None:
        super().__init__(autowrap_functions=())
        self._thread = threading.get_ident()
        self._bound = bound
        self._own: dict[CodeType, bool] = {}
        self._calls: dict[str, int] = {}

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record a call; models that other threads run meanwhile are none of its business."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """The same for attributes, whose reading fx patches for the whole process too."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Proxies that keep in-place operators."""
        return _Proxy(node, self)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for tensors; bound arguments keep a guarded placeholder."""
        positional: list[Any] = [self.root]
        keyword: dict[str, Any] = {}
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        for parameter in parameters:
            value = self._argument(parameter)
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                positional.extend(value)
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                keyword.update(value)
            elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                keyword[parameter.name] = value
            else:
                positional.append(value)

        def call(*args: Any) -> Any:
            return root_fn(*args, **keyword)

        return call, positional

    def _argument(self, parameter: inspect.Parameter) -> Any:
        name = parameter.name
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return ()
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return {}
        if name not in self._bound:
            return self.create_proxy("placeholder", name, (), {})
        value = self._bound[name]
        default = (value,) if isinstance(value, _PLAIN) else ()
        proxy = self.create_proxy("placeholder", name, default, {})
        if default:
            self.create_proxy("call_function", check_bound, (proxy, value, name), {})
        return value

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Every node knows where in the user's model and source it comes from."""
        node = super().create_node(*args, **kwargs)
        owners = tuple((path, cls) for path, cls in self.module_stack.values() if path)
        path = owners[-1][0] if owners else ""
        if node.op == "call_function" or node.op == "call_method":
            leaf = getattr(node.target, "__name__", str(node.target))
            path = self._numbered(f"{path}.{leaf}" if path else leaf)
        elif node.op in ("placeholder", "get_attr", "call_module"):
            path = str(node.target)
        node.meta[KEY] = NodeInfo(
            path=path,
            source=self._source(sys._getframe(1)),
            origins=(node.name,),
            owners=tuple((p, c) for p, c in owners if isinstance(c, type)),
        )
        return node

    def _numbered(self, path: str) -> str:
        """The second ``add`` of a module is ``add_1``: a path names one op."""
        count = self._calls.get(path, 0)
        self._calls[path] = count + 1
        return f"{path}_{count}" if count else path

    def _source(self, frame: FrameType | None) -> str:
        # Above capture() stands the caller of quantize(), who wrote no op.
        while frame is not None and frame.f_code is not capture.__code__:
            code = frame.f_code
            own = self._own.get(code)
            if own is None:
                own = self._own[code] = _is_user_file(code.co_filename)
            if own:
                return f"{code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back
        return ""


_TORCH_DIR: Final = os.path.join(str(torch.__path__[0]), "")
_OWN_DIR: Final = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def _is_user_file(filename: str) -> bool:
    return not filename.startswith((_TORCH_DIR, _OWN_DIR, "<"))


def _user_line(error: BaseException, files: TracebackType | None) -> str:
    """The innermost line of the user's own code in a traceback."""
    for entry in reversed(traceback.extract_tb(files)):
        if _is_user_file(entry.filename):
            return f"{entry.filename}:{entry.lineno}: {entry.line}"
    return f"inside {type(error).__name__}"


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
    signature = inspect.signature(model.forward)
    given: dict[str, Any] = {}
    if args or kwargs:
        try:
            given = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise TraceError(
                f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
            ) from error
    bound: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        variadic = parameter.kind in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if variadic:
            continue
        if name in given:
            if isinstance(given[name], _PLAIN):
                bound[name] = given[name]
        elif parameter.default is not inspect.Parameter.empty:
            bound[name] = parameter.default
    return bound


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
    bound = bind_arguments(model, args, dict(kwargs or {}))
    root = _copy(model)
    if evaluate:
        root.eval()
    _settle_parametrizations(root)
    open_modules(root)
    with _LOCK:
        tracer = _Tracer(bound)
        try:
            graph = tracer.trace(root)
        # Anything may go wrong inside a user's forward that is fed proxies; all of it means
        # the same to them: this model, at this line, cannot be traced.
        except Exception as error:
            raise TraceError(_explain(model, error)) from error
    # Unpickling traces a graph module anew, with a plain tracer.
    graph._tracer_cls = None
    for node in graph.nodes:
        # Annotations may be strings, which the pickle of a graph module cannot import.
        node.type = None
    module = fx.GraphModule(root, graph, type(model).__name__)
    return Captured(module, "torch.fx symbolic tracing", bound)


def _copy(model: nn.Module) -> nn.Module:
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
            values = {name: getattr(module, name).clone() for name in module.parametrizations}  # type: ignore[union-attr]
        # Not remove_parametrizations(): it changes the class, which a copy shares with the user's
        # own module.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))


def _explain(model: nn.Module, error: BaseException) -> str:
    where = _user_line(error, error.__traceback__)
    return (
        f"{type(model).__name__} cannot be traced into a graph: {error}\n"
        f"  at {where}\n"
        "Ways out: compute the condition from arguments that are not tensors and give them in "
        "example_inputs; or move the branch out of the model; or quantize the submodules that "
        "do trace on their own."
    )
