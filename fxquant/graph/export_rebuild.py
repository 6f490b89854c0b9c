"""An exported program as a graph module over the model's own module tree.

An exported program keeps its parameters as inputs, its arguments flat, its ops as ATen overloads.
Here its placeholders are named as ``forward``'s arguments, its parameters stand under the user's
own names, and every node has a record; the op table reads the ATen spellings.
"""

from __future__ import annotations

import inspect
import operator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from fxquant.errors import TraceError
from fxquant.graph.export_conditions import check_conditions, check_value, read_condition
from fxquant.graph.export_places import Places
from fxquant.graph.guards import check_bound
from fxquant.graph.table_aten import first_of_two
from fxquant.graph.tracer import Retracer

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.export.graph_signature import InputSpec

_TENSORS: Final = ("PARAMETER", "BUFFER", "CONSTANT_TENSOR")
_PLAIN: Final = (bool, int, float, str, type(None))


class Structure(nn.Module):
    """Puts the results of a model into the container its ``forward`` returns.

    Args:
        spec: the container, as ``torch.utils._pytree`` describes it.
    """

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, leaves: list[Any]) -> Any:
        """The container, filled with ``leaves``."""
        return pytree.tree_unflatten(leaves, self.spec)


def _refuse_transform(node: fx.Node) -> None:
    """``torch.vmap`` in an exported graph opens and closes a mode that no pass keeps in place."""
    if str(getattr(node.target, "__module__", "")).startswith("torch._functorch"):
        raise TraceError(f"the exported graph calls {getattr(node.target, '__name__', node)}")


class Rebuild:
    """Writes the graph of an exported program anew, over the modules of the model."""

    def __init__(self, root: nn.Module, program: ExportedProgram) -> None:
        self.root = root
        self.program = program
        self.graph = fx.Graph()
        self.places = Places(root)
        self.values: dict[fx.Node, Any] = {}
        self.paths: dict[fx.Node, str] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.loaded: dict[str, fx.Node] = {}
        self.structure: Structure | None = None

    def run(self) -> fx.GraphModule:
        """The graph module."""
        self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                _refuse_transform(node)
                self._call(node)
            elif node.op == "get_attr":
                self.values[node] = getattr(self.program.graph_module, str(node.target))
        self._output()
        return self._module()

    def _new(self, like: fx.Node | None, op: str, target: Any, args: Any, name: str) -> fx.Node:
        node = self.graph.create_node(op, target, args, {}, name=name)
        self.places.note(node, like)
        return node

    # Inputs

    def _inputs(self) -> None:
        specs = self.program.graph_signature.input_specs
        leaves: list[Any] = []
        for node, spec in zip(_placeholders(self.program.graph), specs, strict=True):
            if spec.kind.name == "USER_INPUT":
                leaves.append(_Leaf(node, spec))
            elif spec.kind.name in _TENSORS and spec.target is not None:
                self.paths[node] = self._path(spec)
            else:
                raise TraceError(f"the exported model takes {spec.kind.name} %{node.name}")
        args, kwargs = pytree.tree_unflatten(leaves, self.program.call_spec.in_spec)
        signature = inspect.signature(self.root.forward)
        given = signature.bind(*args, **kwargs).arguments
        made = {p.name: self._argument(p, given) for p in signature.parameters.values()}
        inputs = {name: node for name, node in made.items() if node is not None}
        for name, node in inputs.items():
            if name in given:
                self._unpack(node, given[name], name)
        self._conditions(inputs)

    def _argument(self, parameter: inspect.Parameter, given: dict[str, Any]) -> fx.Node | None:
        name, value = parameter.name, given.get(parameter.name, parameter.default)
        stars = _STARS.get(parameter.kind, "")
        if stars:
            return self._new(None, "placeholder", stars + name, (), name) if name in given else None
        plain = value.plain if isinstance(value, _Leaf) and value.is_plain else value
        if isinstance(plain, _PLAIN):
            node = self._new(None, "placeholder", name, (plain,), name)
            if name not in given:
                self._check_plain(node, plain, name)
            return node
        if name not in given:
            return None
        after_default = any(each.args for each in _placeholders(self.graph))
        return self._new(None, "placeholder", name, (None,) if after_default else (), name)

    def _unpack(self, node: fx.Node, value: Any, name: str) -> None:
        """Nodes for what lies inside an argument: ``batch["image"]``."""
        if isinstance(value, _Leaf):
            if value.is_plain:
                self._check_plain(node, value.plain, name)
                self.values[value.node] = value.plain
            else:
                self.values[value.node] = node
        elif isinstance(value, dict):
            for key, inner in value.items():
                self._unpack(self._item(node, key), inner, f"{name}[{key!r}]")
        elif isinstance(value, tuple | list):
            for place, inner in enumerate(value):
                self._unpack(self._item(node, place), inner, f"{name}[{place}]")
        else:
            raise TraceError(
                f"argument {name!r} is a {type(value).__name__}: pass plain containers"
            )

    def _item(self, node: fx.Node, key: Any) -> fx.Node:
        return self._new(None, "call_function", operator.getitem, (node, key), "getitem")

    def _check_plain(self, node: fx.Node, value: Any, name: str) -> None:
        self._new(None, "call_function", check_bound, (node, value, name), "check_bound")

    def _conditions(self, inputs: dict[str, fx.Node]) -> None:
        found = tuple(dict.fromkeys(self.program._guards_code))
        for condition in found:
            read_condition(condition)
        if found:
            asked = {
                name: node for name, node in inputs.items() if f"L['{name}']" in " ".join(found)
            }
            self._new(None, "call_function", check_conditions, (asked, found), "check_conditions")

    # Tensors that the model holds

    def _path(self, spec: InputSpec) -> str:
        path = str(spec.target)
        if spec.kind.name == "CONSTANT_TENSOR":
            value = self.program.constants[path]
            if self.places.tensor(path) is not value:
                path = path.replace(".", "_")
            self.constants[path] = value
        return path

    def _load(self, path: str) -> fx.Node:
        if path not in self.loaded:
            self.loaded[path] = self._new(None, "get_attr", path, (), path.replace(".", "_"))
        return self.loaded[path]

    # Calls

    def _value(self, node: fx.Node) -> Any:
        return self._load(self.paths[node]) if node in self.paths else self.values[node]

    def _settled(self, value: Any) -> Any:
        """An argument with nodes of the new graph, and tuples where ATen has lists."""
        if isinstance(value, fx.Node):
            return self._value(value)
        if isinstance(value, tuple | list):
            return tuple(self._settled(item) for item in value)
        if isinstance(value, slice):
            return slice(*(self._settled(end) for end in (value.start, value.stop, value.step)))
        return value

    def _call(self, node: fx.Node) -> None:
        if isinstance(node.target, HigherOrderOperator):
            self._inline(node)
            return
        if node in self.values:
            return
        args = self._settled(node.args)
        if node.target is operator.getitem and isinstance(args[0], tuple):
            self.values[node] = args[0][args[1]]  # the result of an inlined graph
        elif str(node.target) in _SAME_TENSOR:
            self.values[node] = args[0]
        elif str(node.target) in _ASSERTIONS:
            self._new(node, "call_function", check_value, args[:2], "check_value")
        elif str(node.target) not in _NOTES_TO_EXPORT:
            single = first_of_two(node.target) if _reads_first_only(node) else None
            made = self._new(node, "call_function", single or node.target, args, node.name)
            if single is not None:
                self.values.update(dict.fromkeys(node.users, made))
            made.kwargs = {name: self._settled(value) for name, value in node.kwargs.items()}
            self.values[node] = made

    def _inline(self, node: fx.Node) -> None:
        """``with torch.no_grad():`` and ``with torch.autocast(...):`` are calls of a graph."""
        if str(node.target) not in _WRAPPERS:
            raise TraceError(f"{node.target} holds graphs of its own, which cannot be quantized")
        inner = next(i for i, a in enumerate(node.args) if _is_graph(a, self.values))
        body: fx.GraphModule = self.values[node.args[inner]]  # type: ignore[index]  # the first argument of such a call is a node
        operands = self._settled(node.args[inner + 1 :])
        for place, value in zip(_placeholders(body.graph), operands, strict=True):
            self.values[place] = value
        for each in body.graph.nodes:
            if each.op == "call_function":
                self._call(each)
            elif each.op == "get_attr":
                self.values[each] = getattr(body, str(each.target))
            elif each.op == "output":
                self.values[node] = self._settled(each.args[0])

    # Outputs

    def _output(self) -> None:
        changed = [
            spec.target
            for spec in self.program.graph_signature.output_specs
            if spec.kind.name != "USER_OUTPUT"
        ]
        if changed:
            raise TraceError(f"forward stores {changed[0]} in the model in every call")
        leaves = self._settled(self.program.graph.output_node().args[0])
        spec = self.program.call_spec.out_spec
        result = pytree.tree_unflatten(list(leaves), spec)
        if not _is_plain_container(result):
            self.structure = Structure(spec)
            name = "output_structure"
            result = self._new(None, "call_module", name, (list(leaves),), name)
        self._new(None, "output", "output", (result,), "output")

    def _module(self) -> fx.GraphModule:
        root = self.root
        for module in root.modules():
            for registry in _HOOKS:
                getattr(module, registry).clear()
        for path, tensor in self.constants.items():
            if self.places.tensor(path) is None:
                root.register_buffer(path, tensor.detach().clone())
        if self.structure is not None:
            root.add_module("output_structure", self.structure)
        # Unpickling traces the code of a graph module anew.
        self.graph._tracer_cls = Retracer
        module = fx.GraphModule(root, self.graph, type(root).__name__)
        for name, child in root.named_children():
            module.add_module(name, child)
        return module


