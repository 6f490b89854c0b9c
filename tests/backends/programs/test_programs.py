"""Converted models run as programs from the fourth call on, and only the clock can tell."""

from __future__ import annotations

import copy
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fxquant
from fxquant.backends.programs import programs, script
from fxquant.backends.programs.programs import Programs
from fxquant.graph.user_class import UserModule
from tests import zoo

NEEDED = 3
"""Calls before a program is run: one, and two that are recorded."""


class Net(nn.Module):
    """Some layers in int8, some in float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).mean((2, 3))
        out: Tensor = self.fc(self.norm(x))
        return out


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    data = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    return fxquant.quantize(Net().eval(), data, mode="static", backend="x86")


@pytest.fixture
def q(net: nn.Module) -> UserModule:
    return cast("UserModule", copy.deepcopy(net))


def executor(q: nn.Module) -> Programs:
    return cast("Programs", cast("Any", q).meta["fxquant_executor"])


def plain(q: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What the graph's own code returns."""
    return type(q).forward.__wrapped__(q, *args, **kwargs)  # type: ignore[attr-defined]


def warm(q: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Calls until there is a program."""
    before = executor(q).count
    for _ in range(NEEDED):
        q(*args, **kwargs)
    assert executor(q).count == before + 1


def picture(seed: int = 1, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_the_fourth_call_is_a_program(q: UserModule) -> None:
    called = 0

    def count(*_: Any) -> None:
        nonlocal called
        called += 1

    x = picture()
    for calls in range(1, 7):
        assert torch.equal(q(x), plain(q, x))
        assert executor(q).count == (calls >= NEEDED)
    handle = q.conv.register_forward_hook(count)
    q(x)
    assert called == 1  # a hook is called: then it is no program
    handle.remove()
    q(x)
    assert (called, executor(q).count) == (1, 1)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x1_0", "unet", "resnet20"])
def test_networks_give_the_same_bits(name: str) -> None:
    model = zoo.build(name, seed=1).eval()
    x, other = zoo.example(name, batch=1), zoo.example(name, batch=2)
    q = fxquant.quantize(model, [x], mode="static", backend="x86")
    warm(q, x)
    assert torch.equal(q(x * 0.5), plain(q, x * 0.5))
    assert torch.equal(q(other), plain(q, other))
    assert executor(q).count == 1
    warm(q, other)
    assert torch.equal(q(other), plain(q, other))


@pytest.mark.parametrize("qconfig", ["dynamic", "int8-bf16", "weight_only", "bfloat16"])
def test_a_transformer_gives_the_same_bits(qconfig: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.Sequential(nn.Embedding(50, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 5))
    ids = torch.randint(0, 50, (1, 7))
    if qconfig == "int8-bf16":
        q = fxquant.quantize(model.eval(), [ids], qconfig=qconfig, backend="x86")
    else:
        mode = cast("Any", qconfig)
        q = fxquant.quantize(model.eval(), mode=mode, backend="x86", example_inputs=(ids,))
    warm(q, ids)
    for seed in range(3):
        ids = torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(q(ids), plain(q, ids))


@pytest.mark.parametrize(
    "x",
    [
        picture(batch=3),
        picture().double().float().contiguous(memory_format=torch.channels_last),
        torch.randn(1, 3, 9, 5),
        torch.randn(1, 3, 16, 16)[:, :, ::2, 1::2],
        torch.randn(0, 3, 8, 8),
        torch.randn(2, 3, 8, 8)[1:],
    ],
    ids=["batch", "layout", "size", "strides", "nothing", "offset"],
)
def test_other_inputs_are_other_calls(q: UserModule, x: Tensor) -> None:
    warm(q, picture())
    assert torch.equal(q(x), plain(q, x))


def test_what_changes_in_place_is_seen(q: UserModule) -> None:
    x = picture()
    warm(q, x)
    before = q(x)
    q.norm.weight.mul_(2.0)
    q.fc.bias.add_(1.0)
    assert not torch.equal(q(x), before)
    assert torch.equal(q(x), plain(q, x))


def test_loading_a_checkpoint_is_seen(q: UserModule) -> None:
    x, other = picture(), copy.deepcopy(q)
    for name, tensor in other.state_dict().items():
        if name.endswith("scale"):
            tensor.mul_(1.5)
    warm(q, x)
    before = q(x)
    q.load_state_dict(other.state_dict())
    assert torch.equal(q(x), plain(q, x))
    assert not torch.equal(q(x), before)
    warm(q, x)
    assert torch.equal(q(x), plain(q, x))


def test_what_is_replaced_is_seen(q: UserModule) -> None:
    x = picture()
    changes: tuple[Callable[[], None], ...] = (
        lambda: setattr(q.norm, "weight", nn.Parameter(torch.full((8,), 3.0))),
        lambda: setattr(q.norm, "eps", 10.0),
        lambda: setattr(q, "norm", nn.Identity()),
        lambda: setattr(q.norm, "forward", lambda x: x * 2),
    )
    for change in changes:
        warm(q, x)
        before = q(x)
        change()
        assert not torch.equal(q(x), before)
        assert torch.equal(q(x), plain(q, x))


def test_a_model_that_changes_all_the_time_is_left_as_it_is(q: UserModule) -> None:
    x = picture()
    for n in range(10 * NEEDED):
        if n % (NEEDED + 1) == 0:
            q.norm.eps = 1e-5 * (n + 1)
        assert torch.equal(q(x), plain(q, x))
    for _ in range(2 * NEEDED):
        q(x)
    assert executor(q).count == 0


def test_a_graph_that_is_edited_is_another_one(q: UserModule) -> None:
    x = picture()
    warm(q, x)
    output = q.graph.output_node()
    with q.graph.inserting_before(output):
        double = q.graph.call_function(torch.mul, (output.args[0], 2.0))
    output.args = (double,)
    before = q(x)
    q.recompile()
    assert torch.equal(q(x), before * 2)
    assert executor(q).count == 0
    warm(q, x)
    assert torch.equal(q(x), before * 2)


def test_copies_and_pickles_begin_anew(q: UserModule) -> None:
    x = picture()
    warm(q, x)
    wanted = q(x)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(q), copy.copy(q), loaded):
        assert torch.equal(other(x), wanted)
    for other in (copy.deepcopy(q), loaded):
        assert executor(other) is not executor(q)
        assert executor(other).count == 0
        warm(other, x)
        assert torch.equal(other(x), wanted)


def test_a_shallow_copy_does_not_run_what_was_recorded_of_another(q: UserModule) -> None:
    x = picture()
    warm(q, x)
    twin = object.__new__(type(q))
    twin.__dict__ = {**q.__dict__, "_modules": {**q._modules, "norm": nn.Identity()}}
    assert torch.equal(twin(x), plain(twin, x))
    assert not torch.equal(twin(x), q(x))


def test_it_can_be_switched_off(q: UserModule) -> None:
    q.run_by(None)
    for _ in range(NEEDED + 1):
        assert torch.equal(q(picture()), plain(q, picture()))
    assert torch.equal(copy.deepcopy(q)(picture()), q(picture()))


def test_without_the_interpreter_the_graph_runs(
    q: UserModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "is_there", lambda: False)
    q.run_by(Programs())
    for _ in range(NEEDED + 1):
        assert torch.equal(q(picture()), plain(q, picture()))
    assert executor(q).count == 0
    assert script.is_there()


class Rows(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


@pytest.mark.parametrize("odd", [0.0, torch.nan, torch.inf, 1e-42])
def test_numbers_that_lead_elsewhere(odd: float) -> None:
    """Rows at run time take a short way that zeros, for one, cannot go."""
    torch.manual_seed(0)
    q = fxquant.quantize(Rows().eval(), mode="dynamic", backend="x86")
    x = torch.randn(3, 64)
    warm(q, x)
    strange = x.clone()
    strange[1] = odd
    wanted = plain(q, strange)
    assert torch.equal(q(strange).nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert torch.equal(q(x), plain(q, x))
    assert executor(q).count == 1


def test_a_program_that_is_never_right_is_dropped() -> None:
    torch.manual_seed(0)
    q = fxquant.quantize(Rows().eval(), mode="dynamic", backend="x86")
    x, strange = torch.randn(3, 64), torch.zeros(3, 64)
    warm(q, x)
    for _ in range(20):
        assert torch.equal(q(strange), plain(q, strange))
    assert executor(q).count == 0


class Words(nn.Module):
    """An embedding, and things that the operators alone do not say."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(10, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, scale: float = 1.0, *, extra: Tensor | None = None) -> Any:
        out = self.fc(self.table(ids)) * scale
        return {"out": out if extra is None else out + extra, "shape": ids.shape, "ids": ids}


def test_arguments_and_results_of_any_form() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[1, 2, 3]])
    example = {"ids": ids, "extra": torch.ones(4)}
    q = fxquant.quantize(Words().eval(), mode="dynamic", backend="x86", example_inputs=example)
    for args, kwargs in (
        ((ids,), {"extra": torch.ones(4)}),
        ((ids, 1.0), {"extra": torch.ones(4)}),
        ((), {"extra": torch.ones(4), "ids": ids}),
        ((ids,), {"extra": torch.ones(1, 3, 4)}),
    ):
        for _ in range(NEEDED + 2):
            got, wanted = q(*args, **kwargs), plain(q, *args, **kwargs)
            assert torch.equal(got["out"], wanted["out"])
            assert got["shape"] == ids.shape
            assert got["ids"] is ids


