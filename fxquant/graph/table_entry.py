"""How an op-table record is written: short constructors for the table files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fxquant.graph.ops import Function, Kind, Op, Spelling

Read = Callable[[dict[str, Any]], dict[str, Any] | None]


def sig(like: Callable[..., Any]) -> inspect.Signature:
    """The signature that ``like`` (usually a lambda returning ``None``) is written with."""
    return inspect.signature(like)


def spellings(
    keys: tuple[Any, ...],
    like: Callable[..., Any],
    *,
    inplace: bool = False,
    read: Read | None = None,
) -> dict[Any, Spelling]:
    """The same signature for several functions, methods or attributes."""
    spelling = Spelling(sig(like), inplace, read)
    return dict.fromkeys(keys, spelling)


def fixed(**values: Any) -> Read:
    """Reads a spelling that says some arguments by its name: ``fliplr`` is ``flip`` of 1."""
    return lambda given: {**given, **values}


def entry(  # noqa: PLR0913 - a table row has that many columns
    name: str,
    kind: Kind,
    target: Function | None,
    signature: inspect.Signature,
    *,
    tensors: tuple[str, ...] = ("input",),
    functions: Mapping[Function, Spelling] | None = None,
    methods: Mapping[str, Spelling] | None = None,
    modules: tuple[type[nn.Module], ...] = (),
    commutes: bool = False,
    alias: bool = False,
    build: Callable[[Mapping[str, Any]], nn.Module] | None = None,
    absorb: Mapping[str, tuple[Any, ...]] | None = None,
    module_constants: Mapping[type[nn.Module], Mapping[str, Any]] | None = None,
    tidy: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    attributes: Mapping[str, Spelling] | None = None,
    module_names: Mapping[str, str] | None = None,
) -> Op:
    """One record; the canonical target is always one of its own spellings."""
    all_functions = dict(functions or {})
    if target is not None:
        all_functions.setdefault(target, Spelling(signature))
    return Op(
        name=name,
        kind=kind,
        target=target,
        signature=signature,
        tensors=tensors,
        functions=all_functions,
        methods=dict(methods or {}),
        modules=modules,
        commutes=commutes,
        alias=alias,
        build=build,
        absorb=dict(absorb or {}),
        module_constants=dict(module_constants or {}),
        tidy=tidy,
        attributes=dict(attributes or {}),
        module_names=dict(module_names or {}),
    )


def plain(
    name: str,
    target: Function,
    *more: Function,
    module: type[nn.Module] | None = None,
    inplace: tuple[Function, ...] = (),
    method: bool = True,
    overwriting: bool = True,
    alias: str = "",
) -> Op:
    """A unary op without options: ``f(input)``, ``f(input, inplace=)``, ``x.f()``, ``x.f_()``.

    Args:
        name: its name, and that of its methods.
        target: the canonical function.
        more: other functions that spell it.
        module: the class that spells it.
        inplace: functions that overwrite their argument.
        method: whether tensors have the method.
        overwriting: whether they have the method that overwrites, too.
        alias: another name of the method.
    """
    methods: dict[str, Any] = {}
    if method:
        called = (name, alias) if alias else (name,)
        methods = spellings(called, lambda input: None)
        if overwriting:
            over = tuple(f"{each}_" for each in called)
            methods |= spellings(over, lambda input: None, inplace=True)
    both = {
        **spellings((target, *more), lambda input, inplace=False: None),
        **spellings(inplace, lambda input: None, inplace=True),
    }
    return entry(
        name,
        Kind.UNARY,
        target,
        sig(lambda input: None),
        functions=both,
        methods=methods,
        modules=(module,) if module is not None else (),
    )


def one_way(arguments: dict[str, Any]) -> dict[str, Any]:
    """``kernel_size=(2, 2), stride=None`` is ``kernel_size=2, stride=2``."""
    found = {name: _one_number(value) for name, value in arguments.items()}
    if found.get("stride", 0) in (None, ()):
        found["stride"] = found["kernel_size"]
    return found


def in_tuples(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """``flip(x, 1)`` and ``flip(x, [1])`` are ``flip(x, (1,))``."""

    def tidy(arguments: dict[str, Any]) -> dict[str, Any]:
        found = {name: _tuple(arguments[name]) for name in names}
        return {**arguments, **found}

    return tidy


def _tuple(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(value)
    return (value,) if type(value) is int else value


def _one_number(value: Any) -> Any:
    if isinstance(value, tuple | list) and value and all(type(side) is int for side in value):
        return value[0] if len(set(value)) == 1 else tuple(value)
    return value


def adopt(module: nn.Module, given: Mapping[str, Any], names: tuple[str, ...]) -> nn.Module:
    """Give ``module`` the caller's own tensors: training it trains the user's parameters."""
    for name in names:
        value = given[name]
        if isinstance(value, nn.Parameter) or value is None:
            module.register_parameter(name, value)
        else:
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return module
