"""Peak memory of quantizing, and that the result shares none with the model."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.x86 import X86

_PEAK = """
import sys, warnings, torch, fxquant
from pathlib import Path
from torch import nn
warnings.simplefilter("ignore")
mode, kind = sys.argv[1:]
def peak():
    # Not ru_maxrss, which goes on from that of the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
def linears(width):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(24))).eval()
def encoder(width):
    from transformers import BertConfig, BertModel
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=10 * width, num_hidden_layers=6, **sizes)).eval()
make, width, example = {
    "linears": (linears, 1024, None),
    "encoder": (encoder, 768, {"input_ids": torch.zeros(1, 64, dtype=torch.long)}),
}[kind]
fxquant.quantize(make(8), mode=mode, example_inputs=None if kind == "linears" else example)
before = peak()
model = make(width)
size = sum(p.numel() * p.element_size() for p in model.parameters())
quantized = fxquant.quantize(model, mode=mode, example_inputs=example)
print((peak() - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("mode", "kind", "most"),
    [("dynamic", "linears", 1.45), ("weight_only", "linears", 1.4), ("dynamic", "encoder", 1.5)],
)
def test_one_form_of_a_weight_is_made_beside_the_float_one(
    mode: str, kind: str, most: float
) -> None:
    """The float model is 1.0 and all codes are 0.25; each is freed as it is packed.

    Both forms of all codes together would make it 1.5 and more, a copy of the float weights 2.25.
    Measured were 1.36 (1.27 for larger layers: memory of small ones is not always used again), 1.28
    and 1.37; in an encoder activations come on top, and holes where three layers became one.
    Where kernels add pairs, weights are worked on once more: 1.50 and 1.52 were measured.
    """
    most += 0.15 if X86().saturates_pairs else 0.0
    command = [sys.executable, "-c", _PEAK, mode, kind]
    # Which thread frees first decides what memory is used again: on a loaded machine one run in
    # fifteen took 0.2 more. The least of three is what the code needs.
    least = math.inf
    for _ in range(3):
        made = subprocess.run(command, capture_output=True, text=True, check=True)
        least = min(least, float(made.stdout))
        if least < most:
            break
    assert 1.2 < least < most


class Mixed(nn.Module):
    """Layers of which some stay float, one of them a recurrent layer with a list of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.first = nn.Linear(16, 16)
        self.last = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        made, _ = self.lstm(self.table(ids))
        hidden: Tensor = self.last(torch.relu(self.first(self.norm(made))))
        return hidden


def _tensors(module: nn.Module) -> list[Tensor]:
    """All a module holds, lists beside the registries included."""
    found: list[Tensor] = [*module.parameters(), *module.buffers()]
    for each in module.modules():
        for value in vars(each).values():
            found += [v for v in (value if isinstance(value, list | tuple) else (value,))
                      if isinstance(v, Tensor)]  # fmt: skip
    return [t for t in found if t.layout == torch.strided and t.numel()]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only", "bfloat16"])
def test_the_result_owns_its_memory(mode: Any, backend: str) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(0, 9, (2, 5))
    data = [ids] if mode == "static" else None
    float_parts = {"lstm": None, "first": None}
    made = fxquant.quantize(
        model, data, mode=mode, example_inputs=(ids,), overrides=float_parts, backend=backend
    )
    ours = {t.untyped_storage().data_ptr() for t in _tensors(model)}
    assert not [t.shape for t in _tensors(made) if t.untyped_storage().data_ptr() in ours]
    expected = made(ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(made(ids), expected)
    model.load_state_dict(before)
    assert not torch.equal(model(ids), torch.zeros(2, 5, 16))
