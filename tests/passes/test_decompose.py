"""Decompose: products of any spelling give the numbers of eager PyTorch, and become matmuls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.edit import Editor
from fxquant.graph.info import info
from fxquant.graph.view import what
from fxquant.passes.adopt_products import AdoptProducts
from fxquant.passes.decompose import Decompose
from tests.helpers import (
    FLOAT32,
    One,
    Two,
    canonical,
    close_share,
    names,
    node_of,
    nodes,
    ranks_of,
    run,
)

Body = Callable[..., Any]


def decomposed(model: nn.Module, *args: Tensor, known: bool = True) -> GraphModule:
    """``model`` with its products written as matmuls, checked against eager PyTorch."""
    module = canonical(model, *args)
    run(module, Decompose(ranks_of(*args, model=model) if known else ()))
    again = Editor(module)
    Decompose().run(again)
    assert again.log == []
    with torch.no_grad():
        found, wanted = module(*args), model(*args)
    assert found.shape == wanted.shape
    # Two ways to sum the same products differ by float32 rounding alone.
    assert close_share(found, wanted) <= FLOAT32
    return module


EQUATIONS: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [
    ("ij,jk->ik", (3, 4), (4, 5)),
    ("ij,jk", (3, 4), (4, 5)),
    ("ba,ca", (3, 4), (5, 4)),
    ("ij,jk->ki", (3, 4), (4, 5)),
    ("i,i->", (4,), (4,)),
    ("i,i", (4,), (4,)),
    ("i,ij->j", (4,), (4, 5)),
    ("ij,j->i", (3, 4), (4,)),
    ("i,j->ij", (3,), (4,)),
    ("i,j->ji", (3,), (4,)),
    ("bij,bij->bij", (2, 3, 4), (2, 3, 4)),
    ("bij,bi->bij", (2, 3, 4), (2, 3)),
    ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("bqhd,bkhd->bhqk", (2, 4, 3, 5), (2, 6, 3, 5)),
    ("bhqk,bkhd->bqhd", (2, 3, 4, 6), (2, 6, 3, 5)),
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    ("bi,bi->b", (2, 3), (2, 3)),
    ("bi,bij->bj", (2, 3), (2, 3, 4)),
    ("bij,bj->bi", (2, 3, 4), (2, 4)),
    ("bijc,bjkc->bik", (2, 3, 4, 5), (2, 4, 6, 5)),
    ("bnd,dhe->bnhe", (2, 3, 4), (4, 5, 6)),
    ("bnhe,hed->bnd", (2, 3, 5, 6), (5, 6, 4)),
    ("bnhe,bhd->bnehd", (2, 3, 4, 5), (2, 4, 6)),
    ("abcd,acef->abdef", (2, 3, 4, 5), (2, 4, 6, 7)),
    ("...ij,...jk->...ik", (2, 3, 4), (2, 4, 5)),
    ("...i,ij->...j", (2, 3, 4), (4, 5)),
    ("...i,...i->...", (2, 3, 4), (3, 4)),
    ("...i,bij->b...j", (3, 4), (2, 4, 5)),
    ("i...,ij->j...", (4, 2, 3), (4, 5)),
    ("b...d,bde->b...e", (2, 3, 4, 5), (2, 5, 6)),
    ("ijk,jl->il", (2, 3, 4), (3, 5)),
    ("ij,kl->il", (2, 3), (4, 5)),
    (" i j , j k -> i k ", (3, 4), (4, 5)),
]


@pytest.mark.parametrize(("equation", "a", "b"), EQUATIONS, ids=lambda v: str(v).replace(" ", ""))
def test_einsum_of_two(equation: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    model = Two(lambda m, x, y: torch.einsum(equation, x, y))
    module = decomposed(model, torch.randn(a), torch.randn(b))
    assert "einsum" not in names(module)
    assert not [info(n).opaque for n in nodes(module) if info(n).opaque]


@pytest.mark.parametrize(
    ("equation", "shape", "ops"),
    [
        ("ijk->kij", (2, 3, 4), ["permute"]),
        ("ijk->ik", (2, 3, 4), ["sum"]),
        ("ij->ij", (2, 3), []),
        ("...ij->...ji", (2, 3, 4), ["permute"]),
    ],
)
def test_einsum_of_one(equation: str, shape: tuple[int, ...], ops: list[str]) -> None:
    model = One(lambda m, x: torch.einsum(equation, x) + 0)
    assert names(decomposed(model, torch.randn(shape)))[:-1] == ops


def test_einsum_of_three() -> None:
    model = Two(lambda m, x, y: torch.einsum("ij,jk,lk->il", x, y, x))
    assert names(decomposed(model, torch.randn(3, 3), torch.randn(3, 3))).count("matmul") == 2


@pytest.mark.parametrize(
    ("equation", "a", "b"),
    [
        ("...i,ij->...j", (2, 3, 4), (4, 5)),
        ("...qd,...kd->...qk", (2, 3, 4), (2, 6, 4)),
        ("...qd,...kd->...kq", (2, 3, 4), (2, 6, 4)),
    ],
)
def test_einsum_of_operands_whose_ranks_are_not_known(
    equation: str, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    model = Two(lambda m, x, y: torch.einsum(equation, x, y))
    module = decomposed(model, torch.randn(a), torch.randn(b), known=False)
    assert "matmul" in names(module)


@pytest.mark.parametrize(
    ("equation", "a", "b", "reason"),
    [
        ("ii,ij->ij", (3, 3), (3, 4), "diagonal"),
        ("...i,...i->i", (2, 3), (2, 3), "sums over"),
    ],
)
def test_einsum_that_stays(
    equation: str, a: tuple[int, ...], b: tuple[int, ...], reason: str
) -> None:
    model = Two(lambda m, x, y: torch.einsum(equation, x, y))
    module = decomposed(model, torch.randn(a), torch.randn(b))
    assert reason in info(nodes(module)[0]).opaque


def test_einsum_with_axes_inside_needs_ranks() -> None:
    model = Two(lambda m, x, y: torch.einsum("i...,ij->j...", x, y))
    module = decomposed(model, torch.randn(4, 2, 3), torch.randn(4, 5), known=False)
    assert "not known how many" in info(nodes(module)[0]).opaque


@pytest.mark.parametrize(
    ("body", "a", "b"),
    [
        (lambda m, x, y: torch.addmm(m.row, x, y), (3, 4), (4, 5)),
        (lambda m, x, y: torch.addmm(m.row, x, y, beta=0.5, alpha=2), (3, 4), (4, 5)),
        (lambda m, x, y: m.nan.addmm(x, y, beta=0), (3, 4), (4, 5)),
        (lambda m, x, y: torch.baddbmm(m.row, x, y), (2, 3, 4), (2, 4, 5)),
        (lambda m, x, y: torch.addbmm(m.row, x, y, alpha=3), (2, 3, 4), (2, 4, 5)),
        (lambda m, x, y: torch.inner(x, y), (2, 3, 4), (5, 4)),
        (lambda m, x, y: torch.inner(x, y), (2, 4), (4,)),
        (lambda m, x, y: torch.tensordot(x, y, 1), (2, 3, 4), (4, 5)),
        (lambda m, x, y: torch.tensordot(x, y), (2, 3, 4), (3, 4, 5)),
        (lambda m, x, y: torch.tensordot(x, y, ([1, 0], [0, -1])), (2, 3, 4), (3, 5, 2)),
        (lambda m, x, y: F.bilinear(x, y, m.weight, m.row), (2, 3), (2, 4)),
        (lambda m, x, y: F.bilinear(x, y, m.weight), (2, 6, 3), (2, 6, 4)),
        (lambda m, x, y: m.part(x, y), (2, 6, 3), (2, 6, 4)),
    ],
)
def test_other_products(body: Body, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    parts = {
        "row": nn.Parameter(torch.randn(5)),
        "nan": nn.Parameter(torch.full((3, 5), float("nan"))),
        "weight": nn.Parameter(torch.randn(5, 3, 4)),
        "part": nn.Bilinear(3, 4, 5),
    }
    module = decomposed(Two(body, **parts).eval(), torch.randn(a), torch.randn(b))
    assert "matmul" in names(module)
    assert not {"addmm", "addbmm", "inner", "tensordot", "bilinear"} & set(names(module))


def test_what_is_not_known_stays_with_the_reason() -> None:
    model = Two(lambda m, x, y: torch.inner(x, y))
    module = decomposed(model, torch.randn(2, 4), torch.randn(2, 3, 4))
    assert "3 dimensions" in info(node_of(module, "inner")).opaque
    model = Two(lambda m, x, y: torch.tensordot(x, y, 1))
    module = decomposed(model, torch.randn(2, 4), torch.randn(4, 4), known=False)
    assert "not known" in info(node_of(module, "tensordot")).opaque


class Conv1D(nn.Module):
    """As GPT-2 writes its linear layers."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        # As transformers writes it.
        shape = x.size()[:-1] + (self.outputs,)  # noqa: RUF005
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(shape)