def test_errors_are_those_of_the_graph() -> None:
    ids = torch.tensor([[1, 2, 3]])
    q = fxquant.quantize(Words().eval(), mode="dynamic", backend="x86", example_inputs=(ids,))
    with pytest.raises(IndexError) as wanted:
        plain(q, ids + 100)
    for _ in range(NEEDED):
        q(ids)
    with pytest.raises(IndexError) as got:
        q(ids + 100)
    assert str(got.value) == str(wanted.value)
    assert torch.equal(q(ids)["out"], plain(q, ids)["out"])


class Counting(nn.Module):
    """A layer of the user's own that does something besides computing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9:  # keeps it the user's own code
            self.calls += 1
        return x * self.calls


def test_what_users_wrote_is_called_every_time() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8), count=Counting(), out=nn.Linear(8, 2)))
    x = torch.randn(2, 8)
    q = fxquant.quantize(model.eval(), [x], mode="static", backend="x86")
    count = cast("Any", q.get_submodule("count"))
    before = count.calls
    for _ in range(NEEDED + 3):
        q(x)
    assert count.calls == before + NEEDED + 3


class Branches(nn.Module):
    """Goes on by what its first layer says; its parts are captured one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.second = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second(y if y.sum() > 0 else -y)
        return out


def test_parts_of_models_are_programs_of_their_own() -> None:
    torch.manual_seed(0)
    data = [torch.randn(4, 8) for _ in range(12)]
    q = fxquant.quantize(Branches().eval(), data, mode="static", backend="x86")
    slow = copy.deepcopy(q)
    parts = [m for m in q.modules() if isinstance(m, UserModule) and m is not q]
    assert len(parts) == 2
    for module in slow.modules():
        if isinstance(module, UserModule):
            module.run_by(None)
    for x in data:
        assert torch.equal(q(x), slow(x))
    assert [executor(part).count for part in parts] == [1, 1]


