"""The arguments of ``forward``: which are inputs of the graph, and which are bound to a value."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from torch import Tensor, nn

from fxquant.errors import TraceError
from fxquant.graph.containers import LEAF, PLAIN, leaf_paths, like, pick, take_apart
from fxquant.graph.guards import check_bound, check_given, check_structure
from fxquant.graph.proxies import Proxy

_EMPTY: Final = inspect.Parameter.empty
_DEFAULTS: Final = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Binding:
    """How a model is called.

    Args:
        signature: of ``forward``, without ``self``.
        values: example arguments by name; ``*args`` as a tuple, ``**kwargs`` as a dict.
        given: whether there is an example at all.
        bound: arguments that are bound to a value.
        named: arguments that the example passes by name.
    """

    signature: inspect.Signature
    values: dict[str, Any] = field(default_factory=dict)
    given: bool = False
    bound: dict[str, Any] = field(default_factory=dict)
    named: frozenset[str] = frozenset()


def bind_example(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Binding:
    """Which arguments of ``forward`` are not tensors, or are left out, and their values.

    Args:
        model: the model.
        args: positional example inputs; empty when there is no example.
        kwargs: keyword example inputs.

    Raises:
        TraceError: the example does not fit ``forward``.
    """
    signature = inspect.signature(model.forward)
    values: dict[str, Any] = {}
    if args or kwargs:
        try:
            values = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise TraceError(
                f"the example inputs do not fit {type(model).__name__}.forward{signature}: "
                f"{error}. Pass what one call takes: a tensor, a tuple of all arguments, or a dict "
                "of arguments by name"
            ) from error
    bound: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in values:
            if isinstance(values[name], PLAIN):
                bound[name] = values[name]
        elif parameter.default is not _EMPTY:
            bound[name] = parameter.default
    return Binding(signature, values, bool(args or kwargs), bound, frozenset(kwargs))


class Making(Protocol):
    """What arguments need of a tracer."""

    root: nn.Module

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...

    def hold(self, proxy: Any, value: Any, constant: bool, data: bool) -> Any: ...

    def is_input(self, proxy: Proxy, name: str) -> None: ...


class Arguments:
    """Makes the placeholders of a graph, and what ``forward`` is called with.

    Args:
        tracer: records the nodes.
        binding: how the model is called.
    """

    def __init__(self, tracer: Making, binding: Binding) -> None:
        self._tracer = tracer
        self._binding = binding
        self._has_default = False

    def make(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments, proxies in them."""
        positional: list[Any] = []
        keyword: dict[str, Any] = {}
        later = []
        for parameter in self._binding.signature.parameters.values():
            value, proxy = self._placeholder(parameter)
            later.append((parameter, value, proxy))
        # Placeholders stand together, then what is asked of them.
        for parameter, value, proxy in later:
            made = self._settle(parameter, value, proxy)
            name = parameter.name
            if name in self._binding.bound and name not in self._binding.values:
                continue  # what the user leaves out is left out, which decorators may notice
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional.extend(made)
            elif parameter.kind is parameter.VAR_KEYWORD:
                keyword.update(made)
            elif parameter.kind is parameter.KEYWORD_ONLY or name in self._binding.named:
                keyword[name] = made
            else:
                positional.append(made)
        return positional, keyword

    def _placeholder(self, parameter: inspect.Parameter) -> tuple[Any, Any]:
        name, values = parameter.name, self._binding.values
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
            value = values.get(name, () if star == "*" else {})
            return value, self._create(star + name, ()) if value else None
        if name in self._binding.bound:
            value = self._binding.bound[name]
            given = values.get(name, value)
            default = (given if is_literal(given) else None,)
            if name in values and not is_literal(value) and parameter.default is _EMPTY:
                default = ()  # type: ignore[assignment] # an argument that has to be given
            return value, self._create(name, default)
        return values.get(name), self._create(name, ())

    def _create(self, target: str, default: tuple[Any, ...]) -> Any:
        if default:
            self._has_default = True
        elif self._has_default and not target.startswith("*"):
            # Keyword-only arguments may follow those with defaults; generated code has no "*".
            default = (None,)
        return self._tracer.create_proxy("placeholder", target, default, {})

    def _settle(self, parameter: inspect.Parameter, value: Any, proxy: Any) -> Any:
        """What ``forward`` gets in the place of ``value``."""
        name = parameter.name
        if proxy is None:
            return value
        if name in self._binding.bound:
            return self._bound(parameter, value, proxy)
        if not self._binding.given:
            return proxy
        if isinstance(value, Tensor):
            if parameter.default is not _EMPTY or proxy.node.args:
                self._check(check_given, (proxy, name))
            return self._input(proxy, value, name)
        return self._container(value, proxy, name)

    def _bound(self, parameter: inspect.Parameter, value: Any, proxy: Any) -> Any:
        name = parameter.name
        literal = is_literal(value)
        if not isinstance(value, PLAIN) and not literal:
            place = f"_bound_{name}"
            setattr(self._tracer.root, place, value)
            value_node = self._tracer.create_proxy("get_attr", place, (), {})
            if isinstance(value_node, Proxy):
                self._check(check_bound, (proxy, value_node, name, True))
            return value
        optional = not literal and bool(proxy.node.args)
        args = (proxy, value, name, True) if optional else (proxy, value, name)
        self._check(check_bound, args)
        return value

    def _input(self, proxy: Any, value: Tensor, name: str) -> Any:
        made = self._tracer.hold(proxy, value.detach().clone(), False, False)
        self._tracer.is_input(made, name)
        return made

    def _container(self, value: Any, proxy: Any, name: str) -> Any:
        leaves: list[Any] = []
        spec = take_apart(value, lambda item: isinstance(item, Tensor), leaves)
        if spec is None or spec == LEAF:
            raise TraceError(
                f"argument {name!r} is a {type(value).__name__}, which is neither a tensor nor a "
                "container of tensors and plain values"
            )
        self._check(check_structure, (proxy, spec, name))
        paths = list(leaf_paths(spec))
        picked = [
            self._tracer.create_proxy("call_function", pick, (proxy, path), {}) for path in paths
        ]
        made = [
            self._input(each, leaf, name + _spelled(path))
            for each, leaf, path in zip(picked, leaves, paths, strict=True)
        ]
        return like(value, spec, iter(made))

    def _check(self, function: Any, args: tuple[Any, ...]) -> None:
        self._tracer.create_proxy("call_function", function, args, {})


def _spelled(path: Any) -> str:
    return "".join(f".{key}" if is_field else f"[{key!r}]" for key, is_field in path)


def is_literal(value: Any) -> bool:
    """Whether it can stand as a default in generated code."""
    if type(value) in (tuple, list):
        return all(is_literal(item) for item in value)
    return type(value) in _DEFAULTS
