"""One calibration: what is fed, what is recorded, what is left as found, what fails and how."""

from __future__ import annotations

import gc
import random
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxquant.calibration import CalibrationResult, calibrate, first_batch
from fxquant.errors import CalibrationError, CalibrationWarning, ConfigError, LoweringError
from fxquant.numerics.observers import NonFiniteError, Observer
from tests.calibration.models import (
    Branches,
    Optional,
    Pair,
    Watched,
    batches,
    observer,
    traced,
)

DATA = batches(4, size=5)


@dataclass
class Named:
    x: Tensor


def seen_range(model: nn.Module, name: str = "before") -> tuple[float, float]:
    """Smallest and largest value the observer ``name`` was shown."""
    summary = model.get_submodule(name).summary()  # type: ignore[operator]  # a Module's attribute
    return summary.low, summary.high


def true_range(data: list[Tensor]) -> tuple[float, float]:
    whole = torch.cat(data)
    return whole.min().item(), whole.max().item()


def run_all(model: nn.Module) -> None:
    for x in DATA:
        model(x)


@pytest.mark.parametrize(
    "data",
    [
        DATA,
        tuple(DATA),
        [(x,) for x in DATA],
        [[x] for x in DATA],
        [{"x": x} for x in DATA],
        [Named(x) for x in DATA],
        DataLoader(TensorDataset(torch.cat(DATA)), batch_size=5),
        run_all,
    ],
    ids=["list", "tuple", "tuples", "lists", "dicts", "dataclasses", "loader", "function"],
)
@pytest.mark.parametrize("make", [Watched, lambda: traced(Watched())], ids=["module", "graph"])
def test_every_kind_of_data_is_fed(make: Callable[[], nn.Module], data: Any) -> None:
    model = make()
    result = calibrate(model, data)
    assert result.batches == 4 and result.unseen == () and result.seconds > 0
    assert result.samples == (None if data is run_all else 20)
    assert seen_range(model) == true_range(DATA)


def test_a_generator_is_read_once_and_in_order() -> None:
    drawn: list[int] = []

    def stream() -> Iterator[Tensor]:
        for i, x in enumerate(DATA):
            drawn.append(i)
            yield x

    model = Watched()
    assert calibrate(model, stream()).batches == 4
    assert drawn == [0, 1, 2, 3] and seen_range(model) == true_range(DATA)


def test_a_lone_tensor_is_one_batch() -> None:
    model = Watched()
    result = calibrate(model, torch.cat(DATA))
    assert (result.batches, result.samples) == (1, 20)
    assert seen_range(model) == true_range(DATA)


def test_the_peeked_data_calibrates_the_same() -> None:
    model = Watched()
    _, _, replay = first_batch(((x, 0) for x in DATA), lambda b: b[0], model=model)
    assert calibrate(model, replay).samples == 20
    assert seen_range(model) == true_range(DATA)


def test_two_inputs() -> None:
    model = Pair()
    calibrate(model, list(zip(DATA, DATA, strict=True)))
    assert seen_range(model) == true_range([2 * x for x in DATA])


def test_transform_is_applied_to_every_batch() -> None:
    model = Watched()
    calibrate(model, [(x, 1) for x in DATA], transform=lambda b: 3 * b[0])
    assert seen_range(model) == true_range([3 * x for x in DATA])


def test_image_and_label_batches_are_refused() -> None:
    loader = DataLoader(TensorDataset(torch.cat(DATA), torch.arange(20)), batch_size=5)
    for model in (Watched(), traced(Watched()), Optional()):
        with pytest.raises(CalibrationError, match=r"batch 0 .*transform=lambda b: b\[0\]"):
            calibrate(model, loader)
        assert calibrate(model, loader, transform=lambda b: b[0]).samples == 20


def test_max_batches_draws_no_batch_too_many() -> None:
    stream = iter(DATA)
    model = Watched()
    assert calibrate(model, stream, max_batches=2).batches == 2
    assert next(stream) is DATA[2]
    assert seen_range(model) == true_range(DATA[:2])
    assert calibrate(Watched(), DATA, max_batches=9).batches == 4


@pytest.mark.parametrize(
    ("data", "max_batches"), [([], None), (iter([]), None), (DATA, 0), ({}, None)]
)
def test_no_batch_is_an_error(data: Any, max_batches: int | None) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(Watched(), data, max_batches=max_batches)
    assert "0 batches" in str(caught.value) or "no tensor" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_generator_used_up_is_told_apart() -> None:
    stream = (x for x in DATA)
    calibrate(Watched(), stream)
    with pytest.raises(CalibrationError, match=r"0 batches.*read only once"):
        calibrate(Watched(), stream)


def test_a_function_that_runs_nothing_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"0 batches.*without running the model"):
        calibrate(Watched(), lambda model: None)

    def generator(model: nn.Module) -> Iterator[None]:
        model(DATA[0])
        yield

    with pytest.raises(CalibrationError, match="generator function"):
        calibrate(Watched(), generator)


