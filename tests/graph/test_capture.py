"""Capture: arguments, errors, and a caller's model and process left as they were found."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations, weight_norm

from fxquant.errors import GuardError, TraceError
from fxquant.graph.capture import bind_arguments, capture
from fxquant.graph.info import info
from fxquant.graph.op_table import module_of
from tests.helpers import FLOAT32, One, canonical, check_eager, close_share, names, nodes


class Options(nn.Module):
    """Arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        scale: float = 1.0,
        *,
        flip: bool = False,
        mode: str = "plain",
        **extra: Any,
    ) -> Tensor:
        z = self.lin(x) * scale
        if y is not None:
            z = z + y
        if flip:
            z = z.flip(0)
        return z * 2 if mode == "double" else z


def same(model: nn.Module, graph: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        assert torch.equal(model(*args, **kwargs), graph(*args, **kwargs))


X, Y = torch.randn(2, 3), torch.randn(2, 3)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {}),
        ((X, Y), {}),
        ((X,), {"y": Y}),
        ((), {"x": X, "y": Y}),
        ((X, None, 0.5), {}),
        ((X,), {"scale": 2.0, "flip": True}),
        ((X, Y), {"mode": "double", "flip": True}),
    ],
)
def test_every_way_to_pass_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model = Options().eval()
    graph = capture(model, args, kwargs).module
    same(model, graph, *args, **kwargs)
    with torch.no_grad():
        wider = torch.randn(7, 3)
        swapped = [wider if a is X or a is Y else a for a in args]
        named = {k: wider if v is X or v is Y else v for k, v in kwargs.items()}
        same(model, graph, *swapped, **named)


def test_left_out_arguments_are_bound_to_their_defaults() -> None:
    captured = capture(Options(), (X,))
    assert captured.bound == {"y": None, "scale": 1.0, "flip": False, "mode": "plain"}


def test_without_example_inputs_only_what_has_no_default_is_an_input() -> None:
    model = Options().eval()
    same(model, capture(model).module, X)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"scale": 2.0}, r"argument 'scale' is 2\.0, but this graph was captured with 1\.0"),
        ({"y": Y}, "argument 'y' is a tensor.*captured with None"),
        ({"flip": True}, "argument 'flip' is True, but this graph was captured with False"),
        ({"mode": "double"}, r"Quantize again with mode='double' in example_inputs"),
        ({"scale": 1}, "argument 'scale' is 1, but"),
    ],
)
def test_a_call_with_another_value_is_refused(kwargs: dict[str, Any], text: str) -> None:
    graph = capture(Options(), (X,)).module
    with pytest.raises(GuardError, match=f"(?s){text}"):
        graph(X, **kwargs)


def test_examples_that_do_not_fit_forward() -> None:
    with pytest.raises(TraceError, match=r"do not fit Options\.forward.*multiple values"):
        capture(Options(), (X,), {"x": X})


def test_arguments_that_are_no_plain_values_are_inputs() -> None:
    model = Options()
    assert bind_arguments(model, (X, Y), {}) == {"scale": 1.0, "flip": False, "mode": "plain"}


class Branches(nn.Module):
    """Control flow that depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.drop = nn.Dropout()
        self.conv.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.conv(x))
        if y.sum() > 0:  # the line that the error names
            return y
        return -y


class Loops(nn.Module):
    """A loop over a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(row for row in x)  # the line that the error names


