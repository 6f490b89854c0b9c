"""A graph module that keeps what users call and read on their model, such as ``q.config``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxquant.errors import LoadError
from fxquant.graph.containers import class_name, class_named

_CLASS: Final = "_fxquant_user_class"
_KEPT: Final = "_user_preserved_attributes"
"""The key under which torch.fx keeps attributes through a copy."""


class UserModule(GraphModule):
    """A graph module with the attributes and methods of the user's own class behind its own."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = None if name.startswith("__") else self._of_class(name)
            if found is None:
                raise
            bind = getattr(found, "__get__", None)
            return found if bind is None else bind(self, type(self))

    def _of_class(self, name: str) -> Any:
        """What the user's class says; nothing where a copy was loaded without that class."""
        cls = self.__dict__.get(_CLASS)
        try:
            found = inspect.getattr_static(class_named(cls), name, None) if cls else None
        except LoadError:
            return None
        # It puts float weights into one piece of memory, and there are none.
        return _nothing if found is nn.RNNBase.flatten_parameters else found

    def __reduce__(self) -> tuple[Any, ...]:
        made: Any = super().__reduce__()
        return _restored, (type(self).__name__, made[0], made[1])


def _nothing(module: nn.Module) -> None:
    """Stands for methods that have nothing to do here."""


def _restored(
    name: str, rebuild: Callable[..., GraphModule], arguments: tuple[Any, ...]
) -> UserModule:
    plain = rebuild(*arguments)
    made = _made(plain, plain.graph, name)
    for key, value in plain.__dict__.items():
        if key not in made.__dict__:
            made.__dict__[key] = value
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
