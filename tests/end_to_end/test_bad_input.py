"""Models that are not what quantize expects: each works, or is refused before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigError
from fxquant.record import record_of

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))
        return y


class Called(Net):
    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = super().__call__(x * 2)
        return y


class DoubledConv(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = super().__call__(x)
        return y * 2


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z: Tensor = self.net(x + y)
        return z


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(5))

    def forward(self, x: Tensor) -> Any:
        return x * self.get_buffer("steps")


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.fft.fft(self.lift(x)) @ self.mix).abs()


def with_hook(register: Callable[[Net], Any]) -> nn.Module:
    """A network after ``register`` has been called with it."""
    model = Net()
    register(model)
    return model


def doubled_inside() -> nn.Module:
    """A network with a layer whose class overrides ``__call__``."""
    model = Net()
    model.conv = DoubledConv(3, 8, 3, padding=1)
    return model


def compiled_inside() -> nn.Module:
    """A network with a compiled layer; compiling is lazy, so this costs nothing."""
    model = Net()
    setattr(model, "conv", torch.compile(model.conv, backend="eager"))  # noqa: B010 - torch says it is a function
    return model


def fingerprint(model: nn.Module) -> list[Any]:
    """All that quantizing must leave as it found it, bit for bit."""
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = [list(h) for h in (module._forward_hooks, module._forward_pre_hooks)]
        found.append((name, id(module), type(module), module.training, hooks, list(vars(module))))
    for name, held in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(held) or held.is_meta:
            found.append((name, id(held)))
        else:
            grad = None if held.grad is None else held.grad.tolist()
            found.append((name, id(held), str(held.dtype), held.tolist(), held._version, grad))
    return found


def sqnr(exact: Tensor, found: Tensor) -> float:
    """Signal to noise in dB."""
    noise = float((exact - found).abs().square().sum().detach())
    return 10 * math.log10(float(exact.abs().square().sum().detach()) / noise)


WORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "forward hook": (
        lambda: with_hook(lambda m: m.conv.register_forward_hook(lambda mod, a, out: out * 2)),
        (X,),
    ),
    "forward pre-hook": (
        lambda: with_hook(lambda m: m.conv.register_forward_pre_hook(lambda mod, a: (a[0] + 1,))),
        (X,),
    ),
    "hook with kwargs": (
        lambda: with_hook(
            lambda m: m.norm.register_forward_hook(lambda mod, a, k, o: o * 2, with_kwargs=True)
        ),
        (X,),
    ),
    "backward hook": (
        lambda: with_hook(
            lambda m: m.conv.register_full_backward_hook(lambda mod, given, made: None)
        ),
        (X,),
    ),
    "hook on the model, wrapped": (
        lambda: nn.Sequential(
            with_hook(lambda m: m.register_forward_hook(lambda mod, a, out: out * 2))
        ),
        (X,),
    ),
    "parametrized": (
        lambda: with_hook(lambda m: nn.utils.parametrizations.weight_norm(m.conv)),
        (X,),
    ),
    "compiled": (lambda: torch.compile(Net(), backend="eager"), (X,)),  # type: ignore[dict-item,return-value]  # torch says it is a function
    "compiled inside": (compiled_inside, (X,)),
    "data parallel": (lambda: nn.DataParallel(Net()), (X,)),
    "graph module": (lambda: torch.fx.symbolic_trace(Net().eval()), (X,)),
    "two inputs": (Sum, (X, X.flip(0))),
    "layer that overrides __call__": (doubled_inside, (X,)),
    "complex inside": (Spectrum, (X[:, 0, 0],)),
}


@pytest.mark.parametrize("name", WORKS)
def test_it_works_and_the_model_is_untouched(name: str) -> None:
    make, inputs = WORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    # A compiled model is compared as the module inside: compiling it would need a compiler.
    plain = getattr(model, "_orig_mod", model)
    if name == "compiled inside":
        plain = Net().eval()
        plain.load_state_dict(
            {n.replace("_orig_mod.", ""): t for n, t in model.state_dict().items()}
        )
    before, state = fingerprint(model), torch.get_rng_state()
    q = fxquant.quantize(model, [inputs], backend="reference")
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert any(op.int8 for op in record_of(q).ops)
    # Two layers in int8 keep about 40 dB; a hook or a call that is lost keeps less than 20.
    assert sqnr(plain(*inputs), q(*inputs)) > 28


REFUSED: dict[str, tuple[Callable[[], Any], Tensor, str]] = {
    "hook on the model": (
        lambda: with_hook(lambda m: m.register_forward_hook(lambda mod, a, out: out * 2)),
        X,
        r"Net itself carries forward hooks.*nn\.Sequential\(model\)",
    ),
    "pre-hook on the model": (
        lambda: with_hook(lambda m: m.register_forward_pre_hook(lambda mod, a: (a[0] * 2,))),
        X,
        r"Net itself carries forward hooks",
    ),
    "overrides __call__": (Called, X, r"Called defines __call__.*move it to forward"),
    "float64": (lambda: Net().double(), X.double(), r"conv\.weight is torch\.float64.*\.float\(\)"),
    "float16": (lambda: Net().half(), X.half(), r"conv\.weight is torch\.float16.*\.float\(\)"),
    "bfloat16": (lambda: Net().bfloat16(), X.bfloat16(), r"torch\.bfloat16.*\.float\(\)"),
    "meta": (lambda: Net().to("meta"), X, r"on the meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), X, r"has no shape yet"),
    "no float": (Integers, torch.arange(5), r"computes on no floating-point tensors"),
    "scripted": (lambda: torch.jit.script(Net().eval()), X, r"is a ScriptModule"),
    "traced": (lambda: torch.jit.trace(Net().eval(), X), X, r"is a ScriptModule"),
    "class": (lambda: Net, X, r"is the class Net: pass a module"),
    "state dict": (lambda: Net().state_dict(), X, r"is a OrderedDict"),
    "exported": (lambda: torch.export.export(Net().eval(), (X,)), X, r"the nn\.Module that was"),
    "module of an exported program": (
        lambda: torch.export.export(Net().eval(), (X,)).module(),
        X,
        r"the nn\.Module that was",
    ),
    "quantized": (
        lambda: fxquant.quantize(Net().eval(), [X], backend="reference"),
        X,
        r"made by fxquant",
    ),
    "prepared": (lambda: fxquant.prepare(Net().eval(), example_inputs=X), X, r"made by fxquant"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_any_work(name: str) -> None:
    make, x, message = REFUSED[name]
    model = make()
    if isinstance(model, nn.Module) and not isinstance(model, torch.fx.GraphModule):
        model.eval()
    before = fingerprint(model) if isinstance(model, nn.Module) else None
    with pytest.raises(ConfigError, match=message):
        fxquant.quantize(model, [x], backend="reference")
    assert before is None or fingerprint(model) == before


def test_one_float32_parameter_is_enough_to_try() -> None:
    """Mixed models are judged op by op."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    q = fxquant.quantize(model, [torch.randn(4, 8)], backend="reference")
    assert any(op.int8 for op in record_of(q).ops)
