"""Fake-quantize: values that will be codes, and weights that will be integers, are rounded.

    relu(bn(conv(x)))   ->   fq(relu(bn(conv(fq(x), weight=fq(conv.weight)))))

Fake-quants stand where static mode has ``quantize`` and ``dequantize``: readers on codes read
through them, and so do readers in float of what is made on codes. A weight is read from the
user's own module and given to it with the call, so that parameters keep their names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from torch import nn
from torch.fx import Node

from fxquant.backends.base import MEASURED, Costs
from fxquant.graph.both_modes import AttentionDropout
from fxquant.graph.edit import Editor
from fxquant.graph.fills import fill_of
from fxquant.graph.flow import Rows, rescaled_by, root_of, rows_read, sites, wanted, wanted_int8
from fxquant.graph.info import Decision, info
from fxquant.graph.op_table import is_op, module_of, op_of
from fxquant.graph.ops import Kind
from fxquant.graph.recurrent_layers import (
    recurrent_layer,
    recurrent_matrices,
    why_slower,
    work_of,
)
from fxquant.graph.trained_layers import take_given_weights
from fxquant.graph.verify import Stage
from fxquant.graph.view import tensor_sources
from fxquant.numerics.fake_quantizer import FakeQuantize, FakeQuantizer
from fxquant.numerics.fake_rows import FakeQuantizeRows
from fxquant.numerics.fake_weights import FakeQuantizeWeight, fold_factor
from fxquant.numerics.trained_recurrent import take_given_matrices
from fxquant.passes.base import Pass
from fxquant.spec import DEFAULT_WEIGHT, ROWS, QSpec

HOME: Final = "fake_quant"
"""Where all that fxquant adds to the user's modules stands."""


