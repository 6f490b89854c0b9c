"""Open attention: the products give the numbers of the one op, and only where asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.passes.configure import Configure
from fxquant.passes.open_attention import OpenAttention
from fxquant.spec import PRESETS, QConfig
from tests.helpers import FLOAT32, Calls, canonical, close_share, names, nodes, run

ASKED = ((F.scaled_dot_product_attention, QConfig()),)
OPENED = ["transpose", "matmul", "attention_scores", "softmax", "matmul"]


class Three(Calls):
    """With three inputs."""

    def forward(self, x: Any, y: Any, z: Any) -> Any:
        return self.body(self, x, y, z)


def attend(**options: Any) -> nn.Module:
    """A model that is one attention; tensors among the options are parameters of it."""
    held = {k: v for k, v in options.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in options.items() if k not in held}
    parts = {k: nn.Parameter(v, requires_grad=False) for k, v in held.items()}

    def body(m: Any, x: Any, y: Any, z: Any) -> Any:
        more = {k: getattr(m, k) for k in held}
        return F.scaled_dot_product_attention(x, y, z, **more, **rest)

    return Three(body, **parts).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": torch.randn(5, 6)},
        {"attn_mask": torch.randn(5, 6) > -1},
        {"attn_mask": torch.randn(2, 1, 5, 6), "scale": 0.2},
    ],
    ids=lambda o: ",".join(o) or "plain",
)
def test_the_products_give_the_same(options: dict[str, Any]) -> None:
    model = attend(**options)
    keys = 5 if "is_causal" in options else 6
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, keys, 4), torch.randn(2, 3, keys, 7)
    module = run(canonical(model, q, k, v), Configure(overrides=ASKED), OpenAttention())
    assert names(module) == OPENED
    # Scores of a few units, summed in another order.
    assert close_share(module(q, k, v), model(q, k, v)) <= FLOAT32
    again = Editor(module)
    OpenAttention().run(again)
    assert again.log == []


def test_it_opens_for_products_at_run_time_too() -> None:
    asked = ((F.scaled_dot_product_attention, PRESETS["dynamic"]),)
    q = torch.randn(2, 3, 5, 4)
    module = run(canonical(attend(), q, q, q), Configure(overrides=asked), OpenAttention())
    assert names(module) == OPENED


@pytest.mark.parametrize(
    "overrides", [(), ((F.scaled_dot_product_attention, None),)], ids=("default", "float")
)
def test_it_stays_one_op_where_nobody_asked(overrides: Any) -> None:
    x = torch.randn(2, 3, 5, 4)
    module = run(canonical(attend(), x, x, x), Configure(overrides=overrides), OpenAttention())
    assert names(module) == ["scaled_dot_product_attention"]


def test_shared_heads_stay_with_the_reason() -> None:
    model = attend(enable_gqa=True)
    q, k = torch.randn(2, 4, 5, 4), torch.randn(2, 2, 5, 4)
    module = run(canonical(model, q, k, k), Configure(overrides=ASKED))
    editor = Editor(module)
    OpenAttention().run(editor)
    assert editor.log == [] and "share keys" in editor.misses[0][2]


def test_what_drops_weights_in_training_goes_on_to_do_so() -> None:
    model = attend(dropout_p=0.5)
    x = torch.randn(2, 3, 5, 4)
    module = run(canonical(model, x, x, x, train=True), Configure(overrides=ASKED))
    editor = Editor(module)
    OpenAttention().run(editor)
    assert editor.log == [] and "drops weights" in editor.misses[0][2]
    name = "scaled_dot_product_attention"
    run(module, OpenAttention(frozenset({name})))
    assert names(module) == [*OPENED[:-1], "dropout", OPENED[-1]]
    assert info(nodes(module)[-2]).origins == (name,)
