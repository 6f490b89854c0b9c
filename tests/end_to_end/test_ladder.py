"""The ladder, end to end: whatever the model's Python does, it is quantized and runs rightly."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigError, GuardError, TraceError

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 16, 16, generator=generator) for _ in range(3)]


def quantize(model: nn.Module, given: Any = None, **more: Any) -> Any:
    return fxquant.quantize(model, data() if given is None else given, backend="reference", **more)


def sqnr(real: Tensor, codes: Tensor) -> float:
    noise = (real - codes).double().square().sum()
    return float(10 * torch.log10(real.double().square().sum() / noise))


def close(model: nn.Module, q: nn.Module, *args: Any, **kwargs: Any) -> None:
    """25 dB is far below what 8 bits lose here and far above what a wrong branch leaves."""
    with torch.no_grad():
        assert sqnr(model(*args, **kwargs), q(*args, **kwargs)) > 25


class Gate(nn.Module):
    """Branches on what a tensor holds; one child is never reached, one is called in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.never = nn.Conv2d(8, 8, 1)
        self.both = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        if x.sum().item() > 1e9:
            return self.never(x)
        y: Tensor = self.body(x) + self.both(x.mean((2, 3)))[:, :, None, None]
        return y + self.both(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Net(nn.Module):
    """A model whose middle cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = Gate()
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gate(torch.relu(self.stem(x))).mean((2, 3)))
        return y

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)


class Whole(nn.Module):
    """The root itself branches on values, around a model that does so inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.last = nn.Linear(10, 10)

    def forward(self, x: Tensor, flag: bool = False, *, double: bool = False) -> Tensor:
        y = self.net(x)
        while y.abs().max() > 1.0:
            y = y / 2
        z: Tensor = self.last(y)
        return z * 2 if double else z


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def test_the_innermost_module_stays_code_and_its_parts_are_quantized() -> None:
    model = seeded(Net)
    q = quantize(model)
    close(model, q, X)
    close(model, q, torch.randn(1, 3, 9, 12))
    report = fxquant.report(q)
    ways = {part["path"]: part for part in report.to_dict()["parts"]}
    assert report.to_dict()["capture"] == "torch.fx symbolic tracing, in pieces"
    assert "if x.sum().item() > 1e9" in ways[""]["why"]
    assert ways["gate.never"]["why"] == "the example never reaches it"
    assert ways["gate.both"]["why"] == "it is called in several ways"
    assert {path for path, part in ways.items() if part["capture"].startswith("torch.fx")} == {
        *("", "gate.body", "gate.blocks.0", "gate.blocks.1")
    }
    assert {op.path for op in report.ops if op.int8 and op.weights} == {
        *("stem", "head", "gate.body.0", "gate.body.2", "gate.blocks.0", "gate.blocks.1")
    }
    text = str(report)
    assert "not traced as a whole: a branch depends on what a tensor holds" in text
    assert "gate.never left in float: the example never reaches it" in text


def test_history_and_diff_cover_the_parts() -> None:
    q = quantize(seeded(Net))
    history = fxquant.history(q)
    assert "gate.blocks.1" in history.after("capture")
    changed = {change.path for change in fxquant.diff(q).changes}
    assert {"stem", "gate.body.0", "gate.blocks.1"} <= changed


def test_a_root_that_branches_on_values_is_called_as_before() -> None:
    model = seeded(Whole)
    q = quantize(model)
    assert isinstance(q, torch.fx.GraphModule)
    close(model, q, X)
    close(model, q, x=X, double=True)
    int8 = {op.path for op in fxquant.report(q).ops if op.int8}
    assert {"last", "net.stem", "net.gate.body.0"} <= int8


@pytest.mark.parametrize("make", [Net, Whole])
def test_pieces_are_copied_pickled_and_leave_the_model_alone(make: Callable[[], Any]) -> None:
    model = seeded(make)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    q = quantize(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        wanted = q(X)
        assert torch.equal(copy.deepcopy(q)(X), wanted)
        assert torch.equal(pickle.loads(pickle.dumps(q))(X), wanted)


def test_overrides_reach_into_parts() -> None:
    model = seeded(Whole)
    q = quantize(model, overrides={"net.gate.body.0": None, "last": None})
    by_path = {op.path: op for op in fxquant.report(q).ops}
    assert by_path["net.gate.body.0"].why == "it was asked to stay float"
    assert by_path["net.gate.body.2"].int8
    ways = {part["path"]: part for part in fxquant.report(q).to_dict()["parts"]}
    assert ways["last"]["why"] == "it was asked to stay float"
    with pytest.raises(ConfigError, match="'nonsense' matches nothing"):
        quantize(model, overrides={"nonsense": None})


def test_strict_refuses_and_no_example_gives_a_hint() -> None:
    with pytest.raises(TraceError, match=r"test_ladder\.py:\d+: if x\.sum\(\)\.item\(\) > 1e9"):
        quantize(seeded(Net), strict=True)
    with pytest.raises(TraceError, match="pass example_inputs"):
        fxquant.prepare(seeded(Net))


def test_methods_of_the_model_keep_working() -> None:
    model = seeded(Net)
    q = quantize(model)
    with torch.no_grad():
        assert torch.equal(q.predict(X), q(X).argmax(-1))
        assert torch.equal(copy.deepcopy(q).predict(X), q(X).argmax(-1))


@dataclass
class Features:
    """What a backbone returns."""

    map: Tensor
    pooled: Tensor
    extra: None = None


class Backbone(nn.Module):
    """Static questions of the kinds people ask, a dict in and a dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8))

    def forward(self, batch: dict[str, Tensor], scale: float = 1.0) -> Features:
        x = batch["image"]
        b, c, h, w = x.shape
        if c != 3 or x.dim() != 4:
            raise ValueError(f"wrong shape {x.shape}")
        for place, conv in enumerate(self.convs):
            x = torch.relu(conv(x))
            if place == 0 and x.is_cuda:
                x = x.cpu()
        pooled = x.reshape(b, 8, h * w).mean(-1) * scale
        return Features(x + torch.zeros(b, 1, 1, 1), pooled)


def test_containers_and_questions_about_sizes() -> None:
    model = seeded(Backbone)
    q = quantize(model, [{"batch": {"image": x}} for x in data()])
    assert fxquant.report(q).to_dict()["capture"] == "torch.fx symbolic tracing"
    for shape in ((1, 3, 16, 16), (5, 3, 7, 11), (4, 3, 32, 8)):
        batch = {"image": torch.randn(shape)}
        with torch.no_grad():
            real, codes = model(batch), q(batch)
        assert type(codes) is Features and codes.extra is None
        assert sqnr(real.map, codes.map) > 25 and sqnr(real.pooled, codes.pooled) > 25


@dataclass
class Words:
    """A batch as an object."""

    x: Tensor
    times: int = 2


class TakesWords(nn.Module):
    """Takes the object itself, or a second tensor that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, words: Words, more: Tensor | None = None) -> Words:
        y = self.fc(words.x) * words.times
        return Words(y if more is None else y + more, words.times)


def test_a_dataclass_is_fed_whole_where_forward_takes_it_whole() -> None:
    torch.manual_seed(0)
    model = TakesWords().eval()
    quantized = fxquant.quantize(model, [Words(torch.randn(64, 4))])
    found, wanted = (m(Words(torch.ones(3, 4))) for m in (quantized, model))
    assert type(found) is Words and found.times == 2
    torch.testing.assert_close(found.x, wanted.x, rtol=0, atol=0.05)  # 8 bits over about +-4
    with pytest.raises(GuardError, match=r"'more' is a tensor \[3, 4\], .* captured with None"):
        quantized(Words(torch.ones(3, 4)), torch.ones(3, 4))


class AsksItsHead(nn.Module):
    """Asks a layer for its type, as many models do, and computes with the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU())
        self.head = nn.Linear(32, 16)
        self.table = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(self.head(self.body(x).to(self.head.weight.dtype)))
        if x.sum() > 1e9:
            return x
        return x @ self.table.weight


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_layers_that_code_around_them_asks(mode: Any) -> None:
    torch.manual_seed(0)
    model, x = AsksItsHead().eval(), torch.randn(4, 16)
    quantized = fxquant.quantize(
        model, [x] if mode == "static" else None, mode=mode, example_inputs=(x,)
    )
    ops = {op.path: op for op in fxquant.report(quantized).ops}
    assert ops["head"].int8
    assert ops["body.0"].int8
    assert "table left in float: the code around it computes with its weight" in str(
        fxquant.report(quantized)
    )
    for made in (quantized, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        close(model, made, x)
        assert made.get_submodule("whole.model.head").weight.dtype is torch.float32