class Raises(nn.Module):
    """Fails on its own."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("own mistake")  # the line that the error names


def line_of(cls: type) -> int:
    with open(__file__, encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"class {cls.__name__}("))
    return next(
        i for i, line in enumerate(lines, 1) if i > start and "the line that the error" in line
    )


@pytest.mark.parametrize("cls", [Branches, Loops, Raises])
def test_what_cannot_be_traced_names_the_users_line(cls: type[nn.Module]) -> None:
    with pytest.raises(TraceError) as caught:
        capture(cls())
    text = str(caught.value)
    assert f"{__file__}:{line_of(cls)}: " in text
    assert text.startswith(f"{cls.__name__} cannot be traced into a graph: ")
    assert "Ways out" in text
    assert caught.value.__cause__ is not None


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    state = pickle.dumps({k: v.numpy().tobytes() for k, v in model.state_dict().items()})
    flags = [(n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()]
    ids = [id(p) for p in model.parameters()] + [id(m) for m in model.modules()]
    return state, flags, ids, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("evaluate", [True, False])
@pytest.mark.parametrize("make", [Branches, Options])
@pytest.mark.parametrize("grad", [True, False])
def test_model_and_process_are_left_as_found(
    make: Callable[[], nn.Module], evaluate: bool, grad: bool
) -> None:
    model = make().train()
    before, rng, call = fingerprint(model), torch.get_rng_state(), nn.Module.__call__
    getattribute = nn.Module.__getattr__
    with torch.set_grad_enabled(grad):
        try:
            capture(model, evaluate=evaluate)
        except TraceError:
            assert make is Branches
        assert torch.is_grad_enabled() is grad
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert nn.Module.__call__ is call and nn.Module.__getattr__ is getattribute


def test_evaluate_puts_the_copy_in_eval() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    assert not any(m.training for m in capture(model, evaluate=True).module.modules())
    assert capture(model).module.get_submodule("0").training


def test_threads_capture_at_once() -> None:
    models = [
        nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)], nn.ReLU()).eval() for _ in range(8)
    ]
    x = torch.randn(3, 4)
    call = nn.Module.__call__

    def work(model: nn.Module) -> GraphModule:
        return [capture(model, (x,)).module for _ in range(3)][-1]

    with ThreadPoolExecutor(4) as pool:
        graphs = list(pool.map(work, models))
    assert nn.Module.__call__ is call
    for model, graph in zip(models, graphs, strict=True):
        check_eager(model, graph, x)


def test_parametrized_weights_become_plain_ones_in_the_copy_only() -> None:
    conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    parametrizations.spectral_norm(conv, "weight")
    model = nn.Sequential(parametrizations.weight_norm(conv, "bias", dim=0), nn.ReLU()).eval()
    x = torch.randn(2, 3, 5, 5)
    wanted, keys = model(x), list(model.state_dict())
    module = canonical(model, x)
    assert names(module) == ["conv2d", "relu"]
    assert close_share(module(x), wanted) <= FLOAT32
    assert type(module_of(nodes(module)[0])) is nn.Conv2d
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), wanted)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weights_computed_by_a_hook_are_settled_in_the_copy() -> None:
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()).eval()
    x = torch.randn(2, 3, 5, 5)
    wanted = model(x)  # leaves a tensor with a history in the module, which deepcopy refuses
    module = canonical(model, x)
    assert names(module) == ["conv2d", "relu"]
    assert model[0]._forward_pre_hooks, "the user's own module keeps its hook"
    assert torch.equal(module(x), wanted)


class Block(nn.Module):
    """Nested, with a functional op."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.lin(x)) + x


def test_nodes_know_path_source_owners_and_origin() -> None:
    model = nn.Sequential(Block(), nn.ModuleDict({"a.b".replace(".", "_"): Block()})["a_b"])
    module = capture(model).module
    records = {n.name: info(n) for n in nodes(module)}
    assert [r.path for r in records.values()] == [
        *("0.lin", "0.relu", "0.add"),
        *("1.lin", "1.relu", "1.add"),
    ]
    for name, record in records.items():
        assert record.origins == (name,)
        file, _, line = record.source.rpartition(":")
        assert file == __file__ and int(line) > 0
    assert records["relu_1"].owners == (("1", Block),)


def test_in_place_operators_are_kept() -> None:
    def body(m: Any, x: Any) -> Any:
        x += 1
        x -= 2
        x *= 3
        x /= 4
        x[0] = 5.0
        return x

    module = capture(One(body)).module
    called = [getattr(n.target, "__name__", "") for n in nodes(module)]
    assert called == ["iadd", "isub", "imul", "itruediv", "setitem"]
    x = torch.randn(3)
    assert torch.equal(module(x.clone()), One(body)(x.clone()))


def test_the_copy_owns_its_parameters() -> None:
    model = nn.Linear(2, 2)
    module = capture(nn.Sequential(model)).module
    assert module.get_parameter("0.weight") is not model.weight
    assert torch.equal(module.get_parameter("0.weight"), model.weight)


def test_a_captured_module_can_be_copied_and_pickled() -> None:
    module = capture(Options().eval(), (X,), {"scale": 2.0}).module
    wanted = module(X, None, 2.0)
    assert torch.equal(copy.deepcopy(module)(X, None, 2.0), wanted)


@pytest.mark.parametrize("word", ["lambda", "class"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_module_named_by_a_keyword_is_an_error_that_says_so(word: str, inner: bool) -> None:
    model = nn.Sequential()
    model.add_module(word, nn.Sequential(nn.Linear(2, 2)) if inner else nn.Linear(2, 2))
    with pytest.raises(TraceError, match=rf"{word}.* keyword '{word}'.*such as '{word}_'"):
        capture(model)
