"""Float sums inside the kernel: what they compute, and when the other summand is overwritten."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_forward_hook

import fxquant
from fxquant.backends import x86_float_sums, x86_linear_add
from fxquant.backends.x86 import X86
from fxquant.backends.x86_float_sums import may_overwrite
from fxquant.backends.x86_layers import PostOp
from fxquant.backends.x86_linear_add import X86LinearAdd
from fxquant.errors import VerifyError
from fxquant.graph.op_table import is_op
from tests.backends.lockstep import check_ops
from tests.backends.oracles import real, some_codes, uint8, weight_codes
from tests.helpers import One

pytestmark = pytest.mark.skipif(X86().missing() is not None, reason=str(X86().missing()))

# The kernel


def layer_of(
    overwrites: bool, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[X86LinearAdd, Callable[[Tensor], Tensor]]:
    """A layer of 37 inputs and 24 outputs, and the exact linear."""
    torch.manual_seed(0)
    weight, scale = weight_codes(24, 37), torch.rand(24) * 0.01 + 0.001
    reads, shift = uint8(0.05, 120), torch.randn(24) if bias else None
    layer = X86LinearAdd(weight, scale, shift, reads, None, PostOp(), overwrites=overwrites)
    if dtype is not torch.float32:
        layer.write_real(dtype)

    def exact(codes: Tensor) -> Tensor:
        held = weight.double() * scale.double().unsqueeze(1)
        return F.linear(real(codes, reads), held, None if shift is None else shift.double())

    return layer, exact


SHAPES = [(5, 37), (3, 4, 37), (1, 37), (2, 3, 4, 37), (37,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overwrites", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_sums_match_float64(
    shape: tuple[int, ...], overwrites: bool, dtype: torch.dtype, bias: bool
) -> None:
    layer, exact = layer_of(overwrites, dtype, bias)
    codes = some_codes(*shape)
    other = torch.randn(*shape[:-1], 24).to(dtype)
    wanted = exact(codes) + other.double()
    given = other.clone()
    with torch.no_grad():
        made = layer(codes, given)
    assert (made.dtype, made.shape) == (dtype, wanted.shape)
    # One rounding of the sum; in float32 those of two scales and of the bias, too.
    limit = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-21
    assert float((made - wanted).abs().max()) <= limit * float(wanted.abs().max())
    assert torch.equal(given, made if overwrites else other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_kernel_that_keeps_the_summand(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """As on processors without AVX512, where there is none in bfloat16: a copy is added to."""
    monkeypatch.setattr(x86_linear_add, "keeps_summand", lambda _real: False)
    layer, exact = layer_of(False, dtype)
    codes, other = some_codes(5, 37), torch.randn(5, 24).to(dtype)
    given = other.clone()
    with torch.no_grad():
        made = layer(codes, given)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(codes, given)
    wanted = exact(codes) + other.double()
    limit = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-21
    assert float((made - wanted).abs().max()) <= limit * float(wanted.abs().max())
    # In compiled graphs torch adds: two roundings.
    assert float((compiled - wanted).abs().max()) <= 2 * limit * float(wanted.abs().max())
    assert torch.equal(given, other)


@pytest.mark.parametrize("overwrites", [True, False])
def test_other_summands_are_added_by_torch(overwrites: bool) -> None:
    layer, exact = layer_of(overwrites)
    codes = some_codes(3, 4, 37)
    wide = torch.randn(3, 24, 4).transpose(1, 2)
    others = {
        "a row": torch.randn(24),
        "a larger one": torch.randn(2, 3, 4, 24),
        "float64": torch.randn(3, 4, 24, dtype=torch.float64),
        "bfloat16": torch.randn(3, 4, 24).bfloat16(),
        "integers": torch.randint(-9, 9, (3, 4, 24)),
        "another layout": wide,
        "every other": torch.randn(3, 4, 48)[..., ::2],
        "expanded": torch.randn(1, 1, 24).expand(3, 4, 24),
    }
    for name, other in others.items():
        kept = other.clone()
        with torch.no_grad():
            made = layer(codes, other)
        wanted = exact(codes) + other
        assert made.dtype == torch.promote_types(torch.float32, other.dtype), name
        assert torch.allclose(made.double(), wanted, rtol=0, atol=1e-5), name
        assert torch.equal(other, kept), f"{name}: copies are overwritten, not what was given"


def test_empty_batches() -> None:
    layer, _ = layer_of(True)
    with torch.no_grad():
        made = layer(some_codes(3, 37)[:0], torch.randn(0, 24))
    assert made.shape == (0, 24)


def test_where_gradients_are_kept_nothing_is_overwritten() -> None:
    layer, exact = layer_of(True)
    codes, other = some_codes(3, 37), torch.randn(3, 24)
    kept = other.clone()
    assert torch.allclose(layer(codes, other).double(), exact(codes) + kept, rtol=0, atol=1e-5)
    assert torch.equal(other, kept), "another op may have kept it for its gradient"
    other.requires_grad_()
    layer(codes, other).sum().backward()
    assert other.grad is not None
    assert torch.equal(other.grad, torch.ones(3, 24))


def test_copies_and_pickles_compute_the_same() -> None:
    layer, _ = layer_of(True)
    codes, other = some_codes(3, 37), torch.randn(3, 24)
    with torch.no_grad():
        wanted = layer(codes, other.clone())
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(codes, other.clone()), wanted)


# The rule

WIDTH = 32
Body = Callable[[Any, Any], Any]


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "norm": nn.LayerNorm(WIDTH),
        "second": nn.LayerNorm(WIDTH),
        "user": _Keeps(),
    }
    made.update({name: nn.Linear(WIDTH, WIDTH) for name in ("a", "b", "c")})
    return made


class _Keeps(nn.Module):
    """A user's op that no table knows, and that returns what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        torch.Tensor.sort(x)
        return x if x.numel() else x + 1


