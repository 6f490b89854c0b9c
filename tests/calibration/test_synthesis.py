"""Inputs made from BatchNorm statistics: they fit, nothing else is touched, what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fxquant.errors import CalibrationError, CalibrationWarning, ConfigError
from fxquant.synthesis import REAL_DATA_IS_BETTER, synthesize

quiet = pytest.mark.filterwarnings("ignore::fxquant.errors.CalibrationWarning")


def trained(model: nn.Module, data: Tensor) -> nn.Module:
    """``model`` in eval, its BatchNorms carrying the statistics of ``data``."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.momentum = None  # a cumulative average: one batch sets the statistics
    with torch.no_grad():
        model.train()(data)
    return model.eval()


def small_cnn(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(8),
    )


def distances(model: nn.Module, inputs: Tensor) -> list[float]:
    """Per BatchNorm, the worst channel's error of mean and spread in standard deviations.

    Written without the library: float64, one channel at a time, from the definition.
    """
    worst: list[float] = []

    def look(norm: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].double().transpose(0, 1).flatten(1)
        errors = []
        for channel, values in enumerate(x):
            mean = sum(values.tolist()) / len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values.tolist()) / (len(values) - 1))
            std = math.sqrt(norm.running_var[channel].item())
            errors += [abs(mean - norm.running_mean[channel].item()) / std, abs(spread / std - 1)]
        worst.append(max(errors))

    kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
    norms = [m for m in model.modules() if isinstance(m, kinds)]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return worst


def ranges(model: nn.Module, inputs: Tensor) -> list[float]:
    """Largest minus smallest output of each BatchNorm."""
    found: list[float] = []
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [
        norm.register_forward_hook(lambda _m, _a, y: found.append((y.max() - y.min()).item()))
        for norm in norms
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module")
def cnn() -> nn.Module:
    torch.manual_seed(1)
    return trained(small_cnn(), 3 + 2 * torch.rand(32, 3, 16, 16))


@quiet
def test_the_statistics_are_reproduced(cnn: nn.Module) -> None:
    (made,) = synthesize(cnn, torch.zeros(1, 3, 16, 16), samples=16)
    noise = torch.randn(16, 3, 16, 16)
    # Plain noise is more than 10 standard deviations off; a twentieth of one is what ranges need.
    assert min(distances(cnn, noise)) > 1
    assert max(distances(cnn, made)) < 0.1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 16), (0, 255), (-2, 2)])
@quiet
def test_inputs_of_any_scale_are_found(low: float, high: float) -> None:
    data = low + (high - low) * torch.rand(32, 3, 16, 16)
    model = trained(small_cnn(), data)
    made = torch.cat(synthesize(model, data, samples=16))
    # The first BatchNorm sees a linear image of the input, so its range follows the scale; a wrong
    # scale is off by 2 and more.
    for real, ours in zip(ranges(model, data), ranges(model, made), strict=True):
        assert 0.7 < ours / real < 1.6
    assert max(distances(model, made)) < 0.15


@quiet
def test_digits_give_the_ranges_of_real_digits() -> None:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    torch.manual_seed(0)
    features = small_cnn(channels=1)
    model = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        for index in torch.randperm(1400).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
    model.eval()
    made = torch.cat(synthesize(model, images[:1]))
    ratios = [a / b for a, b in zip(ranges(model, made), ranges(model, images), strict=True)]
    # On residual networks over digits 0.75 to 1.22 was measured; N(0, 1) noise gives 0.4 to 0.6.
    assert all(0.6 < ratio < 1.5 for ratio in ratios), ratios


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)), (4, 64)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), (2, 8, 8, 8)),
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU()), (12,)),
    "plain": (lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU()), (3, 12, 12)),
}


@quiet
@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_batchnorm(name: str) -> None:
    make, shape = NETS[name]
    model = trained(make(), 1 + 2 * torch.randn(256, *shape))
    made = torch.cat(synthesize(model, torch.zeros(1, *shape), samples=32))
    assert made.shape == (32, *shape)
    assert max(distances(model, made)) < 0.2


@quiet
def test_sync_batchnorm_counts() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(trained(small_cnn(), torch.rand(8, 3, 16, 16)))
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert synthesize(model, torch.zeros(1, 3, 16, 16), samples=4, steps=2)[0].shape[0] == 4