def test_a_function_may_return_what_it_likes_and_leaves_no_hook() -> None:
    model = Watched()
    calibrate(model, lambda m: m(DATA[0]))
    assert not model._forward_hooks
    with pytest.raises(ZeroDivisionError):
        calibrate(model, lambda m: 1 // 0)
    assert not model._forward_hooks


@pytest.mark.parametrize("make", [Watched, lambda: traced(Watched())], ids=["module", "graph"])
@pytest.mark.parametrize(
    ("bad", "shown"),
    [(torch.zeros(5, 4), "float32[5, 4]"), (torch.zeros(5, 3).double(), "float64[5, 3]")],
)
def test_a_batch_the_model_fails_on_is_named(
    make: Callable[[], nn.Module], bad: Tensor, shown: str
) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(make(), [*DATA[:2], bad])
    text = str(caught.value)
    assert "batch 2" in text and shown in text and "RuntimeError" in text
    cause = caught.value.__cause__
    assert isinstance(cause, RuntimeError) and str(cause) in text


def test_a_failing_op_of_a_graph_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Product(Watched):
        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(self.before(x), x)

    # Called the usual way, a GraphModule prints where its own code failed.
    model = traced(Product())
    with pytest.raises(RuntimeError):
        model(DATA[0])
    assert "Call using an FX-traced Module" in capfd.readouterr().err
    with pytest.raises(CalibrationError, match="batch 0"):
        calibrate(model, DATA)
    assert capfd.readouterr().err == ""


def test_fxquant_errors_of_the_model_pass_through() -> None:
    class Guard(Watched):
        def forward(self, x: Tensor) -> Tensor:
            raise LoweringError("mine")

    with pytest.raises(LoweringError, match=r"^mine$"):
        calibrate(Guard(), DATA)


def test_errors_of_the_data_pass_through() -> None:
    def stream() -> Iterator[Tensor]:
        yield DATA[0]
        raise OSError("disk")

    with pytest.raises(OSError, match=r"^disk$"):
        calibrate(Watched(), stream())


@pytest.mark.parametrize(
    ("value", "nan", "inf"), [(float("nan"), 1, 0), (float("inf"), 0, 1), (-float("inf"), 0, 1)]
)
def test_nan_and_infinity_name_site_and_batch(value: float, nan: int, inf: int) -> None:
    bad = DATA[1].clone()
    bad[2, 1] = value
    with pytest.raises(CalibrationError) as caught:
        calibrate(Watched(), [DATA[0], bad])
    text = str(caught.value)
    assert f"{nan} NaN and {inf} infinite values" in text
    assert "'x'" in text and "batch 1" in text and "The batch itself holds 1 such" in text
    assert isinstance(caught.value.__cause__, NonFiniteError)


def test_nan_made_by_the_model_is_told_apart() -> None:
    class Root(Watched):
        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.before(x).sqrt())

    with pytest.raises(CalibrationError, match=r"'linear' in batch 0.*batch itself is finite"):
        calibrate(Root(), DATA)


def test_nan_in_a_function_counts_the_forwards() -> None:
    def run(model: nn.Module) -> None:
        model(DATA[0])
        model(DATA[1])
        model(DATA[2] / 0)

    with pytest.raises(CalibrationError, match="'x' in batch 2"):
        calibrate(Watched(), run)


def test_sites_never_reached_are_listed_and_warned_of() -> None:
    with pytest.warns(CalibrationWarning, match="never reached 7 of 9 sites") as caught:
        result = calibrate(Branches(), DATA)
    assert result.unseen == tuple(f"aux.{i}" for i in range(7))
    text = str(caught[0].message)
    assert "aux.0, aux.1, aux.2, aux.3, aux.4 and 2 more" in text and "stay float" in text


def test_no_warning_when_all_is_seen() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrate(Watched(), DATA).unseen == ()


def test_a_site_of_integers_was_reached() -> None:
    class Counting(Watched):
        def forward(self, x: Tensor) -> Tensor:
            self.before(x.long())
            return self.after(self.linear(x))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrate(Counting(), DATA).unseen == ()


def test_batches_without_samples_are_an_error() -> None:
    with pytest.raises(CalibrationError, match="2 batches ran and no value reached any of the 2"):
        calibrate(Watched(), [torch.zeros(0, 3)] * 2)


def test_samples_are_unknown_where_a_batch_shows_none() -> None:
    class Scalar(Watched):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(1, 1).expand(2, 3))

    assert calibrate(Scalar(), [torch.tensor(1.0), torch.tensor(2.0)]).samples is None


def test_a_model_without_observers_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"Linear has no observer.*prepare"):
        calibrate(nn.Linear(3, 2), DATA)


def test_swapped_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"calibrate\(model, data\)"):
        calibrate(DATA, Watched())  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(CalibrationError, match="the data is a model"):
        calibrate(Watched(), Watched())


