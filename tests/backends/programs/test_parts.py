"""The parts of programs: what inputs agree in, who is trusted, and what is taken for the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant.backends.programs import programs
from fxquant.backends.programs.programs import Programs
from fxquant.backends.programs.recorder import record
from fxquant.backends.programs.recording import Recording, Value
from fxquant.backends.programs.script import parts_of
from fxquant.backends.programs.signature import is_usual, signature_of
from fxquant.backends.programs.trusted import why_not_trusted


def key(*args: Any, **kwargs: Any) -> Any:
    found = signature_of(args, kwargs)
    assert found is not None
    return found[0]


BASE = torch.zeros(2, 4)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 4, dtype=torch.int32),
        torch.zeros(1, 4),
        torch.zeros(2, 4, 1),
        torch.zeros(4, 2).t(),
        torch.zeros(9)[1:].view(2, 4),
        torch.zeros(2, 4, requires_grad=True),
        torch._neg_view(torch.zeros(2, 4)),
        1,
        None,
        [torch.zeros(2, 4)],
        (torch.zeros(2, 4),),
        {"x": torch.zeros(2, 4)},
    ],
    ids=str,
)
def test_what_signatures_tell_apart(other: Any) -> None:
    assert key(other) != key(BASE)
    assert key(other) == key(other)
    assert key(x=other) != key(other)


def test_literals_are_told_apart_by_their_type() -> None:
    keys = [key(value) for value in (1, 1.0, True, "1", None, torch.float32)]
    assert all(one != other for one, other in itertools.combinations(keys, 2))


def test_numbers_in_tensors_are_no_part_of_it() -> None:
    assert key(BASE, a=1) == key(torch.ones(2, 4), a=1)
    leaves = signature_of(([BASE, (1, BASE.t())],), {"z": BASE})
    assert leaves is not None
    assert [leaf.shape for leaf in leaves[1]] == [(2, 4), (4, 2), (2, 4)]


def test_modes_and_shared_memory_are_part_of_it() -> None:
    with torch.no_grad():
        without = key(BASE)
    with torch.inference_mode():
        inside = key(BASE)
    assert len({key(BASE), without, inside}) == 3
    assert key(BASE, BASE) != key(BASE, torch.zeros(2, 4))
    assert key(BASE, BASE) != key(BASE, BASE.view(2, 4))
    assert key(BASE, BASE, torch.ones(1)) == key(*(torch.ones(2, 4),) * 2, torch.ones(1))


@pytest.mark.parametrize(
    "strange",
    [
        object(),
        {1: 2},
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.nn.utils.rnn.pack_sequence([torch.zeros(2, 3)]),
        range(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_inputs_have_none(strange: Any) -> None:
    assert signature_of((strange,), {}) is None
    assert signature_of((), {"a": [strange]}) is None


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        cast("Callable[[], AbstractContextManager[Any]]", _Functions),
        cast("Callable[[], AbstractContextManager[Any]]", TorchDispatchMode),
        lambda: torch.device("cpu"),
        torch.autograd.forward_ad.dual_level,
    ],
    ids=["autocast", "functions", "dispatch", "device", "dual"],
)
def test_where_somebody_takes_part_it_is_not_usual(
    mode: Callable[[], AbstractContextManager[Any]],
) -> None:
    assert is_usual()
    with mode():
        assert not is_usual()
    assert is_usual()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_transformations_tracing_and_global_hooks_are_not_usual() -> None:
    seen: list[bool] = []

    def see(x: Tensor) -> Tensor:
        seen.append(is_usual())
        return x * 2

    torch.func.vmap(see)(torch.ones(2, 2))
    torch.func.grad(lambda x: see(x).sum())(torch.ones(2))
    torch.jit.trace(see, torch.ones(2), check_trace=False)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    see(torch.ones(2))
    handle.remove()
    assert not any(seen)
    assert is_usual()


class Own(nn.Module):
    """A user's own layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name != ""


def graph_of(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, _Tracer().trace(model))


def _users_own(x: Tensor) -> Tensor:
    return x


def calling(function: Callable[..., Any]) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    return fx.GraphModule(nn.Module(), graph)


def method(name: str) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_method(name, (graph.placeholder("x"),)))
    return fx.GraphModule(nn.Module(), graph)


