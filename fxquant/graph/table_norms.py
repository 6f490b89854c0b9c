"""Op table: normalizations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.ops import Kind
from fxquant.graph.table_entry import adopt, entry, sig, spellings


class FunctionalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm written as ``F.batch_norm``, which takes inputs of any rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch_norm needs at least 2 dimensions, got {input.dim()}")


class FunctionalInstanceNorm(nn.modules.instancenorm._InstanceNorm):
    """An instance norm written as ``F.instance_norm``, which takes inputs of any rank."""

    def _get_no_batch_dim(self) -> int:
        return -1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input`` has a batch and any number of further dimensions, but one at least."""
        return F.instance_norm(input, weight=self.weight, bias=self.bias, eps=self.eps)


def _build_batch_norm(given: Mapping[str, Any]) -> nn.Module:
    mean = given["running_mean"]
    module = FunctionalBatchNorm(
        mean.shape[0],
        eps=given["eps"],
        momentum=given["momentum"],
        affine=given["weight"] is not None,
        device="meta",
    )
    for name in ("running_mean", "running_var"):
        value = given[name]
        # Statistics are buffers, even where the caller keeps them as frozen parameters.
        setattr(module, name, value.detach() if isinstance(value, nn.Parameter) else value)
    module.num_batches_tracked = torch.zeros((), dtype=torch.long)
    adopt(module, given, ("weight", "bias"))
    return module.eval()


def _build_layer_norm(given: Mapping[str, Any]) -> nn.Module:
    shape = tuple(given["normalized_shape"])
    affine = given["weight"] is not None
    module = nn.LayerNorm(shape, eps=given["eps"], elementwise_affine=affine, device="meta")
    return adopt(module, given, ("weight", "bias"))


def _build_group_norm(given: Mapping[str, Any]) -> nn.Module:
    weight = given["weight"]
    module = nn.GroupNorm(given["num_groups"], weight.shape[0], eps=given["eps"], device="meta")
    return adopt(module, given, ("weight", "bias"))


def _build_instance_norm(given: Mapping[str, Any]) -> nn.Module:
    weight = given["weight"]
    affine = weight is not None
    channels = weight.shape[0] if affine else 0
    module = FunctionalInstanceNorm(channels, eps=given["eps"], affine=affine, device="meta")
    return adopt(module, given, ("weight", "bias")).eval()


def _build_rms_norm(given: Mapping[str, Any]) -> nn.Module:
    shape, affine = tuple(given["normalized_shape"]), given["weight"] is not None
    module = nn.RMSNorm(shape, eps=given["eps"], elementwise_affine=affine, device="meta")
    return adopt(module, given, ("weight",))


_batch_norm = (
    lambda input, running_mean, running_var, weight=None, bias=None, momentum=0.1, eps=1e-5: None
)


NORMS: Final = (
    entry(
        "batch_norm",
        Kind.ARITH,
        None,
        sig(_batch_norm),
        tensors=("input", "running_mean", "running_var", "weight", "bias"),
        absorb={"training": (False,)},
        functions=spellings(
            (F.batch_norm,),
            lambda input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5: (
                None
            ),
        ),
        modules=(
            nn.BatchNorm1d,
            nn.BatchNorm2d,
            nn.BatchNorm3d,
            nn.SyncBatchNorm,
            FunctionalBatchNorm,
        ),
        build=_build_batch_norm,
    ),
    entry(
        "layer_norm",
        Kind.ARITH,
        None,
        sig(lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: None),
        tensors=("input", "weight", "bias"),
        functions=spellings(
            (F.layer_norm,), lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: None
        ),
        modules=(nn.LayerNorm,),
        build=_build_layer_norm,
    ),
    entry(
        "group_norm",
        Kind.ARITH,
        None,
        sig(lambda input, num_groups, weight, bias=None, eps=1e-5: None),
        tensors=("input", "weight", "bias"),
        functions=spellings(
            (F.group_norm,), lambda input, num_groups, weight, bias=None, eps=1e-5: None
        ),
        modules=(nn.GroupNorm,),
        build=_build_group_norm,
    ),
    entry(
        "instance_norm",
        Kind.ARITH,
        None,
        sig(lambda input, weight=None, bias=None, momentum=0.1, eps=1e-5: None),
        tensors=("input", "weight", "bias"),
        absorb={"running_mean": (None,), "running_var": (None,), "use_input_stats": (True,)},
        functions=spellings(
            (F.instance_norm,),
            lambda input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5: (
                None
            ),
        ),
        modules=(
            nn.InstanceNorm1d,
            nn.InstanceNorm2d,
            nn.InstanceNorm3d,
            FunctionalInstanceNorm,
        ),
        build=_build_instance_norm,
    ),
    entry(
        "rms_norm",
        Kind.ARITH,
        None,
        sig(lambda input, normalized_shape, weight=None, eps=None: None),
        tensors=("input", "weight"),
        functions=spellings(
            (F.rms_norm,), lambda input, normalized_shape, weight=None, eps=None: None
        ),
        modules=(nn.RMSNorm,),
        build=_build_rms_norm,
    ),
    entry(
        "normalize",
        Kind.ARITH,
        F.normalize,
        sig(lambda input, p=2.0, dim=1, eps=1e-12: None),
        absorb={"out": (None,)},
        functions=spellings((F.normalize,), lambda input, p=2.0, dim=1, eps=1e-12, out=None: None),
    ),
    entry(
        "local_response_norm",
        Kind.ARITH,
        F.local_response_norm,
        sig(lambda input, size, alpha=1e-4, beta=0.75, k=1.0: None),
        modules=(nn.LocalResponseNorm,),
    ),
)
