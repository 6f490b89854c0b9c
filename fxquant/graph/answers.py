"""What tracing answers when Python asks a proxy, and the guard each answer leaves behind.

Sizes are answered from the example and guarded where they decide something. The number of
dimensions, dtype and device of a value follow from those of the inputs: one check per input.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.overrides import is_tensor_method_or_property

from fxquant.graph.containers import LEAF, leaf_paths, like, pick, take_apart
from fxquant.graph.guards import check_answer, check_input, count_parts
from fxquant.graph.info import KEY, NodeInfo
from fxquant.graph.proxies import (
    SCALARS,
    Method,
    Proxy,
    ValueDependentError,
    is_proxy,
    proxies_in,
)

_RANK: Final = ("dim", "ndimension", "ndim")
_DTYPE: Final = ("is_floating_point", "is_complex", "is_signed", "element_size", "itemsize")
_DEVICE: Final = ("get_device", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta")
_STILL: Final = ("is_contiguous",)
"""May differ in a call, but no result depends on it."""
_SIZES: Final = ("size", "shape", "numel", "nelement", "dim", "ndim", "stride")
_VALUES: Final = ("tolist", "numpy", "data_ptr", "__array__", "stride", "storage", "is_nonzero")
_DATA_SHAPED: Final = frozenset(
    {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "repeat_interleave"}
)
_SPLITS: Final = ("split", "chunk", "unbind", "tensor_split", "unsafe_chunk", "unsafe_split")


_NEAR: Final = 12
"""How many frames may lie between a user's line and the function of torch that it calls."""


@dataclass(frozen=True)
class _Asked:
    """A question for an index that torch may take back."""

    proxy: Proxy
    frame: FrameType
    place: int
    text: str