def lowered(body: Body, x: Tensor | None = None, **options: Any) -> GraphModule:
    """The x86 model, every op of which gives what the reference's gives."""
    x = torch.randn(4, 6, WIDTH) if x is None else x
    found = check_ops(One(body, **parts()).eval(), x, **options)
    with torch.no_grad():
        for _ in range(2):  # nothing of a first call is left in a second
            made, wanted = found.lowered(x.clone()), found.reference(x.clone())
            # Codes next to ties, see test_x86_quantize.py, are all that differs.
            assert float((made - wanted).abs().mean()) <= 1e-3 * float(wanted.abs().max())
    return found.lowered


def sums(module: GraphModule) -> list[bool]:
    """For each sum in a kernel, whether it overwrites."""
    found = []
    for node in module.graph.nodes:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, X86LinearAdd):
            assert layer.overwrites == ("overwrites" in node.meta)
            found.append(layer.overwrites)
    return found


def post_norm(m: Any, x: Any) -> Any:
    y = m.norm(m.a(x))
    return m.c(m.second(y + m.b(F.gelu(m.c(y)))))


def pre_norm(m: Any, x: Any) -> Any:
    y = m.norm(m.a(x))
    y = y + m.b(m.second(y))
    y = m.c(m.norm(y)) + y
    return m.a(m.second(y))


OVERWRITTEN: dict[str, tuple[Body, list[bool]]] = {
    "after a norm": (post_norm, [True]),
    "a stream": (pre_norm, [True, True]),
    "two layers": (lambda m, x: m.c(m.norm(m.a(x) + m.b(x.relu()))), [True]),
    "attention": (
        lambda m, x: m.c(m.norm(F.scaled_dot_product_attention(x, x, m.norm(x)) + m.b(x))),
        [True],
    ),
}


