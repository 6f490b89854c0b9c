"""Convert: tables of embeddings become int8, tied ones once, and say why where they do not."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant import QConfig, QSpec
from fxquant.graph.integer_modules import IntegerEmbedding, IntegerEmbeddingBag
from fxquant.record import record_of
from fxquant.report.checks import size_in_bytes

ROWS, WIDTH = 40, 16
IDS = [torch.randint(0, ROWS, (2, 6), generator=torch.Generator().manual_seed(s)) for s in range(3)]
pytestmark = pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")


class Language(nn.Module):
    """A table, a layer, and an output layer that may own the same table."""

    def __init__(self, tied: bool = True, functional: bool = False, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, **options)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.functional = functional
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.table.weight) if self.functional else self.table(ids)
        return self.head(self.layer(x).relu())


def quantized(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return fxquant.quantize(model.eval(), IDS, **options)


def stored(model: nn.Module) -> int:
    """Bytes of the file that holds the tensors of a model."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def tables(model: nn.Module) -> list[IntegerEmbedding]:
    return [m for m in model.modules() if isinstance(m, IntegerEmbedding)]


@pytest.mark.parametrize("backend", ["reference", "x86"])
@pytest.mark.parametrize("functional", [False, True], ids=["module", "functional"])
def test_a_table_is_int8_by_row(backend: str, functional: bool) -> None:
    model = Language(tied=False, functional=functional, padding_idx=3)
    made = quantized(model, backend=backend)
    (table,) = tables(made)
    assert table.weight.dtype == torch.int8 and table.weight_scale.shape == (ROWS,)
    rows, wanted = table(IDS[0]), model.table(IDS[0])
    step = model.table.weight.detach().abs().amax(1)[IDS[0]] / 127
    assert bool(((rows - wanted).abs() <= 0.5001 * step.unsqueeze(-1)).all())
    assert torch.equal(rows[IDS[0] == 3], torch.zeros(int((IDS[0] == 3).sum()), WIDTH))
    assert next(op for op in record_of(made).ops if op.op == "embedding").int8
    twin = copy.deepcopy(made)
    assert torch.equal(twin(IDS[1]), made(IDS[1]))


@pytest.mark.parametrize("backend", ["reference", "x86"])
def test_a_tied_table_is_stored_once(backend: str) -> None:
    apart, tied = (quantized(Language(t), backend=backend) for t in (False, True))
    # One table less of one byte an element; scales and records of the file are a few bytes more.
    assert stored(apart) - stored(tied) >= ROWS * WIDTH
    assert len(tables(tied)) == 1
    held = tied.state_dict()
    pointers = {k: t.data_ptr() for k, t in held.items() if t.shape == (ROWS, WIDTH)}
    assert len(pointers) == 2 and len(set(pointers.values())) == 1


def test_one_scale_for_the_table_where_that_is_asked_for() -> None:
    spec = QSpec("int8", symmetric=True, granularity="tensor", observer="minmax")
    made = quantized(Language(False), backend="reference", qconfig=QConfig(weight=spec))
    assert tables(made)[0].weight_scale.numel() == 1


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (Language(False), {"overrides": {nn.Embedding: None}}, "asked to stay float"),
        (Language(True), {"overrides": {"head": None}}, "head reads the same table"),
        (Language(False, max_norm=1.0), {}, "max_norm"),
    ],
    ids=["override", "tied-to-float", "max-norm"],
)
def test_a_table_that_stays_float_says_why(
    model: nn.Module, options: dict[str, Any], reason: str
) -> None:
    made = quantized(model, backend="reference", **options)
    assert tables(made) == []
    op = next(op for op in record_of(made).ops if op.op == "embedding")
    assert not op.int8 and reason in op.why


def test_a_table_that_is_read_as_a_tensor_stays_float() -> None:
    class Read(Language):
        def forward(self, ids: Tensor) -> Tensor:
            rows = self.table(ids) + torch.index_select(self.table.weight, 0, ids[0])
            return self.layer(rows)

    made = quantized(Read(False), backend="reference")
    assert tables(made) == []


class Bags(nn.Module):
    """A bag of rows and a layer."""

    def __init__(self, body: Any, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, WIDTH, **options)
        self.layer = nn.Linear(WIDTH, 3)
        self.body = body

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.body(self.bag, ids))


_FLAT: Any = lambda bag, ids: bag(ids.flatten(), torch.tensor([0, 2, 7]))  # noqa: E731
_WEIGHED: Any = lambda bag, ids: bag(ids, per_sample_weights=ids * 0.1)  # noqa: E731


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (lambda bag, ids: bag(ids), {}),
        (lambda bag, ids: bag(ids), {"mode": "sum", "padding_idx": 3}),
        (lambda bag, ids: bag(ids), {"mode": "mean", "padding_idx": 3}),
        (lambda bag, ids: bag(ids), {"mode": "max"}),
        (_FLAT, {"mode": "sum"}),
        (_FLAT, {"mode": "mean", "include_last_offset": True}),
        (_WEIGHED, {"mode": "sum"}),
    ],
)
def test_a_bag_reads_an_int8_table(body: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Bags(body, **options).eval()
    made = quantized(model, backend="reference")
    (bag,) = [m for m in made.modules() if isinstance(m, IntegerEmbeddingBag)]
    with torch.no_grad():
        found, wanted = body(bag, IDS[0]), body(model.bag, IDS[0])
    # Every row is within half a step of its scale, so that a sum of 6 is within 3 steps.
    step = float(model.bag.weight.detach().abs().max()) / 127
    assert float((found - wanted).abs().max()) <= 3.01 * step
    assert next(op for op in record_of(made).ops if op.op == "embedding_bag").int8
    assert size_in_bytes(made) < 0.5 * size_in_bytes(model)
