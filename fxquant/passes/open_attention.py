"""Open attention: where the user asks for it, attention becomes products with a softmax between.

    scaled_dot_product_attention(q, k, v, mask)
        ->  matmul(softmax(attention_scores(matmul(q, transpose(k)), mask)), v)

By default it stays one op in float, which is faster; an override that names the function, such as
``overrides={F.scaled_dot_product_attention: QConfig()}`` or ``"dynamic"`` in its place, asks for
the products, which then run in int8 whatever they cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

from torch.fx import Node

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.op_table import argument, is_op, op_named
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass

_ATTENTION: Final = "scaled_dot_product_attention"
_SCHEMES: Final = ("static", "dynamic")
"""Those that have a form of products."""


@dataclass(frozen=True)
class OpenAttention(Pass):
    """Write attention as products where an override names it.

    Args:
        drop: names of those that drop weights in training only, in a graph that is to be trained:
            they go on to do so.
    """

    name: ClassVar[str] = "open-attention"
    needs: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL
    drop: frozenset[str] = frozenset()

    def run(self, editor: Editor) -> None:
        """Look at every attention."""
        for node in list(editor.graph.nodes):
            if not is_op(node, _ATTENTION):
                continue
            record = info(node)
            asked = record.configured_by == f"override {_ATTENTION}"
            if asked and record.config is not None and record.config.scheme in _SCHEMES:
                why = _cannot(node, self.drop)
                if why is None:
                    self._open(editor, node)
                else:
                    editor.miss(self.name, node.name, why)

    @staticmethod
    def _open(editor: Editor, node: Node) -> None:
        def call(name: str, *tensors: Any, **options: Any) -> Node:
            made = editor.call(op_named(name), tensors, options, like=node, before=node)
            editor.note_values(made, value="tensor", shape=None)
            return made

        query, key, value = node.args[:3]
        mask, scale = argument(node, "attn_mask"), argument(node, "scale")
        causal = argument(node, "is_causal")
        with editor.rule("open-attention"):
            products = call("matmul", query, call("transpose", key, dim0=-2, dim1=-1))
            scores = call(
                "attention_scores", products, query, mask=mask, is_causal=causal, scale=scale
            )
            weights = call("softmax", scores, dim=-1)
            if argument(node, "dropout_p") != 0:
                weights = call("dropout", weights)
            editor.replace(node, call("matmul", weights, value))


def _cannot(node: Node, drop: frozenset[str]) -> str | None:
    if argument(node, "enable_gqa") is not False:
        return "its heads share keys and values"
    if argument(node, "dropout_p") != 0 and node.name not in drop:
        return "it drops weights at random"
    return None
