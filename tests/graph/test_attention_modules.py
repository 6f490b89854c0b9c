"""Opened attention modules compute what PyTorch's own do, in every layout and with every mask."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.attention_modules import open_modules
from fxquant.graph.attention_ops import append_row, attention_mask
from fxquant.graph.capture import capture
from tests.helpers import Calls, names, nodes

WIDTH, HEADS, BATCH, LENGTH = 8, 2, 3, 5
HIDDEN = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
PADDING = torch.tensor([[False] * LENGTH, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CLOSE = 1e-6
"""Of the largest value, in float64: packed and separate products sum in other orders."""


@pytest.fixture(autouse=True)
def slow_path() -> Iterator[None]:
    """PyTorch's fused inference path is another implementation; the slow path is the promise."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


class Anything(Calls):
    """With as many inputs as are given; tensors that are held are constants."""

    def forward(self, x: Any, y: Any = None, z: Any = None) -> Any:
        return self.body(self, x, y, z)


def drawn(module: nn.Module) -> nn.Module:
    """All parameters far from their initial values, zeros included."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
    return module.double().eval()


def check(model: nn.Module, *inputs: Tensor) -> GraphModule:
    """Capture, and compare with eager."""
    module = capture(model, inputs, evaluate=True).module
    with torch.no_grad():
        found, wanted = module(*inputs), model(*inputs)
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else ((found, wanted),)
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            assert float((a - b).abs().max()) <= CLOSE * max(1.0, float(b.abs().max()))
    assert not [n for n in nodes(module) if n.op == "call_module" and "attn" == n.target]
    return module


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "no-weights": {"need_weights": False},
    "weights-by-head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "float-padding": {"key_padding_mask": PADDING * -3.0},
    "mask": {"attn_mask": HIDDEN},
    "float-mask": {"attn_mask": HIDDEN * -2.0, "need_weights": False},
    "mask-by-head": {"attn_mask": HIDDEN.expand(BATCH * HEADS, LENGTH, LENGTH)},
    "both": {"attn_mask": HIDDEN, "key_padding_mask": PADDING, "need_weights": False},
    "causal": {"attn_mask": HIDDEN, "is_causal": True, "need_weights": False},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attn": {"add_zero_attn": True},
    "both-rows": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("first", [True, False], ids=["batch-first", "length-first"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention(mask: str, kind: str, first: bool) -> None:
    if mask == "causal" and kind not in ("plain", "no-bias"):
        # PyTorch itself takes the hint against keys that the mask does not know.
        mask = "mask"
    attn = drawn(nn.MultiheadAttention(WIDTH, HEADS, batch_first=first, **KINDS[kind]))
    given = {k: v.double() if k and _real(v) else v for k, v in MASKS[mask].items()}
    model = Anything(lambda m, x, y, z: m.attn(x, x, x, **given), attn=attn).eval()
    shape = (BATCH, LENGTH, WIDTH) if first else (LENGTH, BATCH, WIDTH)
    module = check(model, random(*shape))
    linears = [str(n.target) for n in nodes(module) if n.op == "call_module"]
    assert linears == ["attn.in_proj", "attn.out_proj"]


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("first", [True, False], ids=["batch-first", "length-first"])
def test_without_a_batch(first: bool) -> None:
    attn = drawn(nn.MultiheadAttention(WIDTH, HEADS, batch_first=first))
    check(Anything(lambda m, x, y, z: m.attn(x, x, x), attn=attn).eval(), random(LENGTH, WIDTH))
    mask = random(HEADS, LENGTH, LENGTH)
    model = Anything(lambda m, x, y, z: m.attn(x, x, x, attn_mask=mask), attn=attn).eval()
    check(model, random(LENGTH, WIDTH))


@pytest.mark.parametrize(
    ("body", "linears"),
    [
        (lambda m, x, y, z: m.attn(x, y, y), ["attn.kv_proj", "attn.q_proj", "attn.out_proj"]),
        (
            lambda m, x, y, z: m.attn(x, y, z),
            ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"],
        ),
    ],
)
def test_cross_attention(body: Any, linears: list[str]) -> None:
    attn = drawn(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x, y = random(2, 4, WIDTH), random(2, 6, WIDTH)
    module = check(Anything(body, attn=attn).eval(), x, y, y + 1)
    assert [str(n.target) for n in nodes(module) if n.op == "call_module"] == linears


def test_keys_and_values_of_other_widths() -> None:
    attn = drawn(nn.MultiheadAttention(WIDTH, HEADS, kdim=6, vdim=4, batch_first=True))
    model = Anything(lambda m, x, y, z: m.attn(x, y, z), attn=attn).eval()
    check(model, random(2, 4, WIDTH), random(2, 6, 6), random(2, 6, 4))


def test_parameters_stay_the_users_own() -> None:
    attn = nn.MultiheadAttention(WIDTH, HEADS)
    kept = dict(attn.named_parameters())
    open_modules(attn)
    assert isinstance(attn, nn.MultiheadAttention)
    assert type(attn).__name__ == "MultiheadAttention"
    for name, parameter in kept.items():
        assert attn.get_parameter(name) is parameter
    packed = kept["in_proj_weight"]
    assert attn.get_parameter("in_proj.weight") is packed
    part = attn.get_parameter("k_proj.weight")
    assert torch.equal(part, packed[WIDTH : 2 * WIDTH])
    assert part.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # that is the point
            return x

    class Plain(nn.MultiheadAttention):
        pass

    own, plain = Own(WIDTH, HEADS), Plain(WIDTH, HEADS)
    open_modules(nn.ModuleList([own, plain]))
    assert type(own) is Own
    assert type(plain) is not Plain and isinstance(plain, Plain)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "activation", ["relu", "gelu", torch.tanh, nn.SiLU()], ids=["relu", "gelu", "tanh", "silu"]
)
def test_transformer_layers(activation: Any, norm_first: bool) -> None:
    options: dict[str, Any] = {"activation": activation, "norm_first": norm_first}
    layer = drawn(nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, **options))
    x = random(BATCH, LENGTH, WIDTH)
    masks = {"src_mask": HIDDEN, "src_key_padding_mask": PADDING}
    check(Anything(lambda m, x, y, z: m.layer(x, **masks), layer=layer).eval(), x)
    decoder = drawn(nn.TransformerDecoderLayer(WIDTH, HEADS, 16, **options))
    hidden = {"tgt_mask": HIDDEN[:BATCH, :BATCH], "tgt_is_causal": True}
    model = Anything(lambda m, x, y, z: m.layer(x, y, **hidden), layer=decoder).eval()
    check(model, x, random(4, LENGTH, WIDTH))


def test_a_copied_decoder_keeps_its_activation() -> None:
    layer = drawn(nn.TransformerDecoderLayer(WIDTH, HEADS, 16, activation=nn.SiLU()))
    x = random(LENGTH, BATCH, WIDTH)
    assert not torch.equal(copy.deepcopy(layer)(x, x), layer(x, x)), "PyTorch mends it: so may we"
    module = check(Anything(lambda m, x, y, z: m.layer(x, y), layer=layer).eval(), x, x)
    assert "SiLU" in {type(m).__name__ for m in module.modules()}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_whole_transformers() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    stack = drawn(nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH)))
    body: Any = lambda m, x, y, z: m.stack(x, src_key_padding_mask=PADDING)  # noqa: E731
    module = check(Anything(body, stack=stack).eval(), random(BATCH, LENGTH, WIDTH))
    assert names(module).count("scaled_dot_product_attention") == 2
    full = drawn(nn.Transformer(WIDTH, HEADS, 1, 2, 16))
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    body = lambda m, x, y, z: m.full(x, y, tgt_mask=mask)  # noqa: E731
    check(Anything(body, full=full).eval(), random(6, 2, WIDTH), random(4, 2, WIDTH))


def test_small_ops_say_what_they_need() -> None:
    with pytest.raises(ValueError, match="needs a mask"):
        attention_mask(torch.zeros(1, 2, 3), heads=1)
    assert append_row(torch.zeros(3, 2, 4, 5), torch.ones(2, 1, 5))[..., -1, :].eq(1).all()
