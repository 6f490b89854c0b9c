"""What ``torchrun`` starts in each process of the distributed tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxquant
from fxquant.numerics.fake_quantizer import FakeQuantize
from fxquant.numerics.observers import Observer
from tests.qat.models import Residual
from tests.qat.worker import BATCHES, plain, shard

KINDS = ("histogram", "minmax", "moving_average")
SHARES = ([0, 1, 2], [3])
"""The batches of each process."""


def batch(number: int) -> Tensor:
    """A batch; later ones have wider ranges."""
    return shard(number, 0) * (1.0 + number)


def prepared(kind: Any, mode: Any = "static") -> Any:
    """The same network in every process, observed as ``kind`` says."""
    config = fxquant.QConfig(activation=fxquant.QSpec(observer=kind))
    model = plain() if mode == "qat" else plain().eval()
    return fxquant.prepare(model, mode=mode, qconfig=config, example_inputs=(batch(0),))


def observed(model: nn.Module) -> dict[str, Tensor]:
    """All that observers and fake-quants keep."""
    kinds = (Observer, FakeQuantize)
    watchers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    return {f"{n}.{k}": v for n, m in watchers.items() for k, v in m.state_dict().items()}


def error_of(run: Callable[[], object]) -> str:
    """The message of the error that ``run`` ends in."""
    try:
        run()
    except (fxquant.errors.FxQuantError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def calibrations(rank: int, found: dict[str, Any]) -> None:
    """Shares of different sizes, no share at all, and shares that fail."""
    for kind in KINDS:
        for mode in ("static", "qat"):
            model = prepared(kind, mode)
            for share in SHARES, ([4], [4]):  # a second time goes on where the first ended
                fxquant.calibrate(model, [batch(n) for n in share[rank]])
            found[f"{mode} {kind}"] = observed(model)
    model = prepared("histogram")
    fxquant.calibrate(model, [batch(n) for n in ([0, 1], [])[rank]])
    found["empty share"] = observed(model)
    found["empty shares"] = error_of(lambda: fxquant.calibrate(prepared("minmax"), []))
    bad = torch.full((1, 3, 8, 8), float("nan"))
    broken = prepared("minmax")
    before = observed(broken)
    found["broken share"] = error_of(lambda: fxquant.calibrate(broken, [batch(0), bad][: 1 + rank]))
    found["nothing is kept"] = all(torch.equal(before[k], v) for k, v in observed(broken).items())
    data = [batch(0), batch(1)] if rank == 0 else []
    made = fxquant.quantize(plain().eval(), data, backend="reference")
    found["quantized"] = made(batch(2))


def training(rank: int, found: dict[str, Any]) -> None:
    """DDP, each process with its half of every batch."""
    model = fxquant.prepare(plain(), mode="qat", example_inputs=(shard(0, 0),))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
    for step in range(BATCHES):
        optimizer.zero_grad()
        wrapped(shard(step, rank)).square().mean().backward()
        optimizer.step()
    found["halves"] = model.state_dict()


def empty_batch(rank: int, found: dict[str, Any]) -> None:
    """DDP, with a batch that is empty in one process."""
    model = prepared("moving_average", "qat")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.01)
    for step in range(3):
        optimizer.zero_grad()
        x = batch(step)[: 0 if (rank, step) == (1, 1) else 4]
        wrapped(x).square().sum().backward()
        optimizer.step()
    found["trained"] = model.state_dict()
    made = fxquant.convert(wrapped, backend="reference")
    found["verified"] = fxquant.verify(wrapped, made, [batch(3)]).ok


def synchronized(found: dict[str, Any]) -> None:
    """Norms that need a GPU in training, on a CPU."""
    model: Any = nn.SyncBatchNorm.convert_sync_batchnorm(Residual()).eval()
    made: Any = fxquant.prepare(model, mode="qat", example_inputs=(batch(0),))
    found["class"] = type(made.bn1).__name__
    fxquant.calibrate(made, [batch(0)])
    with torch.no_grad():
        found["agrees"] = torch.equal(made(batch(1)), made(batch(1)))
    found["sync verified"] = fxquant.verify(
        made, fxquant.convert(made, backend="reference"), [batch(1)]
    ).ok
    found["sync training"] = error_of(lambda: made.train()(batch(0)))


def main(folder: str) -> None:
    """All of it; what was found goes to one file per process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        rank = dist.get_rank()
        found: dict[str, Any] = {}
        calibrations(rank, found)
        training(rank, found)
        empty_batch(rank, found)
        synchronized(found)
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
