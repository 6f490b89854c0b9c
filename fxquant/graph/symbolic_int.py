"""``int`` while a model is traced: ``int(x.shape[0] / 4)`` stays symbolic.

``int(...)`` has to give an int, so a proxy's own ``__int__`` can only answer and be guarded.
Modules whose code only calls ``int``, or names it beside ``isinstance``, see this class instead.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from fxquant.graph.proxies import SCALARS, asked, is_proxy


class _IntType(type):
    """What ``int`` answers as a class is what the real one answers."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and is_proxy(args[0]) and not kwargs:
            held = args[0].__dict__.get("_held")
            if held is not None and isinstance(held.value, SCALARS) and not held.constant:
                return asked(args[0]).function(torch.sym_int, args, {})
        return int(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, int)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, int)


class SymbolicInt(int, metaclass=_IntType):
    """Stands for ``int`` in the modules of a model that is traced."""


def may_replace_int(module: ModuleType) -> bool:
    """Whether the code of ``module`` calls ``int``, and uses it for nothing else but checks."""
    found = [_uses(code) for code in _codes(module)]
    return any(calls for calls, _ in found) and not any(others for _, others in found)


def _codes(module: ModuleType) -> Iterator[CodeType]:
    todo: list[Any] = list(vars(module).values())
    todo += [each for cls in todo if isinstance(cls, type) for each in vars(cls).values()]
    for each in todo:
        each = getattr(each, "__func__", each)
        if isinstance(each, FunctionType) and each.__module__ == module.__name__:
            yield from _nested(each.__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


@functools.lru_cache(maxsize=4096)
def _uses(code: CodeType) -> tuple[bool, bool]:
    """Whether ``code`` calls ``int``, and whether it uses it in a way that is neither."""
    if "int" not in code.co_names:
        return False, False
    calls, others = False, False
    checks = False
    for instruction in dis.get_instructions(code):
        if instruction.starts_line:
            checks = False
        if instruction.opname != "LOAD_GLOBAL":
            continue
        # The lowest bit of the argument says that a call follows.
        called = bool((instruction.arg or 0) & 1)
        if instruction.argval == "isinstance" and called:
            checks = True
        if instruction.argval == "int":
            calls, others = calls or called, others or not (called or checks)
    return calls, others
