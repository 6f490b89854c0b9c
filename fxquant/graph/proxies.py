"""Proxies that carry example values: they answer what Python asks, and the graph stays symbolic.

Every answer that decides anything (a branch, a loop count, an index) is told to the tracer, which
makes a guard of it. Questions about the *values* of tensors have no answer: they end the tracing.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final, Protocol

import torch
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function


class _Missing:
    """No example value is known."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()


@dataclass
class Held:
    """What a proxy carries along.

    Args:
        value: its value on the example inputs.
        constant: whether it depends on no input.
        data: whether it depends on what tensors hold, and not only on their sizes.
    """

    value: Any = MISSING
    constant: bool = False
    data: bool = False


class ValueDependentError(Exception):
    """Python asked for what a tensor holds, which differs from input to input."""


class TransformError(Exception):
    """A function such as ``torch.vmap`` runs code on tensors of its own, which no graph shows."""


class CaughtError(TransformError):
    """An op failed and the code went on: with other sizes it may not fail, and no guard says so."""


class Answering(Protocol):
    """What proxies ask of their tracer."""

    def answer(self, proxy: Proxy) -> Any: ...

    def index(self, proxy: Proxy, frame: FrameType) -> int: ...

    def length(self, proxy: Proxy) -> Any: ...

    def fact(self, proxy: Proxy, kind: str) -> None: ...

    def attribute(self, proxy: Proxy, name: str) -> Any: ...

    def method(self, proxy: Proxy, name: str, args: Any, kwargs: Any) -> Any: ...

    def function(self, function: Any, args: Any, kwargs: Any) -> Any: ...

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...


SCALARS: Final = (bool, int, float)


