"""Op table of products: canonical functions compute what every spelling does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxquant.graph.attention_ops import attention_scores, attention_weights
from fxquant.graph.info import info
from fxquant.graph.op_table import function_spelling
from fxquant.graph.table_matmul import add_matmul, einsum
from tests.helpers import Two, canonical, names, nodes


@pytest.mark.parametrize("beta", [0, 1, 0.5])
@pytest.mark.parametrize("alpha", [1, -2])
def test_add_matmul_is_addmm_and_baddbmm(beta: float, alpha: float) -> None:
    torch.manual_seed(0)
    c, a, b = (torch.randn(2, 4, 4, dtype=torch.float64) for _ in range(3))
    if beta == 0:
        c = torch.full_like(c, float("nan"))
    found = add_matmul(c, a, b, beta=beta, alpha=alpha)
    # float64 sums of four products, in any order.
    torch.testing.assert_close(found, torch.baddbmm(c, a, b, beta=beta, alpha=alpha))
    flat = add_matmul(c[0], a[0], b[0], beta=beta, alpha=alpha)
    torch.testing.assert_close(flat, torch.addmm(c[0], a[0], b[0], beta=beta, alpha=alpha))


def test_einsum_has_its_tensors_first() -> None:
    a, b = torch.randn(2, 3), torch.randn(3, 4)
    assert torch.equal(einsum([a, b], "ij,jk->ik"), torch.einsum("ij,jk->ik", a, b))


@pytest.mark.parametrize("function", [einsum, add_matmul, attention_scores, attention_weights])
def test_own_functions_are_one_node_when_traced(function: Any) -> None:
    found = function_spelling(function)
    assert found is not None and found[0].target == function
    graph = fx.Graph()
    tracer = fx.Tracer()
    tracer.graph = graph
    x = fx.Proxy(graph.placeholder("x"), tracer)
    if function is einsum:
        einsum([x, x], "ij,jk->ik")
    else:
        function(*[x] * (3 if function is add_matmul else 2))
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [function]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda m, x, y: torch.einsum(x, [0, 1], y, [1, 2]), "einsum"),
        (lambda m, x, y: torch.chain_matmul(x, y), "does not know chain_matmul"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated:UserWarning")
def test_what_cannot_be_read_says_so(body: Any, why: str) -> None:
    module = canonical(Two(body), torch.ones(2, 2), torch.ones(2, 2))
    assert len(names(module)) == 1
    assert why in info(nodes(module)[0]).opaque
