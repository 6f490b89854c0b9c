"""Quantized models behave like any other module: copies, files, modes, compilers, threads."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.backends.x86_layers import X86Layer
from fxquant.graph.info import NodeInfo
from fxquant.numerics.observers import Observer
from fxquant.record import Record
from tests.end_to_end.models import images, residual

BACKENDS = ("x86", "reference")
X = images(1, seed=9)[0]


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def quantized(backend: str, seed: int = 0) -> GraphModule:
    return fxquant.quantize(residual(seed), images(), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies(backend: str) -> None:
    q = quantized(backend)
    wanted = run(q)
    twin = copy.deepcopy(q)
    assert torch.equal(run(twin), wanted)
    assert fxquant.report(twin).rows == fxquant.report(q).rows
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert torch.equal(run(q), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pickles(backend: str) -> None:
    q = quantized(backend)
    back = pickle.loads(pickle.dumps(q))
    assert torch.equal(run(back), run(q))
    assert torch.equal(run(pickle.loads(pickle.dumps(back))), run(q))
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False)), run(q))


def test_a_pickle_holds_no_float_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    weights = sum(p.numel() for p in model.parameters())
    for backend in BACKENDS:
        q = fxquant.quantize(model, images(), backend=backend)
        for round_trip in (q, pickle.loads(pickle.dumps(q))):
            assert len(pickle.dumps(round_trip)) < 2 * weights + 60_000


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepared_models_survive_copies_and_pickles(backend: str) -> None:
    prepared = fxquant.prepare(residual())
    fxquant.calibrate(prepared, images())
    wanted = run(fxquant.convert(prepared, backend=backend))
    assert torch.equal(run(fxquant.convert(copy.deepcopy(prepared), backend=backend)), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_goes_into_a_fresh_conversion(backend: str) -> None:
    """Same data, other weights: only the state makes them equal."""
    q = quantized(backend)
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin = quantized(backend)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    twin.load_state_dict({name: torch.zeros_like(t) for name, t in state.items()})
    assert not torch.equal(run(twin), run(q))
    twin.load_state_dict(state)
    assert torch.equal(run(twin), run(q))


@pytest.mark.parametrize("backend", BACKENDS)
def test_modes_change_nothing(backend: str) -> None:
    q = quantized(backend)
    wanted = run(q)
    for change in (q.train, q.eval, q.zero_grad, q.cpu, q.float):
        change()
        assert torch.equal(run(q), wanted), change.__name__
    assert torch.equal(run(q.requires_grad_(False)), wanted)
    assert torch.equal(q(X).detach(), wanted), "grad mode"
    with torch.inference_mode():
        assert torch.equal(q(X), wanted)
    assert torch.equal(q(X.clone().requires_grad_()).detach(), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_a_part_of_another_model(backend: str) -> None:
    q = quantized(backend)
    whole = nn.Sequential(nn.Identity(), q, nn.Softmax(-1)).eval()
    assert torch.equal(run(whole), run(q).softmax(-1))
    assert len(whole.state_dict()) == len(q.state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile(backend: str) -> None:
    q = quantized(backend)
    torch.compiler.reset()
    compiled: Any = torch.compile(q, backend="eager", fullgraph=True)
    assert torch.equal(run(compiled), run(q))
    assert torch.equal(run(compiled, X[:2]), run(q, X[:2]))
    torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_export(backend: str) -> None:
    q = quantized(backend)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(q, (X,), dynamic_shapes=({0: batch},))
    for x in (X, X[:3]):
        assert torch.equal(run(program.module(), x), run(q, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads(backend: str) -> None:
    """State is read-only in a forward: nothing is packed lazily, no buffer is shared."""
    q = quantized(backend)
    inputs = images(8, seed=20)
    wanted = [run(q, x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(25):
            if not torch.equal(run(q, inputs[index]), wanted[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_quantizing_in_threads() -> None:
    """fx patches torch for the whole process while it traces: one tracing at a time."""
    wanted = run(quantized("x86"))
    call, data = nn.Module.__call__, images()
    found: list[Any] = []
    # Made here: drawing weights uses the one random generator that threads share.
    models = [residual() for _ in range(4)]

    def work(model: nn.Module) -> None:
        found.append(run(fxquant.quantize(model, data, backend="x86")))

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.Module.__call__ is call
    assert len(found) == 4
    assert all(torch.equal(one, wanted) for one in found)


def test_models_run_rightly_while_another_thread_traces() -> None:
    """Deterministic: the trace stands still in the middle of the other model's forward."""
    tracing, go_on = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            tracing.set()
            assert go_on.wait(60)
            found: Tensor = self.conv(x)
            return found

    model, q = residual(), quantized("x86")
    wanted = run(model), run(q)
    made: list[GraphModule] = []
    thread = threading.Thread(target=lambda: made.append(fxquant.prepare(Slow().eval())))
    thread.start()
    assert tracing.wait(60)
    found = run(model), run(q)
    go_on.set()
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    # The convolution, the observer of its input, and the recorder of its output's shape.
    assert [n.op for n in made[0].graph.nodes].count("call_module") == 3, made[0].code


def alive() -> dict[str, int]:
    gc.collect()
    kinds = (Observer, X86Layer, GraphModule, Record, NodeInfo, torch.fx.Node)
    counts = dict.fromkeys((kind.__name__ for kind in kinds), 0)
    for thing in gc.get_objects():
        for kind in kinds:
            # Not isinstance: a lazy proxy in another test's module would be woken by it.
            if issubclass(type(thing), kind):
                counts[kind.__name__] += 1
    return counts


def more_than(before: dict[str, int]) -> dict[str, int]:
    """What there is more of now; what other tests left (compilers' caches) may go at any time."""
    return {kind: count for kind, count in alive().items() if count > before[kind]}


def test_repeated_use_keeps_nothing_alive() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    data = [torch.randn(2, 3, 4, 4)]
    for _ in range(3):
        fxquant.quantize(model, data, backend="x86")
    before = alive()
    for _ in range(50):
        fxquant.quantize(model, data, backend="x86")
    assert not more_than(before)


def test_one_model_quantized_is_freed_with_everything_in_it() -> None:
    before = alive()
    q = quantized("x86")
    assert alive()["X86Layer"] > before["X86Layer"]
    del q
    assert not more_than(before)