@dataclass(frozen=True)
class InsertFakeQuants(Pass):
    """Insert one fake-quant per value and per weight.

    Args:
        saturates_pairs: whether kernels add products in pairs of 16 bits: then weights are
            trained in 7 bits, with which no pair can pass them.
        droppers: by the name of a node, the path of what drops at random in training (empty if it
            has none yet), and the module.
    """

    name: ClassVar[str] = "fake-quantize"
    needs: ClassVar[Stage] = Stage.MEASURED
    gives: ClassVar[Stage] = Stage.OBSERVED
    saturates_pairs: bool = False
    droppers: Mapping[str, tuple[str, nn.Module]] = field(default_factory=dict)
    costs: Costs = field(default_factory=lambda: MEASURED)

    def run(self, editor: Editor) -> None:
        """Inputs and results of int8 ops, then weights, then what drops at random."""
        calls = editor.graph.find_nodes(op="call_module")
        if any(isinstance(module_of(node), FakeQuantizer) for node in calls):
            return  # a second one would round what is rounded
        with editor.rule("forget-proposals"):
            for node in editor.graph.nodes:
                editor.annotate(node, qtype=None)
        self._leave_fills(editor)
        observed = sites(editor.graph)
        # Before any is inserted: a fake-quant in between would hide what a value is made of.
        own = {v: s for v, s in observed.items() if not _has_codes_of_source(v, observed)}
        for value, spec in own.items():
            _value(editor, value, spec)
        rows: dict[tuple[Node, Rows], Node] = {}
        for node in list(editor.graph.nodes):
            if self._weight(editor, node) or is_op(node, "matmul"):
                _rows(editor, node, rows)
        layers = {node: recurrent_layer(node) for node in editor.graph.nodes}
        for node, layer in layers.items():
            if layer is not None and wanted(node, "dynamic"):
                self._matrices(editor, node, layer)
        for node in list(editor.graph.nodes):
            if is_op(node, "dropout", "scaled_dot_product_attention"):
                found = next((o for o in info(node).origins if o in self.droppers), None)
                if found is not None:
                    _dropper(editor, node, *self.droppers[found])

    def _leave_fills(self, editor: Editor) -> None:
        """Whether a code stands for a constant that a move puts in is known after training only."""
        why = "it puts in a constant, and no range is known before training that holds it"
        with editor.rule("leave-float"):
            for node in editor.graph.nodes:
                fill = fill_of(node) if wanted_int8(node) and info(node).custom is None else None
                if fill is not None and fill != 0:
                    editor.annotate(node, decision=Decision(False, why, self.name))

    def _weight(self, editor: Editor, node: Node) -> bool:
        """Round the weight of a layer; returns whether that was done."""
        spec, layer = _weight_spec(node), _layer(node)
        if spec is None or layer is None or not take_given_weights(layer):
            return False
        weight = layer.get_parameter("weight")
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        groups = int(getattr(layer, "groups", 1))
        lone = isinstance(layer, nn.modules.conv._ConvNd) and layer.in_channels == groups
        if self.saturates_pairs and spec.bits == 8 and not lone:
            spec = dataclasses.replace(spec, bits=7)
        path = str(node.target)
        fake = FakeQuantizeWeight(
            spec, path, tuple(weight.shape), int(transposed), groups if transposed else 1
        )
        with editor.rule("fake-quantize-weight"):
            where = editor.add_module(f"{HOME}.{node.name}_weight", fake)
            read = editor.get_attr(f"{path}.weight", like=node, before=node)
            shares = fake.axis is None or (transposed and groups > 1)
            factor = _factor(editor, node) if shares else None
            args = (read,) if factor is None else (read, factor)
            made = editor.call_module(where, args, like=node, before=node)
            for each in (read, made):
                editor.note_values(each, unit=None, decision=None, value="tensor", shape=None)
            editor.set_call(node, node.target, node.args, {"weight": made})
        return True

    def _matrices(self, editor: Editor, node: Node, layer: nn.RNNBase) -> None:
        """All weights of a recurrent layer, which reads rows that are quantized at run time."""
        real, codes = (cost.of(0, work_of(layer)) for cost in self.costs.recurrent())
        slower = why_slower(node, layer, real, codes)
        if slower is not None:
            with editor.rule("leave-float"):
                editor.annotate(node, decision=Decision(False, slower, self.name))
            return
        record = info(node)
        config, decision = record.config, record.decision
        if config is None or decision is None:
            return
        spec = config.weight or DEFAULT_WEIGHT
        if self.saturates_pairs and spec.bits == 8:
            spec = dataclasses.replace(spec, bits=7)
        # One range for several rows would make a sequence depend on its batch mates.
        reads = dataclasses.replace(config.activation or ROWS, granularity="row")
        take_given_matrices(layer, reads)
        path, given = str(node.target), dict(node.kwargs)
        with editor.rule("fake-quantize-weight"):
            for name, weight in recurrent_matrices(layer):
                if weight is None:
                    raise TypeError(f"{path}.{name} is no parameter")
                fake = FakeQuantizeWeight(spec, path, tuple(weight.shape), 0)
                where = editor.add_module(f"{HOME}.{node.name}_{name}", fake)
                read = editor.get_attr(f"{path}.{name}", like=node, before=node)
                made = editor.call_module(where, (read,), like=node, before=node)
                for each in (read, made):
                    editor.note_values(each, unit=None, decision=None, value="tensor", shape=None)
                given[name] = made
            editor.set_call(node, path, node.args, given)
            # It is trained for int8 now, whatever that costs on another machine.
            editor.annotate(node, decision=dataclasses.replace(decision, by=self.name))


def _layer(node: Node) -> nn.Module | None:
    return module_of(node) if node.op == "call_module" else None


def _weight_spec(node: Node) -> QSpec | None:
    """How the weight of a call is quantized, if it is and takes part in training."""
    op, config = op_of(node), info(node).config
    if op is None or config is None or config.weight is None:
        return None
    weight = config.weight
    if weight.granularity == "group" or not weight.symmetric:
        return None
    if op.kind is Kind.CONTRACT:
        return weight if wanted_int8(node) or wanted(node, "dynamic") else None
    layer = _layer(node)
    if not isinstance(layer, nn.Embedding | nn.EmbeddingBag) or config.activation is None:
        return None
    # Gradients with rows left out cannot be passed on to a table, nor rows be changed in place.
    return None if layer.sparse or layer.max_norm is not None else weight


