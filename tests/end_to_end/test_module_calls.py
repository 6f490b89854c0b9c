"""What people call on any module, called on converted models of every backend and mode."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import ConfigError

MODES = ("static", "dynamic", "weight_only", "bfloat16", "float16", "qat")
BACKENDS = ("x86", "reference")
pytestmark = pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning")


class Net(nn.Module):
    """Layers of each kind, tied tables, a buffer, a batch norm that cannot be folded, dropout."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.bag = nn.EmbeddingBag(40, 32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm1d(32), nn.Dropout(0.5)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.full((32,), 0.25))

    def forward(self, ids: Tensor) -> Tensor:
        """Through all of it."""
        x = self.table(ids) + self.shift
        x = x + self.lstm(x)[0] + self.bag(ids)[:, None]
        x = self.norm(torch.relu(self.conv(x.mT))).mT
        y: Tensor = self.head(self.drop(torch.sigmoid(x) * x))
        return y


def batches() -> list[Tensor]:
    """Token ids."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 40, (4, 6), generator=generator) for _ in range(2)]


_MADE: dict[tuple[str, str], Any] = {}


def train(model: nn.Module) -> None:
    """One step."""
    model(batches()[0]).square().mean().backward()


def converted(mode: Any, backend: str) -> Any:
    """A model of that mode, made once."""
    key = (mode, backend)
    if key not in _MADE:
        torch.manual_seed(0)
        calibration = batches() if mode in ("static", "qat") else None
        more: dict[str, Any] = {"train": train} if mode == "qat" else {}
        _MADE[key] = fxquant.quantize(
            Net().eval(), calibration, mode=mode, backend=backend,
            example_inputs=(batches()[0],), **more,
        )  # fmt: skip
    return copy.deepcopy(_MADE[key])


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """Every mode."""
    return str(request.param)


@pytest.fixture(params=BACKENDS)
def made(request: pytest.FixtureRequest, mode: str) -> Any:
    """A converted model of one's own."""
    return converted(mode, request.param)


def run(model: Any) -> Tensor:
    """What it computes."""
    with torch.no_grad():
        y: Tensor = model(batches()[1])
    return y


def check_same(model: Any, wanted: Tensor) -> None:
    """Bit for bit what it computed before."""
    found = run(model)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_moving_and_casting_change_nothing(made: Any) -> None:
    wanted = run(made)
    dtypes = {name: tensor.dtype for name, tensor in made.state_dict().items()}
    calls: list[Callable[[Any], Any]] = [
        lambda m: m.float(),
        lambda m: m.to(torch.float32),
        lambda m: m.to("cpu"),
        lambda m: m.to("cpu", torch.float32),
        lambda m: m.cpu(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.share_memory(),
        lambda m: m.apply(lambda each: None),
    ]
    for call in calls:
        assert call(made) is made
        check_same(made, wanted)
    assert {name: tensor.dtype for name, tensor in made.state_dict().items()} == dtypes


def test_other_numbers_are_refused_and_nothing_is_changed(made: Any) -> None:
    wanted = run(made)
    calls: list[tuple[Callable[[Any], Any], str]] = [
        (lambda m: m.half(), "float16"),
        (lambda m: m.bfloat16(), "bfloat16"),
        (lambda m: m.double(), "float64"),
        (lambda m: m.to(torch.bfloat16), "bfloat16"),
    ]
    for call, dtype in calls:
        with pytest.raises(ConfigError, match=rf"cannot be made torch\.{dtype}.*mode='bfloat16'"):
            call(made)
        check_same(made, wanted)


def test_x86_stays_on_the_cpu(mode: str) -> None:
    made = converted(mode, "x86")
    wanted = run(made)
    with pytest.raises(ConfigError, match="runs on the CPU, and cannot go to meta"):
        made.to("meta")
    check_same(made, wanted)


def test_modes_of_a_module_change_nothing(made: Any) -> None:
    wanted = run(made)
    assert made.train() is made and made.training
    check_same(made, wanted)
    keeps: list[Callable[[Any], Any]] = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
    for keep in keeps:
        check_same(keep(made), wanted)
        assert keep(made).training
    assert made.train(False) is made and not made.training
    made.train()
    assert made.eval() is made and not any(m.training for m in made.modules())
    check_same(made, wanted)


def test_gradients_are_asked_for_and_cleared(made: Any) -> None:
    wanted = run(made)
    assert made.requires_grad_(False) is made
    assert not any(p.requires_grad for p in made.parameters())
    assert not made(batches()[1]).requires_grad
    assert made.requires_grad_() is made
    assert all(p.requires_grad for p in made.parameters())
    assert all(p.is_floating_point() for p in made.parameters())
    made.zero_grad()
    made.zero_grad(set_to_none=False)
    check_same(made.requires_grad_(False), wanted)
    torch.optim.SGD([*made.parameters(), nn.Parameter(torch.ones(1))], lr=0.1).zero_grad()


def test_copies_compute_the_same_and_are_their_own(made: Any) -> None:
    wanted = run(made)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    twins = [
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(copy.deepcopy(pickle.loads(pickle.dumps(made))))),
    ]
    for twin in twins:
        check_same(twin, wanted)
        assert list(twin.state_dict()) == list(made.state_dict())
        with torch.no_grad():
            for tensor in (*twin.parameters(), *twin.buffers()):
                tensor.zero_()
    check_same(made, wanted)


def test_state_dicts_go_back_and_forth(made: Any) -> None:
    wanted = run(made)
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    assert not any(name.startswith("_") for name in state)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(0.5)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    made.load_state_dict(torch.load(file, weights_only=True))
    check_same(made, wanted)
    with pytest.raises(RuntimeError, match="Missing key"):
        made.load_state_dict({})


def test_what_is_integer_is_no_parameter(made: Any) -> None:
    assert all(p.is_floating_point() for p in made.parameters())


def test_tied_weights_are_still_one(mode: str) -> None:
    if mode == "qat":
        pytest.skip("each layer trains the scales of its own weight: the codes differ")
    made = converted(mode, "reference")
    for model in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        big = [t for t in model.state_dict().values() if tuple(t.shape) == (40, 32)]
        places = {tensor.data_ptr() for tensor in big}
        assert len(places) <= 2, "the tied table, and the one of the bag"


def test_prepared_models_are_modules_too() -> None:
    torch.manual_seed(0)
    prepared: Any = fxquant.prepare(Net().eval(), example_inputs=(batches()[0],))
    prepared.requires_grad_(False).float().to("cpu").train().eval().zero_grad()
    fxquant.calibrate(prepared, batches())
    twin = copy.deepcopy(prepared)
    twin.load_state_dict(prepared.state_dict())
    first, second = (fxquant.convert(each, backend="reference") for each in (prepared, twin))
    assert torch.equal(run(first), run(second))


def test_layers_keep_their_names(made: Any) -> None:
    """Whatever holds a layer's integers stands where the layer stood."""
    held = {name.rpartition(".")[0] for name in made.state_dict()}
    assert {"conv", "head", "lstm", "table"} <= held