def summed(m: Any, x: Any, y: Any) -> Any:
    """The sum of ``y`` and a layer, normed and read by a layer."""
    return m.c(m.second(y + m.a(x)))


def returned(m: Any, x: Any) -> Any:
    y = m.norm(x)
    return torch.cat([summed(m, x, y), y])


def read_later(m: Any, x: Any) -> Any:
    y = m.norm(x)
    return torch.cat([summed(m, x, y), y.sigmoid()])


def view_read_later(m: Any, x: Any) -> Any:
    y = m.norm(x)
    view = y.flatten(1).view_as(y)
    return torch.cat([summed(m, x, y), view.sin()])


def perhaps_kept(m: Any, x: Any) -> Any:
    y = m.norm(x)
    kept = m.user(y)
    return torch.cat([summed(m, x, y), kept.sin()])


KEPT: dict[str, Body] = {
    "the input": lambda m, x: summed(m, x, x),
    "a view of something": lambda m, x: summed(m, x, m.norm(x).flip(1).view(4, 6, WIDTH)),
    "a parameter": lambda m, x: summed(m, x, m.b.weight[:6].expand(4, 6, WIDTH)),
    "it is returned": returned,
    "it is read later": read_later,
    "a view of it is read later": view_read_later,
    "an op that may keep it": perhaps_kept,
}


@pytest.mark.parametrize("name", OVERWRITTEN)
def test_it_overwrites(name: str) -> None:
    body, wanted = OVERWRITTEN[name]
    assert sums(lowered(body)) == wanted


@pytest.mark.parametrize("name", KEPT)
def test_it_does_not_overwrite(name: str) -> None:
    assert sums(lowered(KEPT[name])) == [False]


def layer_read_twice(m: Any, x: Any) -> Any:
    y = m.a(x)
    return torch.cat([m.c(m.norm(m.second(x) + y)), y.sin()])


def broadcast(m: Any, x: Any) -> Any:
    y = m.second(x[:, :1])
    return torch.cat([m.c(m.norm(m.a(x) + y)), m.b(y)], 1)


NONE: dict[str, Body] = {
    "a broadcast sum": broadcast,
    "a number": lambda m, x: m.c(m.norm(m.a(x) + 1.0)),
    "another factor": lambda m, x: m.c(m.norm(torch.add(m.second(x), m.a(x), alpha=0.5))),
    "a difference": lambda m, x: m.c(m.norm(m.second(x) - m.a(x))),
    "a layer read twice": layer_read_twice,
    "an activation between": lambda m, x: m.c(m.norm(m.second(x) + m.a(x).sin())),
}


@pytest.mark.parametrize("name", NONE)
def test_where_it_does_not_fire(name: str) -> None:
    assert sums(lowered(NONE[name])) == []


def test_sums_whose_shapes_calibration_did_not_see() -> None:
    """Of float values it sees those next to codes; the module looks at every call."""
    assert sums(lowered(lambda m, x: m.c(m.norm(m.a(x) + m.second(x[:, :1]))))) == [True]
    assert sums(lowered(lambda m, x: m.c(m.norm(m.a(x[:, :1]) + m.second(x))))) == [True]


def test_its_conditions_say_why() -> None:
    found = lowered(NONE["a broadcast sum"])
    assert "the sum broadcasts" in [why for *_, why in fxquant.history(found).near("x86-float-sum")]


def test_a_shared_weight_is_left_to_the_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.b.weight = self.a.weight
            self.norm, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            result: Tensor = self.b(self.second(y + self.a(y)))
            return result

    x = torch.randn(4, 6, WIDTH)
    assert sums(check_ops(Tied().eval(), x).lowered) == []


def test_in_bfloat16_the_sum_is_rounded_once() -> None:
    def body(m: Any, x: Any) -> Any:
        return m.c(m.norm(m.a(x) + m.b(x.relu())))

    made = fxquant.quantize(
        One(body, **parts()).eval(), [torch.randn(4, 6, WIDTH)], qconfig="int8-bf16", backend="x86"
    )
    layers = [module for module in made.modules() if isinstance(module, X86LinearAdd)]
    assert [layer.real for layer in layers] == [torch.bfloat16]


