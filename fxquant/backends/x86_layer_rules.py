"""Lowering of layers to the x86 backend.

quantize(act(conv2d(dequantize(x), dequantize_weight(w), b)))           ->  X86Conv(x)
quantize(relu(conv2d(...) + dequantize(y)))                             ->  X86ConvSum(x, y)
act(linear(dequantize(x), dequantize_weight(w), b))                     ->  X86Linear(x), float
cast(act(linear(...)), bfloat16)                                        ->  X86Linear(x), bfloat16
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.backends.layer_parts import (
    codes_node,
    geometry_of,
    op_name,
    tensors_of,
    transposed_geometry_of,
    weight_of,
)
from fxquant.backends.x86_layers import (
    PostOp,
    X86Conv,
    X86ConvSum,
    X86Layer,
    X86Linear,
    X86LinearSum,
)
from fxquant.backends.x86_pointwise import X86Pointwise, X86PointwiseSum
from fxquant.backends.x86_stem import X86Stem, can_read_floats
from fxquant.backends.x86_transposed import X86ConvTranspose
from fxquant.graph.edit import Editor
from fxquant.graph.info import QType, info
from fxquant.graph.op_table import argument, op_of
from fxquant.graph.tied import tied_of
from fxquant.graph.view import flat_nodes
from fxquant.patterns.boundary import DEQUANTIZE, DEQUANTIZE_WEIGHT, QUANTIZE
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.norm import CONVS, LINEAR, TRANSPOSED
from fxquant.patterns.rule import Rule
from fxquant.patterns.units import ACTIVATIONS

LAYERS: Final = (*CONVS, *LINEAR, *TRANSPOSED)


def layer_expr(layers: tuple[str, ...] = LAYERS) -> OpExpr:
    """A layer with integer weights that reads codes."""
    codes = op(DEQUANTIZE, var("x"), name="dq", shared=True)
    weight = op(DEQUANTIZE_WEIGHT, var("w"), var("scale"), name="dqw", shared=True)
    return op(layers, codes, weight, var("bias"), name="layer")


def _scalars(*names: str) -> Callable[[Node], tuple[float, ...]]:
    return lambda node: tuple(float(argument(node, name)) for name in names)


def _nothing(_: Node) -> tuple[float, ...]:
    return ()


_POST: Final[dict[str, tuple[str, Callable[[Node], tuple[float, ...]]]]] = {
    "relu": ("relu", _nothing),
    "relu6": ("hardtanh", lambda _: (0.0, 6.0)),
    "hardtanh": ("hardtanh", _scalars("min_val", "max_val")),
    "hardswish": ("hardswish", _nothing),
    "silu": ("swish", _nothing),
    "gelu": ("gelu", _nothing),
    "leaky_relu": ("leaky_relu", _scalars("negative_slope")),
    "tanh": ("tanh", _nothing),
}
_CONV2D_POST: Final = ("relu", "relu6", "hardtanh", "hardswish", "silu")
_TAKES: Final = {
    "conv1d": ("relu",),
    "conv2d": _CONV2D_POST,
    "conv3d": (),
    "conv_transpose1d": ("relu",),
    "conv_transpose2d": _CONV2D_POST,
    "conv_transpose3d": (),
    "linear": tuple(_POST),
}
"""Which activations the kernel of each layer takes; see ``tests/backends/test_x86_layers.py``."""


def post_op(layer: str, act: Node | None) -> PostOp | None:
    """The kernel's form of an activation after ``layer``, or ``None`` if it has none."""
    if act is None:
        return PostOp()
    found = op_of(act)
    if found is None or found.name not in _TAKES[layer]:
        return None
    name, scalars = _POST[found.name]
    algorithm = str(argument(act, "approximate")) if found.name == "gelu" else ""
    return PostOp(name, scalars(act), algorithm)


_NO_RELU: Final = ("conv3d", "conv_transpose3d")


def floor_of(match: Match) -> int | None:
    """The code that ``relu`` clamps at, where the kernel itself has no ``relu``."""
    act = match.bound.get("act")
    if act is None or op_name(act) != "relu" or op_name(match.node("layer")) not in _NO_RELU:
        return None
    return info(match.root).writes.zero_point  # type: ignore[union-attr]  # the pattern that matched has it


def kernel_takes(match: Match) -> Reject | None:
    """The kernel must have the activation, the input codes must be what it reads."""
    layer, act = match.node("layer"), match.bound.get("act")
    reads = codes_type(match.node("dq"))
    wanted = (torch.uint8,) if op_name(layer) != "linear" else (torch.uint8, torch.int8)
    if reads.dtype not in wanted:
        return Reject(f"the kernel reads uint8, not {reads.dtype}", layer)
    quantized = op_name(match.root) == QUANTIZE
    if post_op(op_name(layer), act) is None and not (quantized and floor_of(match) is not None):
        return Reject(
            f"the {op_name(layer)} kernel has no {op_name(act) if act else 'such'}", layer
        )
    return _full_range(match) if quantized else None


