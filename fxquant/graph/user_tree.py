"""A graph module for training: under the user's names, in the user's order, with all their modules.

torch.fx keeps the modules that a graph calls, in the order of the calls. Optimizers and
checkpoints go by the order and the names that the user's model has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Self

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.trained_layers import is_trained_layer
from fxquant.graph.user_class import UserModule, restored

_FROZEN: Final = "fxquant_frozen"
_HOME: Final = "fxquant_home"
_REGISTRIES: Final = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_READS: Final = ("__getitem__", "__len__", "__iter__", "__contains__", "__reversed__")
"""Special methods that read a container; Python looks for them in the class only."""


class TrainableModule(UserModule):
    """A graph module whose modules are those of the user's model, whether or not called.

    ``train()`` leaves modules that were frozen in evaluation mode. Where the user's model can be
    indexed or iterated over, so can this, and nothing but the user's modules is found.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        _, arguments = super().__reduce__()
        return _restored_tree, (arguments, {name: self.__dict__[name] for name in _REGISTRIES})

    def freeze(self, paths: Iterable[str], frozen: bool = True) -> None:
        """Keep modules in evaluation mode from now on, or let them follow the model again.

        Args:
            paths: where they stand.
            frozen: whether they are kept; those that never were stay as they are if it is false.
        """
        before: frozenset[str] = self.meta.get(_FROZEN, frozenset())
        changed = set(paths) - before if frozen else set(paths) & before
        self.meta[_FROZEN] = before | changed if frozen else before - changed
        for path in changed:
            self.get_submodule(path).train(self.training and not frozen)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but for what is frozen."""
        super().train(mode)
        for path in self.meta.get(_FROZEN, ()):
            self.get_submodule(path).train(False)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModule:
        made = super().__deepcopy__(memo)
        for name in _REGISTRIES:
            # The copy is known by now: torch.fx has made it, and then looked for calls in it.
            made.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        _let_read(made)
        return made

    def _as_users(self, cls: type[nn.Module]) -> nn.Module:
        """This model as the user's class sees its own: without what training added.

        Args:
            cls: the user's class.
        """
        view = cls.__new__(cls)
        view.__dict__.update(self.__dict__)
        home = self.meta.get(_HOME)
        own = {name: module for name, module in self._modules.items() if name != home}
        view.__dict__["_modules"] = own
        return view


def _let_read(made: GraphModule) -> None:
    """Give the class of one graph module what the user's class reads a container with."""
    # torch.fx makes a class for every graph module, so no other one gets these.
    cls = made._user_class() if isinstance(made, TrainableModule) else None
    for name in _READS:
        if cls is not None and getattr(cls, name, None) is not None:
            setattr(type(made), name, _reading(cls, name))


def _reading(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    def read(self: TrainableModule, *args: Any) -> Any:
        return getattr(cls, name)(self._as_users(cls), *args)

    read.__name__ = name
    return read


def _restored_tree(arguments: tuple[Any, ...], registries: dict[str, Any]) -> UserModule:
    name, rebuild, held, known = arguments
    made = restored(name, rebuild, held, known, TrainableModule)
    made.__dict__.update(registries)
    _let_read(made)
    return made


def adopt_tree(made: TrainableModule, root: nn.Module, model: nn.Module, home: str) -> None:
    """Give ``made`` the modules of ``root``; what the user's model has not, moves to ``home``.

    Args:
        made: calls modules of ``root``, and others that were made for it.
        root: the copy of the user's model that was traced.
        model: the user's model; says which names are theirs, and what is in training mode.
        home: where all others stand.
    """
    names = dict(model.named_modules())
    for node in made.graph.nodes:
        if node.op == "call_module":
            _settle_module(made, root, node, names, home)
        elif node.op == "get_attr":
            _settle_tensor(made, model, node, home)
    for path in [path for path, _ in root.named_modules() if path not in names]:
        parent, _, leaf = path.rpartition(".")
        if parent in names:
            del root.get_submodule(parent)._modules[leaf]
    extra = made._modules.get(home) or nn.Module()
    extra.train(model.training)
    for path, own in names.items():
        twin = root.get_submodule(path)
        if type(twin) is not type(own) and not is_trained_layer(twin):
            twin.__class__ = type(own)  # it was opened up for tracing
        twin.training = own.training
    for name in _REGISTRIES:
        made.__dict__[name] = root.__dict__[name]
    made._modules[home] = extra
    made.training = model.training
    made.meta[_HOME] = home
    _let_read(made)
    made.recompile()


def _settle_module(
    made: nn.Module, root: nn.Module, node: Node, names: dict[str, nn.Module], home: str
) -> None:
    path = str(node.target)
    if path.startswith(f"{home}."):
        return
    parent, _, leaf = path.rpartition(".")
    module = made.get_submodule(path)
    if path in names:
        root.get_submodule(parent)._modules[leaf] = module
        return
    node.target = _put(made, home, path, module)


def _settle_tensor(made: nn.Module, model: nn.Module, node: Node, home: str) -> None:
    path = str(node.target)
    if path.startswith(f"{home}.") or _stands(model, path):
        return
    parent, _, leaf = path.rpartition(".")
    tensor = getattr(made.get_submodule(parent), leaf)
    node.target = _put(made, home, path, tensor)


def _put(made: nn.Module, home: str, path: str, value: Any) -> str:
    """Put a module or tensor in ``home``; what is there already stays one."""
    if not isinstance(made._modules.get(home), nn.Module):
        made.add_module(home, nn.Module())
    place = made.get_submodule(home)
    for name in _free_names(path.replace(".", "_")):
        found = getattr(place, name, None)
        if found is None:
            if isinstance(value, nn.Module):
                place.add_module(name, value)
            elif isinstance(value, nn.Parameter):
                place.register_parameter(name, value)
            else:
                place.register_buffer(name, value)
        if found is None or found is value:
            return f"{home}.{name}"
    raise AssertionError("names never end")


def _free_names(base: str) -> Iterator[str]:
    yield base
    count = 0
    while True:
        count += 1
        yield f"{base}_{count}"


def _stands(model: nn.Module, path: str) -> bool:
    owner: Any = model
    for part in path.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True