@quiet
def test_batches_of_at_most_sixteen_and_the_asked_number(cnn: nn.Module) -> None:
    example = torch.zeros(1, 3, 16, 16)
    assert [len(b) for b in synthesize(cnn, example, samples=20, steps=1)] == [16, 4]
    assert [len(b) for b in synthesize(cnn, (example,), samples=3, steps=1)] == [3]
    # The cost of a photograph is bounded by making fewer.
    assert sum(len(b) for b in synthesize(cnn, torch.zeros(9, 3, 224, 224), steps=1)) == 8
    assert sum(len(b) for b in synthesize(cnn, example, steps=1)) == 32


@quiet
def test_the_same_arguments_give_the_same_inputs(cnn: nn.Module) -> None:
    example = torch.zeros(1, 3, 16, 16)

    def make(seed: int) -> Tensor:
        torch.rand(3)  # moves the global random state
        return synthesize(cnn, example, samples=4, steps=5, seed=seed)[0]

    assert torch.equal(make(0), make(0))
    assert not torch.equal(make(0), make(1))


@quiet
def test_the_result_is_plain_and_of_the_models_dtype(cnn: nn.Module) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        model = copy.deepcopy(cnn).to(dtype)
        (made,) = synthesize(model, torch.zeros(1, 3, 16, 16), samples=4, steps=2)
        assert made.dtype == dtype and made.grad_fn is None and not made.requires_grad
        assert torch.isfinite(made).all()
        assert model[0].weight.dtype == dtype  # type: ignore[index]  # an nn.Sequential


class Noisy(nn.Module):
    """Draws from the global random state in eval too, and can fail."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.net = small_cnn()
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x + 0.01 * torch.randn_like(x))
        if self.fail and not self.training and x.requires_grad:
            raise RuntimeError("on purpose")
        return y


@quiet
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_caller_are_left_as_found(fail: bool, training: bool) -> None:
    model = trained(Noisy(fail), torch.rand(8, 3, 16, 16)).train(training)
    model.net[1].train(not training)  # type: ignore[index,union-attr]  # an nn.Sequential
    first = next(model.parameters())
    first.requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    random = torch.get_rng_state()
    with torch.no_grad():
        if fail:
            with pytest.raises(CalibrationError, match="on purpose") as caught:
                synthesize(model, torch.zeros(1, 3, 16, 16), samples=4, steps=3)
            assert isinstance(caught.value.__cause__, RuntimeError)
        else:
            synthesize(model, torch.zeros(1, 3, 16, 16), samples=4, steps=3)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert torch.equal(last.grad, torch.ones_like(last))
    assert [p.grad is None for p in model.parameters()] == [True] * (len(needs) - 1) + [False]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


@quiet
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_descends_whatever_the_callers_grad_mode(
    cnn: nn.Module, mode: Callable[[], Any]
) -> None:
    with mode():
        (made,) = synthesize(cnn, torch.zeros(1, 3, 16, 16), samples=8)
    assert max(distances(cnn, made)) < 0.2
    assert not made.is_inference()


def test_it_says_that_real_data_is_better(cnn: nn.Module) -> None:
    with pytest.warns(CalibrationWarning) as caught:
        synthesize(cnn, torch.zeros(1, 3, 16, 16), samples=16)
    assert [str(w.message) for w in caught] == [REAL_DATA_IS_BETTER]
    assert "real data is better" in REAL_DATA_IS_BETTER


def test_a_fit_that_stays_bad_is_warned_of() -> None:
    model = trained(small_cnn(), torch.rand(8, 3, 16, 16))
    first = model[1]  # type: ignore[index]  # an nn.Sequential
    # Channel 0 is a copy of channel 1, so no input gives them these two means.
    model[0].weight.data[0] = model[0].weight.data[1]  # type: ignore[index]  # as above
    first.running_mean[0], first.running_mean[1] = -20.0, 20.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        synthesize(model, torch.zeros(1, 3, 16, 16), samples=4)
    assert str(caught[0].message) == REAL_DATA_IS_BETTER
    assert "miss the BatchNorm statistics by" in str(caught[1].message)
    assert {w.category for w in caught} == {CalibrationWarning}


@quiet
def test_a_channel_that_training_switched_off_counts_nothing() -> None:
    model = trained(small_cnn(), torch.rand(8, 3, 16, 16))
    norm: Any = model[1]  # type: ignore[index]  # an nn.Sequential
    reference = torch.cat(synthesize(model, torch.zeros(1, 3, 16, 16), samples=8))
    with torch.no_grad():
        norm.weight[3], norm.running_mean[3], norm.running_var[3] = 0.0, 50.0, 1e-12
        norm.bias[3] = 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the made-up inputs miss")
        made = torch.cat(synthesize(model, torch.zeros(1, 3, 16, 16), samples=8))
    assert 0.5 < made.std() / reference.std() < 2


class OneHead(nn.Module):
    """Two convolutions with BatchNorm; the second head is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = small_cnn(), small_cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@quiet