class Tally(nn.Module):
    """Counts in a buffer, which is no code of its own."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.fc(x) / self.calls
        return out


def test_what_is_counted_in_a_buffer_is_counted_once() -> None:
    x = torch.randn(2, 8)
    q = fxquant.quantize(Tally().eval(), [x], mode="static", backend="x86")
    start = float(cast("Any", q).calls)
    for calls in range(1, NEEDED + 3):
        q(x)
        assert float(cast("Any", q).calls) == start + calls
    assert executor(q).count == 0


def test_inputs_that_are_written_to_are_written_to_once() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x.add_(1.0)
            out: Tensor = self.fc(x)
            return out

    q = fxquant.quantize(Writes().eval(), [torch.randn(2, 8)], mode="static", backend="x86")
    for _ in range(NEEDED + 2):
        once, wanted = torch.zeros(2, 8), torch.zeros(2, 8)
        assert torch.equal(q(once), plain(q, wanted))
        assert torch.equal(once, wanted)


class Noise(nn.Module):
    """Draws anew in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y + torch.rand_like(y)


def test_what_is_drawn_is_drawn_anew() -> None:
    x = torch.randn(2, 8)
    q = fxquant.quantize(Noise().eval(), [x], mode="static", backend="x86")
    for _ in range(NEEDED):
        q(x)
    assert not torch.equal(q(x), q(x))
    torch.manual_seed(3)
    got = q(x)
    torch.manual_seed(3)
    assert torch.equal(got, plain(q, x))


