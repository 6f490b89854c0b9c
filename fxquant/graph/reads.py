"""What code that stays as it is reads of layers it calls, such as ``self.head.weight.dtype``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_DESCRIBES: Final = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in
          ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_meta")),
        *(getattr(Tensor, name) for name in
          ("size", "dim", "numel", "is_floating_point", "is_complex", "__len__")),
    }
)  # fmt: skip
"""What may be asked of a tensor without looking at its numbers."""


@dataclass
class Reads:
    """What was read of a module while others ran.

    Args:
        described: names of its own tensors that were asked for their type, device or sizes.
        computed: names, dotted below it, of tensors whose numbers were used.
    """

    described: set[str] = field(default_factory=set)
    computed: set[str] = field(default_factory=set)


class _Watched(Tensor):
    """A tensor that tells when its numbers are used."""

    used: Callable[[], None]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _DESCRIBES:
            for value in pytree.tree_leaves((args, kwargs)):
                if isinstance(value, _Watched):
                    value.used()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@contextmanager
def watching(module: nn.Module) -> Iterator[Reads]:
    """Note what is read of the tensors of ``module`` by others than itself, while the block runs.

    Args:
        module: has the class it had again when the block ends.
    """
    found = Reads()
    running = [0]
    own: list[tuple[nn.Module, type[nn.Module]]] = []

    def enter(*_: Any) -> None:
        running[0] += 1

    def leave(*_: Any) -> None:
        running[0] -= 1

    def read(path: str, name: str, value: Any) -> Any:
        if running[0] or not isinstance(value, Tensor):
            return value
        where = f"{path}.{name}" if path else name
        # A layer within the module may be gone when its tensor is asked for its type.
        (found.computed if path else found.described).add(where)
        watched = value.detach().as_subclass(_Watched)
        watched.used = lambda: found.computed.add(where)
        return watched

    handles = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        for path, each in list(module.named_modules()):
            own.append((each, type(each)))
            each.__class__ = _watched_class(type(each), path, read)
        yield found
    finally:
        for each, cls in own:
            each.__class__ = cls
        for handle in handles:
            handle.remove()


def _watched_class(
    cls: type[nn.Module], path: str, read: Callable[[str, str, Any], Any]
) -> type[nn.Module]:
    def get(self: nn.Module, name: str) -> Any:
        return read(path, name, cls.__getattr__(self, name))

    body = {"__getattr__": get, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


def description(tensor: Tensor) -> Tensor:
    """A tensor of the same type and sizes that holds no numbers: they are NaN, or zeros."""
    nothing = float("nan") if tensor.is_floating_point() else 0
    alike = torch.full((), nothing, dtype=tensor.dtype, device=tensor.device)
    return alike.expand(tensor.shape)
