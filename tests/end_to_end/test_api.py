"""The public calls: what they promise about their arguments, their results and the caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from fxquant.errors import (
    CalibrationError,
    CalibrationWarning,
    ConfigError,
    FxQuantWarning,
    GuardError,
    LoweringError,
)
from tests.end_to_end.models import fingerprint, images, residual


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def same(a: nn.Module, b: nn.Module) -> bool:
    """Same state, same graph, same outputs, bit for bit."""
    mine, theirs = a.state_dict(), b.state_dict()
    assert list(mine) == list(theirs)
    equal = all(torch.equal(mine[name], theirs[name]) for name in mine)
    return equal and not fxquant.diff(a, b) and torch.equal(run(a, X), run(b, X))


X = images(1, seed=9)[0]


# The caller's things


def succeed(model: nn.Module) -> None:
    fxquant.quantize(model, images())


def fail_in_data(model: nn.Module) -> None:
    data = [*images(2), torch.full((4, 3, 12, 12), float("nan"))]
    with pytest.raises(CalibrationError):
        fxquant.quantize(model, data)


def fail_in_overrides(model: nn.Module) -> None:
    with pytest.raises(ConfigError):
        fxquant.quantize(model, images(), overrides={"nowhere": None})


def fail_in_coverage(model: nn.Module) -> None:
    with pytest.raises(LoweringError):
        fxquant.quantize(model, images(), overrides={nn.Linear: None}, min_coverage=1.0)


def fail_in_the_callers_function(model: nn.Module) -> None:
    def boom(prepared: nn.Module) -> None:
        prepared(X)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fxquant.quantize(model, boom)


WAYS = (succeed, fail_in_data, fail_in_overrides, fail_in_coverage, fail_in_the_callers_function)


@pytest.mark.filterwarnings("ignore:the model is in training mode")
@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("way", WAYS)
def test_the_model_and_the_process_are_left_as_found(
    way: Callable[[nn.Module], None], train: bool
) -> None:
    model = residual().train(train)
    model.get_submodule("gate").requires_grad_(False)
    seen: list[str] = []
    model.get_submodule("stem").register_forward_hook(lambda *_: seen.append("hook"))
    before, random = fingerprint(model), torch.get_rng_state()
    call = nn.Module.__call__
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            way(model)
            assert torch.is_grad_enabled() is grad
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert nn.Module.__call__ is call
    run(model.eval(), X)
    assert seen, "the caller's hook still works"


def test_the_result_shares_no_memory_with_the_model() -> None:
    model = residual()
    model.register_buffer("unused", torch.ones(3))
    prepared = fxquant.prepare(model)
    fxquant.calibrate(prepared, images())
    made = [fxquant.convert(prepared, backend=name) for name in ("x86", "reference", "reference")]
    stores = [
        {t.untyped_storage().data_ptr() for t in m.state_dict().values() if t.numel()}
        for m in (model, *made)
    ]
    for i, mine in enumerate(stores):
        for theirs in stores[i + 1 :]:
            assert not mine & theirs


def test_frozen_and_float_parts_share_no_memory_either() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
            self.register_buffer("shift", torch.randn(8, 1, 1))
            self.factor = nn.Parameter(torch.randn(8, 1, 1), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(self.conv(x)) * self.factor + self.shift
            return found

    model = Mixed().eval().requires_grad_(False)
    prepared = fxquant.prepare(model)
    fxquant.calibrate(prepared, images())
    first, second = fxquant.convert(prepared), fxquant.convert(prepared)
    wanted = run(second, X)
    with torch.no_grad():
        for tensor in (*first.parameters(), *first.buffers()):
            tensor.zero_()
    assert torch.equal(run(second, X), wanted)
    assert torch.equal(run(fxquant.convert(prepared), X), wanted)


def test_training_mode_is_warned_about_and_the_result_is_in_eval() -> None:
    with pytest.warns(FxQuantWarning, match="training mode"):
        q = fxquant.quantize(residual().train(), images())
    assert not q.training
    assert same(q, fxquant.quantize(residual(), images()))


# The steps


@pytest.mark.parametrize("backend", ("x86", "reference"))
def test_quantize_is_prepare_calibrate_convert(backend: str) -> None:
    options: dict[str, Any] = {"overrides": {"gate": None}, "qconfig": "default"}
    whole = fxquant.quantize(residual(), images(), backend=backend, **options)
    prepared = fxquant.prepare(residual(), example_inputs=images()[0], **options)
    fxquant.calibrate(prepared, images())
    assert same(whole, fxquant.convert(prepared, backend=backend))


def test_convert_leaves_the_prepared_model_usable() -> None:
    prepared = fxquant.prepare(residual())
    fxquant.calibrate(prepared, images())
    before, wanted = fingerprint(prepared), run(prepared, X)
    first = fxquant.convert(prepared)
    assert same(first, fxquant.convert(prepared))
    assert fingerprint(prepared) == before
    assert torch.equal(run(prepared, X), wanted)
    assert len(fxquant.history(prepared)) < len(fxquant.history(first))


def test_the_prepared_model_computes_what_the_float_one_does() -> None:
    # Folding a batch norm rounds: eight float32 roundings deep.
    found, wanted = run(fxquant.prepare(residual()), X), run(residual(), X)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_calibrating_more_widens_what_is_seen() -> None:
    prepared = fxquant.prepare(residual(), qconfig=MINMAX)
    fxquant.calibrate(prepared, images(1))
    narrow = fxquant.convert(prepared, backend="reference")
    fxquant.calibrate(prepared, [10 * x for x in images(1)])
    wide = fxquant.convert(prepared, backend="reference")
    assert input_scale(wide) == pytest.approx(10 * input_scale(narrow), rel=1e-5)


MINMAX = fxquant.QConfig(activation=fxquant.QSpec(observer="minmax"))


def input_scale(model: nn.Module) -> float:
    found = fxquant.report(model).ops[0].reads[0]
    assert found is not None
    return found.scale


# Calibration data


@dataclasses.dataclass
class Sample:
    x: Tensor


def one_shot() -> Iterator[Tensor]:
    yield from images()


def feed(model: nn.Module) -> None:
    for x in images():
        model(x)


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any] | None]] = {
    "list": (images, None),
    "tuple": (lambda: tuple(images()), None),
    "generator": (one_shot, None),
    "iterator": (lambda: iter(images()), None),
    "function": (lambda: feed, None),
    "tuples of one": (lambda: [(x,) for x in images()], None),
    "dicts": (lambda: [{"x": x} for x in images()], None),
    "labelled": (lambda: [(x, torch.zeros(4)) for x in images()], lambda b: b[0]),
    "labelled generator": (lambda: ((x, 1) for x in images()), lambda b: b[0]),
    "objects": (lambda: [{"image": x} for x in images()], lambda b: {"x": b["image"]}),
    "dataclasses": (lambda: [Sample(x) for x in images()], None),
    "DataLoader": (
        lambda: torch.utils.data.DataLoader(torch.cat(images()), batch_size=4), None,  # type: ignore[arg-type] # a tensor is a dataset
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_model(kind: str) -> None:
    make, transform = KINDS[kind]
    wanted = fxquant.quantize(residual(), images())
    assert same(fxquant.quantize(residual(), make(), transform=transform), wanted)


def test_max_batches_and_progress() -> None:
    drawn: list[int] = []

    def stream() -> Iterator[Tensor]:
        for index, x in enumerate(images(6)):
            drawn.append(index)
            yield x

    told: list[tuple[int, int | None]] = []
    q = fxquant.quantize(
        residual(), stream(), max_batches=2, progress=lambda done, of: told.append((done, of))
    )
    assert drawn == [0, 1]
    assert [done for done, _ in told] == [1, 2]
    assert same(q, fxquant.quantize(residual(), images(6)[:2]))


def test_an_example_is_not_part_of_the_data() -> None:
    q = fxquant.quantize(residual(), images(), example_inputs=100 * images()[0])
    assert same(q, fxquant.quantize(residual(), images()))


# Overrides


SELECTORS: dict[str, tuple[Any, set[str]]] = {
    "path": ("conv", {"conv"}),
    "path of a container": ("stem", {"stem.0"}),
    "glob": ("*e*", {"gate", "head", "stem.0"}),
    "regular expression": ("re:(gate|head)", {"gate", "head"}),
    "class": (nn.Linear, {"head"}),
    "function": (torch.cat, {"cat"}),
    "other spelling of a function": (F.relu, {"stem.0", "conv"}),
    "base class": (nn.modules.conv._ConvNd, {"stem.0", "conv", "gate"}),
}


@pytest.mark.parametrize("kind", SELECTORS)
def test_overrides_of_every_kind_leave_ops_in_float(kind: str) -> None:
    selector, paths = SELECTORS[kind]
    q = fxquant.quantize(residual(), images(), overrides={selector: None}, backend="reference")
    ops = {op.path: op for op in fxquant.report(q).ops}
    if kind == "other spelling of a function":
        # The relu is what was asked to stay float; its layer may be int8 beside it.
        assert any(op.op == "relu" and not op.int8 for op in fxquant.report(q).ops)
        return
    for path in paths:
        assert not ops[path].int8, path
        assert ops[path].why == "it was asked to stay float"
        assert "override" in ops[path].by
    layers = {"stem.0", "conv", "gate", "head"}
    assert all(ops[path].int8 for path in layers - paths)


def test_the_last_override_wins() -> None:
    general: dict[Any, Any] = {nn.Conv2d: None}
    special: dict[Any, Any] = {"conv": fxquant.QConfig()}
    for overrides, wanted in ((general | special, True), (special | general, False)):
        q = fxquant.quantize(residual(), images(), overrides=overrides)
        ops = {op.path: op for op in fxquant.report(q).ops}
        assert ops["conv"].int8 is wanted
        assert not ops["gate"].int8


def test_an_override_may_name_a_preset_or_change_the_weight() -> None:
    q = fxquant.quantize(residual(), images(), overrides={"head": "qnnpack"}, backend="reference")
    ops = {op.path: op for op in fxquant.report(q).ops}
    assert ops["head"].weight == "int8 per tensor"
    assert ops["conv"].weight == "int8 per channel 0"


# Results


def test_min_coverage() -> None:
    q = fxquant.quantize(residual(), images(), min_coverage=0.5)
    assert fxquant.report(q).coverage >= 0.5
    overrides: dict[Any, Any] = {nn.Linear: None, nn.Conv2d: None, "conv": "default"}
    with pytest.raises(LoweringError, match="min_coverage=90%") as error:
        fxquant.quantize(residual(), images(), overrides=overrides, min_coverage=0.9)
    assert "stem.0 (conv2d): it was asked to stay float" in str(error.value)


def test_nothing_int8_is_an_error_that_says_why() -> None:
    overrides: dict[Any, Any] = {nn.Linear: None, nn.Conv2d: None, "re:.*": None}
    with pytest.raises(LoweringError, match="nothing in this model became int8") as error:
        fxquant.quantize(residual(), images(), overrides=overrides)
    assert "conv (conv2d" in str(error.value) and "asked to stay float" in str(error.value)


def test_a_model_of_float_ops_only() -> None:
    model = nn.Sequential(nn.LPPool1d(2, 2), nn.CrossMapLRN2d(3)).eval()
    with pytest.raises(LoweringError, match="powers and roots of sums need float"):
        fxquant.quantize(model, [torch.randn(1, 4, 8, 8)])


def test_a_branch_that_data_never_reaches_stays_float_and_is_listed() -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.first, self.rare = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.conv(x[:, :, 1:]) + self.rare(self.first(x[:0])).sum()
            return found

    with pytest.warns(CalibrationWarning, match="never reached"):
        q = fxquant.quantize(Switch().eval(), images())
    ops = {op.path: op for op in fxquant.report(q).ops}
    assert ops["conv"].int8
    assert not ops["rare"].int8
    assert fxquant.report(q).to_dict()["unseen"]
    assert run(q, X).shape == (4, 8, 11, 12)


def test_structures_in_and_out() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> dict[str, Any]:
            a, b = self.a(x), self.b(y)
            return {"sum": (a + b) * scale, "parts": (a, [b])}

    data = [(torch.randn(8, 4), torch.randn(8, 4)) for _ in range(2)]
    q = fxquant.quantize(Pair().eval(), data)
    with torch.no_grad():
        found = q(*data[0])
    assert set(found) == {"sum", "parts"}
    assert all(t.dtype == torch.float32 for t in (found["sum"], found["parts"][0]))
    with pytest.raises(GuardError, match=r"argument 'scale' is 3\.0"):
        q(*data[0], 3.0)


def test_backends_are_listed() -> None:
    found = {b.name: b for b in fxquant.backends()}
    assert set(found) == {"x86", "cuda", "reference"}
    assert found["reference"].available
    assert all(b.reason for b in found.values())
