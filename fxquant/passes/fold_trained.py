"""Fold trained units: weights take the numbers they were trained with, norms go into them.

    bn(conv(x, weight=fq(w)))   ->   conv'(x),   whose weight is codes * scale, exactly

The codes are those of the last step of training, so nothing is rounded a second time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxquant.graph.both_modes import AttentionDropout
from fxquant.graph.copies import share_parameters
from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import is_op, module_of, module_op, op_named
from fxquant.graph.sharing import unshare
from fxquant.graph.trained_layers import is_trained_layer
from fxquant.graph.verify import Stage
from fxquant.numerics.fake_rows import FakeQuantizeRows
from fxquant.numerics.fake_weights import FakeQuantizeWeight, fold_factor
from fxquant.numerics.qparams import SMALLEST_SCALE
from fxquant.numerics.trained_recurrent import with_matrices
from fxquant.passes.base import Pass
from fxquant.patterns.match import Match, Reject
from fxquant.patterns.norm import RULES, affine_of, folded
from fxquant.patterns.rule import RuleSet


@dataclass(frozen=True)
class FoldTrained(Pass):
    """Turn what was trained into what static mode would have observed."""

    name: ClassVar[str] = "fold-trained"
    needs: ClassVar[Stage] = Stage.OBSERVED
    gives: ClassVar[Stage] = Stage.OBSERVED

    def run(self, editor: Editor) -> None:
        """Layer by layer; then norms that were trained beside layers in float."""
        for node in list(editor.graph.nodes):
            if node.op == "call_module":
                _drop(editor, node)
        unshare(editor)
        for node in list(editor.graph.nodes):
            given = node.kwargs.get("weight")
            if isinstance(given, Node) and given.op == "call_module":
                fake = module_of(given)
                if isinstance(fake, FakeQuantizeWeight):
                    _settle(editor, node, given, fake)
            layer = module_of(node) if node.op == "call_module" else None
            if isinstance(layer, nn.RNNBase) and is_trained_layer(layer):
                _settle_matrices(editor, node, layer)
        RuleSet(_FLOAT_RULES).apply(editor)
        with editor.rule("drop-dead"):
            editor.clean()


def _drop(editor: Editor, node: Node) -> None:
    """In evaluation nothing is dropped at random, and rows are rounded where they are read."""
    module = module_of(node)
    if isinstance(module, FakeQuantizeRows):
        with editor.rule("read-rows"):
            editor.replace(node, node.args[0])  # type: ignore[arg-type]  # its one argument
        return
    op = module_op(module)
    with editor.rule("drop-identity"):
        if op is not None and op.name == "dropout":
            editor.replace(node, node.args[0])  # type: ignore[arg-type]  # its one argument
        elif isinstance(module, AttentionDropout):
            target = op_named("scaled_dot_product_attention").target
            editor.set_call(node, target, node.args, {**node.kwargs, "dropout_p": 0.0})


def _settle(editor: Editor, node: Node, given: Node, fake: FakeQuantizeWeight) -> None:
    layer = module_of(node)
    norm = _norm_of(node)
    weight = layer.get_parameter("weight").detach()
    twin, signed = share_parameters(layer), None
    factor = None
    if norm is not None:
        bn = module_of(norm)
        twin, signed = folded(layer, bn), affine_of(bn)[0]
        if len(given.args) > 1:
            factor = fold_factor(bn._parameters.get("weight"), bn.get_buffer("running_var"), bn.eps)  # type: ignore[arg-type]  # a float
    codes, scale = fake.codes(weight, factor)
    if signed is not None:
        sign = signed.sign().to(torch.float32)
        codes = codes * fake.spread(sign, weight)
        if factor is None:
            # Each scale belongs to one channel, and grows with what the norm multiplies that by.
            scale = _per_channel(scale, signed)
    view = [1] * weight.dim()
    if fake.axis is not None:
        view[fake.axis] = -1
    grid = nn.Parameter(codes * scale.view(view), requires_grad=False)
    twin.register_parameter("weight", grid)
    _keep_read(editor, node, "weight")
    with editor.rule("fold-trained", note="" if norm is None else f"with {norm.target}"):
        editor.set_module(str(node.target), twin)
        editor.set_call(node, node.target, node.args, {})
        config = info(node).config
        if config is not None:
            config = dataclasses.replace(config, weight=fake.spec)
        editor.annotate(node, weight_scales=tuple(scale.tolist()), config=config)
        if norm is not None:
            editor.replace(norm, node)
        _erase_sources(editor, given)


def _settle_matrices(editor: Editor, node: Node, layer: nn.RNNBase) -> None:
    """A recurrent layer: torch's own again, with the weights it was trained with."""
    found: dict[str, tuple[Node, FakeQuantizeWeight]] = {}
    for name, given in node.kwargs.items():
        fake = module_of(given) if isinstance(given, Node) and given.op == "call_module" else None
        if isinstance(given, Node) and isinstance(fake, FakeQuantizeWeight):
            found[name] = (given, fake)
    weights, scales = {}, []
    for name, (_, fake) in found.items():
        codes, scale = fake.codes(layer.get_parameter(name).detach())
        weights[name] = codes * (scale if fake.axis is None else scale.view(-1, 1))
        scales.append((name, tuple(scale.tolist())))
    for name in found:
        _keep_read(editor, node, name)
    twin = share_parameters(layer)
    with_matrices(layer, twin, weights)  # type: ignore[arg-type]  # a copy has its class
    config = info(node).config
    with editor.rule("fold-trained"):
        editor.set_module(str(node.target), twin)
        rest = {name: value for name, value in node.kwargs.items() if name not in found}
        editor.set_call(node, node.target, node.args, rest)
        for given, fake in found.values():
            if config is not None:
                config = dataclasses.replace(config, weight=fake.spec)
            _erase_sources(editor, given)
        editor.annotate(node, matrix_scales=tuple(scales), config=config)


def _keep_read(editor: Editor, node: Node, name: str) -> None:
    """Who reads a weight as a tensor was trained with it as it is, and goes on to read that."""
    for read in editor.graph.find_nodes(op="get_attr", target=f"{node.target}.{name}"):
        others = [
            user
            for user in read.users
            if user.op != "call_module" or not isinstance(module_of(user), FakeQuantizeWeight)
        ]
        if others:
            weight = module_of(node).get_parameter(name)
            with editor.rule("keep-weight", note=f"of {node.target}"):
                place = editor.add_buffer(f"{node.name}_{name}", weight)
                kept = editor.get_attr(place, like=read, before=read)
                for user in others:
                    editor.replace_use(user, read, kept)


def _per_channel(scale: Tensor, signed: Tensor) -> Tensor:
    made = scale.double() * signed.abs()
    return made.clamp(min=SMALLEST_SCALE).to(torch.float32)


def _norm_of(node: Node) -> Node | None:
    label = info(node).unit
    found = [u for u in node.users if is_op(u, "batch_norm") and info(u).unit == label]
    return found[0] if label is not None and found else None


def _erase_sources(editor: Editor, node: Node) -> None:
    if node.users:
        return
    sources = node.all_input_nodes
    editor.erase(node)
    for source in sources:
        if source.op in ("get_attr", "call_function"):
            _erase_sources(editor, source)


def _not_trained(match: Match) -> Reject | None:
    """A weight that was trained as it is must stay so: its norm is an op of its own."""
    layer = match.node("layer")
    if info(layer).weight_scales is not None:
        return Reject("its weight was trained without the batch norm", layer)
    return None


_FLOAT_RULES: Final = tuple(
    dataclasses.replace(rule, checks=(*rule.checks, _not_trained)) for rule in RULES
)
