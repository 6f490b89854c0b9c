"""Capture: containers of every kind, in and out, and the attributes of the user's class."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fxquant.errors import GuardError, TraceError
from fxquant.graph.capture import capture
from fxquant.graph.user_class import with_user_class


class Pair(NamedTuple):
    """A named tuple of tensors."""

    a: Tensor
    b: Tensor


@dataclass
class Batch:
    """A dataclass with a tensor, none, and a plain value."""

    x: Tensor
    mask: Tensor | None = None
    scale: float = 1.0


class Outputs(OrderedDict[str, Any]):
    """A dict of a class of its own."""


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        same(list(a.values()), list(b.values()))
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same(one, other)
    elif isinstance(a, Batch):
        same(vars(a), vars(b))
    else:
        assert a == b


class Any1(nn.Module):
    """Takes one container and returns several."""

    def forward(self, batch: Any) -> Any:
        if isinstance(batch, Batch):
            x = batch.x * batch.scale
            return Batch(x if batch.mask is None else x * batch.mask, None, 2.0)
        if isinstance(batch, dict):
            y = sum(v for v in batch.values() if v is not None)
            return Outputs(y=y, n=len(batch), inner=(y, [y + 1, None]))
        if hasattr(batch, "_fields"):
            return Pair(batch.b, batch.a)
        a, (b, flag) = batch
        return {"a": a * 2 if flag else a, "b": [b]}


def tensor(n: int = 2) -> Tensor:
    return torch.randn(n, 3)


def inputs(n: int) -> list[Any]:
    return [
        Batch(tensor(n)),
        Batch(tensor(n), tensor(n), 0.5),
        {"a": tensor(n), "b": None, "c": tensor(n)},
        OrderedDict(a=tensor(n)),
        Pair(tensor(n), tensor(n)),
        [tensor(n), (tensor(n), True)],
    ]


@pytest.mark.parametrize("place", range(6))
def test_containers_in_and_out(place: int) -> None:
    model = Any1()
    module = capture(model, (inputs(2)[place],)).module
    for n in (2, 5):
        given = inputs(n)[place]
        same(model(given), module(given))
        same(model(given), pickle.loads(pickle.dumps(module))(given))
        same(model(given), copy.deepcopy(module)(given))


@pytest.mark.parametrize(
    ("place", "other", "text"),
    [
        (0, Batch(tensor(), tensor()), r"batch\['mask'\] is a tensor, and was None"),
        (1, Batch(tensor(), None, 0.5), r"batch\['mask'\] is None, and was a tensor"),
        (1, Batch(tensor(), tensor(), 0.7), r"batch\['scale'\] is 0\.7, and was 0\.5"),
        (2, {"a": tensor(), "b": None}, r"batch has \['a', 'b'\], and had \['a', 'b', 'c'\]"),
        (3, {"a": tensor()}, "batch is a dict, and was a OrderedDict"),
        (5, [tensor(), (tensor(), False)], r"batch\[1\]\[1\] is False, and was True"),
        (5, [tensor()], "batch has 1 items, and had 2"),
    ],
)
def test_containers_built_in_another_way_are_refused(place: int, other: Any, text: str) -> None:
    module = capture(Any1(), (inputs(2)[place],)).module
    with pytest.raises(GuardError, match=text):
        module(other)


class Variadic(nn.Module):
    """Arguments of every kind."""

    def forward(
        self, x: Tensor, *rest: Tensor, scale: float = 1.0, y: Tensor, **more: Tensor
    ) -> tuple[Tensor, ...]:
        total = x * scale + y
        for each in (*rest, *more.values()):
            total = total + each
        return total, *rest


@pytest.mark.parametrize(
    ("count", "names", "scale"),
    [(0, (), {}), (2, (), {}), (0, ("p",), {}), (2, ("p", "q"), {"scale": 2.0})],
)
def test_variadic_and_keyword_only_arguments(
    count: int, names: tuple[str, ...], scale: dict[str, float]
) -> None:
    def call(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = {name: tensor(n) for name in ("y", *names)}
        return (tensor(n), *[tensor(n) for _ in range(count)]), {**named, **scale}

    model = Variadic()
    module = capture(model, *call(2)).module
    for n in (2, 4):
        args, kwargs = call(n)
        same(model(*args, **kwargs), module(*args, **kwargs))


def test_an_optional_tensor_that_is_left_out_is_refused() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return x if y is None else x * 2

    module = capture(Optional(), (tensor(), tensor())).module
    with pytest.raises(GuardError, match="argument 'y' is None, but this graph was captured with"):
        module(tensor(), None)


def test_objects_that_are_no_containers_are_no_inputs_of_a_graph() -> None:
    class Box:
        def __init__(self) -> None:
            self.x = tensor()

    class Opens(nn.Module):
        def forward(self, box: Box) -> Tensor:
            return box.x * 2

    with pytest.raises(TraceError, match="neither a tensor nor a container"):
        capture(Opens(), (Box(),), strict=True)
    box = Box()
    captured = capture(Opens(), (box,))
    assert captured.leaves
    assert torch.equal(captured.module(box), box.x * 2)


class Named(nn.Module):
    """Has what users read and call later."""

    kind = "classifier"

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 4)
        self.config = {"classes": 4}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin(x)
        return out

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)

    @property
    def classes(self) -> int:
        return self.config["classes"]

    @staticmethod
    def twice(x: int) -> int:
        return 2 * x

    @classmethod
    def named(cls) -> str:
        return "named"


@pytest.mark.parametrize("how", ["made", "copied", "pickled", "copied twice"])
def test_attributes_and_methods_keep_working(how: str) -> None:
    model = Named()
    module: Any = with_user_class(capture(model, (tensor(),)).module, model)
    if how.startswith("copied"):
        module = copy.deepcopy(module)
    if how == "copied twice":
        module = copy.deepcopy(module)
    if how == "pickled":
        module = pickle.loads(pickle.dumps(module))
    x = tensor()
    assert torch.equal(module.predict(x), model.predict(x))
    assert (module.config, module.classes, module.kind) == ({"classes": 4}, 4, "classifier")
    assert (module.twice(3), module.named()) == (6, "named")
    assert module.config is not model.config
    with pytest.raises(AttributeError, match="nonsense"):
        module.nonsense  # noqa: B018


NOWHERE = """
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
    def forward(self, x):
        return self.fc(x)
    def answer(self):
        return {answer}
