"""Cast floats: bfloat16 where it was asked for, float32 at the borders."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import fxquant
from fxquant.backends.base import Backend
from fxquant.backends.reference import Reference
from fxquant.backends.x86 import X86
from fxquant.backends.x86_layers import X86Layer
from fxquant.building import lower
from fxquant.errors import SpeedWarning
from fxquant.graph.op_table import op_names
from fxquant.passes import cast_floats


def half(model: nn.Module, mode: str = "bfloat16", **more: object) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpeedWarning)  # on processors without bfloat16
        return fxquant.quantize(model.eval(), mode=mode, backend="reference", **more)  # type: ignore[arg-type]  # keywords of quantize


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
HALF = torch.bfloat16


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


class Attention(nn.Module):
    """One block as transformers have it, with a float mask that is added inside."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        made = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        y = self.norm(x + self.out(made))
        return y + self.down(F.gelu(self.up(y)))


class ConvAttention(nn.Module):
    """A convolutional network whose pixels attend to each other, by products written out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 48, 1)
        self.out, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, dim=-1)
        made = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(made.unflatten(2, x.shape[2:]))
        return self.head(x.mean((2, 3)))


def between(model: nn.Module, data: list[Tensor], mode: str, backend: Backend) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpeedWarning)
        prepared = fxquant.prepare(
            model.eval(),
            mode=mode,  # type: ignore[arg-type]  # a Mode
            qconfig="int8-bf16",
            example_inputs=data[0],
        )
    if mode == "static":
        fxquant.calibrate(prepared, data)
    return lower(prepared, backend)


def sqnr(exact: Tensor, found: Tensor) -> float:
    return -20 * math.log10(error(exact, found))


SAME_WEIGHTS = Reference(saturates_pairs=X86().saturates_pairs)
"""The reference with weights of 7 bits where the kernels here want them."""

CASES = (
    (Attention, (2, 6, 32), {"static": 30, "dynamic": 35}, {"scaled_dot_product_attention"}),
    (
        ConvAttention,
        (2, 3, 13, 13),
        {"static": 28, "dynamic": 35},
        {"scaled_dot_product_attention"},
    ),
)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize(("make", "shape", "least", "halves"), CASES)
def test_bfloat16_between_int8_layers(
    make: type[nn.Module],
    shape: tuple[int, ...],
    least: dict[str, float],
    halves: set[str],
    mode: str,
) -> None:
    """Against the float model, and against the same int8 model with float32 between its layers.

    The second is what bfloat16 costs: one rounding to 8 bits of mantissa at a few places, each of
    about 2 ** -9 / sqrt(3), or 59 dB; where its result is quantized anew, codes change by one.
    """
    torch.manual_seed(0)
    model, data = make(), [torch.randn(shape) for _ in range(6)]
    q = between(model, data, mode, Reference())
    runs = {row["op"]: row["runs"] for row in fxquant.report(q).to_dict()["ops"]}
    assert halves <= {op for op, kind in runs.items() if kind == "bfloat16"}
    assert sum(row["runs"] == "int8" for row in fxquant.report(q).to_dict()["ops"]) >= 3
    plain = fxquant.quantize(
        model.eval(), data if mode == "static" else None, mode=mode,  # type: ignore[arg-type]  # a Mode
        example_inputs=data[0], backend="reference",
    )  # fmt: skip
    assert sqnr(model(data[0]), q(data[0])) > least[mode]
    assert sqnr(plain(data[0]), q(data[0])) > 36


@pytest.mark.skipif(X86().missing() is not None, reason="the x86 backend cannot run here")
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize(("make", "shape", "least", "halves"), CASES)
def test_kernels_write_bfloat16_as_the_reference_does(
    make: type[nn.Module], shape: tuple[int, ...], least: object, halves: object, mode: str
) -> None:
    """The same roundings at the same places; float32 sums before them differ in their last bits."""
    torch.manual_seed(0)
    model, data = make(), [torch.randn(shape) for _ in range(6)]
    lowered = between(model, data, mode, X86())
    if mode == "static":
        held = [m for m in lowered.modules() if isinstance(m, X86Layer)]
        assert torch.bfloat16 in {layer.real for layer in held if layer.writes is None}
        casts = [n for n in lowered.graph.nodes if n.kwargs.get("dtype") is torch.bfloat16]
        assert not casts
    reference = between(model, data, mode, SAME_WEIGHTS)
    assert sqnr(reference(data[0]), lowered(data[0])) > 40
    again = copy.deepcopy(lowered)
    again.load_state_dict(lowered.state_dict())
    assert torch.equal(again(data[0]), lowered(data[0]))
    assert torch.equal(pickle.loads(pickle.dumps(lowered))(data[0]), lowered(data[0]))


def test_results_and_what_reads_float32_stay_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    q = between(model, [torch.randn(3, 8) for _ in range(4)], "static", Reference())
    assert not [n for n in q.graph.nodes if n.kwargs.get("dtype") is torch.bfloat16]
    assert q(torch.randn(3, 8)).dtype == torch.float32


def test_what_is_only_moved_is_not_cast() -> None:
    model, x = Attention(), torch.randn(2, 6, 32)
    q = fxquant.quantize(
        model.eval(), mode="dynamic", qconfig="int8-bf16", example_inputs=x,
        overrides={F.scaled_dot_product_attention: None}, backend="reference",
    )  # fmt: skip
    assert {row["runs"] for row in fxquant.report(q).to_dict()["ops"]} == {"int8", "float"}
    assert not [n for n in q.graph.nodes if "dtype" in n.kwargs and n.kwargs["dtype"] is HALF]


class Masked(nn.Module):
    """Scores with a mask of the largest numbers there are, as transformers write it."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.q, self.k, self.fill = nn.Linear(8, 8), nn.Linear(8, 8), fill

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        scores = scores.masked_fill(mask, self.fill)
        return torch.softmax(scores, -1) @ x


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min, float("-inf")])
@pytest.mark.parametrize("mode", ["bfloat16", "float16"])
def test_masks_do_not_overflow(mode: str, fill: float) -> None:
    torch.manual_seed(0)
    model, x = Masked(fill).eval(), torch.randn(2, 5, 8)
    mask = torch.zeros(2, 5, 5, dtype=torch.bool)
    mask[0, :, 3:] = True
    q = half(model, mode=mode, example_inputs=(x, mask))
    assert error(model(x, mask), q(x, mask)) < 2 * TOLERANCE
    adds = Attention().eval()
    sums = torch.zeros(2, 1, 1, 5).masked_fill(mask[:, None, :1, :], fill)
    given = (torch.randn(2, 5, 32), sums)
    q = half(adds, mode=mode, example_inputs=given)
    assert error(adds(*given), q(*given)) < TOLERANCE