class Answers:
    """The part of the tracer that answers; mixed into it."""

    graph: fx.Graph
    root: nn.Module
    live: bool
    create_proxy: Any
    create_node: Any
    text: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guarded: dict[Any, Any] = {}
        self._keys: dict[fx.Node, Any] = {}
        self._facts: dict[fx.Node, dict[str, str]] = {}
        self._walked: set[tuple[str, fx.Node]] = set()
        self._inputs: dict[fx.Node, tuple[str, Tensor]] = {}
        self._asked: list[_Asked] = []
        self._dropped: dict[fx.Node, int] = {}
        self._ranks: dict[fx.Node, int] = {}

    def is_input(self, proxy: Proxy, name: str) -> None:
        """Note that ``proxy`` is a tensor the user passes."""
        self._inputs[proxy.node] = (name, proxy._held.value)

    # -- answers that decide -------------------------------------------------------------------

    def answer(self, proxy: Proxy, where: str = "") -> Any:
        """The value of a proxy, guarded: Python is about to decide by it.

        Raises:
            ValueDependentError: it depends on what a tensor holds.
        """
        held = proxy._held
        fixed = held.constant and not (self.root.training and isinstance(held.value, Tensor))
        if held.data or (isinstance(held.value, Tensor) and not fixed):
            raise ValueDependentError(where or self.text())
        if not fixed:
            self._guard(proxy.node, held.value, where)
        return held.value

    def index(self, proxy: Proxy, frame: FrameType) -> int:
        """The value of a proxy that is used as an index, or that torch only looks at.

        torch asks every number among its arguments for its index before it hands the call to
        :meth:`function`, which takes the question back: such a number stays symbolic.
        """
        self._asked.append(_Asked(proxy, frame, frame.f_lasti, self.text()))
        return operator.index(proxy._held.value)

    def _take_back(self, args: Any) -> None:
        given = {id(proxy) for proxy in proxies_in(args)}
        stack: FrameType | None = sys._getframe(1)
        running: dict[int, int] = {}
        while stack is not None and len(running) < _NEAR:
            running[id(stack)] = stack.f_lasti
            stack = stack.f_back
        self._asked = [
            asked
            for asked in self._asked
            if id(asked.proxy) not in given or running.get(id(asked.frame)) != asked.place
        ]

    def settle_indices(self) -> None:
        """Guard the numbers that really were used as indices."""
        while self._asked:
            asked = self._asked.pop(0)
            self.answer(asked.proxy, asked.text)

    def _guard(self, node: fx.Node, expected: Any, where: str = "") -> None:
        key = self._key(node)
        known = self._guarded.setdefault(key, [])
        if not any(type(value) is type(expected) and value == expected for value in known):
            known.append(expected)
            where = where or self.text()
            self.create_node("call_function", check_answer, (node, expected, where), {})

    def _key(self, node: fx.Node) -> Any:
        """Two questions with one key have one answer: guards are few."""
        if node not in self._keys:
            self._keys[node] = self._make_key(node)
        return self._keys[node]

    def _make_key(self, node: fx.Node) -> Any:
        if _value(node) not in ("scalar", "sizes") or node.op == "placeholder":
            return node
        args = [self._key(a) if isinstance(a, fx.Node) else repr(a) for a in node.args]
        if node.target is getattr and node.args[1] == "shape":
            return ("size", args[0])
        if node.target == "size":
            return ("size", *args) if len(args) == 1 else ("at", ("size", args[0]), args[1])
        if node.target is operator.getitem:
            return ("at", *args)
        return (node.target, *args, repr(node.kwargs))

    def length(self, proxy: Proxy) -> Any:
        """``len(proxy)``: a number that may stay symbolic."""
        value = proxy._held.value
        if isinstance(value, Tensor):
            return self.create_proxy("call_method", "size", (proxy, 0), {})
        if isinstance(value, torch.Size):
            self.fact(proxy, "rank")
        elif isinstance(value, tuple | list):
            self._count(proxy, len(value))
        return len(value)

    def _count(self, proxy: Proxy, expected: int) -> None:
        """Guard how many parts a split made, without reading the parts."""
        node = proxy.node
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if proxy._held.constant or name not in _SPLITS or not node.args:
            return
        names = ("split_size", "split_size_or_sections", "chunks", "indices_or_sections")
        size = next((node.kwargs[n] for n in names if n in node.kwargs), None)
        dims = node.args[1:] if name == "unbind" or size is not None else node.args[2:]
        if name != "unbind" and size is None:
            size = node.args[1]
        dim = node.kwargs.get("dim", dims[0] if dims else 0)
        if isinstance(size, tuple | list) or name == "tensor_split" or proxy._held.data:
            return
        if self._is_fixed(node.args[0], dim):
            return
        asked = self.create_node("call_method", "size", (node.args[0], dim), {})
        asked.meta[KEY] = info_of(asked).seen_as("scalar")
        if name != "unbind":
            how = name.removeprefix("unsafe_")
            asked = self.create_node("call_function", count_parts, (asked, size, how), {})
            asked.meta[KEY] = info_of(asked).seen_as("scalar")
        self._guard(asked, expected)

    def _is_fixed(self, node: Any, dim: Any) -> bool:
        """Whether a layer's weights alone say how long a dimension is."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return False
        layer = self.root.get_submodule(str(node.target))
        if isinstance(layer, nn.Linear | nn.Embedding | nn.LayerNorm):
            return bool(dim == -1)
        return isinstance(layer, nn.modules.conv._ConvNd) and bool(dim == 1)

    # -- facts about inputs --------------------------------------------------------------------

    def fact(self, proxy: Proxy, kind: str) -> None:
        """Note that the code depends on ``rank``, ``dtype`` or ``device`` of a value."""
        if not proxy._held.constant:
            self._walk(proxy.node, kind, self.text())

    def _walk(self, node: fx.Node, kind: str, where: str) -> None:
        """Note it of the inputs that ``node`` is made from."""
        todo = [node]
        while todo:
            node = todo.pop()
            if (kind, node) in self._walked:
                continue
            self._walked.add((kind, node))
            if node in self._inputs:
                self._facts.setdefault(node, {})[kind] = where
            elif kind == "rank" and node in self._dropped:
                asked = self.create_node("call_method", "dim", (node,), {})
                asked.meta[KEY] = info_of(asked).seen_as("scalar")
                self._guard(asked, self._dropped[node])
            elif not self._settled(node, kind):
                todo += [n for n in node.all_input_nodes if _value(n) != "scalar"]

    def _settled(self, node: fx.Node, kind: str) -> bool:
        """Whether the fact follows from the model alone."""
        if kind == "dtype" and node.op == "call_module":
            layer = self.root.get_submodule(str(node.target))
            return any(p.is_floating_point() for p in layer.parameters())
        if kind == "rank" and node.target in ("view", "reshape", torch.reshape):
            shape = node.args[1:]
            shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple) else shape
            return all(not isinstance(s, fx.Node) or _value(s) == "scalar" for s in shape)
        return False

    def rank_of(self, node: fx.Node) -> int | None:
        """How many dimensions a value has; ``None`` where that may differ from call to call."""
        todo, seen = [node], {node}
        while todo:
            each = todo.pop()
            if each in self._inputs:
                if "rank" not in self._facts.get(each, {}):
                    return None
            elif each in self._dropped:
                return None
            elif not self._settled(each, "rank"):
                new = {n for n in each.all_input_nodes if _value(n) != "scalar"} - seen
                seen |= new
                todo += new
        return self._ranks.get(node)

    def settle_facts(self) -> None:
        """One check per input for all that was asked of it."""
        self.settle_indices()
        if not self._facts:
            return
        last = next(reversed(self._inputs))
        for node in self.graph.nodes:
            if node in self._inputs:
                last = node
        with self.graph.inserting_after(last):
            for node, asked in self._facts.items():
                name, value = self._inputs[node]
                rank = value.dim() if "rank" in asked else None
                dtype = value.dtype if "dtype" in asked else None
                device = value.device.type if "device" in asked else ""
                args = (node, rank, dtype, device, name, next(iter(asked.values())))
                self.create_node("call_function", check_input, args, {})

    # -- attributes, methods, functions --------------------------------------------------------

    def attribute(self, proxy: Proxy, name: str) -> Any:
        """``proxy.name``: the value's own rules, what is a method waits for its call."""
        value = proxy._held.value
        if not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        found = getattr(value, name)
        if isinstance(value, torch.device):
            self.fact(proxy, "device")
            return found
        if callable(found) and not isinstance(found, Tensor):
            return Method(proxy, name)
        if isinstance(value, Tensor):
            if name in ("shape", "device", "ndim", "dtype") and proxy._held.constant:
                return found
            for names, kind in (
                (_RANK, "rank"),
                (("dtype", *_DTYPE), "dtype"),
                (_DEVICE, "device"),
            ):
                if name in names:
                    self.fact(proxy, kind)
                    return found
            if not isinstance(found, Tensor | torch.Size | torch.device):
                return found
        elif isinstance(value, SCALARS):
            return found
        return self.create_proxy("call_function", getattr, (proxy, name), {})

    def method(self, proxy: Proxy, name: str, args: Any, kwargs: Any) -> Any:
        """``proxy.name(...)``."""
        value = proxy._held.value
        if isinstance(value, Tensor):
            known, found = self._known(proxy, name, args, kwargs)
            if known:
                return found
        return self.create_proxy("call_method", name, (proxy, *args), kwargs)

    def _known(self, proxy: Proxy, name: str, args: Any, kwargs: Any) -> tuple[bool, Any]:
        """Methods that are answered at once, or not at all."""
        held = proxy._held
        nested = any(True for _ in proxies_in((args, kwargs)))
        if held.constant and not nested and name in (*_SIZES, *_RANK):
            return True, getattr(held.value, name)(*args, **kwargs)
        if name in _VALUES or (name == "item" and held.constant):
            fixed = self.answer(proxy)
            return True, getattr(fixed, name)(*args, **kwargs)
        kinds = ((_RANK, "rank"), (_DTYPE, "dtype"), (_DEVICE, "device"), (_STILL, ""))
        for names, kind in kinds:
            if name in names:
                if kind:
                    self.fact(proxy, kind)
                return True, getattr(held.value, name)(*args, **kwargs)
        if name == "type" and not args and not kwargs:
            self.fact(proxy, "dtype")
            return True, held.value.type()
        return False, None

    def function(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A torch function that was given proxies."""
        if self._asked:
            self._take_back((args, kwargs))
        name = getattr(function, "__name__", "")
        if is_tensor_method_or_property(function) and name != "__get__":
            plain = name.strip("_")
            if name.startswith("__r") and hasattr(operator, f"__{plain[1:]}__"):
                return self.create_proxy(
                    "call_function", getattr(operator, plain[1:]), (args[1], args[0]), {}
                )
            if name.startswith("__") and hasattr(operator, plain):
                return self.create_proxy("call_function", getattr(operator, plain), args, kwargs)
            if is_proxy(args[0]):
                return self.method(args[0], name, args[1:], kwargs)
            return self.create_proxy("call_method", name, args, kwargs)
        first: Any = args[0] if args else None
        if name in _DTYPE and is_proxy(first) and self.live:
            return self.method(first, name, (), {})
        return self.create_proxy("call_function", function, args, kwargs)

    # -- what a new value is -------------------------------------------------------------------

    def flags_of(
        self, kind: str, target: Any, args: Any, kwargs: Any, value: Any
    ) -> tuple[bool, bool]:
        """Whether a value depends on no input, and whether on what tensors hold."""
        if kind == "get_attr":
            return True, False
        sources = list(proxies_in((args, kwargs)))
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        random = kind == "call_module" or name in ("dropout", "bernoulli", "multinomial")
        constant = bool(sources) and all(s._held.constant for s in sources) and not random
        if any(s._held.data for s in sources):
            return constant, name not in _SIZES or isinstance(value, SCALARS)
        if isinstance(value, Tensor):
            masked = target is operator.getitem and any(
                isinstance(p._held.value, Tensor) and p._held.value.dtype is torch.bool
                for p in proxies_in(args[1])
            )
            lone = name == "where" and len(args) == 1
            return constant, masked or lone or name in _DATA_SHAPED
        if isinstance(value, SCALARS) and name not in _SIZES and name != "getattr":
            asks_tensor = any(isinstance(s._held.value, Tensor) for s in sources)
            return constant, asks_tensor and not constant
        return constant, False

    def opened(self, proxy: Proxy, value: Any) -> Any:
        """A dict or dataclass that holds proxies, in place of a proxy of one."""
        leaves: list[Any] = []
        spec = take_apart(value, lambda v: isinstance(v, Tensor), leaves)
        if spec is None or spec == LEAF:
            return proxy
        made = [
            self.create_proxy("call_function", pick, (proxy, path), {}) for path in leaf_paths(spec)
        ]
        return like(value, spec, iter(made))


def info_of(node: fx.Node) -> NodeInfo:
    """The record of a node that is being captured."""
    found: NodeInfo = node.meta[KEY]
    return found


def _value(node: fx.Node) -> str:
    return info_of(node).held


def may_drop_dims(node: fx.Node) -> bool:
    """``squeeze()`` without dimensions drops those that happen to be 1."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("squeeze", "squeeze_") and len(node.args) + len(node.kwargs) == 1
