"""The statistics BatchNorms remember, and how far some input is from reproducing them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fxquant.errors import CalibrationError

NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PASS_DATA: Final = "pass calibration data: fxquant.quantize(model, data)"


@dataclass(frozen=True)
class Site:
    """One trained BatchNorm and what its input looked like in training.

    Args:
        path: of the module.
        norm: the module.
        mean: running mean, [channels].
        std: root of the running variance plus epsilon, [channels].
        weight: how much a channel counts, [channels], 1 on average. The output of channel c is
            ``gamma_c`` times its normalised input, and one scale serves all channels, so an error
            counts by ``gamma_c ** 2``; channels that training switched off count nothing.
    """

    path: str
    norm: nn.Module
    mean: Tensor
    std: Tensor
    weight: Tensor

    def mismatch(self, x: Tensor) -> Tensor:
        """Squared distance of the statistics of ``x`` [batch, channels, ...], in units of std."""
        axes = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x, dim=axes)
        # The root has an infinite slope at 0, where a dead channel is.
        spread = (variance + 1e-12).sqrt() / self.std - 1
        return (self.weight * (((mean - self.mean) / self.std) ** 2 + spread**2)).mean()


def trained_sites(model: nn.Module) -> list[Site]:
    """Every BatchNorm of ``model`` whose statistics say something.

    Raises:
        CalibrationError: there is none, or a statistic is NaN or infinite.
    """
    norms = [(path, m) for path, m in model.named_modules() if isinstance(m, NORMS)]
    tracked = [(path, m) for path, m in norms if m.running_mean is not None]
    if not tracked:
        why = "its BatchNorms track no statistics" if norms else "it has no BatchNorm"
        raise CalibrationError(
            f"inputs cannot be made up for this {type(model).__name__}: {why}, from which the "
            f"ranges would be learnt. {_PASS_DATA}"
        )
    sites = [site for path, m in tracked if (site := _site(path, m)) is not None]
    if not sites:
        raise CalibrationError(
            f"inputs cannot be made up for this {type(model).__name__}: its {len(tracked)} "
            "BatchNorms were never trained (running means are 0, variances 1), so they tell "
            f"nothing about the data. Load the trained weights, or {_PASS_DATA}"
        )
    return sites


def _site(path: str, norm: Any) -> Site | None:
    mean, variance = norm.running_mean.detach(), norm.running_var.detach()
    if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
        raise CalibrationError(
            f"the statistics of the BatchNorm {path!r} hold NaN or infinity: the model is broken"
        )
    if bool((mean == 0).all()) and bool((variance == 1).all()):
        return None
    gain = torch.ones_like(mean) if norm.weight is None else norm.weight.detach() ** 2
    # All gains 0 would divide by 0; such a layer then counts nothing.
    weight = gain / gain.mean().clamp(min=1e-20)
    return Site(path, norm, mean, (variance + norm.eps).sqrt(), weight)


class Reached(Exception):
    """Ends a forward whose rest does not matter; never leaves this package."""


@contextmanager
def measuring(sites: list[Site], *, only_first: bool = False) -> Generator[list[Tensor]]:
    """While open, each forward appends one mismatch per use of a site to the list yielded.

    With ``only_first`` each forward ends, by :class:`Reached`, at the first site it comes to.
    """
    found: list[Tensor] = []

    def hook_for(site: Site) -> Any:
        def measure(_norm: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(site.mismatch(args[0]))
            if only_first:
                raise Reached

        return measure

    handles = [site.norm.register_forward_pre_hook(hook_for(site)) for site in sites]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
