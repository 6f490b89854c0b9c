"""Inputs fitted by gradient descent until they reproduce the statistics of the BatchNorms.

Source: Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", arXiv 2001.00281, section
3.2; the errors are taken in units of each channel's standard deviation and weighted by its gain.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.errors import CalibrationError, CalibrationWarning, ConfigError, warn_user
from fxquant.graph.held_state import random_kept
from fxquant.synthesis.shapes import input_shape
from fxquant.synthesis.statistics import Reached, Site, measuring, trained_sites

REAL_DATA_IS_BETTER: Final = (
    "the calibration inputs are made up, from the statistics of the model's BatchNorms: real data "
    "is better. Pass a few hundred samples: fxquant.quantize(model, data)"
)
# In units of the input's spread, per step. Between 0.1 and 0.5 the ranges of a residual network
# trained on CIFAR-10 come out alike; more overshoots where noise already fits well.
_RATE: Final = 0.2
_WARM_UP: Final = 5
# Small networks halve the mismatch every few steps to the end. Large ones slow down, and gain
# nothing by what is left: after 10, 13, 20 and 40 steps ResNet-18 at 224 x 224 quantizes alike, and
# as from real data (31.9 to 32.5 dB).
_PATIENCE, _GAIN = 5, 0.25
# Inputs come normalised, as 0..1, as 0..16 or as bytes: the first statistics tell which.
_SPREADS: Final = (1.0, 1 / 16, 1 / 4, 4.0, 16.0, 64.0, 256.0)
_SHIFTS: Final = (0.0, 1.0, 2.0)
_NEAR: Final = 1.0
_SCALE_STEPS, _SCALE_SAMPLES = 30, 4
# A quarter of a standard deviation: ranges are then off by several percent.
_LARGE: Final = 0.25
_VALUES: Final = 1_300_000
_BATCH: Final = 16


@dataclass(frozen=True)
class _Fit:
    """Inputs [samples, ...] and the root mean square of what is left of the mismatch."""

    inputs: Tensor
    mismatch: float
    steps: int


def synthesize(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    *,
    samples: int | None = None,
    steps: int = 40,
    seed: int = 0,
) -> list[Tensor]:
    """Make inputs whose statistics at every BatchNorm are those the model was trained with.

    The model is left as found: a copy is worked on. The same arguments and number of threads give
    the same inputs, and the global random state is not touched.

    Args:
        model: a float model with trained BatchNorm1d, 2d, 3d or SyncBatchNorm layers and one float
            input; its training flag does not matter.
        example_inputs: one tensor [batch, ...] that shows the shape; the batch is replaced. Without
            it the shape is found by trying.
        samples: how many inputs; by default as many as hold 1.3 million values, 4 to 32.
        steps: gradient steps at most; fewer when the mismatch stops falling.
        seed: of the noise that is started from.

    Returns:
        Batches of at most 16 samples, on the model's device and in its dtype.

    Raises:
        CalibrationError: it cannot be done for this model; says why and what to pass.
        ConfigError: ``samples`` or ``steps`` is not positive.

    Example:
        >>> import torch, warnings
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> _ = model(torch.randn(16, 3, 32, 32))  # in train: the BatchNorm learns
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     [batch.shape for batch in synthesize(model, samples=20, steps=2)]
        [torch.Size([16, 3, 32, 32]), torch.Size([4, 3, 32, 32])]
    """
    for name, value in (("samples", samples), ("steps", steps)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} is {value!r}: pass a positive integer")
    with _undisturbed(model):
        twin, probe = _twin(model)
        sites = trained_sites(twin)
        shape = input_shape(twin, example_inputs, probe)
        count = samples or min(max(_VALUES // math.prod(shape), 4), 32)
        fit = _fit(twin, sites, _noise((count, *shape), seed, probe), steps)
    warn_user(REAL_DATA_IS_BETTER, CalibrationWarning)
    if fit.mismatch > _LARGE:
        warn_user(
            f"the made-up inputs miss the BatchNorm statistics by {fit.mismatch:.2f} standard "
            f"deviations after {fit.steps} steps, so ranges may be far off",
            CalibrationWarning,
        )
    return list(fit.inputs.to(_dtype(model)).split(_BATCH))


@contextmanager
def _undisturbed(model: nn.Module) -> Generator[None]:
    """Gradients on whatever the caller's mode, and the random state put back: forwards may draw."""
    with (
        random_kept(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def _dtype(model: nn.Module) -> torch.dtype:
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


def _twin(model: nn.Module) -> tuple[nn.Module, Tensor]:
    """A frozen copy in eval, and an empty tensor of the dtype and device of its inputs."""
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    dtype = _dtype(model)
    if dtype in (torch.float16, torch.bfloat16):
        # Squares of errors and their gradients leave the range of 16 bits.
        dtype = torch.float32
        twin = twin.float()
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    return twin, torch.empty(0, dtype=dtype, device=device)


def _noise(shape: tuple[int, ...], seed: int, probe: Tensor) -> Tensor:
    """Gaussian noise of mean 0 and spread 1; over a plane, of every wavelength as pictures have."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 4:
        side, cells = min(shape[-2:]), 2
        while cells < side:
            grid = torch.randn(*shape[:2], cells, cells, generator=generator)
            grown = F.interpolate(grid, size=shape[-2:], mode="bilinear", align_corners=False)
            # Amplitude falls with the root of the frequency: between white noise and photographs.
            noise += grown * math.sqrt(side / cells)
            cells *= 2
    return (noise / noise.std(correction=0)).to(probe)


@dataclass(frozen=True)
class _Scale:
    """How noise of mean 0 and spread 1 becomes an input; both are [1, channels, 1, ...]."""

    offset: Tensor
    spread: Tensor

    def __call__(self, noise: Tensor) -> Tensor:
        return self.offset + self.spread * noise


def _fit(model: nn.Module, sites: list[Site], noise: Tensor, steps: int) -> _Fit:
    """Descend from the best-scaled noise; keep the best inputs met on the way."""
    scale = _find_scale(model, sites, noise)
    values = noise.clone().requires_grad_()
    best, history = noise, [math.inf]
    optimizer = torch.optim.Adam([values], lr=_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, steps))
    with measuring(sites) as found:
        for step in range(steps + 1):
            loss = _loss(model, scale(values), found)
            value = _finite(loss.item(), model)
            if value < min(history):
                best = values.detach().clone()
            history.append(value)
            if step == steps or _settled(history, steps):
                break
            (values.grad,) = _gradients(loss, [values], model)
            optimizer.step()
            schedule.step()
    return _Fit(scale(best), math.sqrt(min(history)), len(history) - 1)


def _find_scale(model: nn.Module, sites: list[Site], noise: Tensor) -> _Scale:
    """The offset and spread at which noise is nearest to the first statistics it meets."""
    few = noise[:_SCALE_SAMPLES] if noise.dim() > 2 else noise
    channels = noise.new_zeros(1, noise.shape[1], *[1] * (noise.dim() - 2))
    with measuring(sites, only_first=True) as found:
        best, scale = math.inf, _Scale(channels, channels + 1)
        with torch.no_grad():
            for spread, shift in itertools.product(_SPREADS, _SHIFTS):
                tried = _Scale(channels + spread * shift, channels + spread)
                loss = _loss(model, tried(few), found).item()
                if loss < best:
                    best, scale = loss, tried
        _finite(best, model)
        # Near enough, fitting each channel to one layer would only undo the noise's spectrum.
        return scale if best < _NEAR else _fitted_scale(model, scale, few, found)


def _fitted_scale(model: nn.Module, start: _Scale, few: Tensor, found: list[Tensor]) -> _Scale:
    """Fit offset and spread per channel: inputs whose offset is many times their spread."""
    offset = torch.zeros_like(start.offset).requires_grad_()
    power = torch.zeros_like(start.offset).requires_grad_()
    best, scale = math.inf, start

    def evaluate() -> float:
        nonlocal best, scale
        tried = _Scale(start.offset + start.spread * offset, start.spread * power.exp())
        loss = _loss(model, tried(few), found)
        value = loss.item()
        if value < best:
            best, scale = value, _Scale(tried.offset.detach(), tried.spread.detach())
        offset.grad, power.grad = _gradients(loss, [offset, power], model)
        return value

    # Few unknowns and a narrow valley: first-order steps small enough for the spread would never
    # bring the offset home.
    torch.optim.LBFGS([offset, power], max_iter=_SCALE_STEPS, line_search_fn="strong_wolfe").step(
        evaluate
    )
    return scale


def _finite(loss: float, model: nn.Module) -> float:
    if not math.isfinite(loss):
        raise CalibrationError(
            f"inputs cannot be made up for this {type(model).__name__}: noise gives NaN or "
            "infinity at its BatchNorms. Pass calibration data"
        )
    return loss


def _rate(step: int, steps: int) -> float:
    """A short warm-up, because Adam's first steps move every value at full rate; then a cosine."""
    return min((step + 1) / _WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _loss(model: nn.Module, inputs: Tensor, found: list[Tensor]) -> Tensor:
    """One forward; the mean mismatch over all uses of all sites."""
    found.clear()
    try:
        nn.Module.__call__(model, inputs)
    except Reached:
        pass
    except (RuntimeError, TypeError, ValueError, LookupError, AssertionError) as error:
        raise CalibrationError(
            f"the model failed on a made-up input {list(inputs.shape)}: {type(error).__name__}: "
            f"{error}. Pass example_inputs=(tensor,) of the right shape, or calibration data"
        ) from error
    if not found:
        raise CalibrationError(
            f"forward of this {type(model).__name__} never reaches a trained BatchNorm, so inputs "
            "cannot be made up from one: pass calibration data"
        )
    return torch.stack(found).mean()


def _gradients(loss: Tensor, values: list[Tensor], model: nn.Module) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(loss, values)
    except RuntimeError as error:
        raise CalibrationError(
            f"this {type(model).__name__} cannot be differentiated down to its input ({error}), so "
            "inputs cannot be made up for it: pass calibration data"
        ) from error


def _settled(history: list[float], steps: int) -> bool:
    """Whether, past the first half, the last five steps brought less than a quarter."""
    if len(history) <= max(steps // 2, _PATIENCE + 1):
        return False
    return min(history[-_PATIENCE:]) > (1 - _GAIN) * min(history[:-_PATIENCE])