def test_progress_is_told_after_each_batch() -> None:
    told: list[tuple[int, int | None]] = []
    record = lambda done, total: told.append((done, total))  # noqa: E731
    calibrate(Watched(), DATA, progress=record)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    calibrate(Watched(), DATA, max_batches=2, progress=record)
    assert told == [(1, 2), (2, 2)]
    told.clear()
    calibrate(Watched(), (x for x in DATA[:2]), progress=record)
    assert told == [(1, None), (2, None)]
    told.clear()
    calibrate(Watched(), run_all, progress=record)
    assert told == [(i, None) for i in (1, 2, 3, 4)]


def test_progress_has_to_be_a_function() -> None:
    with pytest.raises(ConfigError, match="progress is a bool"):
        calibrate(Watched(), DATA, progress=True)  # type: ignore[arg-type]  # the mistake under test


def test_no_batch_and_no_output_outlives_its_turn() -> None:
    outputs: list[weakref.ref[Tensor]] = []
    inputs: list[weakref.ref[Tensor]] = []

    class Recording(Watched):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            outputs.append(weakref.ref(y))
            return y

    def stream() -> Iterator[tuple[Tensor, int]]:
        for i in range(5):
            assert [ref() for ref in inputs] == [None] * i
            assert [ref() for ref in outputs] == [None] * i
            x = torch.randn(5, 3)
            inputs.append(weakref.ref(x))
            batch = (x, i)
            del x
            yield batch
            del batch

    # Reference counts alone must free them: no help from the collector.
    gc.disable()
    try:
        result = calibrate(Recording(), stream(), transform=lambda b: b[0])
    finally:
        gc.enable()
    assert result.batches == 5 and len(outputs) == 5


def test_nothing_is_recorded_for_autograd() -> None:
    grads: list[bool] = []

    class Recording(Watched):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            grads.append(y.requires_grad or torch.is_inference(y))
            return y

    model = Recording()
    calibrate(model, [DATA[0].clone().requires_grad_()])
    calibrate(model, lambda m: m(DATA[0]))
    with torch.inference_mode():
        calibrate(model, DATA[:1])
    assert grads == [False] * 3


def test_observers_filled_in_inference_mode_can_still_be_used() -> None:
    model = Watched()
    with torch.inference_mode():
        calibrate(model, DATA[:2])
    calibrate(model, DATA[2:])
    assert seen_range(model) == true_range(DATA)


@pytest.mark.parametrize("grad", [True, False])
def test_data_is_drawn_in_the_callers_grad_mode(grad: bool) -> None:
    modes: list[bool] = []

    def stream() -> Iterator[Tensor]:
        modes.append(torch.is_grad_enabled())
        yield DATA[0]
        modes.append(torch.is_grad_enabled())

    with torch.set_grad_enabled(grad):
        calibrate(Watched(), stream())
    assert modes == [grad, grad]


def disturbing(fail: bool) -> Iterator[Tensor]:
    """A stream that changes the grad mode and draws random numbers, and may fail."""
    yield torch.randn(5, 3)
    torch.set_grad_enabled(False)
    yield torch.randn(5, 3)
    if fail:
        yield torch.randn(5, 4)


@pytest.mark.parametrize("fail", [False, True])
def test_all_is_left_as_found(fail: bool) -> None:
    model = Watched()
    model.train()
    model.linear.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    python_state = random.getstate()
    weights = {name: value.clone() for name, value in model.linear.state_dict().items()}
    if fail:
        with pytest.raises(CalibrationError):
            calibrate(model, disturbing(fail))
    else:
        calibrate(model, disturbing(fail))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.linear.state_dict()[k], v) for k, v in weights.items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.enabled for m in model.modules() if isinstance(m, Observer))


def test_a_function_that_changes_the_mode_is_undone() -> None:
    model = Watched().eval()

    def run(m: nn.Module) -> None:
        m.train()
        m(DATA[0])

    calibrate(model, run)
    assert not any(module.training for module in model.modules())


def test_observers_are_on_only_meanwhile() -> None:
    model = Watched()
    states: list[bool] = []

    def stream() -> Iterator[Tensor]:
        states.append(model.before.enabled and model.after.enabled)
        yield DATA[0]

    model.before.enabled = model.after.enabled = False
    calibrate(model, stream())
    assert states == [True]
    assert not model.before.enabled and not model.after.enabled
    before = seen_range(model)
    model(100 * DATA[1])
    assert seen_range(model) == before


def test_calibrating_twice_adds_data() -> None:
    model = Watched()
    calibrate(model, DATA[:2])
    calibrate(model, DATA[2:])
    assert seen_range(model) == true_range(DATA)


def test_batches_are_moved_to_the_models_device() -> None:
    devices: list[str] = []

    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2, device="meta")
            self.site = observer("x")

        def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
            devices.extend((x.device.type, more["y"].device.type))
            # Values have no place on a meta device: the observer gets others.
            self.site(torch.ones(2))
            return self.linear(x + more["y"])

    calibrate(Recording(), [(DATA[0], {"y": DATA[1]})])
    assert devices == ["meta", "meta"]


def test_the_result_is_frozen() -> None:
    result = CalibrationResult(1, 2, 0.5, ())
    with pytest.raises(AttributeError):
        result.batches = 3  # type: ignore[misc]  # the mistake under test