def adopted(model: nn.Module, *args: Tensor) -> GraphModule:
    """``model`` after the passes that make linear layers, checked against eager PyTorch."""
    known = ranks_of(*args, model=model)
    module = canonical(model, *args)
    run(module, Decompose(known), AdoptProducts(known))
    again = Editor(module)
    AdoptProducts(known).run(again)
    assert again.log == []
    with torch.no_grad():
        assert close_share(module(*args), model(*args)) <= FLOAT32
    return module


@pytest.mark.parametrize(
    ("body", "shape", "ops"),
    [
        (lambda m, x: x @ m.w, (2, 3), ["linear"]),
        (lambda m, x: x.matmul(m.w) + m.b, (2, 3), ["linear"]),
        (lambda m, x: m.b + torch.matmul(x, m.w), (6, 2, 3), ["linear"]),
        (lambda m, x: torch.sub(torch.mm(x, m.w), m.b), (2, 3), ["linear", "sub"]),
        (lambda m, x: torch.add(torch.mm(x, m.w), m.b, alpha=2), (2, 3), ["linear"]),
        (lambda m, x: torch.mm(x, m.t.transpose(0, 1)), (2, 3), ["linear"]),
        (lambda m, x: torch.addmm(m.b, x, m.w, beta=2), (2, 3), ["linear"]),
        (lambda m, x: m.conv1d(x), (2, 5, 3), ["reshape", "linear", "reshape"]),
        (lambda m, x: torch.einsum("bi,io->bo", x, m.w), (2, 3), ["linear"]),
        (lambda m, x: torch.einsum("bi,oi->bo", x, m.t), (2, 3), ["linear"]),
        (lambda m, x: torch.einsum("bni,ihe->bnhe", x, m.c), (2, 6, 3), ["linear", "unflatten"]),
        (lambda m, x: torch.tensordot(x, m.w, 1), (2, 5, 3), ["linear"]),
        (lambda m, x: m.t @ x, (3,), ["linear"]),
        (lambda m, x: m.t @ x, (2, 3, 5), ["transpose", "linear", "transpose"]),
        (lambda m, x: x @ m.batch, (2, 4, 3), ["matmul"]),
        (lambda m, x: x @ m.w + x.sum(), (2, 3), ["linear", "sum", "add"]),
    ],
)
def test_a_product_with_a_constant_is_a_linear(
    body: Body, shape: tuple[int, ...], ops: list[str]
) -> None:
    parts = {
        "w": nn.Parameter(torch.randn(3, 4)),
        "t": nn.Parameter(torch.randn(4, 3)),
        "b": nn.Parameter(torch.randn(4)),
        "c": nn.Parameter(torch.randn(3, 2, 4)),
        "batch": nn.Parameter(torch.randn(2, 3, 4)),
        "conv1d": Conv1D(4, 3),
    }
    module = adopted(One(body, **parts), torch.randn(shape))
    tensors = [node for node in nodes(module) if info(node).value not in ("scalar", "sizes")]
    assert [what(node) for node in tensors] == ops


def test_a_product_that_is_read_twice_keeps_its_sum() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = x @ m.w
        return (y + m.b) * y

    parts = {"w": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(4))}
    assert names(adopted(One(body, **parts), torch.randn(2, 3))) == ["linear", "add", "mul"]


def test_a_tied_weight_stays_one_tensor() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.emb(x).relu() @ m.emb.weight.transpose(0, 1)

    module = adopted(One(body, emb=nn.Embedding(7, 4)), torch.tensor([[1, 2, 0]]))
    assert names(module) == ["embedding", "relu", "linear"]
    assert len({p.data_ptr() for p in module.parameters()}) == 1
    assert len(list(module.parameters())) == 1
