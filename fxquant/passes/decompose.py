"""Decompose: products of any spelling as products of matrices, and views around them.

    addmm(c, a, b)                        ->   add(matmul(a, b), c)
    einsum("bqhd,bkhd->bhqk", q, k)       ->   matmul(permute(q), permute(k))
    inner, tensordot, addbmm, bilinear    ->   the same

What cannot be written so stays as it is, marked with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.einsum import REST, Axes, Contraction, contraction, read_equation
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, is_op, op_named, op_of
from fxquant.graph.ops import Unreadable
from fxquant.graph.ranks import record_ranks
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass


@dataclass(frozen=True)
class Decompose(Pass):
    """Write products with ``matmul``.

    Args:
        ranks: name and number of dimensions of the inputs that are known.
    """

    name: ClassVar[str] = "decompose"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    ranks: tuple[tuple[str, int], ...] = field(default=())

    def run(self, editor: Editor) -> None:
        """Rewrite call by call, in graph order."""
        writers = {
            "addmm": _add_product,
            "addbmm": _add_batches,
            "einsum": _einsum,
            "tensordot": _tensordot,
            "inner": _inner,
            "bilinear": _bilinear,
        }
        record_ranks(editor.graph, dict(self.ranks))
        for node in list(editor.graph.nodes):
            op = op_of(node)
            if op is None or op.name not in writers:
                continue
            with editor.rule("decompose", note=op.name):
                made = writers[op.name](_Writer(editor, node))
                if isinstance(made, Node):
                    editor.replace(node, made)
            if isinstance(made, Unreadable):
                editor.note_values(node, opaque=made.reason)
        with editor.rule("drop-dead"):
            editor.clean()


class _Writer:
    """Writes canonical calls in front of the call that they stand for."""

    def __init__(self, editor: Editor, node: Node) -> None:
        self._editor = editor
        self.node = node

    def __call__(self, name: str, *tensors: Any, **options: Any) -> Node:
        """Call the op ``name``; options that are not given have their defaults."""
        op = op_named(name)
        said = {n: options.get(n, op.signature.parameters[n].default) for n in op.options}
        made = self._editor.call(op, tensors, said, like=self.node, before=self.node)
        self._editor.note_values(made, value="tensor", rank=None, shape=None)
        return made

    def size(self, tensor: Node, dim: int) -> int | Node:
        """How long an axis is: a number for a constant, else a question asked in every call."""
        held = _constant_shape(self._editor, tensor)
        if held is not None:
            return held[dim]
        target: Any = op_named("size").target
        made = self._editor.call(target, (tensor, dim), like=self.node, before=self.node)
        self._editor.note_values(made, value="scalar", rank=None, shape=None)
        return made

    def arguments(self, *names: str) -> tuple[Any, ...]:
        """Arguments of the call that is rewritten."""
        return tuple(argument(self.node, name) for name in names)


def _constant_shape(editor: Editor, tensor: Node) -> tuple[int, ...] | None:
    """The shape of a constant, or of one whose axes were reordered."""
    if tensor.op == "get_attr":
        held: Any = editor.module
        for part in str(tensor.target).split("."):
            held = getattr(held, part)
        return tuple(held.shape)
    source = tensor.args[0] if is_op(tensor, "permute") else None
    shape = _constant_shape(editor, source) if isinstance(source, Node) else None
    return None if shape is None else tuple(shape[dim] for dim in argument(tensor, "dims"))


Written = Node | Unreadable


def _add_product(write: _Writer) -> Written:
    added, mat1, mat2 = write.arguments("input", "mat1", "mat2")
    return _plus(write, write("matmul", mat1, mat2), added)


def _add_batches(write: _Writer) -> Written:
    """``sum_b A_b B_b`` is one product of the ``A_b`` side by side with the ``B_b`` stacked."""
    added, batch1, batch2 = write.arguments("input", "batch1", "batch2")
    wide = write("flatten", write("permute", batch1, dims=(1, 0, 2)), start_dim=1)
    tall = write("flatten", batch2, start_dim=0, end_dim=1)
    return _plus(write, write("matmul", wide, tall), added)


def _plus(write: _Writer, product: Node, added: Node) -> Node:
    beta, alpha = write.arguments("beta", "alpha")
    if alpha != 1:
        product = write("mul", product, alpha)
    return product if beta == 0 else write("add", product, added, alpha=beta)


def _inner(write: _Writer) -> Written:
    first, second = write.arguments("input", "other")
    rank = info(second).rank
    if rank is None or rank > 2:
        return Unreadable(f"inner with an operand of {rank or 'unknown'} dimensions")
    return write(
        "matmul", first, second if rank < 2 else write("transpose", second, dim0=0, dim1=1)
    )


def _tensordot(write: _Writer) -> Written:
    first, second, dims = write.arguments("a", "b", "dims")
    left, right = info(first).rank, info(second).rank
    if isinstance(dims, Node) or right is None:
        return Unreadable("tensordot with axes or dimensions that are not known")
    if isinstance(dims, int):
        own, other = list(range(-dims, 0)), list(range(dims))
    else:
        own, other = list(dims[0]), list(dims[1])
    names = [f"b{place}" for place in range(right)]
    for a, b in zip(own, other, strict=True):
        names[b % right] = f"s{a if left is None else a % left}"
    summed = tuple(name for name in names if name[0] == "s")
    if left is None and own != list(range(-len(own), 0)):
        return Unreadable("tensordot over inner axes of a tensor whose rank is not known")
    if left is None:
        terms: Axes = (REST, *(f"s{a}" for a in own))
    else:
        terms = tuple(f"s{a}" if f"s{a}" in summed else f"a{a}" for a in range(left))
    wanted = tuple(n for n in (*terms, *names) if n not in summed)
    return _pair(write, (first, terms), (second, tuple(names)), wanted)[0]


def _bilinear(write: _Writer) -> Written:
    first, second, weight, bias = write.arguments("input1", "input2", "weight", "bias")
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return Unreadable("bilinear with a weight that is computed in every call")
    matrix = write("transpose", write("flatten", weight, start_dim=0, end_dim=1), dim0=0, dim1=1)
    sizes = (write.size(weight, 0), write.size(weight, 1))
    rows = write("unflatten", write("matmul", second, matrix), dim=-1, sizes=sizes)
    column = write("unsqueeze", first, dim=-1)
    made = write("squeeze", write("matmul", rows, column), dim=-1)
    return made if bias is None else write("add", made, bias, alpha=1)


def _einsum(write: _Writer) -> Written:
    operands, text = write.arguments("tensors", "equation")
    if not isinstance(text, str):
        return Unreadable("einsum with axes as lists of numbers")
    equation = read_equation(text, [info(operand).rank for operand in operands])
    if isinstance(equation, Unreadable):
        return equation
    if len(operands) == 1:
        return _alone(write, operands[0], equation.terms[0], equation.result)
    done, axes = operands[0], equation.terms[0]
    for place in range(1, len(operands)):
        later = {axis for term in equation.terms[place + 1 :] for axis in term}
        there = equation.terms[place]
        every = dict.fromkeys((*axes, *there))
        wanted = tuple(axis for axis in every if axis in later or axis in equation.result)
        if place == len(operands) - 1:
            wanted = equation.result
        if REST in wanted:
            wanted = (REST, *(axis for axis in wanted if axis != REST))
        done, axes = _pair(write, (done, axes), (operands[place], there), wanted)
    found: Node = done
    return found


def _alone(write: _Writer, operand: Node, axes: Axes, wanted: Axes) -> Node:
    gone = tuple(axis for axis in axes if axis not in wanted)
    operand, axes = _sum(write, operand, axes, gone)
    return _order(write, operand, axes, wanted)


def _sum(write: _Writer, tensor: Node, axes: Axes, gone: Axes) -> tuple[Node, Axes]:
    if not gone:
        return tensor, axes
    dims = tuple(axes.index(axis) - len(axes) for axis in gone)
    return write("sum", tensor, dim=dims), tuple(axis for axis in axes if axis not in gone)


def _order(write: _Writer, tensor: Node, axes: Axes, wanted: Sequence[str]) -> Node:
    """Bring the axes of ``tensor`` into the wanted order."""
    if axes == tuple(wanted):
        return tensor
    if axes[0] != REST:
        return write("permute", tensor, dims=tuple(axes.index(axis) for axis in wanted))
    source = tuple(axes.index(axis) - len(axes) for axis in wanted[1:])
    return write("movedim", tensor, source=source, destination=tuple(range(1 - len(axes), 0)))


def _pair(
    write: _Writer, a: tuple[Node, Axes], b: tuple[Node, Axes], wanted: Axes
) -> tuple[Node, Axes]:
    """One product of two operands."""
    plan = contraction(a[1], b[1], wanted)
    first, left = _sum(write, *a, plan.alone[0])
    second, right = _sum(write, *b, plan.alone[1])
    batches = [tuple(x for x in plan.batch if x in axes) for axes in (left, right)]
    first = _order(write, first, left, (*batches[0], *plan.left, *plan.summed))
    second = _order(write, second, right, (*batches[1], *plan.summed, *plan.right))
    if plan.summed:
        made = _product(write, first, second, plan, (bool(batches[0]), bool(batches[1])))
    else:
        made = _outer(write, first, second, plan)
    return _order(write, made, (*plan.batch, *plan.left, *plan.right), wanted), wanted


def _outer(write: _Writer, first: Node, second: Node, plan: Contraction) -> Node:
    """Nothing to sum: elements are multiplied, with sides of one where an operand has no axis."""
    for _ in plan.right:
        first = write("unsqueeze", first, dim=-1)
    for _ in plan.left:
        second = write("unsqueeze", second, dim=-1 - len(plan.right))
    return write("mul", first, second)


def _product(
    write: _Writer, first: Node, second: Node, plan: Contraction, batched: tuple[bool, bool]
) -> Node:
    """``[batch, left, summed]`` times ``[batch, summed, right]``, each side made one axis."""
    sizes = _Sizes(write, plan, {"left": first, "right": second})
    inner, right = len(plan.summed), len(plan.right)
    if inner > 1:
        first = write("flatten", first, start_dim=-inner)
        second = write("flatten", second, start_dim=-inner - right, end_dim=-1 - right)
    # Against a single matrix all axes of the other operand are a batch and can stay apart.
    group = batched[1] and len(plan.left) > 1
    row, column = all(batched) and not plan.left, batched[1] and not plan.right
    if group:
        first = write("flatten", first, start_dim=-1 - len(plan.left), end_dim=-2)
    if row:
        first = write("unsqueeze", first, dim=-2)
    if right > 1:
        second = write("flatten", second, start_dim=-right)
    if column:
        second = write("unsqueeze", second, dim=-1)
    made = write("matmul", first, second)
    made = write("squeeze", made, dim=-1) if column else made
    made = write("squeeze", made, dim=-2 if right else -1) if row else made
    made = write("unflatten", made, dim=-1, sizes=sizes.of("right")) if right > 1 else made
    return write("unflatten", made, dim=-1 - right, sizes=sizes.of("left")) if group else made


@dataclass(frozen=True)
class _Sizes:
    """How long the axes are that are flattened for a product."""

    write: _Writer
    plan: Contraction
    operands: Mapping[str, Node]

    def of(self, side: str) -> tuple[int | Node, ...]:
        """Sizes of the left or right axes."""
        operand = self.operands[side]
        count = len(self.plan.left if side == "left" else self.plan.right)
        last = -len(self.plan.summed) if side == "left" else 0
        sizes = [self.write.size(operand, place - count + last) for place in range(count)]
        return tuple(sizes)
