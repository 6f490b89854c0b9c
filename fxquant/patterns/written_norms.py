"""Norms written out by hand become the module that computes them.

self.weight * (x * rsqrt(mean(x ** 2, -1, keepdim=True) + eps))   ->   RMSNorm(x)
"""

from __future__ import annotations

from typing import Final

from torch import nn
from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.held import held_tensor
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, op_of
from fxquant.patterns.expr import OpExpr, op, var
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.rule import Rule


def _squares(node: Node) -> str | None:
    found = op_of(node)
    name = found.name if found is not None else ""
    if name == "pow" and argument(node, "exponent") != 2:
        return f"it raises to the power {argument(node, 'exponent')!r}, not 2"
    if name == "mul" and node.args[0] is not node.args[1]:
        return "it multiplies two tensors"
    return None


def _over_the_last(node: Node) -> str | None:
    dim = argument(node, "dim")
    return None if dim in (-1, (-1,), [-1]) else f"it averages over dim={dim!r}, not the last"


def _power() -> OpExpr:
    square = op(("pow", "square", "mul"), var("x"), check=_squares)
    mean = op("mean", square, check=_over_the_last, keepdim=True)
    return op("add", mean, var("eps"), name="power", alpha=1)


def weight_fits(match: Match) -> Reject | None:
    """The factor must be one of the model's own tensors with one dimension, ``eps`` a number."""
    weight = held_tensor(match.bound["w"])
    if weight is None or weight.dim() != 1 or not weight.is_floating_point():
        return Reject("its factor is no vector of the model's own", match.root)
    if not isinstance(match.bound["eps"], int | float):
        return Reject("what is added to the mean is no number", match.node("power"))
    for node in match.nodes[1:]:
        if info(node).pinned:
            return Reject(info(node).pinned, node)
    return None


def _adopt(match: Match, editor: Editor) -> None:
    weight, source = held_tensor(match.bound["w"]), match.bound["x"]
    if weight is None or not isinstance(source, Node):
        return
    norm = nn.RMSNorm(weight.shape[0], eps=float(match.bound["eps"]), device="meta")
    kept = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
    norm.register_parameter("weight", kept)
    owners = info(match.root).owners
    path = editor.add_module(f"{owners[-1][0]}.rms_norm" if owners else "rms_norm", norm)
    made = editor.call_module(path, (source,), like=match.root, before=match.root)
    editor.annotate(made, path=path, value="tensor")
    editor.replace(match.root, made, *match.nodes[1:])


def _rule(name: str, inner: OpExpr) -> Rule:
    return Rule(name, op("mul", inner, var("w"), name="scaled"), _adopt, (weight_fits,))


WRITTEN_NORMS: Final = (
    _rule("adopt-rms-norm", op("mul", var("x"), op("rsqrt", _power()))),
    _rule("adopt-rms-norm-root", op("div", var("x"), op("sqrt", _power()))),
)
"""Run before the other rules: these would take the root and what is added under it as a chain."""