def _patched() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (graph_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), ""),
        (graph_of(nn.Sequential(nn.Sequential(nn.ReLU(), Own()))), "Own is code of its own"),
        (graph_of(nn.Sequential(Own())), "Own is code of its own"),
        (graph_of(nn.Sequential(_patched())), "Linear is code of its own"),
        (graph_of(nn.Sequential(nn.GRU(2, 2))), "GRU is one call already"),
        (calling(torch.relu), ""),
        (calling(torch.ops.aten.relu.default), ""),
        (calling(_users_own), "_users_own is code of its own"),
        (calling(print), "print is code of its own"),
        (calling(torch.utils.checkpoint.checkpoint), "checkpoint is code of its own"),
        (calling(len), ""),
        (method("relu"), ""),
        (method("tolist"), "may do more than compute"),
        (method("my_method"), "may do more than compute"),
    ],
)
def test_who_is_trusted(module: fx.GraphModule, why: str) -> None:
    found = why_not_trusted(module)
    assert why in found
    assert bool(why) == bool(found)


def recorded(run: Callable[[], Any], *leaves: Tensor) -> Recording:
    found = record(run, list(leaves))[1]
    assert isinstance(found, Recording)
    return found


def test_what_no_part_reads_again_is_let_go() -> None:
    x = torch.randn(4)

    def run() -> Tensor:
        first = (x + 1).view(torch.int32)
        second = (first + 1).view(torch.float32)
        return (second * 2).exp()

    with torch.no_grad():
        recording = recorded(run, x)
    registers: dict[Value, Any] = {recording.inputs[0]: x}
    parts = parts_of(recording)
    assert len(parts) == 5
    for part in parts:
        part(registers)
        assert len(registers) == 1
    assert torch.equal(next(iter(registers.values())), run())


@pytest.fixture
def module() -> fx.GraphModule:
    return graph_of(nn.Sequential(nn.ReLU()))


def test_what_counts_its_calls_is_no_program(module: fx.GraphModule) -> None:
    """Python's own numbers are seen by nobody, but two recordings do not agree then."""
    run, counter, x = Programs(), itertools.count(), torch.ones(2)
    with torch.no_grad():
        got = [float(run(module, lambda x: x * next(counter), (x,), {})[0]) for _ in range(8)]
    assert got == list(range(8))  # nothing is run twice
    assert run.count == 0


def test_tensors_that_are_made_anew_are_nothing_that_a_model_holds(module: fx.GraphModule) -> None:
    run, x = Programs(), torch.ones(2)
    made = itertools.count()
    with torch.no_grad():
        got = [
            float(run(module, lambda x: x * torch.tensor(float(next(made))), (x,), {})[0])
            for _ in range(8)
        ]
    assert got == list(range(8))
    assert run.count == 0


def test_a_program_that_gives_anything_else_is_not_run(
    module: fx.GraphModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(recording: Recording) -> Any:
        def part(registers: dict[Value, Any]) -> None:
            registers[recording.steps[-1].results[0]] = torch.zeros(2)

        return (part,)

    monkeypatch.setattr(programs, "parts_of", wrong)
    run, x = Programs(), torch.ones(2)
    with torch.no_grad():
        for _ in range(6):
            assert torch.equal(run(module, lambda x: x + 1, (x,), {}), x + 1)
    assert run.count == 0


def test_models_that_draw_are_left_as_they_are(module: fx.GraphModule) -> None:
    run, x = Programs(), torch.ones(2)
    with torch.no_grad():
        torch.manual_seed(0)
        wanted = [x + torch.rand(2) for _ in range(8)]
        torch.manual_seed(0)
        for each in wanted:
            assert torch.equal(run(module, lambda x: x + torch.rand(2), (x,), {}), each)
    assert run.count == 0


def test_what_is_no_number_is_like_itself(module: fx.GraphModule) -> None:
    run, x = Programs(), torch.tensor([0.0, torch.nan, torch.inf])
    with torch.no_grad():
        for _ in range(4):
            run(module, lambda x: x * 2 + x.new_zeros(3), (x,), {})
    assert run.count == 1


def test_an_error_while_recording_is_the_users(module: fx.GraphModule) -> None:
    run, x, calls = Programs(), torch.ones(2), itertools.count(1)

    def fails(x: Tensor) -> Tensor:
        if next(calls) == 2:
            raise KeyError("theirs")
        return x + 1

    with torch.no_grad():
        run(module, fails, (x,), {})
        with pytest.raises(KeyError, match="theirs"):
            run(module, fails, (x,), {})
        for _ in range(4):
            assert torch.equal(run(module, fails, (x,), {}), x + 1)
