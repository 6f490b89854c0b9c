"""What is recorded of a call, and what says that there is no use in that."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from fxquant.backends.programs.programs import Program
from fxquant.backends.programs.recorder import record
from fxquant.backends.programs.recording import Recording, values_in
from fxquant.backends.programs.watch import Watch
from fxquant.backends.x86_row_sums import RowSums

MODES: list[Callable[[], AbstractContextManager[Any]]] = [torch.no_grad, torch.inference_mode]


@pytest.fixture(params=MODES, ids=["no grad", "inference"], autouse=True)
def _mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.param():
        yield


def recorded(run: Callable[[], Any], *leaves: Tensor) -> Recording:
    found = record(run, list(leaves))[1]
    assert isinstance(found, Recording), found
    return found


def refused(run: Callable[[], Any], *leaves: Tensor) -> str:
    found = record(run, list(leaves))[1]
    assert isinstance(found, str)
    return found


def names(recording: Recording) -> list[str]:
    return [step.op.name().removeprefix("aten::") for step in recording.steps]


def program(run: Callable[..., Any], *leaves: Tensor) -> Program:
    return Program(recorded(lambda: run(*leaves), *leaves), Watch(torch.nn.Identity()))


def test_views_that_undo_each_other_are_left_out() -> None:
    x = torch.randn(2, 3, 4)
    made = recorded(lambda: x.permute(0, 2, 1).contiguous().permute(0, 2, 1).view(2, 3, 4) + 1, x)
    assert [name for name in names(made) if "permute" not in name][-1] == "add.Tensor"
    plain = recorded(lambda: x.permute(0, 2, 1).permute(0, 2, 1).reshape(2, 3, 4) + 1, x)
    assert names(plain) == ["add.Tensor"]
    assert plain.steps[0].reads == plain.inputs


def test_a_view_that_is_returned_is_an_object_of_its_own() -> None:
    x = torch.randn(2, 3)
    made = program(lambda x: (x.view(2, 3), x), x).run([x])
    assert made[0] is not x
    assert made[1] is x
    made[0].unsqueeze_(0)
    assert x.shape == (2, 3)


def test_looks_at_other_memory_are_not_taken_for_each_other() -> None:
    x, y = torch.randn(4), torch.randn(4)
    run = program(lambda x, y: (x.view(2, 2) + 1, y.view(2, 2) + 1, x[:2].exp(), x[2:].exp()), x, y)
    for got, wanted in zip(
        run.run([x, y]), (x.view(2, 2) + 1, y.view(2, 2) + 1, x[:2].exp(), x[2:].exp()), strict=True
    ):
        assert torch.equal(got, wanted)


def test_views_follow_what_is_written_to_their_memory() -> None:
    def run(x: Tensor) -> Tensor:
        a = x + 1
        before = a.view(-1)
        a.mul_(2)
        a[0].zero_()
        return before.view(2, 3).view(-1) + a.view(-1)

    x = torch.randn(2, 3)
    assert torch.equal(program(run, x).run([x]), run(x))


def test_shapes_that_change_in_place() -> None:
    def run(x: Tensor) -> Tensor:
        a = x + 1
        a.unsqueeze_(0)
        a.squeeze_(0)
        a.t_()
        return a.contiguous() @ a.t()

    x = torch.randn(2, 3)
    assert torch.equal(program(run, x).run([x]), run(x))


@pytest.mark.parametrize(
    "write", [lambda x, _: x.add_(1), lambda x, _: x[0].mul_(2), lambda x, held: held.add_(x)]
)
def test_who_writes_to_inputs_or_to_what_is_held_is_refused(write: Callable[..., Any]) -> None:
    x, held = torch.randn(2, 3), torch.randn(2, 3)
    assert "writes to an input, or to what the model holds" in refused(lambda: write(x, held), x)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda x: x * x.sum().item(), "looks at the numbers"),
        (lambda x: x * float(x[0]), "looks at the numbers"),
        (lambda x: x[x > 0], "returns as much as the numbers"),
        (lambda x: x.nonzero(), "returns as much as the numbers"),
        (lambda x: x.masked_select(x > 0), "returns as much as the numbers"),
        (lambda x: {1, x.sum()}, "it returns a set"),
    ],
)
def test_what_depends_on_numbers_is_refused(run: Callable[[Tensor], Any], why: str) -> None:
    x = torch.randn(5)
    found = refused(lambda: run(x), x)
    assert why in found or "returns something other than tensors" in found


def test_answers_are_part_of_a_recording() -> None:
    def run(x: Tensor) -> Tensor:
        return x + 1 if bool((x > 0).all()) or torch.equal(x, x.new_zeros(2)) else x - 1

    x, y = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 2.0])
    one, other = recorded(lambda: run(x), x), recorded(lambda: run(y), y)
    assert list(one.answers.values()) == [True]
    assert list(other.answers.values()) == [False, False]
    assert not one.agrees(other)
    assert one.agrees(recorded(lambda: run(x * 2), x * 2)) is False  # x * 2 is held there
    z = x * 2
    assert one.agrees(recorded(lambda: run(z), z))


def test_integers_that_index_are_no_mask() -> None:
    table, x = torch.randn(5, 2), torch.tensor([0, 4, 4])
    run = program(lambda x: table[x] + table[:, None][x, 0], x)
    assert torch.equal(run.run([x + 0]), table[x] * 2)


def test_no_result_is_kept_alive() -> None:
    x = torch.randn(3)
    seen: list[weakref.ref[Tensor]] = []

    def run() -> Tensor:
        between = x + 1
        seen.append(weakref.ref(between))
        made = between * 2
        del between
        assert seen[0]() is None
        return made

    made = recorded(run, x)
    gc.collect()
    assert made.tensors == ()


def test_memory_that_is_used_again_is_not_mixed_up() -> None:
    def run(x: Tensor) -> Tensor:
        total = x.clone()
        for n in range(50):
            part = x * n  # lies where the last one lay, as another object at the same place
            total = total + part.view(3, 2).view(2, 3)
        return total

    x = torch.randn(2, 3)
    assert torch.equal(program(run, x).run([x]), run(x))


def test_lists_optional_arguments_and_types() -> None:
    def run(x: Tensor) -> Any:
        a, b, c = torch.split(x, [1, 2, 3], dim=-1)
        low, _ = torch.cat([a, b, c], -1).to(torch.float64).min(0)
        return {"low": low, "std": x.std(dim=[0, 1], keepdim=True), "text": "a", "n": (1, None)}

    x = torch.randn(4, 6)
    got, wanted = program(run, x).run([x]), run(x)
    assert torch.equal(got["low"], wanted["low"])
    assert torch.equal(got["std"], wanted["std"])
    assert (got["text"], got["n"]) == ("a", (1, None))


def test_what_the_interpreter_does_not_know_is_called_between() -> None:
    def run(x: Tensor) -> Tensor:
        bits = (x * 2).view(torch.int32)
        more = (bits + 1).view(torch.float32)
        return more.to(memory_format=torch.channels_last) * 2

    x = torch.randn(1, 2, 3, 4)
    made = recorded(lambda: run(x), x)
    assert sum("view.dtype" in name for name in names(made)) == 2
    assert torch.equal(program(run, x).run([x]), run(x))


def test_values_are_found_in_nests() -> None:
    x = torch.randn(2)
    made = recorded(lambda: torch.stack([x, x]), x)
    assert [value.number for value in values_in(made.steps[0].args)] == [0, 0]


def _written_by_numpy(x: Tensor) -> Tensor:
    made = torch.empty(2, 3)
    made.numpy()[:] = x.numpy() * 2
    return made + 1


def _written_by_numpy_alone(x: Tensor) -> Tensor:
    made = torch.empty(2, 3)
    made.view(3, 2).numpy()[:] = 1.0
    return made


def _computed_in_place(x: Tensor) -> Tensor:
    made = torch.empty(2, 3)
    made.numpy()[:] = x.numpy() * 2
    return made.mul_(x)


@pytest.mark.parametrize("run", [_written_by_numpy, _written_by_numpy_alone, _computed_in_place])
def test_memory_that_no_operator_wrote_is_refused(run: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3)
    assert "memory that no operator wrote" in refused(lambda: run(x), x)


def test_memory_that_operators_wrote_is_read() -> None:
    def run(x: Tensor) -> Tensor:
        made = torch.empty(4, 3)
        made[:2] = x
        made.view(-1)[6:] = 1.0
        room = torch.empty_like(made)
        torch.exp(made, out=room)
        return room + x.new_empty(0).sum()

    x = torch.randn(2, 3)
    assert torch.equal(program(run, x).run([x]), run(x))


def test_operators_are_not_taken_to_pieces() -> None:
    """FBGEMM's kernel writes to memory past torch: of its pieces only the memory is an operator."""
    rows = RowSums(torch.ones(4, 6, dtype=torch.int8))

    def run(x: Tensor) -> Tensor:
        room = rows.room(2)
        room[:, :6] = x.round()
        return rows(room)

    x = torch.randn(2, 6) * 50
    assert torch.equal(program(run, x).run([x * 0.5]), run(x * 0.5))
