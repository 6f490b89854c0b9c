"""Codes in one pass: those of the rule but for ties, and only where no number is too large."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxquant
from fxquant.backends import x86_quantize
from fxquant.backends.x86 import X86
from fxquant.backends.x86_quantize import quantize_bounded
from fxquant.backends.x86_row_codes import byte_kernel
from fxquant.graph.edit import Editor
from fxquant.graph.op_table import is_op
from fxquant.numerics.affine import quantize
from fxquant.patterns.boundary import QUANTIZE
from fxquant.patterns.rule import RuleSet
from tests.backends.lockstep import check_ops
from tests.helpers import One

pytestmark = pytest.mark.skipif(X86().missing() is not None, reason=str(X86().missing()))
fused = pytest.mark.skipif(byte_kernel() is None, reason="this torch has no such kernel")

FULL = (0, 255, torch.uint8)
SCALE, ZERO = 0.0312371, 121


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Four fifths of them within the range of the codes."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3.0
    return made.to(dtype)


def assert_codes(x: Tensor, scale: float = SCALE, zero_point: int = ZERO) -> Tensor:
    """The codes of the rule, but next to ties."""
    made = quantize_bounded(x, scale, zero_point, *FULL)
    wanted = quantize(x, scale, zero_point, *FULL)
    assert (made.dtype, made.shape) == (torch.uint8, x.shape)
    difference = (made.int() - wanted.int()).abs()
    assert int(difference.max()) <= 1
    # Five roundings of 2**-24 of 255 steps, on either side of a half: 5 * 2**-15, were all of
    # them as large as can be; of few numbers, two.
    assert int((difference > 0).sum()) <= max(2, 5 * 2.0**-15 * x.numel())
    steps = x.double() / scale
    off_tie = ((steps - steps.floor()) - 0.5).abs() > 2.0**-13
    assert not bool((difference[off_tie] > 0).any())
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(128, 768), (1, 128, 768), (2, 197, 768), (1500, 512), (4, 3, 224, 224), (32,), (7, 5, 32)],
)
def test_codes_are_those_of_the_rule(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_codes(numbers(*shape, dtype=dtype))


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(2.0**-20, 2.0**40),
    zero_point=st.integers(0, 255),
    shape=st.sampled_from([(64,), (3, 96), (2, 5, 13, 32), (700, 256)]),
    seed=st.integers(0, 9),
)
def test_any_scale_and_zero_point(
    scale: float, zero_point: int, shape: tuple[int, ...], seed: int
) -> None:
    x = numbers(*shape, seed=seed) * 30.0 * scale + (128 - zero_point) * scale
    assert_codes(x.clamp(-3e38, 3e38), scale, zero_point)


@fused
def test_it_saturates_up_to_the_bound() -> None:
    limit = x86_quantize._MOST_CODES * SCALE
    for value in (limit, 1e6, 10.0):
        ends = torch.tensor([value, -value]).repeat(16)
        assert quantize_bounded(ends, SCALE, ZERO, *FULL).tolist() == [255, 0] * 16


@fused
def test_beyond_the_bound_it_does_not() -> None:
    """What the rule's condition is there for; should it fail, the condition can go."""
    assert quantize_bounded(torch.full((32,), 1e30), SCALE, ZERO, *FULL)[0] == 0


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "heads beside each other": lambda x: x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "backwards": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "one sample": lambda x: x[:1],
    "with gaps": lambda x: F.pad(x, (0, 8))[..., :-8],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "every other": lambda x: x[:, ::2],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("alone", [True, False])
def test_memory_is_laid_out_as_it_was(
    name: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(x86_quantize, "_ALONE", 2**20 if alone else 1)
    x = LAYOUTS[name](numbers(3, 12, 14, 32))
    made = assert_codes(x)
    assert made.stride() == quantize(x, SCALE, ZERO, *FULL).stride()


@pytest.mark.parametrize(
    "x",
    [
        numbers(5, 13),  # the last numbers of a row would wrap around
        numbers(31),
        numbers(3, 64, dtype=torch.float64),
        numbers(0, 64),
        torch.tensor(1.5),
    ],
    ids=["odd", "short", "float64", "empty", "scalar"],
)
def test_what_the_kernel_does_not_take_follows_the_rule(x: Tensor) -> None:
    assert torch.equal(quantize_bounded(x, SCALE, ZERO, *FULL), quantize(x, SCALE, ZERO, *FULL))


@pytest.mark.parametrize("shape", [(32, 5, 31), (32, 1), (64, 3, 7, 7), (4, 40), (2, 3, 64)])
def test_samples_do_not_depend_on_their_batch(shape: tuple[int, ...]) -> None:
    """Numbers next to ties, which the kernel and the rule may round either way."""
    x = (torch.randint(-90, 90, shape) + 0.5) * SCALE
    whole = quantize_bounded(x, SCALE, ZERO, *FULL)
    alone = [quantize_bounded(sample, SCALE, ZERO, *FULL) for sample in x.split(1)]
    assert torch.equal(torch.cat(alone), whole)


def test_without_the_kernel_the_rule_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86_quantize, "byte_kernel", lambda: None)
    x = numbers(64, 64)
    assert torch.equal(quantize_bounded(x, SCALE, ZERO, *FULL), quantize(x, SCALE, ZERO, *FULL))


