"""Sums that a norm reads: which are found, through what, and which are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

import fxquant
from fxquant.graph.normed_sums import norm_that_reads, sum_that_takes
from fxquant.graph.op_table import is_op
from fxquant.passes.adopt_norms import AdoptNorms
from fxquant.passes.configure import Configure
from tests.helpers import One, Overrides, canonical, nodes, run

Body = Callable[[Any, Any], Any]
X = torch.randn(2, 6, 4, 4)


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "layer": nn.Linear(4, 4),
        "other": nn.Linear(4, 4),
        "norm": nn.LayerNorm(4),
        "second": nn.LayerNorm(4),
        "rms": nn.RMSNorm(4),
        "group": nn.GroupNorm(2, 6),
        "instance": nn.InstanceNorm2d(6),
        "batch": nn.BatchNorm2d(6),
        "drop": nn.Dropout(0.5),
    }


def configured(body: Body, overrides: Overrides = (), train: bool = False) -> GraphModule:
    model = One(body, **parts()).train(train)
    return run(canonical(model, X, train=train), AdoptNorms(), Configure(overrides=overrides))


def sums(body: Body, overrides: Overrides = (), train: bool = False) -> dict[str, str | None]:
    """The sums of a model, each with the norm that reads it."""
    module = configured(body, overrides, train)
    found = {n.name: norm_that_reads(n) for n in nodes(module) if is_op(n, "add")}
    return {name: norm.name if isinstance(norm, Node) else None for name, norm in found.items()}


def written(m: Any, x: Any) -> Any:
    y = x + m.layer(x)
    return m.rms.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


FOUND: dict[str, tuple[Body, str]] = {
    "layer norm": (lambda m, x: m.norm(x + m.layer(x)), "norm"),
    "functional": (lambda m, x: F.layer_norm(torch.add(x, m.layer(x)), (4,)), "layer_norm"),
    "rms norm": (lambda m, x: m.rms(m.layer(x).add_(x)), "rms"),
    "written out": (written, "rms"),
    "group norm": (lambda m, x: m.group(x + m.layer(x)), "group"),
    "instance norm": (lambda m, x: m.instance(x + m.layer(x)), "instance"),
    "moved": (lambda m, x: m.norm((x + m.layer(x)).flatten(1, 2)[:, 1:]), "norm"),
    "split": (lambda m, x: m.norm((x + m.layer(x)).chunk(2, 1)[1]), "norm"),
    "side by side": (lambda m, x: m.norm(torch.cat([x, x + m.layer(x)], 1)), "norm"),
    "scaled": (lambda m, x: m.norm((x + m.layer(x)) * 0.5), "norm"),
    "weighted": (lambda m, x: m.norm(torch.add(x, m.layer(x), alpha=2)), "norm"),
    "others read it, too": (lambda m, x: m.norm(y := x + m.layer(x)) * m.other(y), "norm"),
}


@pytest.mark.parametrize("case", FOUND)
def test_a_sum_and_the_norm_that_reads_it(case: str) -> None:
    body, norm = FOUND[case]
    (found,) = sums(body).values()
    assert found is not None and found.startswith(norm)


def test_a_sum_that_goes_into_another_is_part_of_it() -> None:
    found = sums(lambda m, x: m.norm(x + m.layer(x) + m.other(x)))
    assert list(found.values()) == ["norm", "norm"]


def test_dropout_of_training_stands_between() -> None:
    found = sums(lambda m, x: m.norm(m.drop(x + m.layer(x))), train=True)
    assert list(found.values()) == ["norm"]


NOT: dict[str, Body] = {
    "a batch norm, which has one factor for every row": lambda m, x: m.batch(x + m.layer(x)),
    "an activation between": lambda m, x: m.norm(F.relu(x + m.layer(x))),
    "a layer between": lambda m, x: m.norm(m.other(x + m.layer(x))),
    "a number": lambda m, x: m.norm(m.layer(x) + 1.0),
    "a computed number": lambda m, x: m.norm(m.layer(x) + x.size(0)),
    "no norm": lambda m, x: m.other(x + m.layer(x)),
    "a weight": lambda m, x: F.layer_norm(x, (4,), m.layer.weight[0] + m.other.weight[0]),
    "a sum that something else reads, too": lambda m, x: (
        (y := x + m.layer(x)) * 2 + m.norm(y * m.other(x))
    ),
}


@pytest.mark.parametrize("case", NOT)
def test_what_no_norm_reads(case: str) -> None:
    found = sums(NOT[case])
    assert found and set(found.values()) == {None}


@pytest.mark.parametrize("selector", [torch.add, "add"])
def test_who_names_the_sum_gets_it_in_int8(selector: Any) -> None:
    asked = ((selector, fxquant.QConfig()),)
    assert sums(lambda m, x: m.norm(x + m.layer(x)), asked) == {"add": None}


@pytest.mark.parametrize("selector", ["*", nn.Linear])
def test_who_names_more_than_the_sum_does_not(selector: Any) -> None:
    asked = ((selector, fxquant.QConfig()),)
    assert sums(lambda m, x: m.norm(x + m.layer(x)), asked) == {"add": "norm"}


def test_the_search_has_an_end() -> None:
    body = lambda m, x: m.norm(sum((m.layer(x) for _ in range(100)), x))  # noqa: E731
    found = [norm is not None for norm in sums(body).values()]
    assert len(found) == 100 and found[-1] and found[-60] and not found[0]


def moves(body: Body) -> list[bool]:
    """Of each op that moves, whether all that it moves goes into a sum that stays float."""
    found = (n for n in nodes(configured(body)) if not is_op(n, "add", "layer_norm", "linear"))
    return [sum_that_takes(node) is not None for node in found]


def test_what_is_moved_into_such_a_sum() -> None:
    assert moves(lambda m, x: m.norm(m.layer(x).flatten(2).reshape(2, 6, 4, 4) + x)) == [True] * 2
    assert moves(lambda m, x: m.norm(torch.cat([m.layer(x), x], 1)[:, :6] + x)) == [True] * 2


def test_what_is_not_only_moved_into_such_a_sum() -> None:
    assert moves(lambda m, x: (y := m.layer(x).flip(1)) * 2 + m.norm(y + x)) == [False] * 2
    assert moves(lambda m, x: m.norm(torch.relu(m.layer(x)) + x)) == [False]
    assert moves(lambda m, x: m.layer(x).flip(1) + x) == [False]
    assert moves(lambda m, x: m.norm(m.layer(x).flip(1))) == [False]


def test_what_a_users_pattern_has_taken_is_the_patterns() -> None:
    @fxquant.pattern
    def my_sum(x: Any, y: Any) -> Any:
        return x + y

    torch.manual_seed(0)
    model = One(lambda m, x: m.norm(m.layer(x).flip(1) + x), **parts()).eval()
    prepared = fxquant.prepare(model, example_inputs=(X,), patterns=[my_sum])
    total = next(n for n in prepared.graph.nodes if is_op(n, "add"))
    assert norm_that_reads(total) is None
    flip = next(n for n in prepared.graph.nodes if is_op(n, "flip"))
    assert sum_that_takes(flip) is None