def test_batchnorms_that_are_not_reached_do_not_matter() -> None:
    model = trained(OneHead(), torch.rand(8, 3, 16, 16))
    made = torch.cat(synthesize(model, torch.zeros(1, 3, 16, 16), samples=8))
    assert max(distances(model, made)) < 0.2


def refusal(model: nn.Module, example: Any = None, **options: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        synthesize(model, example, **options)
    text = str(caught.value)
    assert "data" in text or "example_inputs" in text or "broken" in text
    return text


def test_models_without_statistics_are_refused() -> None:
    assert "has no BatchNorm" in refusal(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert "has no BatchNorm" in refusal(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)))
    untracked = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert "track no statistics" in refusal(untracked)


def test_an_untrained_model_is_refused_and_an_untrained_layer_ignored() -> None:
    model = small_cnn()
    assert "its 2 BatchNorms were never trained" in refusal(model, torch.zeros(1, 3, 16, 16))
    norm: Any = trained(model, torch.rand(8, 3, 16, 16))[1]  # type: ignore[index]  # a Sequential
    norm.reset_running_stats()
    with pytest.warns(CalibrationWarning):
        made = torch.cat(synthesize(model, torch.zeros(1, 3, 16, 16), samples=8))
    assert distances(model, made)[1] < 0.2


def test_broken_statistics_are_named() -> None:
    model = trained(small_cnn(), torch.rand(8, 3, 16, 16))
    model[4].running_var[2] = float("nan")  # type: ignore[index]  # an nn.Sequential
    assert "BatchNorm '4' hold NaN" in refusal(model, torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.long), "float tensors only"),
        ((torch.zeros(1, 3), torch.zeros(1, 3)), "holds (Tensor, Tensor)"),
        ((torch.zeros(1, 3), 2), "holds (Tensor, int)"),
        ({"x": torch.zeros(1, 3)}, "holds (dict)"),
        ((), "holds ()"),
        (torch.zeros(3), "shape [3]"),
        (torch.zeros(2, 3, 0, 4), "shape [2, 3, 0, 4]"),
        (torch.zeros(1, 5, 16, 16), "failed on a made-up input [4, 5, 16, 16]"),
    ],
)
def test_examples_that_cannot_be_followed_are_refused(
    cnn: nn.Module, example: Any, words: str
) -> None:
    assert words in refusal(cnn, example, samples=4)


class Detached(OneHead):
    def forward(self, x: Tensor) -> Tensor:
        return self.used(x.detach())


class Exploding(OneHead):
    def forward(self, x: Tensor) -> Tensor:
        return self.used(x / 0)


class Skipping(OneHead):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Detached, "cannot be differentiated"),
        (Exploding, "NaN or infinity at its BatchNorms"),
        (Skipping, "never reaches a trained BatchNorm"),
    ],
)
def test_models_that_cannot_be_descended_are_refused(kind: type[OneHead], words: str) -> None:
    model = kind()
    trained(model.used, torch.rand(8, 3, 16, 16))
    assert words in refusal(model, torch.zeros(1, 3, 16, 16), samples=4)


@pytest.mark.parametrize("option", [{"samples": 0}, {"samples": 1.5}, {"steps": 0}, {"steps": "9"}])
def test_options_have_to_be_counts(cnn: nn.Module, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="pass a positive integer"):
        synthesize(cnn, torch.zeros(1, 3, 16, 16), **option)


def test_it_stops_when_nothing_improves() -> None:
    calls: list[int] = []

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(len(args[0]))

    model = trained(nn.BatchNorm2d(2), torch.rand(8, 2, 8, 8))
    # The BatchNorm only ever sees zeros, so no step can bring anything.
    model.register_forward_pre_hook(lambda _m, args: (torch.zeros_like(args[0]) + 0 * args[0],))
    model.register_forward_pre_hook(count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        synthesize(model, torch.zeros(1, 2, 8, 8), samples=8, steps=100)
    # The search for the scale takes at most 60 forwards; the descent gives up past its first half.
    assert 50 < len(calls) < 60 + 60
