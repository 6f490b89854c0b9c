"""The same model and data give the same bytes: again, in another process, under another hash."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxquant
from fxquant.graph.view import render
from tests.end_to_end.models import images, residual

ROOT = Path(__file__).parents[2]
PROGRAM = """
import hashlib, warnings, torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
from tests.end_to_end.test_determinism import digest
for backend in ("x86", "reference"):
    print(digest(backend))
"""


def digest(backend: str) -> str:
    """Of everything a quantized model is: state, graph, report, outputs."""
    q = fxquant.quantize(residual(), images(), backend=backend)
    found = hashlib.sha256()
    for name, tensor in q.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()))
    found.update(render(q.graph).encode())
    found.update(q.code.encode())
    found.update(fxquant.report(q).table.encode())
    found.update(str(fxquant.diff(q)).encode())
    with torch.no_grad():
        found.update(bytes(q(images(1, seed=7)[0]).view(-1).view(torch.uint8).tolist()))
    return found.hexdigest()


def in_a_process(seed: str, program: str = PROGRAM) -> str:
    environment = {
        **os.environ,
        "PYTHONHASHSEED": seed,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, "-c", program],
        check=True, capture_output=True, text=True, env=environment, cwd=ROOT,
    ).stdout  # fmt: skip


def test_other_processes_and_hash_seeds_give_the_same_bytes() -> None:
    first = in_a_process("0")
    assert len(first.split()) == 2
    assert in_a_process("12345") == first


@pytest.mark.parametrize("backend", ("x86", "reference"))
def test_again_in_this_process(backend: str) -> None:
    first = digest(backend)
    torch.manual_seed(77)
    assert digest(backend) == first


def test_the_digest_sees_a_difference() -> None:
    assert digest("x86") != digest("reference")


def test_without_data_too() -> None:
    def once() -> dict[str, torch.Tensor]:
        with pytest.warns(fxquant.errors.FxQuantWarning):
            q = fxquant.quantize(residual(), example_inputs=images()[0], backend="reference")
        return q.state_dict()

    first = once()
    torch.manual_seed(77)
    again = once()
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


IMPORTS = """
import sys, torch
before = set(sys.modules)
import fxquant
ours = sorted(set(sys.modules) - before)
print("\\n".join(ours))
"""


def test_importing_pulls_in_little() -> None:
    loaded = in_a_process("0", IMPORTS).split()
    assert "fxquant.api" in loaded
    for package in ("numpy", "sklearn", "matplotlib", "scipy", "pandas", "torchvision", "onnx"):
        assert not [m for m in loaded if m == package or m.startswith(f"{package}.")], package
    assert not [m for m in loaded if m.startswith(("torch.ao", "torch.quantization"))]
    assert not [m for m in loaded if m.startswith(("torch._dynamo", "torch._inductor"))]


def test_fxquant_names_the_deprecated_package_nowhere() -> None:
    for file in (ROOT / "fxquant").rglob("*.py"):
        text = file.read_text()
        for name in ("import torch.ao", "from torch.ao", "from torch import ao", "torch.quint8"):
            assert name not in text, f"{file}: {name}"
