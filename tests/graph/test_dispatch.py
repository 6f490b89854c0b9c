"""Quantizing loads no compiler: that would take a second of every process.

Computed weights are rehearsed with torch's fake tensors, which do load it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import fxquant

ALONE = """
import sys, torch, fxquant
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)
    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
net = Net().eval()
x = torch.randn(4, 3, 8, 8)
fxquant.quantize(net, [x], backend="reference")(x)
print(sorted({"torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""


def test_the_compiler_is_not_loaded() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore")
def test_a_users_own_compiled_function_is_seen_through() -> None:
    wave = torch.compile(lambda x: torch.sin(x) + 1, backend="eager")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.last(wave(self.first(x)))
            return made

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(8, 4)
    q = fxquant.quantize(net, [x], backend="reference")
    assert [op.int8 for op in fxquant.report(q).ops if op.path in ("first", "last")] == [True] * 2
    assert torch.allclose(q(x), net(x), atol=0.05)  # a few steps of 8 bits of values up to 3