def _factor(editor: Editor, node: Node) -> Node | None:
    """What the batch norm of the unit multiplies each channel by; computed in every call."""
    norm = _norm_of(node)
    if norm is None:
        return None
    bn: Any = module_of(norm)
    path = str(norm.target)
    names = ("weight", "running_var")
    read = [
        editor.get_attr(f"{path}.{name}", like=node, before=node)
        if getattr(bn, name) is not None
        else None
        for name in names
    ]
    made = editor.call(fold_factor, (*read, float(bn.eps)), like=node, before=node)
    for each in (*read, made):
        if each is not None:
            editor.note_values(each, unit=None, decision=None, value="tensor", shape=None)
    return made


def _norm_of(node: Node) -> Node | None:
    """The batch norm that belongs to the unit of a layer."""
    label = info(node).unit
    found = [u for u in node.users if is_op(u, "batch_norm") and info(u).unit == label]
    return found[0] if label is not None and found else None


def _has_codes_of_source(value: Node, observed: Container[Node]) -> bool:
    """``x * 0.5`` has the codes of ``x``: its own rounding would be a second one."""
    if not wanted_int8(value) or rescaled_by(value) is None:
        return False
    return root_of(tensor_sources(value)[0]) in observed


def _value(editor: Editor, value: Node, spec: QSpec) -> None:
    label = info(value).unit
    users = [u for u in value.users if label is None or info(u).unit != label]
    readers = [u for u in users if wanted_int8(u) and value in tensor_sources(u)]
    path = info(value).path or value.name
    with editor.rule("fake-quantize"):
        where = editor.add_module(f"{HOME}.{value.name}", FakeQuantize(spec, path))
        last = value
        while value.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        fake = editor.call_module(where, (value,), like=value, after=last)
        editor.note_values(fake, unit=None, decision=None)
        for user in users:
            if user in readers or wanted_int8(value):
                editor.replace_use(user, value, fake)


def _rows(editor: Editor, node: Node, made: dict[tuple[Node, Rows], Node]) -> None:
    """What a dynamic op reads; several that read one value in one way share its rounding."""
    ways = rows_read(node)
    sources = [source for source in node.args[: len(ways)] if isinstance(source, Node)]
    if not ways or len(sources) < len(ways):
        return
    with editor.rule("fake-quantize-rows"):
        for source, rows in zip(sources, ways, strict=True):
            if (source, rows) not in made:
                path = info(node).path or node.name
                fake = FakeQuantizeRows(rows.spec, path, rows.dims, by_column=rows.by_column)
                where = editor.add_module(f"{HOME}.{source.name}_rows", fake)
                made[source, rows] = editor.call_module(where, (source,), like=source, before=node)
                editor.note_values(made[source, rows], unit=None, decision=None)
        read = [made[key] for key in zip(sources, ways, strict=True)]
        editor.set_call(node, node.target, (*read, *node.args[len(ways) :]), dict(node.kwargs))


def _dropper(editor: Editor, node: Node, path: str, dropper: nn.Module) -> None:
    if isinstance(dropper, AttentionDropout) and is_op(node, "dropout"):
        dropper = nn.Dropout(dropper.p)  # of an attention that was opened up
    with editor.rule("drop-in-training"):
        # The user's own module was taken out when its call became that of a function.
        if not path or editor.free_path(path) == path:
            path = editor.add_module(path or f"{HOME}.{node.name}", dropper)
        attention = is_op(node, "scaled_dot_product_attention")
        args, kwargs = (node.args, dict(node.kwargs)) if attention else (node.args[:1], {})
        kwargs.pop("dropout_p", None)
        editor.set_call(node, path, args, kwargs)