def test_float16_has_more_digits_than_bfloat16() -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(2, 3, 9, 9)
    q = half(model, mode="float16", example_inputs=x)
    # Eleven bits of mantissa round by 2 ** -12 at most.
    assert error(model(x), q(x)) < 2.0**-9
    runs = {row["path"]: row["runs"] for row in fxquant.report(q).to_dict()["ops"]}
    assert (runs["conv"], runs["norm"], runs["out"]) == ("float16", "float", "float16")
    assert "float16: 2 of" in fxquant.report(q).summary
    assert q.get_parameter("conv.weight").dtype == torch.float16


def test_float16_on_a_processor_says_so() -> None:
    with pytest.warns(SpeedWarning, match="float16 is for GPUs"):
        fxquant.quantize(nn.Sequential(nn.Linear(4, 4)).eval(), mode="float16")


def test_16_bits_beside_a_stored_weight_are_not_there() -> None:
    config = fxquant.QConfig(activation=None, float_dtype="bfloat16")
    with pytest.raises(fxquant.errors.ConfigError, match="stored"):
        fxquant.prepare(nn.Sequential(nn.Linear(4, 4)).eval(), qconfig=config)


def test_what_stays_float32_has_a_reason() -> None:
    assert set(cast_floats._FLOAT32) <= set(op_names())
    assert not set(cast_floats._FLOAT32) & set(cast_floats._FOLLOW)
    q = half(Small(), example_inputs=torch.randn(1, 3, 9, 9))
    whys = {row["op"]: row["why"] for row in fxquant.report(q).to_dict()["ops"]}
    assert "sums of squares" in whys["group_norm"]
    assert "adds up many numbers" in whys["mean"]


def test_reports_do_not_call_16_bits_int8() -> None:
    q = half(Small(), example_inputs=torch.randn(1, 3, 9, 9))
    report = fxquant.report(q)
    assert repr(report) == "Report(2 of 5 ops in bfloat16)"
    assert "int8" not in report.summary
    assert str(fxquant.explain(q, "conv")).splitlines()[0].endswith(": bfloat16")
    with pytest.raises(fxquant.errors.LoweringError, match="computes in bfloat16"):
        half(nn.Sequential(nn.ReLU()), example_inputs=torch.randn(2))