class Seen(TorchDispatchMode):
    """Sees operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_whoever_looks_at_operators_sees_the_graph(q: UserModule) -> None:
    x = picture()
    warm(q, x)
    counts = []
    runs: tuple[Callable[[Tensor], Any], ...] = (q, lambda x: plain(q, x))
    for run in runs:
        with Seen() as seen:
            run(x)
        counts.append(seen.count)
    assert counts[0] == counts[1] > 0
    traced = make_fx(q)(x)
    assert torch.equal(traced(x), plain(q, x))


def test_autocast_vmap_and_gradients_go_by_the_graph(q: UserModule) -> None:
    x = picture()
    warm(q, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q(x), plain(q, x))
    with torch.enable_grad():
        needs = picture().requires_grad_()
        for _ in range(NEEDED + 1):
            assert torch.equal(q(needs), plain(q, needs))
        q.requires_grad_(False)
        warm(q, x)
        assert torch.equal(q(x), plain(q, x))
    with torch.inference_mode():
        for _ in range(NEEDED + 1):
            assert q(x).is_inference()


def test_gradients_of_what_is_float() -> None:
    data, x = [picture()], picture()
    overrides: Any = {"fc": None, "norm": None}
    q = fxquant.quantize(Net().eval(), data, mode="static", backend="x86", overrides=overrides)
    for _ in range(NEEDED + 2):
        with torch.enable_grad():
            q(x).sum().backward()
    grads = cast("nn.Linear", q.fc).weight.grad
    with torch.enable_grad():
        q.zero_grad()
        plain(q, x).sum().backward()
    assert grads is not None
    torch.testing.assert_close(grads, (NEEDED + 2) * cast("Any", q.fc).weight.grad)


def test_models_that_are_compiled(q: UserModule) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(q, backend="eager", fullgraph=True)
    x = picture()
    for _ in range(NEEDED + 1):
        assert torch.equal(compiled(x), plain(q, x))
    warm(q, x)
    assert torch.equal(compiled(x), q(x))


def test_any_number_of_models_is_compiled(q: UserModule) -> None:
    torch._dynamo.reset()
    for _ in range(12):
        other = copy.deepcopy(q)
        assert torch.equal(
            torch.compile(other, backend="eager", fullgraph=True)(picture()), q(picture())
        )


def test_threads(q: UserModule) -> None:
    xs = [picture(seed, batch) for seed in range(4) for batch in (1, 2)]
    wanted = [plain(q, x) for x in xs]
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(6):
                wrong.extend(n for n, x in enumerate(xs) if not torch.equal(q(x), wanted[n]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert executor(q).count == 2


def test_there_are_only_so_many_programs(q: UserModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_MOST", 3)
    monkeypatch.setattr(programs, "_MOST_KNOWN", 8)
    for _ in range(2):
        for batch in range(1, 12):
            for _ in range(NEEDED + 1):
                x = picture(batch=batch)
                assert torch.equal(q(x), plain(q, x))
    assert executor(q).count <= 3
    assert len(executor(q)._known) <= 11


def test_the_more_programs_there_were_the_more_calls_it_takes(
    q: UserModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_MOST", 2)
    for batch, needed in ((1, 3), (2, 3), (3, 5), (4, 5), (5, 9), (6, 9)):
        x = picture(batch=batch)
        for call in range(1, needed + 1):
            before = executor(q)._built
            q(x)
            assert executor(q)._built == before + (call == needed)


class Steps(nn.Module):
    """A recurrent layer and what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(32, 32, 2, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.lstm(x)[0])
        return out


def test_recurrent_layers() -> None:
    torch.manual_seed(0)
    one, other = Steps().eval(), Steps().eval()
    q, r = (fxquant.quantize(m, mode="dynamic", backend="x86") for m in (one, other))
    for x in (torch.randn(1, 5, 32), torch.randn(3, 2, 32)):
        warm(q, x)
        for given in (x, x * 3, x * torch.inf):
            wanted = plain(q, given)
            assert torch.equal(q(given).nan_to_num(7.0), wanted.nan_to_num(7.0))
    x = torch.randn(1, 5, 32)
    before, program = q(x), executor(q)
    q.load_state_dict(r.state_dict())
    assert torch.equal(q(x), r(x))
    assert not torch.equal(q(x), before)
    assert program.count == 0


def test_one_tensor_twice_is_not_two() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, a: Tensor, b: Tensor) -> Any:
            return self.fc(a) + b, a, b

    a, b = torch.randn(2, 8), torch.randn(2, 8)
    q = fxquant.quantize(Two().eval(), [(a, b)], mode="static", backend="x86")
    warm(q, a, a)
    assert torch.equal(q(a, b)[0], plain(q, a, b)[0])
    assert q(a, b)[2] is b
    warm(q, a, b)
    assert torch.equal(q(b, b)[0], plain(q, b, b)[0])
    assert q(b, a)[1] is b


def test_the_optimiser_of_torchscript_is_left_as_it_was(q: UserModule) -> None:
    warm(q, picture())
    for wanted in (False, True):
        torch._C._set_graph_executor_optimize(wanted)
        q(picture())
        assert torch._C._get_graph_executor_optimize() is wanted
