"""Models on the processor while torch makes new tensors elsewhere (``torch.set_default_device``).

``meta`` stands for a GPU here: what is made on it by mistake cannot be computed with.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxquant


class Mixed(nn.Module):
    """A residual sum, attention and recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x + self.embed(x))
        y = y + self.attention(y, y, y)[0]
        made: Tensor = self.head(self.gru(self.lstm(y)[0])[0])
        return made


def mixed() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Mixed().eval(), torch.randn(2, 5, 32)


def pictures() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    first = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU())
    rest = (nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 8))
    return nn.Sequential(*first, *rest).eval(), torch.randn(4, 3, 8, 8)


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Not ``with torch.device("meta")``: what users leave switched on is the default."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def made(model: nn.Module, x: Tensor, mode: Any, backend: str, qconfig: str | None) -> nn.Module:
    """Quantized; data where it is wanted."""
    data: dict[str, Any] = {"calibration": [x]} if mode == "static" else {"example_inputs": (x,)}
    return fxquant.quantize(model, mode=mode, backend=backend, qconfig=qconfig, **data)


WAYS: list[tuple[Any, str, str | None, str]] = [
    (pictures, "static", None, "x86"),
    (pictures, "dynamic", None, "x86"),
    (mixed, "static", None, "x86"),
    (mixed, "static", "int8-bf16", "x86"),
    (mixed, "dynamic", None, "x86"),
    (mixed, "weight_only", None, "x86"),
    (mixed, "weight_only", "weight-only-int4", "x86"),
    (mixed, "bfloat16", None, "x86"),
    (pictures, "static", None, "reference"),
    (mixed, "dynamic", None, "reference"),
]


@pytest.mark.parametrize(("build", "mode", "qconfig", "backend"), WAYS)
def test_quantized_and_run_elsewhere(
    build: Any, mode: str, qconfig: str | None, backend: str
) -> None:
    model, x = build()
    with torch.no_grad():
        wanted = made(model, x, mode, backend, qconfig)(x)
        with elsewhere():
            quantized = made(model, x, mode, backend, qconfig)
            found = [quantized(x) for _ in range(5)]
    assert all(torch.equal(each, wanted) for each in found)


@pytest.mark.parametrize(
    ("build", "mode"), [(mixed, "static"), (mixed, "dynamic"), (pictures, "dynamic")]
)
def test_run_elsewhere_from_the_first_call(build: Any, mode: Literal["static", "dynamic"]) -> None:
    """What kernels make when they first run, and keep, is made on the processor."""
    model, x = build()
    quantized, twin = (made(model, x, mode, "auto", None) for _ in range(2))
    with torch.no_grad():
        with elsewhere():
            found = quantized(x)
        assert torch.equal(found, twin(x))
        assert torch.equal(quantized(x), twin(x))


_IMPORTED_ELSEWHERE = """
import torch
torch.set_default_device("meta")
import fxquant
from fxquant.backends.x86_row_codes import byte_kernel
with torch.device("cpu"):
    model, x = torch.nn.Linear(64, 8).eval(), torch.randn(4, 64)
q = fxquant.quantize(model, mode="dynamic", example_inputs=(x,))
found = q(x), byte_kernel()
torch.set_default_device(None)
byte_kernel.cache_clear()
assert found[1] is byte_kernel()
assert float((found[0] - model(x)).abs().max()) < 0.05
"""


def test_imported_elsewhere() -> None:
    """What modules keep is made on the processor, and its kernels are asked there."""
    command = [sys.executable, "-W", "ignore", "-c", _IMPORTED_ELSEWHERE]
    subprocess.run(command, check=True, timeout=300)


@pytest.mark.parametrize(
    ("build", "mode"), [(pictures, "static"), (pictures, "dynamic"), (mixed, "dynamic")]
)
def test_copied_and_loaded_elsewhere(build: Any, mode: Literal["static", "dynamic"]) -> None:
    """Kernels ignore the device of some of their arguments; compilers do not."""
    model, x = build()
    quantized = made(model, x, mode, "auto", None)
    with torch.no_grad():
        wanted = quantized(x)
        with elsewhere():
            quantized.load_state_dict(quantized.state_dict())
            twins = [quantized, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))]
        for twin in twins:
            assert torch.equal(twin(x), wanted)
            held = pytree.tree_leaves([vars(module) for module in twin.modules()])
            assert not [each for each in held if isinstance(each, Tensor) and each.is_meta]


def test_trained_elsewhere() -> None:
    model, x = pictures()
    with elsewhere():
        prepared = fxquant.prepare(model.train(), mode="qat", example_inputs=(x,))
        optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(prepared(x), x.new_zeros(4, 8)).backward()
            optimizer.step()
        with torch.no_grad():
            assert fxquant.convert(prepared.eval())(x).is_cpu
