"""Containers of tensors: taken apart where a graph begins, put together where it ends.

A *spec* says how a container is built, in nested tuples of plain values, so that it can stand in
a graph as a constant::

    ("leaf",)                                      a tensor
    ("const", 3)                                   a plain value
    ("list", "builtins:list", spec, ...)           also tuples and named tuples
    ("dict", "builtins:dict", ("key", spec), ...)  also dataclasses and objects, by field
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fxquant.errors import LoadError

Spec = tuple[Any, ...]
LEAF: Final[Spec] = ("leaf",)
PLAIN: Final = (
    bool, int, float, complex, str, bytes, type(None), type(...),
    torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip

_LOCAL: Final[dict[str, type]] = {}
"""Classes that no import can find, such as those defined inside functions."""


def class_name(cls: type) -> str:
    """The name under which :func:`class_named` finds a class again."""
    name = f"{cls.__module__}:{cls.__qualname__}"
    if cls.__module__ == "__main__" or not can_be_imported(cls):
        _LOCAL[name] = cls
    return name


def can_be_imported(cls: type) -> bool:
    """Not so for classes of functions, of executed text, and redefined ones."""
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


def class_named(name: str) -> type:
    """The class that :func:`class_name` named.

    Raises:
        LoadError: it cannot be imported here.
    """
    local = _LOCAL.get(name)
    return _imported(name) if local is None else local


@functools.lru_cache(maxsize=1024)
def _imported(name: str) -> type:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise LoadError(
            f"this model needs the class {path} of module {module}, which cannot be imported "
            "here: make the module that defines it importable"
        ) from error
    cls: type = found
    return cls


def kind_of(value: Any) -> str | None:
    """How a container is taken apart: ``list``, ``data``, ``dict`` or ``object``; else None."""
    cls = type(value)
    if isinstance(value, torch.Size):
        return None
    if dataclasses.is_dataclass(value):
        return "data"
    if issubclass(cls, tuple | list):
        return "list"
    if issubclass(cls, dict):
        return "dict"
    return None


def parts(value: Any, kind: str) -> Iterator[tuple[Any, Any]]:
    """The items of a container with the key or field each has."""
    if kind == "list":
        yield from enumerate(value)
    elif kind == "dict":
        yield from value.items()
    elif kind == "data":
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                yield field.name, getattr(value, field.name)
    else:
        yield from vars(value).items()


def take_apart(
    value: Any, is_leaf: Callable[[Any], bool], leaves: list[Any], *, objects: bool = False
) -> Spec | None:
    """The spec of ``value``; its leaves are appended to ``leaves`` in order.

    Args:
        value: a container, a leaf or a plain value.
        is_leaf: whether a value is a leaf.
        leaves: gets the leaves.
        objects: whether objects of any class may be taken apart by their attributes.

    Returns:
        The spec, or ``None`` if ``value`` holds what is neither.
    """
    if is_leaf(value):
        leaves.append(value)
        return LEAF
    if isinstance(value, PLAIN):
        return ("const", value)
    kind = kind_of(value)
    if kind is None and objects and hasattr(value, "__dict__") and not callable(value):
        kind = "object"
    if kind is None:
        return None
    items: list[Any] = []
    for key, item in parts(value, kind):
        spec = take_apart(item, is_leaf, leaves, objects=objects)
        if spec is None or not isinstance(key, str | int):
            return None
        items.append(spec if kind == "list" else (key, spec))
    return (kind, class_name(type(value)), *items)


def put_together(spec: Spec, leaves: Iterator[Any]) -> Any:
    """The container that ``spec`` describes, with the next of ``leaves`` at each leaf."""
    kind = spec[0]
    if kind == "leaf":
        return next(leaves)
    if kind == "const":
        return spec[1]
    cls: Any = class_named(spec[1])
    if kind == "list":
        items = [put_together(item, leaves) for item in spec[2:]]
        return cls(*items) if hasattr(cls, "_fields") else cls(items)
    named = {key: put_together(item, leaves) for key, item in spec[2:]}
    if kind == "data":
        return _dataclass(cls, named)
    if kind == "dict":
        return named if cls is dict else _filled(cls(), named)
    made = cls.__new__(cls)
    made.__dict__.update(named)
    return made


def _filled(made: Any, named: dict[Any, Any]) -> Any:
    for key, value in named.items():
        made[key] = value
    return made


def _dataclass(cls: Any, named: dict[str, Any]) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    made = cls(**{name: value for name, value in named.items() if fields[name].init})
    for name, value in named.items():
        if not fields[name].init:
            object.__setattr__(made, name, value)
    return made


def like(value: Any, spec: Spec, leaves: Iterator[Any]) -> Any:
    """As :func:`put_together`, but by copying ``value``: what its class hides is kept."""
    kind = spec[0]
    if kind == "leaf":
        return next(leaves)
    if kind == "const":
        return value
    if kind == "list":
        items = [like(v, s, leaves) for v, s in zip(value, spec[2:], strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    twin = copy.copy(value)
    for (key, item), (_, inner) in zip(list(parts(value, kind)), spec[2:], strict=True):
        new = like(item, inner, leaves)
        if isinstance(twin, dict) and key in twin:
            twin[key] = new
        if kind != "dict":
            object.__setattr__(twin, key, new)
    return twin


Path = tuple[tuple[Any, bool], ...]
"""Steps into a container: a key or the name of a field, and whether it is a field."""


def leaf_paths(spec: Spec, path: Path = ()) -> Iterator[Path]:
    """Where each leaf stands, in order."""
    kind = spec[0]
    if kind == "leaf":
        yield path
    elif kind == "list":
        for place, item in enumerate(spec[2:]):
            yield from leaf_paths(item, (*path, (place, False)))
    elif kind != "const":
        for key, item in spec[2:]:
            yield from leaf_paths(item, (*path, (key, kind != "dict")))


def pick(container: Any, path: Path) -> Any:
    """The leaf of ``container`` at ``path``, as :func:`leaf_paths` gives it."""
    if has_torch_function((container,)) and not isinstance(container, Tensor):
        return handle_torch_function(pick, (container,), container, path)
    for key, is_field in path:
        container = getattr(container, key) if is_field else container[key]
    return container


def rebuild(spec: Spec, *leaves: Any) -> Any:
    """The container that ``spec`` describes, made of ``leaves``."""
    # Real tensors have no function of their own here; proxies of a new tracing do.
    if has_torch_function(leaves):
        return handle_torch_function(rebuild, leaves, spec, *leaves)
    return put_together(spec, iter(leaves))


def mismatch(value: Any, spec: Spec, name: str) -> str | None:
    """Why ``value`` is not built as ``spec`` says, or ``None``."""
    kind = spec[0]
    if kind == "leaf":
        if isinstance(value, Tensor):
            return None
        return f"{name} is {value!r:.80}, and was a tensor when the model was captured"
    if kind == "const":
        if type(value) is type(spec[1]) and value == spec[1]:
            return None
        return f"{name} is {_short(value)}, and was {spec[1]!r} when the model was captured"
    if class_name(type(value)) != spec[1]:
        was = spec[1].partition(":")[2]
        return f"{name} is a {type(value).__qualname__}, and was a {was} when captured"
    found = dict(parts(value, kind))
    inner = dict(enumerate(spec[2:])) if kind == "list" else dict(spec[2:])
    if list(found) != list(inner) and set(found) != set(inner):
        if kind == "list":
            return f"{name} has {len(found)} items, and had {len(inner)} when captured"
        return f"{name} has {sorted(map(str, found))}, and had {sorted(map(str, inner))} before"
    for key, item in inner.items():
        why = mismatch(found[key], item, f"{name}[{key!r}]")
        if why is not None:
            return why
    return None


def _short(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else f"{value!r:.80}"
