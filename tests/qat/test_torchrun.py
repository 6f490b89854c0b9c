"""Several processes under torchrun: ranges are those of one process that sees all the data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxquant
from fxquant.numerics.fake_quantizer import FakeQuantize
from tests.qat.models import built
from tests.qat.torchrun_worker import KINDS, SHARES, batch, observed, prepared
from tests.qat.worker import BATCHES, plain, shard

ROOT = Path(__file__).parents[2]
Found = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "tests.qat.torchrun_worker", str(folder)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        if not key.endswith(but):
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("kind", ["histogram", "minmax"])
def test_merged_observers_are_those_of_one_process(ranks: list[Found], kind: str) -> None:
    alone = prepared(kind)
    fxquant.calibrate(alone, [batch(n) for n in (*SHARES[0], *SHARES[1], 4, 4)])
    for found in ranks:
        same(found[f"static {kind}"], observed(alone))


def together(step: int) -> Tensor:
    """What all processes see in one step."""
    seen = [batch(share[step]) for share in SHARES if step < len(share)]
    return torch.cat(seen)


def test_moving_averages_take_steps_together(ranks: list[Found]) -> None:
    alone = prepared("moving_average")
    fxquant.calibrate(alone, [*(together(n) for n in range(3)), torch.cat([batch(4)] * 2)])
    for found in ranks:
        # Batches, and values outside the range of the time, are counted in each process.
        same(found["static moving_average"], observed(alone), but=("tally",))


@pytest.mark.parametrize("kind", KINDS)
def test_fake_quants_are_calibrated_together(ranks: list[Found], kind: str) -> None:
    alone = prepared(kind, "qat")
    fxquant.calibrate(alone, [*(together(n) for n in range(3)), torch.cat([batch(4)] * 2)])
    for found in ranks:
        same(found[f"qat {kind}"], observed(alone))


def test_a_process_without_data_ends_with_the_ranges_of_the_others(ranks: list[Found]) -> None:
    alone = prepared("histogram")
    fxquant.calibrate(alone, [batch(0), batch(1)])
    quantized = fxquant.quantize(plain().eval(), [batch(0), batch(1)], backend="reference")
    for found in ranks:
        same(found["empty share"], observed(alone))
        assert torch.equal(found["quantized"], quantized(batch(2)))


def test_errors_reach_every_process(ranks: list[Found]) -> None:
    for found in ranks:
        assert "none of the 2 processes had a batch" in found["empty shares"]
        assert found["nothing is kept"]
    assert "failed in process 1" in ranks[0]["broken share"]
    assert all("NaN" in found["broken share"] for found in ranks)


def test_two_processes_have_the_ranges_and_weights_of_one(ranks: list[Found]) -> None:
    alone = fxquant.prepare(plain(), mode="qat", example_inputs=(shard(0, 0),))
    optimizer = torch.optim.SGD(alone.parameters(), 0.05)
    for step in range(BATCHES):
        optimizer.zero_grad()
        whole = torch.cat([shard(step, rank) for rank in range(2)])
        alone(whole).square().mean().backward()
        optimizer.step()
    same(ranks[0]["halves"], ranks[1]["halves"])
    for key, value in alone.state_dict().items():
        # Gradients are averaged over processes in another order than over one batch.
        torch.testing.assert_close(ranks[0]["halves"][key], value, rtol=1e-5, atol=1e-6, msg=key)


def test_processes_train_alike_though_one_has_an_empty_batch(ranks: list[Found]) -> None:
    same(ranks[0]["trained"], ranks[1]["trained"])
    assert all(found["verified"] for found in ranks)


def test_synchronized_norms_are_kept_folded_and_need_a_gpu_to_train(ranks: list[Found]) -> None:
    for found in ranks:
        assert found["class"] == "SyncBatchNorm"
        assert found["agrees"] and found["sync verified"]
        assert "GPU" in found["sync training"]  # torch's own limit


def test_alone_synchronized_norms_train_as_plain_ones() -> None:
    """Without processes to meet, torch computes a plain batch norm, on a CPU too."""
    plain_one, synced = (prepared_residual(sync) for sync in (False, True))
    for model in (plain_one, synced):
        model(batch(0)).square().mean().backward()
    buffers = dict(synced.named_buffers())
    for name, buffer in plain_one.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert all(m.seen for m in synced.modules() if isinstance(m, FakeQuantize))


def prepared_residual(sync: bool) -> Any:
    model = built("residual")
    if sync:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return fxquant.prepare(model, mode="qat", example_inputs=(batch(0),))
