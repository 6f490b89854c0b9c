"""Propose: mark the values that would be codes, before anything is known of their ranges.

What is worth running on codes is decided before training, so that no op is trained as int8 and
deployed in float. The ranges are found in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fxquant.graph.edit import Editor
from fxquant.graph.flow import moves_codes, root_of, sites, wanted_int8
from fxquant.graph.info import QType, info
from fxquant.graph.verify import Stage
from fxquant.passes.base import Pass
from fxquant.spec import QSpec


@dataclass(frozen=True)
class Propose(Pass):
    """Write a type with scale 1 into the record of every value that would be codes."""

    name: ClassVar[str] = "propose"
    needs: ClassVar[Stage] = Stage.ANNOTATED
    gives: ClassVar[Stage] = Stage.MEASURED

    def run(self, editor: Editor) -> None:
        """What is observed first, then what only moves it."""
        with editor.rule("propose"):
            for value, spec in sites(editor.graph).items():
                editor.annotate(value, qtype=_unscaled(spec))
            for node in editor.graph.nodes:
                if wanted_int8(node) and moves_codes(node):
                    editor.annotate(node, qtype=info(root_of(node)).qtype)


def _unscaled(spec: QSpec) -> QType:
    dtype = torch.uint8 if spec.dtype == "uint8" else torch.int8
    return QType(1.0, max(spec.quant_min, 0), spec.quant_min, spec.quant_max, dtype)