class _Leaf:
    """A flat input of the exported program."""

    def __init__(self, node: fx.Node, spec: InputSpec) -> None:
        self.node = node
        self.is_plain = type(spec.arg).__name__ == "ConstantArgument"
        self.plain: Any = getattr(spec.arg, "value", None)


def _reads_first_only(node: fx.Node) -> bool:
    read = [user for user in node.users if user.users]
    return all(user.target is operator.getitem and user.args[1] == 0 for user in read)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="placeholder")


def _is_graph(value: Any, values: dict[fx.Node, Any]) -> bool:
    return isinstance(value, fx.Node) and isinstance(values.get(value), fx.GraphModule)


def _is_plain_container(value: Any) -> bool:
    """Whether a graph can hold the container itself."""
    # Not named tuples: the code of torch 2.10 does not know their class where it returns them.
    if type(value) in (tuple, list):
        return all(_is_plain_container(item) for item in value)
    if type(value) is dict:
        return all(_is_plain_container(item) for item in value.values())
    return isinstance(value, (fx.Node, *_PLAIN))


_STARS: Final[dict[Any, str]] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}
_HOOKS: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_WRAPPERS: Final = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_SAME_TENSOR: Final = ("aten.detach.default", "aten.detach_.default", "aten.alias.default")
_ASSERTIONS: Final = ("aten._assert_scalar.default", "aten._assert_async.msg")
_NOTES_TO_EXPORT: Final = (
    "aten.sym_constrain_range.default",
    "aten.sym_constrain_range_for_size.default",
    "aten._assert_tensor_metadata.default",
)
