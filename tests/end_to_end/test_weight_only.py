"""Weight-only models, end to end."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import fxquant
from fxquant import QConfig, QSpec

PRESETS = ("weight-only-int8", "weight-only-int4")
UNEVEN = QConfig(activation=None, weight=QSpec("uint8", bits=4, granularity="group", group_size=64))


def decibels(exact: Tensor, found: Tensor) -> float:
    exact, found = exact.detach().double(), found.detach().double()
    return 10 * math.log10(float((exact**2).sum() / ((exact - found) ** 2).sum()))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 50), nn.ReLU(), nn.Linear(50, 11, bias=False)).eval()


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("qconfig", [*PRESETS, UNEVEN])
@pytest.mark.parametrize("shape", [(37,), (1, 37), (2, 37), (9, 37), (2, 3, 37), (0, 37)])
def test_a_perceptron(backend: str, qconfig: QConfig | str, shape: tuple[int, ...]) -> None:
    model = mlp()
    q = fxquant.quantize(model, mode="weight_only", qconfig=qconfig, backend=backend)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made = q(x)
    assert made.shape == model(x).shape
    if x.numel():
        # Two layers: 3 dB less than one alone.
        assert decibels(model(x), made) > (30 if qconfig == "weight-only-int8" else 15)


def test_backends_agree() -> None:
    x = torch.randn(2, 37)
    for batch in (x, x.repeat(8, 1), x[:1]):
        a, b = (
            fxquant.quantize(mlp(), mode="weight_only", backend=name)(batch)
            for name in ("reference", "auto")
        )
        # The same products in float32, added up in another order: no kernel takes 37 or 50 inputs.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qconfig", [*PRESETS, UNEVEN])
def test_it_copies_pickles_and_loads(qconfig: QConfig | str) -> None:
    q = fxquant.quantize(mlp(), mode="weight_only", qconfig=qconfig)
    x = torch.randn(3, 37)
    expected = q(x)
    assert torch.equal(copy.deepcopy(q)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(q))(x), expected)
    other = copy.deepcopy(q)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(q.state_dict())
    assert torch.equal(other(x), expected)
    kinds = {t.dtype for name, t in q.state_dict().items() if name.endswith("weight")}
    assert kinds <= {torch.int8, torch.uint8}


@pytest.mark.parametrize(("qconfig", "share"), [(PRESETS[0], 0.28), (PRESETS[1], 0.18)])
def test_sizes(qconfig: str, share: float) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)).eval()
    q = fxquant.quantize(model, mode="weight_only", qconfig=qconfig)
    assert fxquant.report(q).ratio <= share


class Words(nn.Module):
    """Tables of two kinds, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 21, padding_idx=0)
        self.bag = nn.EmbeddingBag(30, 21, mode="mean", padding_idx=3)
        self.out = nn.Linear(21, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.table(ids).sum(1) + self.bag(ids))


@pytest.mark.parametrize("qconfig", PRESETS)
def test_tables(qconfig: str) -> None:
    torch.manual_seed(0)
    model, ids = Words().eval(), torch.randint(0, 30, (4, 6))
    q = fxquant.quantize(model, mode="weight_only", qconfig=qconfig, example_inputs=ids)
    assert decibels(model(ids), q(ids)) > (30 if qconfig == PRESETS[0] else 14)
    rows = {op.path: op for op in fxquant.report(q).ops}
    assert rows["table"].int8 and rows["bag"].int8 and rows["out"].int8
    assert rows["bag"].weight.startswith("int8" if qconfig == PRESETS[0] else "int4")


def test_one_op_of_a_static_model() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    data = [torch.randn(8, 64) for _ in range(3)]
    q = fxquant.quantize(model, data, overrides={"2": "weight-only-int4"}, backend="reference")
    rows = fxquant.report(q).ops
    assert [op.weight for op in rows] == ["int8 per channel 0", "int4 per group of 32"]
    assert decibels(model(data[0]), q(data[0])) > 15


def test_gpt2_keeps_its_tied_weight_in_one_piece() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 64, (2, 7))
    q = fxquant.quantize(model, mode="weight_only", example_inputs={"input_ids": ids})
    assert decibels(model(ids).logits, q(input_ids=ids).logits) > 25
    head, table = (
        q.get_submodule(path).get_buffer("weight") for path in ("lm_head", "transformer.wte")
    )
    assert head.dtype == torch.int8
    assert head is table or head.data_ptr() == table.data_ptr()


@pytest.mark.parametrize("qconfig", PRESETS)
def test_bert(qconfig: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    model, ids = BertModel(config).eval(), torch.randint(0, 64, (2, 7))
    q = fxquant.quantize(
        model, mode="weight_only", qconfig=qconfig, example_inputs={"input_ids": ids}
    )
    exact, found = (m(input_ids=ids).last_hidden_state for m in (model, q))
    assert decibels(exact, found) > (30 if qconfig == PRESETS[0] else 12)


def test_a_weight_that_is_not_finite_stays_float_and_says_so() -> None:
    model = mlp()
    model.get_parameter("0.weight").data[0, 0] = float("nan")
    with pytest.raises(fxquant.errors.ConfigError, match="NaN"):
        fxquant.quantize(model, mode="weight_only")


def test_reports_do_not_call_stored_weights_int8() -> None:
    q = fxquant.quantize(nn.Sequential(nn.Linear(8, 8)).eval(), mode="weight_only")
    report = fxquant.report(q)
    assert repr(report) == "Report(1 of 1 ops with stored weights)"
    assert report.summary.startswith("stored weights: 1 of 1 ops (100.0%)")
    assert (report.coverage, report.weight_coverage) == (1.0, 1.0)
    assert report.to_dict()["ops"][0]["runs"] == "stored"
    assert str(fxquant.explain(q, "0")).splitlines()[0].endswith(": stored weights")
