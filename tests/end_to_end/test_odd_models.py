"""Models written in odd ways: captured as they are, or told why a part stays their own code."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.graph.functions import set_item
from tests.helpers import Calls

pytestmark = pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")
X, ROWS = (2, 3, 8, 8), (4, 8)


def walrus(m: Any, x: Tensor) -> Any:
    if (n := x.shape[0]) >= 0 and (y := m.c(x)) is not None:
        return m.l(y.mean((2, 3))) * (1.0 if y.shape[-1] > 4 else 0.5) + n
    return None


def early_return(m: Any, x: Tensor) -> Any:
    for place, layer in enumerate((m.l, m.k, m.l)):
        x = torch.relu(layer(x))
        if place == 1:
            return x
    return x


def nested_functions(m: Any, x: Tensor) -> Any:
    def block(layer: nn.Module, t: Tensor, act: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
        def inner(u: Tensor) -> Tensor:
            return act(layer(u))

        return inner(t)

    return block(m.d, block(m.c, x), act=lambda t: t * torch.sigmoid(t))


def without_gradients(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = m.l(x)
    with torch.autocast("cpu", enabled=False), torch.set_grad_enabled(False):
        y = y.relu()
    return m.k(y.detach())


def odd_sizes(m: Any, x: Tensor) -> Any:
    if x.shape[-1] % 2:
        x = F.pad(x, (0, 1))
    return F.max_pool2d(m.c(x), 2)


def assertions(m: Any, x: Tensor) -> Any:
    assert x.dim() == 4, f"expected 4D, got {x.dim()}D"
    _, _, height, width = x.shape
    if height < 2 or width < 2:
        raise ValueError(f"too small: {height}x{width}")
    return m.c(x)


def comprehensions(m: Any, x: Tensor) -> Any:
    outs = [layer(x) for layer in (m.l, m.k)]
    outs += [out.relu() for out in outs if out is not None]
    first, *rest = outs
    by_name = dict(zip("abcd", outs, strict=True))
    return torch.cat([*rest, first], -1), torch.stack(list(by_name.values())[::-1]), len(outs)


def ellipsis(m: Any, x: Tensor) -> Any:
    q, k = m.l(x), m.k(x)
    weights = torch.einsum("...qd,...kd->...qk", q, k) / math.sqrt(8)
    return torch.einsum("...qk,...kd->...qd", weights.softmax(-1), k)


def spectrum(m: Any, x: Tensor) -> Any:
    spectrum = torch.fft.rfft(m.l(x), dim=-1)
    turned = spectrum * torch.exp(1j * torch.angle(spectrum) * 0.1)
    return m.k(torch.fft.irfft(turned, n=x.shape[-1], dim=-1))


def two_shapes(m: Any, x: Tensor) -> Any:
    return m.c(x).mean((2, 3)) + m.c(F.avg_pool2d(x, 2)).mean((2, 3))


def numpy_sizes(m: Any, x: Tensor) -> Any:
    window = torch.from_numpy(np.hanning(x.shape[-1]).astype(np.float32))
    return m.k(m.l(x) * window) * int(np.ceil(np.sqrt(x.shape[-1])))


def numpy_values(m: Any, x: Tensor) -> Any:
    return m.k(torch.from_numpy(np.tanh(m.l(x).detach().numpy())))


def vmapped(m: Any, x: Tensor) -> Any:
    return m.k(torch.vmap(lambda row: row * 2 + row.sum())(m.l(x)))


def vmapped_layer(m: Any, x: Tensor) -> Any:
    return m.k(torch.vmap(m.l)(x))


def gradient(m: Any, x: Tensor) -> Any:
    return m.k(torch.func.grad(lambda y: y.square().sum())(m.l(x)))


def generator(m: Any, x: Tensor) -> Any:
    def steps(y: Tensor) -> Any:
        for layer in (m.l, m.k):
            y = layer(y)
            yield y

    *_, last = steps(x)
    return last, dict(zip("ab", steps(x), strict=True))


def item_set(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    y[:, 0] = 1.0
    return m.d(y)


def masked_set(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    y[y < 0] = 0.0
    return m.d(y)


def placed(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    border = y.new_zeros(y.shape[0], y.shape[1], y.shape[2] + 2, y.shape[3] + 2)
    border[:, :, 1:-1, 1:-1] = y
    return m.d(border)


def copied_first(m: Any, x: Tensor) -> Any:
    x = x.clone()
    x[:, 0] = 0
    return m.d(m.c(x))


def boxes(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    y[..., 0:2] = y[..., 0:2].sigmoid() * 2 - 0.5
    y[:, 1:3] += 1
    y[:, 3].mul_(0.5)
    return m.d(y)


def caught(m: Any, x: Tensor) -> Any:
    try:
        return m.k(m.l(x).view(-1, 3 * 8))
    except RuntimeError:
        return m.k(m.l(x))


def chosen(m: Any, x: Tensor) -> Any:
    y = m.l(x)
    z = torch.where(y > 0, y, y * 0.1)
    return m.k(z), (z > -9).float().mean()


MODELS: list[tuple[Callable[[Any, Tensor], Any], tuple[int, ...], int]] = [
    (walrus, X, 2), (early_return, ROWS, 2), (nested_functions, X, 2),
    (without_gradients, ROWS, 2), (odd_sizes, (2, 3, 7, 9), 1), (assertions, X, 1),
    (comprehensions, ROWS, 2), (ellipsis, (2, 5, 8), 2), (spectrum, ROWS, 2), (two_shapes, X, 2),
    (numpy_sizes, ROWS, 2), (numpy_values, ROWS, 2), (vmapped, ROWS, 2),
    (vmapped_layer, (4, 5, 8), 1), (gradient, ROWS, 1), (generator, ROWS, 4), (item_set, X, 2),
    (masked_set, X, 2), (placed, X, 2), (copied_first, X, 2), (boxes, X, 2),
    (caught, ROWS, 2), (chosen, ROWS, 2),
]  # fmt: skip


class Odd(Calls):
    """Two convolutions, two linears, and a way to use them."""

    def forward(self, x: Tensor) -> Any:
        """As the body says."""
        return self.body(self, x)


def leaves(value: Any) -> list[Any]:
    """Everything in nested containers."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, tuple | list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def check_near(wanted: Any, found: Any) -> None:
    """The same containers, tensors to a twelfth of their norm."""
    assert type(found) is type(wanted)
    for a, b in zip(leaves(wanted), leaves(found), strict=True):
        if isinstance(a, Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert float((a - b).norm()) <= 0.08 * float(a.norm())
        else:
            assert a == b


@pytest.mark.parametrize("backend", ["x86", "reference"])
@pytest.mark.parametrize(
    ("body", "shape", "least"), MODELS, ids=lambda v: getattr(v, "__name__", "")
)
def test_it_is_quantized_as_it_is(
    body: Callable[[Any, Tensor], Any], shape: tuple[int, ...], least: int, backend: str
) -> None:
    torch.manual_seed(0)
    layers = {
        "c": nn.Conv2d(3, 8, 3, padding=1), "d": nn.Conv2d(8, 8, 3, padding=1),
        "l": nn.Linear(8, 8), "k": nn.Linear(8, 8),
    }  # fmt: skip
    model = Odd(body, **layers).eval()
    data = [torch.randn(16, *shape[1:]) for _ in range(2)]
    kept = data[0].clone()
    modes: list[tuple[Any, Any]] = [("static", data), ("dynamic", None)]
    for mode, given in modes:
        made: Any = fxquant.quantize(
            model,
            given,
            mode=mode,
            example_inputs=(data[0],),
            backend=backend,
        )
        layers_in_int8 = [op for op in fxquant.report(made).ops if op.int8 and op.weights]
        assert len(layers_in_int8) >= least
        for count in (16, 1, 5):
            x = torch.randn(count, *shape[1:])
            with torch.no_grad():
                check_near(model(x), made(x))
        with torch.no_grad():
            twin = pickle.loads(pickle.dumps(made))
            pairs = zip(leaves(twin(x)), leaves(made(x)), strict=True)
            assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)
    assert torch.equal(kept, data[0])


