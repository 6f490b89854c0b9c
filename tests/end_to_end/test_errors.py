"""What cannot work is refused before any work starts, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.errors import CalibrationError, ConfigError, FxQuantError, TraceError
from tests.end_to_end.models import fingerprint, images, residual


class Untouchable:
    """Data that must not be looked at: the call is wrong in another way."""

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("the data was drawn before the arguments were checked")


class Unused(nn.Module):
    """A model that must not be run or copied."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model ran before the arguments were checked")

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise AssertionError("the model was copied before the arguments were checked")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "x68"}, r"no backend is called 'x68'; did you mean 'x86'\?"),
    "backend type": ({"backend": 3}, "backend is 3: pass the name"),
    "mode": ({"mode": "statical"}, "mode is 'statical'"),
    "preset": ({"qconfig": "onedn"}, r"no preset is called 'onedn'.*Did you mean 'onednn'\?"),
    "preset type": ({"qconfig": 8}, "qconfig is a int"),
    "share": ({"min_coverage": 1.5}, "it must lie between 0 and 1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_options_are_refused_before_any_work(what: str) -> None:
    options, message = WRONG[what]
    with pytest.raises(ConfigError, match=message):
        fxquant.quantize(Unused(), Untouchable(), **options)
    if what != "share":
        with pytest.raises(ConfigError, match=message):
            fxquant.prepare(Unused(), **options)


LATER: dict[str, tuple[dict[str, Any], str]] = {
    "overrides": ({"overrides": ["conv"]}, "overrides must be a dict"),
    "overrides value": ({"overrides": {"conv": "defualt"}}, "no preset is called 'defualt'"),
    "patterns": ({"patterns": ["conv"]}, "patterns holds a str"),
}


@pytest.mark.parametrize("what", LATER)
def test_wrong_wishes_are_refused_before_any_work(what: str) -> None:
    options, message = LATER[what]
    with pytest.raises(ConfigError, match=message):
        fxquant.quantize(Unused(), Untouchable(), **options)


UNKNOWN: dict[str, tuple[Any, str]] = {
    "path": ("cnov", r"the override 'cnov' matches nothing.*the nearest names are \['conv'"),
    "glob": ("layer*", r"the override 'layer\*' matches nothing"),
    "expression": ("re:(", "is no regular expression"),
    "class": (nn.LSTM, "the override LSTM matches nothing"),
    "function": (torch.cumsum, "the override cumsum matches nothing"),
    "no selector": (3, "the override selector 3 is none"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_overrides_that_match_nothing(what: str) -> None:
    selector, message = UNKNOWN[what]
    with pytest.raises(ConfigError, match=message):
        fxquant.quantize(residual(), images(), overrides={selector: None})


def test_models_that_are_none() -> None:
    for given, message in (
        (lambda x: x, "model is a function: pass an nn.Module"),
        (torch.randn(3), "model is a Tensor"),
        (nn.Conv2d, "model is the class Conv2d"),
    ):
        with pytest.raises(ConfigError, match=message):
            fxquant.quantize(given, images())  # type: ignore[arg-type] # what the error is about


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit itself is deprecated
def test_script_modules() -> None:
    scripted = torch.jit.trace(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="the model is a ScriptModule"):
        fxquant.quantize(scripted, images())


def test_models_without_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(ConfigError, match=r"0\.weight is on the meta device"):
        fxquant.quantize(model, images())


def test_models_that_are_quantized_already() -> None:
    q = fxquant.quantize(residual(), images())
    with pytest.raises(ConfigError, match="was made by fxquant"):
        fxquant.quantize(q, images())
    with pytest.raises(ConfigError, match="converted already"):
        fxquant.convert(q)
    with pytest.raises(ConfigError, match="was not made by fxquant"):
        fxquant.convert(residual())
    with pytest.raises(ConfigError, match="was not made by fxquant"):
        fxquant.calibrate(residual(), images())


def test_lazy_models() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(ConfigError, match=r"0\.weight has no shape yet: run the model once"):
        fxquant.quantize(model, images())


def test_calibration_that_was_forgotten() -> None:
    with pytest.raises(CalibrationError, match=r"call fxquant\.calibrate\(prepared, data\)"):
        fxquant.convert(fxquant.prepare(residual()))


def bad(index: int, value: float) -> list[Tensor]:
    data = images()
    data[index][0, 0, 0, 0] = value
    return data


DATA: dict[str, tuple[Any, str]] = {
    "empty list": ([], "0 batches"),
    "empty generator": (iter(()), "0 batches"),
    "function that does nothing": (lambda m: None, "0 batches"),
    "labelled": ([(x, torch.zeros(4)) for x in images()], r"transform=lambda b: b\[0\]"),
    "NaN": (bad(2, float("nan")), "1 NaN.*in batch 2.*holds 1 such"),
    "infinity": (bad(0, float("inf")), "1 infinite.*in batch 0"),
    "wrong shape": ([torch.randn(4, 5, 6, 6)], r"failed on batch 0.*\[4, 5, 6, 6\]"),
    "wrong shape later": ([*images(2), torch.randn(4, 1, 6, 6)], "failed on batch 2"),
    "wrong key": ([{"image": images()[0]}], "image"),
    "a string": ("images", "str"),
    "a number": (5, "int"),
}


@pytest.mark.parametrize("what", DATA)
def test_data_that_cannot_be_fed(what: str) -> None:
    data, message = DATA[what]
    with pytest.raises(CalibrationError, match=f"(?s){message}"):
        fxquant.quantize(residual(), data)


def test_zero_batches_asked_for() -> None:
    with pytest.raises(CalibrationError, match="max_batches=0"):
        fxquant.quantize(residual(), images(), max_batches=0)


def test_no_data_and_no_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    with pytest.raises(CalibrationError, match="BatchNorm"):
        fxquant.quantize(model)


def test_no_data_but_statistics_is_a_warning() -> None:
    with pytest.warns(fxquant.errors.FxQuantWarning, match="real data"):
        q = fxquant.quantize(residual(), example_inputs=images()[0])
    assert fxquant.report(q).weight_coverage == 1.0
    x, model = images(1, seed=3)[0], residual()
    with torch.no_grad():
        wanted = model(x)
        error = float((q(x) - wanted).square().mean() / wanted.square().mean())
    assert error < 0.05


def test_branches_on_values_are_refused_with_the_line() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = -x
            found: Tensor = self.conv(x)
            return found

    with pytest.raises(TraceError, match=r"test_errors\.py:\d+: if x\.sum\(\) > 0:"):
        fxquant.quantize(Branch().eval(), images(), strict=True)


def test_an_error_in_the_model_names_the_line() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).no_such_method_of_mine

    with pytest.raises(FxQuantError):
        fxquant.quantize(Broken().eval(), images())


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16), ids=str)
def test_models_of_other_precisions_are_refused_in_words(dtype: torch.dtype) -> None:
    """Their weights could be quantized, but their results would change type without a word."""
    model = residual().to(dtype)
    with pytest.raises(FxQuantError, match=str(dtype)):
        fxquant.quantize(model, [x.to(dtype) for x in images()])


def test_complex_and_integer_models_are_refused() -> None:
    class Count(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("one", torch.ones(1, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.get_buffer("one")

    with pytest.raises(FxQuantError):
        fxquant.quantize(Count().eval(), [torch.arange(6)])
    with pytest.raises(FxQuantError):
        fxquant.quantize(nn.Linear(4, 4, dtype=torch.complex64).eval(), [torch.randn(2, 4) * 1j])


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = residual()
    with torch.no_grad():
        model.get_parameter("gate.weight")[0] = value
    with pytest.raises(ConfigError, match=r"gate\.weight holds NaN or infinity"):
        fxquant.quantize(model, images())


def test_errors_leave_the_model_alone() -> None:
    model = residual()
    before = fingerprint(model)
    for data, _ in DATA.values():
        with pytest.raises(FxQuantError):
            fxquant.quantize(model, data)
    assert fingerprint(model) == before


def test_errors_are_the_builtins_that_fit() -> None:
    with pytest.raises(ValueError, match="backend"):
        fxquant.quantize(residual(), images(), backend="cuda")
    with pytest.raises(ValueError, match="0 batches"):
        fxquant.quantize(residual(), [])
