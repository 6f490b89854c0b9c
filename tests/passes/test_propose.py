"""Propose: values that would be codes get a type before anything is known of their ranges."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.passes.propose import Propose
from tests.helpers import One, check_eager, run
from tests.passes.trainees import decided

X = torch.randn(2, 4, 6, 6)


def model() -> nn.Module:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = m.b(F.relu(m.a(x)).flatten(2).view(2, 4, 6, 6))
        return made

    return One(body, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)).eval()


def proposed(*overrides: tuple[str, None]) -> dict[str, bool]:
    module = run(decided(model(), X, overrides=overrides)[0], Propose())
    return {n.name: info(n).qtype is not None for n in module.graph.nodes if n.op != "output"}


def test_it_fires_on_what_is_read_and_on_what_moves_it() -> None:
    found = proposed()
    assert found == {
        "x": True, "a": False, "relu": True, "flatten": True, "view": True, "b": False,
    }  # fmt: skip


def test_it_leaves_what_stays_float() -> None:
    assert not any(proposed(("*", None)).values())


def test_it_preserves_the_graph_and_is_idempotent() -> None:
    net = model()
    module = run(decided(net, X)[0], Propose())
    check_eager(net, module, X)
    again = Editor(module)
    Propose().run(again)
    assert again.log == []
