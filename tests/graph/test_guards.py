"""Guards: another way through the model is refused, and never run in silence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import FxQuantError, GuardError
from fxquant.graph.capture import capture
from fxquant.graph.guards import GUARDS, count_parts
from tests.helpers import One, canonical

Body = Callable[[Any, Tensor], Tensor]


def guards(module: GraphModule) -> list[str]:
    return [node.target.__name__ for node in module.graph.nodes if node.target in GUARDS]


def branch(m: Any, x: Tensor) -> Tensor:
    if x.shape[1] > 4:
        return x * 2
    return x * 3


def loop(m: Any, x: Tensor) -> Tensor:
    y = x[:, 0]
    for place in range(1, x.size(1)):
        y = y + x[:, place] * place
    return y


def rows(m: Any, x: Tensor) -> Tensor:
    return torch.stack([row * 2 for row in x])


def asserts(m: Any, x: Tensor) -> Tensor:
    assert x.size(-1) % 4 == 0, "sides of four"
    return x + 1


def parts(m: Any, x: Tensor) -> Tensor:
    a, b = x.split(4, 1)
    return a * b


def number(m: Any, x: Tensor) -> Tensor:
    return x * int(x.shape[1] / 2)


def truth(m: Any, x: Tensor) -> Tensor:
    return x * 2 if x.size(1) - 8 else x * 3


def equal(m: Any, x: Tensor) -> Tensor:
    return x * 2 if x.shape[1:] == (8, 8) else x * 3


def key(m: Any, x: Tensor) -> Tensor:
    return x * {8: 2.0, 4: 3.0}[x.size(1)]


def text(m: Any, x: Tensor) -> Tensor:
    return x * float(f"{x.size(1)}.5")


CASES: list[tuple[Body, tuple[int, ...]]] = [
    (branch, (2, 3, 8)),
    (loop, (2, 5, 8)),
    (rows, (3, 8, 8)),
    (asserts, (2, 8, 6)),
    (parts, (2, 12, 8)),
    (number, (2, 4, 8)),
    (truth, (2, 9, 8)),
    (equal, (2, 8, 4)),
    (key, (2, 4, 8)),
    (text, (2, 4, 8)),
]


@pytest.mark.parametrize(("body", "other"), CASES, ids=lambda c: getattr(c, "__name__", ""))
@pytest.mark.parametrize("how", ["captured", "canonical", "copied", "pickled"])
def test_a_guard_fires_where_the_answer_differs(
    body: Body, other: tuple[int, ...], how: str
) -> None:
    x = torch.randn(2, 8, 8)
    model = One(body)
    module = canonical(model, x) if how == "canonical" else capture(model, (x,)).module
    if how == "copied":
        module = copy.deepcopy(module)
    if how == "pickled":
        module = pickle.loads(pickle.dumps(module))
    assert torch.equal(module(x), model(x))
    with pytest.raises(GuardError, match=r"test_guards\.py:\d+: .*\n.*this line") as caught:
        module(torch.randn(other))
    assert isinstance(caught.value, FxQuantError) and isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(("body", "_"), CASES[:1] + CASES[3:4] + CASES[6:7])
def test_a_guard_without_its_node_would_run_the_wrong_way(body: Body, _: Any) -> None:
    """The tests above can fail: without its guards a graph gives an answer, and a wrong one."""
    module = capture(One(body), (torch.randn(2, 8, 8),)).module
    for node in [n for n in module.graph.nodes if n.target in GUARDS]:
        module.graph.erase_node(node)
    module.recompile()
    module(torch.randn(2, 3, 6))


def test_the_message_says_line_answers_and_what_to_do() -> None:
    module = capture(One(branch), (torch.randn(2, 8, 8),)).module
    with pytest.raises(GuardError) as caught:
        module(torch.randn(2, 3, 8))
    text = str(caught.value)
    assert "if x.shape[1] > 4:" in text
    assert "answered True when the model was captured, and in this call the answer is False" in text
    assert "quantize again with example_inputs like these" in text


def test_sizes_that_decide_nothing_stay_free() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = torch.zeros(b, c, device=x.device, dtype=x.dtype) + torch.ones((b, c))
        y = y + torch.arange(c) + torch.full((b, 1), 2.0)
        z = x.reshape(b, c, h * w).transpose(1, 2).reshape(b, h, w, c)
        z = z.view(len(z), *z.shape[1:]) * (h / w) + x.numel() + y.sum(1)[:, None, None, None]
        return z.expand(b, h, w, c).mean(dim=tuple(range(1, z.dim())))

    model = One(body)
    module = capture(model, (torch.randn(2, 3, 4, 5),)).module
    assert guards(module) == ["check_input"]
    for shape in ((1, 3, 4, 5), (7, 2, 9, 3), (3, 1, 1, 1)):
        x = torch.randn(shape)
        assert torch.equal(module(x), model(x))


def test_one_question_has_one_guard() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(5):
            if x.shape[0] == 2 and x.size(0) == 2 and x.size()[0] == 2:
                x = x.clone() if x.dim() == 3 and x.ndim == 3 and len(x.shape) == 3 else x
            assert x.dtype == torch.float32
        return x + 1

    module = capture(One(body), (torch.randn(2, 8, 8),)).module
    assert guards(module).count("check_input") == 1
    first = One(lambda m, x: x * 2 if x.shape[0] == 2 and x.size(0) == 2 else x)
    assert guards(capture(first, (torch.randn(2, 8),)).module) == ["check_answer"]


@pytest.mark.parametrize(
    ("body", "wrong", "what"),
    [
        (lambda m, x: x * 2 if x.dim() == 3 else x, torch.randn(2, 8), "dimensions"),
        (lambda m, x: x * 2 if m.lin(x).ndim == 3 else x, torch.randn(2, 8), "dimensions"),
        (lambda m, x: x * 2 if x.dtype == torch.float32 else x, torch.ones(2, 8, 8).double(),
         "dtype"),
        (lambda m, x: x * 2 if x.is_floating_point() else x, torch.ones(2, 8, 8).long(), "dtype"),
        (lambda m, x: x * 2 if torch.is_floating_point(x) else x, torch.ones(2, 8, 8).long(),
         "dtype"),
        (lambda m, x: x.cpu() if x.is_cuda else x * 2, torch.empty(2, 8, 8, device="meta"),
         "device"),
        (lambda m, x: x.cpu() if x.device.type == "cuda" else x * 2,
         torch.empty(2, 8, 8, device="meta"), "device"),
    ],
)  # fmt: skip
def test_facts_about_inputs_are_checked_at_the_input(body: Body, wrong: Tensor, what: str) -> None:
    x = torch.randn(2, 8, 8)
    model = One(body, lin=nn.Linear(8, 8))
    module = capture(model, (x,)).module
    assert guards(module) == ["check_input"]
    assert torch.equal(module(x), model(x))
    with pytest.raises(GuardError, match=f"depends on the {what} of 'x'"):
        module(wrong)


def test_dtypes_that_weights_decide_need_no_guard() -> None:
    body = lambda m, x: m.lin(x) * 2 if m.lin(x).dtype == torch.float32 else x  # noqa: E731
    module = capture(One(body, lin=nn.Linear(8, 8)), (torch.randn(2, 8),)).module
    assert guards(module) == []


def test_a_squeeze_that_may_keep_its_dimension_is_guarded() -> None:
    body = lambda m, x: x * 2 if x.squeeze().dim() == 2 else x * 3  # noqa: E731
    module = capture(One(body), (torch.randn(1, 8, 8),)).module
    with pytest.raises(GuardError, match=r"answered 2 .* the answer is 3"):
        module(torch.randn(4, 8, 8))


@pytest.mark.parametrize("size", range(1, 12))
def test_counting_parts(size: int) -> None:
    x = torch.zeros(size)
    for number in (1, 2, 3, 5):
        assert count_parts(size, number, "split") == len(x.split(number))
        assert count_parts(size, number, "chunk") == len(x.chunk(number))