def _full_range(match: Match) -> Reject | None:
    """Kernels saturate at the ends of the type, not at those of a narrower code range."""
    writes = info(match.root).writes
    if writes is None:
        return Reject("its result has no type", match.root)
    limits = torch.iinfo(writes.dtype)
    if (writes.quant_min, writes.quant_max) != (limits.min, limits.max):
        return Reject(f"it uses only codes {writes.quant_min}..{writes.quant_max}", match.root)
    return None


def codes_type(dq: Node) -> QType:
    """The type of the codes that a ``dequantize`` reads."""
    source = dq.args[0]
    found = info(source).writes if isinstance(source, Node) else None
    if found is None:
        raise TypeError(f"%{dq.name} reads no codes")
    return found


def _is_pointwise(layer: Node, dq: Node) -> bool:
    """Whether a convolution looks at one pixel at a time, all of them, in all channels."""
    if op_name(layer) != "conv2d" or len(info(dq).shape or ()) != 4:
        return False
    g = geometry_of(layer)
    plain = (g.stride, g.padding, g.dilation, g.groups) == ((1, 1), (0, 0), (1, 1), 1)
    return plain and _weight_shape(layer) == (1, 1)


def _weight_shape(layer: Node) -> tuple[int, ...]:
    """Height and width of a layer's kernel."""
    return tuple(weight_of(layer).shape[2:])


def _make_linear(
    layer: Node,
    parts: tuple[Tensor, Tensor, Tensor | None, QType, QType | None],
    post: PostOp,
    other: QType | None,
) -> X86Linear:
    """A linear, or a convolution that is one; a weight that several read is packed once."""
    tied, flat = tied_of(codes_node(layer)), op_name(layer) == "linear"
    packed = None if tied is None else tied.packed
    if other is not None:
        kind = X86LinearSum if flat else X86PointwiseSum
        made: X86Linear = kind(*parts, post, packed, other=other)
    else:
        made = (X86Linear if flat else X86Pointwise)(*parts, post, packed)
    if tied is not None:
        tied.packed = made.packed
        if tied.table:
            made.keep_plain(parts[0])
    return made


def _make(match: Match, editor: Editor, writes: QType | None, other: QType | None) -> X86Layer:
    layer, dq = match.node("layer"), match.node("dq")
    parts = (*tensors_of(layer, editor), codes_type(dq), writes)
    post = post_op(op_name(layer), match.bound.get("act")) or PostOp()
    if op_name(layer) == "linear" or _is_pointwise(layer, dq):
        return _make_linear(layer, parts, post, other)
    if op_name(layer) in TRANSPOSED:
        deconv = X86ConvTranspose(*parts, post, transposed_geometry_of(layer))
        deconv.floor = floor_of(match) if writes is not None else None
        return deconv
    shape = info(dq).shape
    # The weight's layout is chosen for one picture; a batch is big enough to bear another.
    more = (post, geometry_of(layer), None if shape is None else (1, *shape[1:]))
    if other is not None:
        return X86ConvSum(*parts, *more, other=other)
    made = (X86Stem if picture_of(match) is not None else X86Conv)(*parts, *more)
    made.floor = floor_of(match) if writes is not None else None
    return made


def put(
    match: Match,
    editor: Editor,
    module: nn.Module,
    inputs: tuple[Node, ...],
    writes: QType | None,
    *,
    path: str,
    like: Node,
) -> Node:
    """Call ``module`` on codes where the match stood."""
    root = match.root
    standing = path and is_container(editor, path)
    if standing:
        editor.set_module(path, module)
    else:
        path = editor.add_module(path or root.name, module)
    made = editor.call_module(path, inputs, like=like, before=root)
    editor.annotate(
        made,
        writes=writes,
        reads=tuple(info(value).writes for value in inputs),
        value="tensor",
        decision=info(like).decision,
        shape=info(root).shape,
    )
    editor.replace(root, made, *match.nodes[1:])
    return made


def is_container(editor: Editor, path: str) -> bool:
    """Whether the place belongs to the layer's own weight holder."""
    try:
        return "weight_scale" in editor.module.get_submodule(path)._buffers
    except AttributeError:
        return False


def _path(match: Match) -> str:
    return str(match.bound["w"].target).rpartition(".")[0]


