"""What has to be different while a model is traced: ``len``, factories of tensors, and caches.

Everything here passes through untouched what holds no proxy and whatever other threads do.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Generator, Mapping
from types import CellType, FunctionType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._functorch import apis, eager_transforms
from torch.overrides import TorchFunctionMode

from fxquant.graph.proxies import TransformError, asked, is_proxy, proxies_in
from fxquant.graph.symbolic_int import SymbolicInt, may_replace_int

_FACTORIES: Final = ("zeros", "ones", "empty", "rand", "randn")
"""Their sizes may come one by one, and torch does not look for proxies among those."""


_TRANSFORMS: Final = (
    (apis, "vmap_impl", "torch.vmap"),
    (eager_transforms, "grad_impl", "torch.func.grad"),
    (eager_transforms, "grad_and_value_impl", "torch.func.grad_and_value"),
)


class _Mode(TorchFunctionMode):
    """Sees functions of tensors that are no proxies but meet some: ``buffer[:, :n]``."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = next(proxies_in((args, kwargs)), None)
        if found is None:
            return func(*args, **(kwargs or {}))
        return asked(found).function(func, args, kwargs or {})


def _length(value: Any) -> Any:
    """``len`` that keeps the size of a tensor symbolic."""
    if is_proxy(value) and hasattr(value.tracer, "length") and hasattr(value, "_held"):
        return asked(value).length(value) if value.tracer.live else value.__len__()
    return len(value)


def _isinstance(value: Any, classes: Any) -> bool:
    """``isinstance`` that takes a proxy of a tensor for a tensor."""
    if is_proxy(value):
        held = value.__dict__.get("_held")
        if held is not None and isinstance(held.value, Tensor):
            return isinstance(held.value, classes) or isinstance(value, classes)
    return isinstance(value, classes)


_BUILTINS: Final[Mapping[str, Callable[..., Any]]] = {"len": _length, "isinstance": _isinstance}


def _is_tensor(value: Any) -> bool:
    return _isinstance(value, Tensor)


def _factory(real: Callable[..., Any], is_mine: Callable[[], bool]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        found = next(proxies_in((args, kwargs)), None) if is_mine() else None
        if found is None:
            return real(*args, **kwargs)
        size = kwargs.pop("size", args)
        if len(size) == 1 and (isinstance(size[0], tuple | list)):
            size = size[0]
        return asked(found).function(real, (size if is_proxy(size) else tuple(size),), kwargs)

    return make


def _transform(
    real: Callable[..., Any], name: str, is_mine: Callable[[], bool]
) -> Callable[..., Any]:
    """What ``torch.vmap`` and ``torch.func.grad`` end in; it wraps tensors, and a proxy is none."""

    def run(function: Any, *args: Any, **kwargs: Any) -> Any:
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        if is_mine() and next(proxies_in((args, kwargs, cells)), None) is not None:
            raise TransformError(f"{name} runs a function on tensors of its own")
        return real(function, *args, **kwargs)

    return run


_Cached: Final = type(functools.lru_cache(len))
"""What ``functools.lru_cache`` makes of a function."""


def _uncached(cached: Any, is_mine: Callable[[], bool]) -> Callable[..., Any]:
    """A cached function that is simply called for proxies: a cache looks for the size they had."""

    @functools.wraps(cached)
    def call(*args: Any, **kwargs: Any) -> Any:
        traced = is_mine() and next(proxies_in((args, kwargs)), None) is not None
        return (cached.__wrapped__ if traced else cached)(*args, **kwargs)

    return call


def _caches(root: nn.Module) -> tuple[dict[tuple[type, str], Any], list[CellType]]:
    """Cached methods of the model's classes, and cells of their methods that hold a cache."""
    classes = dict.fromkeys(base for m in root.modules() for base in type(m).__mro__)
    own = [c for c in classes if c is not object and not c.__module__.startswith("torch.")]
    members = {(c, name): value for c in own for name, value in vars(c).items()}
    methods = {at: v for at, v in members.items() if isinstance(_function(v), _Cached)}
    functions = [f for f in map(_function, members.values()) if isinstance(f, FunctionType)]
    cells = {id(cell): cell for f in functions for cell in f.__closure__ or ()}
    return methods, [cell for cell in cells.values() if isinstance(_inside(cell), _Cached)]


def _function(member: Any) -> Any:
    return member.__func__ if isinstance(member, staticmethod | classmethod) else member


def _inside(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not set yet
        return None


@contextlib.contextmanager
def _without_caches(root: nn.Module, is_mine: Callable[[], bool]) -> Generator[None]:
    """Cached methods are called for proxies as if they were not cached."""
    methods, cells = _caches(root)
    held = [cell.cell_contents for cell in cells]
    try:
        for (owner, name), member in methods.items():
            plain = _uncached(_function(member), is_mine)
            kind = type(member) if isinstance(member, staticmethod | classmethod) else None
            setattr(owner, name, plain if kind is None else kind(plain))
        for cell, cached in zip(cells, held, strict=True):
            cell.cell_contents = _uncached(cached, is_mine)
        yield
    finally:
        for (owner, name), member in methods.items():
            setattr(owner, name, member)
        for cell, cached in zip(cells, held, strict=True):
            cell.cell_contents = cached


@contextlib.contextmanager
def patched(root: nn.Module, is_mine: Callable[[], bool]) -> Generator[None]:
    """Patch while ``root`` is traced; undone at the end, failure or not.

    Args:
        root: the model; the modules of its package get another ``len`` and ``isinstance``.
        is_mine: whether the calling thread is the one that traces.
    """
    places: list[tuple[dict[str, Any], str, Any]] = [
        (vars(module), name, function)
        for module in _user_modules(root)
        for name, function in _BUILTINS.items()
        if name not in vars(module)
    ]
    places += [
        (vars(module), "int", SymbolicInt)
        for module in _class_modules(root)
        if "int" not in vars(module) and may_replace_int(module)
    ]
    places += [
        (vars(module), name, _transform(vars(module)[name], shown, is_mine))
        for module, name, shown in _TRANSFORMS
    ]
    places += [
        (vars(module), name, _uncached(value, is_mine))
        for module in _user_modules(root)
        for name, value in vars(module).items()
        if isinstance(value, _Cached)
    ]
    before = [(space, name, space.get(name)) for space, name, _ in places]
    real = {name: getattr(torch, name) for name in (*_FACTORIES, "is_tensor")}
    try:
        for space, name, function in places:
            space[name] = function
        for name in _FACTORIES:
            setattr(torch, name, _factory(real[name], is_mine))
        torch.is_tensor = _is_tensor  # type: ignore[assignment] # narrower than a TypeGuard
        with _Mode(), _without_caches(root, is_mine):
            yield
    finally:
        for name, function in real.items():
            setattr(torch, name, function)
        for space, name, old in before:
            if old is None:
                space.pop(name, None)
            else:
                space[name] = old


def _class_modules(root: nn.Module) -> list[ModuleType]:
    """The modules that define the model's classes."""
    names = {cls.__module__ for module in root.modules() for cls in type(module).__mro__}
    foreign = ("torch", "builtins", "fxquant")
    own = sorted(name for name in names if name.partition(".")[0] not in foreign)
    return [sys.modules[name] for name in own if name in sys.modules]


def _user_modules(root: nn.Module) -> list[ModuleType]:
    """The modules of the packages that define the model's classes."""
    classes = {cls for module in root.modules() for cls in type(module).__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in classes} | {"einops"}
    packages -= {"torch", "builtins", "fxquant"}
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in packages and isinstance(module, ModuleType)
    ]