def test_inference_and_training_share_what_is_kept() -> None:
    x_scale = 0.0123456
    with torch.inference_mode():
        quantize_bounded(numbers(64), x_scale, 3, *FULL)
    weight = numbers(64).requires_grad_()
    assert not quantize_bounded(weight, x_scale, 3, *FULL).requires_grad


# The rule

WIDTH = 32
Body = Callable[[Any, Any], Any]


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "first": nn.Linear(WIDTH, WIDTH),
        "norm": nn.LayerNorm(WIDTH),
        "last": nn.Linear(WIDTH, WIDTH),
        "conv": nn.Conv2d(8, 8, 3),
    }


def counted(body: Body, shape: tuple[int, ...] = (4, 6, WIDTH), **options: Any) -> tuple[int, int]:
    """How many quantizes have the kernel, and how many have not."""
    x = torch.randn(shape)
    found = check_ops(One(body, **parts()).eval(), x, **options)
    made = [n.target is quantize_bounded for n in found.lowered.graph.nodes if is_op(n, QUANTIZE)]
    return sum(made), len(made) - sum(made)


def test_after_a_norm() -> None:
    assert counted(lambda m, x: m.last(m.norm(x))) == (1, 0)


def test_a_residual_stream() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.first(x)
        return m.last(m.norm(y + m.first(m.norm(y))))

    fused, plain = counted(body)
    assert (fused > 0, plain) == (True, 1), "the input alone has no bound"


def test_attention_over_codes() -> None:
    def body(m: Any, x: Any) -> Any:
        y = m.first(x)
        return m.last(F.scaled_dot_product_attention(y, y, y))

    assert counted(body) == (1, 1)


@pytest.mark.parametrize(
    "body",
    [lambda m, x: m.last(x), lambda m, x: m.last(x.cumsum(1)), lambda m, x: m.last(x * 3.0)],
    ids=["the input", "an unknown op", "a multiple of the input"],
)
def test_not_where_nothing_bounds_the_numbers(body: Body) -> None:
    assert counted(body) == (0, 1)


def test_infinities_of_the_input_saturate() -> None:
    """They reach no quantize that has the kernel."""
    x = torch.randn(4, WIDTH)
    model = One(lambda m, x: m.last(x), **parts()).eval()
    # Of 7 bits, both backends make the same weights on processors without VNNI, too.
    weight = fxquant.QSpec("int8", bits=7, symmetric=True, granularity="channel", observer="minmax")
    options: dict[str, Any] = {"mode": "static", "qconfig": fxquant.QConfig(weight=weight)}
    made = fxquant.quantize(model, [x], backend="x86", **options)
    like = fxquant.quantize(model, [x], backend="reference", **options)
    x[0, 3], x[1, 4], x[2, 5] = torch.inf, -torch.inf, 1e30
    with torch.no_grad():
        assert torch.allclose(made(x), like(x), rtol=0, atol=1e-4)


def test_not_with_fewer_codes() -> None:
    qconfig = fxquant.QConfig(activation=fxquant.QSpec("uint8", bits=7))
    assert counted(lambda m, x: m.last(m.norm(x)), qconfig=qconfig) == (0, 1)


def test_its_condition_is_what_keeps_codes_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the check: without it infinities get code 0."""
    monkeypatch.setattr(x86_quantize, "largest", lambda _: 1.0)
    if byte_kernel() is not None:
        with pytest.raises(AssertionError):
            test_infinities_of_the_input_saturate()


def test_lowering_again_changes_nothing() -> None:
    model = One(lambda m, x: m.last(m.norm(x)), **parts()).eval()
    made = fxquant.quantize(model, [torch.randn(4, WIDTH)], mode="static", backend="x86")
    code = str(made.graph)
    report = RuleSet(x86_quantize.QUANTIZE_RULES).apply(Editor(made))
    assert (report.hits, str(made.graph)) == ({}, code)


def test_such_models_are_copied_compiled_and_traced() -> None:
    x = torch.randn(4, 6, WIDTH)
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)).eval()
    made = fxquant.quantize(model, [x], mode="static", backend="x86")
    with torch.no_grad():
        wanted = made(x)
        assert torch.equal(pickle.loads(pickle.dumps(made))(x), wanted)
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)(x)
    assert torch.allclose(compiled, wanted, rtol=0, atol=0.05)


def test_it_is_one_node_of_a_traced_graph() -> None:
    traced = torch.fx.symbolic_trace(lambda x: quantize_bounded(x, SCALE, ZERO, *FULL))
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [quantize_bounded]
    x = numbers(4, 32)
    assert torch.equal(traced(x), quantize_bounded(x, SCALE, ZERO, *FULL))