def _lower(match: Match, editor: Editor) -> None:
    writes = info(match.root).writes if op_name(match.root) == QUANTIZE else None
    module = _make(match, editor, writes, None)
    if op_name(match.root) == "cast":
        module.write_real(torch.bfloat16)
    codes = picture_of(match) or match.node("dq").args[0]
    if isinstance(codes, Node):
        put(match, editor, module, (codes,), writes, path=_path(match), like=match.node("layer"))


def picture_of(match: Match) -> Node | None:
    """The float picture that a first convolution can quantize by itself, if this is one."""
    layer, dq = match.node("layer"), match.node("dq")
    codes = dq.args[0]
    if op_name(layer) != "conv2d" or not isinstance(codes, Node) or op_name(codes) != QUANTIZE:
        return None
    if _is_pointwise(layer, dq):  # a linear over pixels
        return None
    alone = len(codes.users) == 1 and len(dq.users) == 1
    picture = codes.args[0]
    if not alone or not isinstance(picture, Node) or picture.op != "placeholder":
        return None
    fits = can_read_floats(weight_of(layer), geometry_of(layer))
    return picture if fits and codes_type(dq).dtype == torch.uint8 else None


def sum_fits(match: Match) -> Reject | None:
    """Sums exist for 2-d convolutions and linears, with ``relu`` or nothing after them."""
    layer = match.node("layer")
    if op_name(layer) not in ("conv2d", "linear"):
        return Reject(f"the {op_name(layer)} kernel has no sum", layer)
    if codes_type(match.node("dq2")).dtype != torch.uint8:
        return Reject("the kernel sums uint8 only", layer)
    total, other = info(match.root).shape, info(match.node("dq2")).shape
    if total is None or other is None:
        return Reject("calibration saw no shape of the sum", match.node("add"))
    if total != other:
        return Reject("the sum broadcasts", match.node("add"))
    return None


def _lower_sum(match: Match, editor: Editor) -> None:
    writes = info(match.root).writes
    module = _make(match, editor, writes, codes_type(match.node("dq2")))
    codes, other = match.node("dq").args[0], match.node("dq2").args[0]
    if not isinstance(codes, Node) or not isinstance(other, Node):
        return
    # conv(y) + y: the kernel must not write over what it is still reading.
    if other is codes or not may_overwrite(other, match.node("dq2"), match.root):
        kept = info(other).writes
        other = editor.call(torch.clone, (other,), like=other, before=match.root)
        editor.annotate(other, writes=kept, reads=(kept,), value="tensor")
    made = put(
        match, editor, module, (codes, other), writes, path=_path(match), like=match.node("layer")
    )
    made.meta["overwrites"] = 1


def may_overwrite(codes: Node, dq: Node, at: Node) -> bool:
    """Whether the memory of ``codes`` is free once the op at ``at`` has read it."""
    if codes.op in ("placeholder", "get_attr") or _shares_memory(codes):
        return False
    for reader in _readers(codes):
        found = op_of(reader)
        if found is not None and found.alias:
            return False
        if reader.op == "output" or (at < reader and reader is not at):
            return False
    return dq is not at


def _readers(codes: Node) -> list[Node]:
    found: list[Node] = []
    for user in codes.users:
        found.extend(user.users if op_name(user) == DEQUANTIZE else (user,))
    return found


def _shares_memory(codes: Node) -> bool:
    """Whether codes will be a view of other codes, once lowered."""
    maker = next(flat_nodes(codes.args), None) if op_name(codes) == QUANTIZE else codes
    found = op_of(maker) if maker is not None else None
    if maker is not None and op_name(maker) == DEQUANTIZE:
        return False
    return found is not None and found.alias


def _q(inner: OpExpr) -> OpExpr:
    return op(QUANTIZE, inner, name="q")


def _ended() -> OpExpr:
    return op(ACTIVATIONS, layer_expr(), name="act", optional=True)


_OTHER: Final = op(DEQUANTIZE, var("y"), name="dq2", shared=True)
_SUM: Final = op("add", layer_expr(), _OTHER, name="add", alpha=1)

LAYER_RULES: Final = (
    Rule(
        "x86-layer-sum",
        _q(op("relu", _SUM, name="act", optional=True)),
        _lower_sum,
        (kernel_takes, sum_fits),
        priority=30,
    ),
    Rule(
        "x86-layer",
        _q(_ended()),
        _lower,
        (kernel_takes,),
        priority=20,
    ),
    Rule(
        "x86-layer-bfloat16",
        op("cast", _ended(), dtype=torch.bfloat16, device=None, like=None),
        _lower,
        (kernel_takes,),
        priority=10,
    ),
    Rule(
        "x86-layer-float",
        _ended(),
        _lower,
        (kernel_takes,),
    ),
)
