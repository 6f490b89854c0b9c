"""Masks: what stands between scores and a softmax is found, whatever is spelled in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxquant.graph.masks import masks_scores, reads_masked
from tests.helpers import One, canonical, node_of, nodes

Body = Callable[..., Any]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: (x @ x + m.mask).softmax(-1),
        lambda m, x: ((x @ x + m.mask) / 8).softmax(-1),
        lambda m, x: (m.mask + x).view(1, 3, 3).softmax(-1),
        lambda m, x: torch.log_softmax(x - m.mask, 1),
    ],
)
def test_a_mask_before_a_softmax(body: Body) -> None:
    module = canonical(One(body, mask=nn.Parameter(torch.ones(3, 3))), torch.ones(3, 3))
    masking = [node for node in nodes(module) if masks_scores(node)]
    assert len(masking) == 1
    assert reads_masked(nodes(module)[-1])


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: x + m.mask,
        lambda m, x: (x + m.mask).relu().softmax(-1),
        lambda m, x: [(y := x + m.mask).softmax(-1), y.relu()],
    ],
)
def test_other_sums_are_no_masks(body: Body) -> None:
    module = canonical(One(body, mask=nn.Parameter(torch.ones(3, 3))), torch.ones(3, 3))
    assert not masks_scores(node_of(module, "add"))
    assert not any(reads_masked(node) for node in nodes(module))