def test_the_report_has_both_ops() -> None:
    made = lowered(post_norm)
    rows = {op.path: op for op in fxquant.report(made).ops}
    assert (rows["b"].int8, rows["b"].kernel) == (True, "X86LinearAdd")
    assert (rows["add"].int8, rows["add"].kernel) == (False, "float")
    assert "%second divides each row" in rows["add"].why


def test_other_batch_sizes_and_shapes() -> None:
    made = lowered(pre_norm)
    model = One(pre_norm, **parts()).eval()
    for shape in ((1, 6, WIDTH), (9, 2, WIDTH), (0, 6, WIDTH)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert made(x).shape == model(x).shape
            assert torch.allclose(made(x), model(x), atol=0.1)


def test_lowered_sums_compile() -> None:
    made, x = lowered(pre_norm), torch.randn(4, 6, WIDTH)
    with torch.no_grad():
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)(x)
        # Compiled graphs quantize by the rule: a code here and there.
        assert float((compiled - made(x)).abs().mean()) <= 1e-3 * float(compiled.abs().max())


@pytest.mark.parametrize("where", ["norm", "second"])
@pytest.mark.parametrize("kind", ["after", "before", "global"])
def test_what_hooks_keep_is_not_overwritten(where: str, kind: str) -> None:
    made, x = lowered(pre_norm), torch.randn(4, 6, WIDTH)
    twin = copy.deepcopy(made)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(value: Tensor) -> None:
        kept.append((value, value.clone()))

    for model in (made, twin):
        kept.clear()
        module = model.get_submodule(where)
        if kind == "before":
            handle = module.register_forward_pre_hook(lambda _, given: keep(given[0]))
        elif kind == "after":
            handle = module.register_forward_hook(lambda _, given, value: keep(value))
        else:
            handle = register_module_forward_hook(lambda _, given, value: keep(value))
        with torch.no_grad():
            wanted = model(x)
        handle.remove()
        assert kept and all(torch.equal(value, copied) for value, copied in kept)
        with torch.no_grad():
            assert torch.equal(model(x), wanted)
    assert copy.deepcopy(made).state_dict().keys() == made.state_dict().keys()


def test_without_hooks_memory_is_used_again() -> None:
    made, x = lowered(pre_norm), torch.randn(4, 6, WIDTH)
    layers = [module for module in made.modules() if isinstance(module, X86LinearAdd)]
    with torch.no_grad(), mock.patch.object(X86LinearAdd, "_is_hooked", lambda _: True):
        wanted = made(x)
    with torch.no_grad():
        assert torch.equal(made(x), wanted)
    assert [layer._is_hooked() for layer in layers] == [False, False]


def test_a_wrong_answer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the checks: the verifier, and what this file compares."""
    monkeypatch.setattr(x86_float_sums, "may_overwrite", lambda *_: True)
    with pytest.raises(VerifyError, match="reads later"):
        lowered(KEPT["it is read later"])
    with pytest.raises(AssertionError):
        lowered(KEPT["a view of it is read later"])


def test_may_overwrite_asks_every_reader() -> None:
    made = fxquant.quantize(
        One(pre_norm, **parts()).eval(), [torch.randn(4, 6, WIDTH)], backend="reference"
    )
    graph = made.graph
    adds = [node for node in graph.nodes if is_op(node, "add")]
    norm = next(node for node in adds[0].all_input_nodes if is_op(node, "layer_norm"))
    assert may_overwrite(norm, adds[0])
    early = next(user for user in norm.users if user is not adds[0])
    assert not may_overwrite(norm, early)
    assert not may_overwrite(next(n for n in graph.nodes if n.op == "placeholder"), adds[0])