def test_an_input_that_is_written_to_is_the_caller_s() -> None:
    class Marks(nn.Module):
        """Writes into what it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            """Through both."""
            y: Tensor = self.head(self.layer(x))
            x[:, 0] = 7.0
            return y

    made = fxquant.quantize(Marks().eval(), [torch.randn(4, 8)], backend="reference")
    x = torch.randn(4, 8)
    made(x)
    assert (x[:, 0] == 7.0).all()


def test_set_item_is_one_call_and_leaves_its_input_alone() -> None:
    x = torch.zeros(2, 3)
    made = set_item(x, (slice(None), 1), torch.ones(2))
    assert torch.equal(made, torch.tensor([[0.0, 1.0, 0.0]] * 2)) and not x.any()
    traced = torch.fx.symbolic_trace(lambda x, v: set_item(x, (..., 0), v))
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [set_item]


@dataclasses.dataclass
class Result:
    """What a model returns."""

    y: Tensor
    parts: tuple[Tensor, ...] = ()
    name: str = ""
    nothing: None = None


class Base(nn.Module):
    """Half of the model below."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gain = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Any:
        """One layer."""
        return self.first(x)


class Derived(Base):
    """Keyword-only arguments beside ``*rest``, a property, ``super()``, a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})

    @property
    def doubled(self) -> Tensor:
        """A parameter, times two."""
        return self.gain * 2

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *rest: Tensor, which: str = "a", n: int = 2
    ) -> Result:
        """Through it."""
        y = super().forward(x).relu() * self.doubled
        y = y if mask is None else y.masked_fill(mask, 0.0)
        for layer in self.layers.values():
            y = layer(y) + sum(rest)
        return Result(self.layers[which](y) * n, (y, y.mean(-1)), name=which)


@pytest.mark.parametrize("backend", ["x86", "reference"])
def test_signatures_stay_what_they_are(backend: str) -> None:
    torch.manual_seed(0)
    model, x = Derived().eval(), torch.randn(4, 8)
    for args in ((x,), (x, x > 1), (x, x > 1, x, 2 * x)):
        made: Any = fxquant.quantize(model, mode="dynamic", example_inputs=args, backend=backend)
        for each in (made, pickle.loads(pickle.dumps(made)), pickle.loads(pickle.dumps(made))):
            with torch.no_grad():
                wanted, found = model(*args), each(*args)
            assert isinstance(found, Result) and found.name == "a" and found.nothing is None
            check_near([wanted.y, *wanted.parts], [found.y, *found.parts])
            with pytest.raises(fxquant.errors.GuardError, match="which"):
                each(*args, which="b")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted_modules_are_called_as_they_are() -> None:
    torch.manual_seed(0)
    script = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval())
    layers = {"l": nn.Linear(8, 8), "k": nn.Linear(8, 8), "script": script}
    model = Odd(lambda m, x: m.k(m.script(m.l(x))), **layers).eval()
    made = fxquant.quantize(model, [torch.randn(16, 8)], backend="reference")
    assert sum(op.int8 for op in fxquant.report(made).ops) == 2
    for count in (1, 16):
        x = torch.randn(count, 8)
        with torch.no_grad():
            check_near(model(x), made(x))


def test_where_an_op_fails_and_is_caught_other_sizes_go_their_own_way() -> None:
    """No guard can say that an op will fail again: the module stays its own code."""
    model = Odd(caught, l=nn.Linear(8, 8), k=nn.Identity()).eval()
    made = fxquant.quantize(model, [torch.randn(4, 8)], backend="reference")
    for count in (4, 3, 6):
        x = torch.randn(count, 8)
        with torch.no_grad():
            check_near(model(x), made(x))
    why = fxquant.report(made).to_dict()["parts"][0]["why"]
    assert "an op fails on the example" in why and "test_odd_models.py" in why


def _pictures() -> nn.Module:
    parts = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only", "bfloat16"])
@pytest.mark.parametrize("inside", [False, True])
def test_inference_tensors(mode: Any, inside: bool) -> None:
    """Weights, data and calls from inference mode; the model is left as it is."""
    with torch.inference_mode():
        net, x = _pictures(), torch.randn(2, 3, 8, 8)
        kept = {name: value.clone() for name, value in net.state_dict().items()}
    data = [x] if mode == "static" else None
    with torch.inference_mode(inside), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = fxquant.quantize(net, data, mode=mode, example_inputs=(x,))
    with torch.inference_mode():  # torch refuses such weights outside of it
        wanted = net(x)
    x = x.clone()
    found = q(x).detach()
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert torch.equal(copy.deepcopy(q)(x), found)
    assert all(p.is_inference() and p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())


def test_training_from_inference_tensors() -> None:
    with torch.inference_mode():
        net, x = _pictures(), torch.randn(2, 3, 8, 8)
        prepared = fxquant.prepare(net, mode="qat", example_inputs=(x,))
    prepared.train()
    prepared(x).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("channels", [3, 8])  # a first layer that reads the picture, and others
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 4])
def test_same_padding_with_sides_of_unequal_width(channels: int, rank: int, kernel: int) -> None:
    """The wider side is padded in front of the convolution, with the code of 0.0."""
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](channels, 8, kernel, padding="same")
    net, x = nn.Sequential(conv, nn.ReLU()).eval(), torch.randn(2, channels, *(9,) * rank)
    wanted = net(x).detach()
    for backend in ("x86", "reference"):
        found = fxquant.quantize(net, [x], backend=backend)(x).detach()
        assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