def _in_place(how: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for ``x += y``, which torch.fx would take for ``x = x + y``."""

    def write(self: fx.Proxy, other: Any) -> Any:
        held = self.__dict__.get("_held", Held())
        unknown = held.value is MISSING
        number = _is_size(self.node) if unknown else isinstance(held.value, SCALARS)
        # Numbers cannot change: generated code would let the old name be the new number.
        target = plain if number else how
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return write


def _is_size(node: fx.Node) -> bool:
    """Whether a node without a value is a size, or computed from sizes alone."""
    if node.target in ("size", "numel", "dim") or (
        node.target is getattr and node.args[1] in ("shape", "ndim")
    ):
        return True
    arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math")
    return arithmetic and all(map(_is_size, node.all_input_nodes))


class WritingProxy(fx.Proxy):
    """A proxy that records what is written in place: torch.fx refuses or forgets it."""

    __iadd__ = _in_place(operator.iadd, operator.add)
    __isub__ = _in_place(operator.isub, operator.sub)
    __imul__ = _in_place(operator.imul, operator.mul)
    __itruediv__ = _in_place(operator.itruediv, operator.truediv)
    __ifloordiv__ = _in_place(operator.ifloordiv, operator.floordiv)
    __imod__ = _in_place(operator.imod, operator.mod)
    __ipow__ = _in_place(operator.ipow, operator.pow)
    __iand__ = _in_place(operator.iand, operator.and_)
    __ior__ = _in_place(operator.ior, operator.or_)
    __ixor__ = _in_place(operator.ixor, operator.xor)
    __ilshift__ = _in_place(operator.ilshift, operator.lshift)
    __irshift__ = _in_place(operator.irshift, operator.rshift)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class Proxy(WritingProxy):
    """Stands for a value while the model runs; see the module's text."""

    def __init__(self, node: fx.Node, tracer: Any) -> None:
        super().__init__(node, tracer)
        self._held = Held()

    def __repr__(self) -> str:
        return f"Proxy({self.node.name})"

    def __getattr__(self, k: str) -> Any:
        held = self.__dict__.get("_held")
        if held is None or held.value is MISSING:
            return super().__getattr__(k)
        return asked(self).attribute(self, k)

    @classmethod
    def __torch_function__(
        cls,
        orig_method: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = next(proxies_in((args, kwargs)))
        return asked(found).function(orig_method, args or (), kwargs or {})

    def __getitem__(self, index: Any) -> Any:
        value = self._held.value
        several = isinstance(value, tuple | list) and all(isinstance(v, Tensor) for v in value)
        if isinstance(index, slice) and several and value:
            # Of several tensors, each is a value of its own: x.chunk(2)[::-1] is two of them.
            return tuple(self[place] for place in range(len(self))[index])
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __bool__(self) -> bool:
        value = self._held.value
        if value is MISSING:
            return super().__bool__()
        if isinstance(value, bool | Tensor):
            return bool(asked(self).answer(self))
        if isinstance(value, int | float):
            return bool(asked(self).create_proxy("call_function", truth, (self,), {}))
        return bool(len(self)) if hasattr(value, "__len__") else bool(value)

    def __index__(self) -> int:
        if self._held.value is MISSING:
            raise fx.proxy.TraceError("a symbolically traced variable cannot be an index")
        return asked(self).index(self, sys._getframe(1))

    def __int__(self) -> int:
        if isinstance(self._held.value, float):
            return int(asked(self).create_proxy("call_function", torch.sym_int, (self,), {}))
        return int(self._number("turned into an int"))

    def __float__(self) -> float:
        return float(self._number("turned into a float"))

    def __complex__(self) -> complex:
        return complex(self._number("turned into a complex number"))

    def __len__(self) -> int:
        if self._held.value is MISSING:
            return super().__len__()
        return operator.index(asked(self).length(self))

    def __iter__(self) -> Iterator[Any]:
        value = self._held.value
        if value is MISSING:
            return _plain_iter(self)
        if isinstance(value, Tensor | tuple | list):
            return iter([self[place] for place in range(len(self))])
        return iter(asked(self).answer(self))

    def __contains__(self, item: Any) -> bool:
        if isinstance(self._held.value, Tensor):
            return bool(asked(self).answer((self == item).any()))
        return any(item is each or item == each for each in self)

    def __eq__(self, other: object) -> Any:
        return self._compare(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._compare(operator.ne, other)

    def _compare(self, how: Callable[[Any, Any], Any], other: object) -> Any:
        value = self._held.value
        if other is None and value is not MISSING:
            return how(value is None, True)
        if isinstance(value, torch.device | str):
            asked(self).fact(self, "device")
            return how(value, other._held.value if isinstance(other, Proxy) else other)
        return self.tracer.create_proxy("call_function", how, (self, other), {})

    def __hash__(self) -> int:
        held = self.__dict__.get("_held")
        if held is None or isinstance(held.value, (_Missing, Tensor)) or held.data:
            return object.__hash__(self)
        if isinstance(held.value, SCALARS):
            return hash(asked(self).answer(self))
        return hash(tuple(self)) if isinstance(held.value, tuple) else object.__hash__(self)

    def __str__(self) -> str:
        if isinstance(self._held.value, SCALARS) and not self._held.data:
            return str(asked(self).answer(self))
        return repr(self)

    def __format__(self, spec: str) -> str:
        if isinstance(self._held.value, SCALARS) and not self._held.data:
            return format(asked(self).answer(self), spec)
        return repr(self)

    def _number(self, how: str) -> Any:
        if self._held.value is MISSING:
            raise fx.proxy.TraceError(f"a symbolically traced variable cannot be {how}")
        return asked(self).answer(self)

    def _seen_class(self) -> type:
        # isinstance(n, int) of user code means it. Not so for tensors: torch's own C++ believes
        # __class__ too, and would read the memory of a tensor that is none; see patches.py.
        held = self.__dict__.get("_held")
        plain = held is None or isinstance(held.value, _Missing | Tensor)
        return Proxy if plain or held is None else type(held.value)

    __class__ = property(_seen_class)


def truth(value: Any) -> Any:
    """``bool(value)`` that can be traced."""
    if has_torch_function((value,)):
        return handle_torch_function(truth, (value,), value)
    return bool(value)


def asked(proxy: Proxy) -> Answering:
    """The tracer of a proxy, as what answers."""
    tracer: Any = proxy.tracer
    answering: Answering = tracer
    return answering


def _plain_iter(proxy: Proxy) -> Iterator[Any]:
    """Without a value only ``a, b = x`` can be answered: the number of names is in the code."""
    frame = sys._getframe(2)
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti and instruction.opname == "UNPACK_SEQUENCE":
            return iter([proxy[place] for place in range(instruction.argval)])
    return proxy.tracer.iter(proxy)


class Method:
    """A method of a proxy, not yet called."""

    def __init__(self, owner: Proxy, name: str) -> None:
        self._owner = owner
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return asked(self._owner).method(self._owner, self._name, args, kwargs)


def is_proxy(value: Any) -> bool:
    """Whether ``value`` really is a proxy, whatever it says of its class."""
    return issubclass(type(value), fx.Proxy)


def proxies_in(value: Any) -> Iterator[Proxy]:
    """Every proxy in nested tuples, lists, dicts and slices."""
    if is_proxy(value):
        yield value
    elif isinstance(value, tuple | list | set):
        for item in value:
            yield from proxies_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from proxies_in(item)
    elif isinstance(value, slice):
        yield from proxies_in((value.start, value.stop, value.step))


class NoValueError(Exception):
    """A value was needed that is not known."""


def values_of(value: Any) -> Any:
    """``value`` with every proxy replaced by what it carries.

    Raises:
        NoValueError: a proxy carries nothing.
    """
    if is_proxy(value):
        held = value.__dict__.get("_held")
        if held is None or held.value is MISSING:
            raise NoValueError
        return held.value
    if isinstance(value, slice):
        return slice(values_of(value.start), values_of(value.stop), values_of(value.step))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[values_of(item) for item in value])
    if type(value) in (tuple, list, set):
        return type(value)([values_of(item) for item in value])
    if isinstance(value, dict) and any(True for _ in proxies_in(value)):
        return {key: values_of(item) for key, item in value.items()}
    return value
