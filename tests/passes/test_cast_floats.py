"""Cast floats: bfloat16 where it was asked for, float32 at the borders."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import fxquant
from fxquant.errors import SpeedWarning


def half(model: nn.Module, **more: object) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpeedWarning)  # on processors without bfloat16
        return fxquant.quantize(model.eval(), mode="bfloat16", backend="reference", **more)  # type: ignore[arg-type]  # keywords of quantize


def error(exact: Tensor, found: Tensor) -> float:
    assert found.dtype == torch.float32
    exact, found = exact.detach(), found.detach()
    return float((exact - found).norm() / exact.norm())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.out = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return self.out(torch.relu(self.norm(y) + y).mean((2, 3)))


# Eight bits of mantissa round by 2 ** -9 at most; a few roundings follow one another.
TOLERANCE = 2.0**-6


def test_layers_are_bfloat16_and_the_rest_float32() -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(2, 3, 9, 9)
    q = half(model, example_inputs=x)
    assert error(model(x), q(x)) < TOLERANCE
    runs = {row["path"]: row["runs"] for row in fxquant.report(q).to_dict()["ops"]}
    assert (runs["conv"], runs["norm"], runs["out"]) == ("bfloat16", "float", "bfloat16")
    assert q.get_parameter("conv.weight").dtype == torch.bfloat16
    assert q.get_parameter("norm.weight").dtype == torch.float32
    assert model.conv.weight.dtype == torch.float32


def test_a_chain_is_cast_once_at_each_end() -> None:
    q = half(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Flatten(), nn.Linear(5, 3)))
    casts = [node.kwargs["dtype"] for node in q.graph.nodes if "dtype" in node.kwargs]
    assert casts == [torch.bfloat16, torch.float32]
    assert fxquant.report(q).coverage == 1.0
    assert q(torch.randn(0, 4)).shape == (0, 3)


def test_an_override_leaves_an_op_alone_or_asks_for_it() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    q = half(model, overrides={"2": None})
    assert [p.dtype for p in q.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    data = [torch.randn(8, 4) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpeedWarning)
        mixed = fxquant.quantize(model, data, overrides={"2": "bfloat16"}, backend="reference")
    rows = [row["runs"] for row in fxquant.report(mixed).to_dict()["ops"]]
    assert rows == ["int8", "bfloat16"]
    assert mixed(data[0]).dtype == torch.float32


def test_what_asks_for_nothing_is_left_alone() -> None:
    with pytest.raises(fxquant.errors.LoweringError):
        half(nn.Sequential(nn.Linear(4, 4)), overrides={"0": None})


def test_a_processor_without_bfloat16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    with pytest.warns(SpeedWarning, match="no bfloat16 instructions"):
        fxquant.quantize(nn.Sequential(nn.Linear(4, 4)).eval(), mode="bfloat16")


def test_transformers() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 7))
    bert = BertModel(
        BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=16,
        )
    ).eval()  # fmt: skip
    q = half(bert, example_inputs={"input_ids": ids})
    exact = bert(input_ids=ids).last_hidden_state
    assert error(exact, q(input_ids=ids).last_hidden_state) < 2 * TOLERANCE
    gpt = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    q = half(gpt, example_inputs={"input_ids": ids})
    assert error(gpt(ids).logits, q(input_ids=ids).logits) < 2 * TOLERANCE
    head, table = (q.get_parameter(f"{p}.weight") for p in ("lm_head", "transformer.wte"))
    assert head.data_ptr() == table.data_ptr()


@pytest.mark.parametrize("qconfig", ["int8-bf16", "float16"])
def test_what_is_not_there_says_so(qconfig: str) -> None:
    with pytest.raises(fxquant.errors.ConfigError, match="bfloat16"):
        fxquant.prepare(nn.Sequential(nn.Linear(4, 4)).eval(), qconfig=qconfig)
