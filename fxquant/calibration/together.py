"""Several processes calibrate one model: what they exchange, and that nobody waits in vain.

Every process says once how it went, be its share of the data empty or broken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch.distributed as dist
from torch import nn

from fxquant.calibration.data import FirstBatch, Transform, first_batch
from fxquant.errors import CalibrationError
from fxquant.numerics.ranks import is_distributed
from fxquant.numerics.shards import Watcher

Counted = tuple[int, int | None]
"""How many batches and samples there were; ``None`` where the samples are not known."""
_NOTHING: Final = "none of the {} processes had a batch: each of them got empty data"


@dataclass(frozen=True)
class _Said:
    """What one process tells the others.

    Args:
        failure: what went wrong; empty if nothing did.
        content: what it has to say otherwise.
    """

    failure: str = ""
    content: Any = None


def everyone(work: Callable[[], Any]) -> list[Any]:
    """Do something in every process and return what each made, in the order of their ranks.

    Args:
        work: what to do; its result is sent to all.

    Raises:
        CalibrationError: another process failed; says which, and how.
        Exception: whatever ``work`` raised here, once the others know.
    """
    try:
        made = work()
    # The user's data and model may fail in any way, and all the others are waiting.
    except Exception as error:
        _tell(_Said(f"{type(error).__name__}: {error}"))
        raise
    said = _tell(_Said(content=made))
    for rank, each in enumerate(said):
        if each.failure:
            raise CalibrationError(f"calibration failed in process {rank}: {each.failure}")
    return [each.content for each in said]


def _tell(said: _Said) -> list[_Said]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, said)
    return found


def watched_together(model: nn.Module, run: Callable[[], Counted]) -> Counted:
    """Feed this process's share; then let the watchers end with what all processes saw.

    Args:
        model: holds the watchers, the same in every process.
        run: feeds the share.

    Returns:
        What all processes fed.

    Raises:
        CalibrationError: another process failed, or nobody had a batch.
    """
    if not is_distributed():
        return run()
    watchers = [module for module in model.modules() if isinstance(module, Watcher)]
    for watcher in watchers:
        watcher.begin_part()
    try:
        shares = everyone(lambda: (run(), [watcher.part() for watcher in watchers]))
        if {len(parts) for _, parts in shares} != {len(watchers)}:
            raise CalibrationError("the processes calibrate different models: prepare them alike")
        batches = sum(counted[0] for counted, _ in shares)
        if not batches:
            raise CalibrationError(_NOTHING.format(len(shares)))
    except Exception:
        for watcher in watchers:
            watcher.drop_part()
        raise
    for place, watcher in enumerate(watchers):
        watcher.join_parts([parts[place] for _, parts in shares])
    samples = [counted[1] for counted, _ in shares]
    known = [each for each in samples if each is not None]
    return batches, sum(known) if len(known) == len(samples) else None


def first_of_all(data: Any, transform: Transform | None, model: nn.Module) -> FirstBatch:
    """The first batch as :func:`first_batch` finds it; the same example in every process.

    Args:
        data: this process's share; it may be empty where another one's is not.
        transform: as for :func:`first_batch`.
        model: the model the batch is for.

    Raises:
        CalibrationError: as for :func:`first_batch`, here or in another process.
    """
    if not is_distributed():
        return first_batch(data, transform, model=model)
    own: list[FirstBatch] = []

    def look() -> tuple[Any, Any]:
        own.append(first_batch(data, transform, model=model, may_be_empty=True))
        return own[0].args, own[0].kwargs

    found = everyone(look)
    # One example for all: what is decided by shapes must be decided alike.
    args, kwargs = next((each for each in found if each[0] is not None), (None, {}))
    return FirstBatch(args, kwargs, own[0].replay)