"""


def from_text(answer: int) -> Any:
    """A model whose class no import can find, such as one of a notebook's cell."""
    names: dict[str, Any] = {"__name__": "no_such_module"}
    exec(compile(NOWHERE.format(answer=answer), "cell.py", "exec"), names)
    return names["Model"]()


def test_classes_that_cannot_be_imported() -> None:
    for answer in (1, 2):  # the cell is run again, with another class of the same name
        model = from_text(answer)
        module: Any = with_user_class(capture(model, (torch.ones(2, 4),)).module, model)
        assert module.answer() == answer
        with pytest.raises(AttributeError, match="nonsense"):
            module.nonsense  # noqa: B018


def test_a_copy_without_the_class_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = from_text(1), torch.ones(2, 4)
    module: Any = with_user_class(capture(model, (x,)).module, model)
    monkeypatch.setattr("fxquant.graph.containers._LOCAL", {})
    assert torch.equal(module(x), model(x))
    assert not hasattr(module, "answer")


@pytest.mark.parametrize("cut", [slice(None, None, -1), slice(1, None), slice(0, 2), slice(3, 3)])
def test_slices_of_several_tensors_are_the_tensors(cut: slice) -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Any:
            parts = x.chunk(3, dim=1)[cut]
            return torch.cat(parts, 1) if parts else (parts, x)

    x = torch.randn(2, 6)
    module = capture(Cut(), (x,)).module
    same(module(x), Cut()(x))
    same(module(x[:1]), Cut()(x[:1]))
