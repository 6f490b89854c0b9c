"""Capture for training: one graph for both modes, or a reason why there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import TraceError
from fxquant.graph.both_modes import AttentionDropout, Trainable, capture_both
from tests.helpers import One

X = torch.randn(2, 4)


def both(body: Any, **parts: Any) -> Trainable:
    return capture_both(One(body, **parts).train(), (X,), {})


def test_a_model_without_a_mode_has_nothing_that_drops() -> None:
    model = One(lambda m, x: F.relu(m.fc(x)), fc=nn.Linear(4, 4)).train()
    found = capture_both(model, (X,), {})
    assert found.droppers == {}
    with torch.no_grad():
        assert torch.equal(found.captured.module(X), model(X))


@pytest.mark.parametrize(
    ("call", "kind", "p"),
    [
        (lambda x, on: F.dropout(x, 0.3, on), nn.Dropout, 0.3),
        (lambda x, on: F.dropout(x, p=0.2, training=on), nn.Dropout, 0.2),
        (lambda x, on: F.dropout(x, training=on), nn.Dropout, 0.5),
        (lambda x, on: F.alpha_dropout(x, 0.1, on), nn.AlphaDropout, 0.1),
        (lambda x, on: torch.dropout(x, 0.4, on), nn.Dropout, 0.4),
    ],
)
def test_functions_that_drop_in_training_only_become_modules(
    call: Any, kind: type[nn.Module], p: float
) -> None:
    found = both(lambda m, x: call(x, m.training))
    [(path, made)] = found.droppers.values()
    assert path == "" and type(made) is kind and made.p == p


def test_the_users_dropout_keeps_its_path() -> None:
    drop = nn.Dropout(0.25)
    found = both(lambda m, x: m.drop(x), drop=drop)
    [(path, made)] = found.droppers.values()
    assert path == "drop" and made.p == 0.25


def test_a_function_that_always_drops_is_left() -> None:
    assert both(lambda m, x: F.dropout(x, 0.5, True)).droppers == {}


def test_attention_drops_by_its_mode() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        p = 0.5 if m.training else 0.0
        y = x.view(1, 1, 2, 4)
        return F.scaled_dot_product_attention(y, y, y, dropout_p=p)

    [(_, made)] = both(body).droppers.values()
    assert isinstance(made, AttentionDropout) and made.p == 0.5 and "p=0.5" in repr(made)
    q = torch.randn(1, 1, 8, 4)
    plain = F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(made.eval()(q, q, q), plain)
    assert not torch.equal(made.train()(q, q, q), plain)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x + 1 if m.training else x,
        lambda m, x: x * 2 if m.training else x * 3,
        lambda m, x: F.relu(x) if m.training else torch.tanh(x),
        lambda m, x: (x, x) if m.training else x,
        lambda m, x: F.dropout(x, m.p if m.training else 0.5, True),
    ],
)
def test_other_branches_are_refused_with_the_place(body: Any) -> None:
    with pytest.raises(TraceError, match=r"(?s)test_both_modes\.py:\d+|self\.training"):
        both(body, p=0.25)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
    ],
)
def test_weights_that_are_computed_are_refused_with_the_way_out(wrap: Any) -> None:
    with pytest.raises(TraceError, match="remove_parametrizations"):
        both(lambda m, x: m.fc(x), fc=wrap(nn.Linear(4, 4)))


@pytest.mark.parametrize("modes", [(True, False), (True,), (False,)])
def test_a_model_that_only_comes_in_pieces_in_a_mode_is_refused(modes: tuple[bool, ...]) -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.fc(x)
            if self.training in modes:
                return made if made.sum() > 0 else -made
            return made

    with pytest.raises(TraceError, match="cannot be trained as one graph: a branch depends on"):
        both(lambda m, x: m.inner(x), inner=Choosing())
