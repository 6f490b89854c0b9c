"""Models on a GPU: every mode does there what it does on the processor, and training too.

None of this runs where there is no GPU; what a processor can tell of it is tested beside the
modules.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.backends.cuda import CudaDynamicLinear
from fxquant.backends.x86_weight_only import StoredLinear
from fxquant.errors import ConfigError, SpeedWarning
from fxquant.numerics.fake_quantizer import FakeQuantize, FakeQuantizer
from fxquant.spec import QConfig, QSpec
from tests.end_to_end.models import images, residual

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda")


class Text(nn.Module):
    """A table, an encoder layer, an LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.lstm = nn.LSTM(32, 24, batch_first=True)
        self.head = nn.Linear(24, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.lstm(self.layer(self.table(ids)))
        made: Tensor = self.head(x)
        return made


def text() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Text().eval()
    return model, [torch.randint(0, 50, (4, 9)) for _ in range(3)]


def pictures() -> tuple[nn.Module, list[Tensor]]:
    return residual(), images()


def decibels(wanted: Tensor, found: Tensor) -> float:
    wanted, found = wanted.detach(), found.detach()
    error = float((wanted.double() - found.double()).square().mean())
    return 10 * math.log10(float(wanted.double().square().mean()) / max(error, 1e-30))


def quantized(
    model: nn.Module, data: list[Tensor], mode: Any, backend: str, qconfig: Any = None
) -> nn.Module:
    options: dict[str, Any] = {"mode": mode, "backend": backend, "qconfig": qconfig}
    with warnings.catch_warnings():
        # So small models are no faster; that it is said is tested below.
        warnings.simplefilter("ignore", SpeedWarning)
        if mode == "static":
            return fxquant.quantize(model, data, **options)
        return fxquant.quantize(model, example_inputs=data[0], **options)


@pytest.fixture(autouse=True)
def _whole_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


MODES = [
    *((mode, None) for mode in ("static", "dynamic", "weight_only", "bfloat16", "float16")),
    ("static", "int8-bf16"),
    ("static", "qnnpack"),
    ("dynamic", "int8-bf16"),
    ("dynamic", "dynamic-symmetric"),
    ("weight_only", "weight-only-int4"),
]


@pytest.mark.parametrize(("mode", "qconfig"), MODES)
@pytest.mark.parametrize("make", [text, pictures])
def test_every_mode_does_there_what_the_reference_does_here(
    make: Any, mode: str, qconfig: str | None
) -> None:
    model, data = make()
    truth = quantized(model, data, mode, "reference", qconfig)
    wanted = truth(data[0])
    there = copy.deepcopy(model).to(DEVICE)
    made = quantized(there, [batch.to(DEVICE) for batch in data], mode, "auto", qconfig)
    assert all(t.device.type == DEVICE.type for t in (*made.parameters(), *made.buffers()))
    found = made(data[0].to(DEVICE))
    assert found.device.type == DEVICE.type and found.dtype == wanted.dtype
    # One code at a tie is 40 dB and more below what is computed. bfloat16 has 8 bits, which are
    # rounded in another order, and which rows are rounded to before a stored weight.
    coarse = mode in ("bfloat16", "weight_only") or qconfig == "int8-bf16"
    floor = 30.0 if coarse else 38.0
    assert decibels(wanted, found.cpu()) > floor
    # Rows of other numbers, and fewer.
    assert decibels(truth(data[1][:1]), made(data[1][:1].to(DEVICE)).cpu()) > floor


def test_the_kernels_are_used_and_copies_go_back_and_forth() -> None:
    model, data = text()
    model, batch = model.to(DEVICE), data[0].to(DEVICE)
    for mode, kind in (("dynamic", CudaDynamicLinear), ("weight_only", StoredLinear)):
        made = quantized(model, [batch], mode, "auto")
        layers = [module for module in made.modules() if isinstance(module, kind)]
        assert len(layers) >= 3
        assert "cuda" in fxquant.report(made).summary
        here = copy.deepcopy(made).cpu()
        assert decibels(made(batch).cpu(), here(data[0])) > 38.0
        assert torch.equal(copy.deepcopy(here).to(DEVICE)(batch), made(batch))


def test_rows_do_not_depend_on_their_batch_mates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 9)).eval().to(DEVICE)
    x = torch.randn(33, 40, device=DEVICE)
    made = quantized(model, [x], "dynamic", "auto")
    together = made(x)
    assert torch.equal(torch.cat([made(row[None]) for row in x]), together)
    order = torch.randperm(33, device=DEVICE)
    assert torch.equal(made(x[order]), together[order])
    assert not made(torch.zeros(2, 40, device=DEVICE)).isnan().any()
    x[4, 7] = math.nan
    assert bool(made(x)[4].isnan().all()) and torch.equal(made(x)[5:], together[5:])


def test_graphs_of_the_gpu_hold_the_kernels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 16)).eval().to(DEVICE)
    x = torch.randn(20, 64, device=DEVICE)
    made = quantized(model, [x], "dynamic", "auto")
    with torch.no_grad():
        made(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = made(x)
        x.copy_(torch.randn(20, 64, device=DEVICE))
        graph.replay()
        assert torch.equal(held, made(x))


def test_autocast_does_not_make_sums_of_codes_overflow() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4096, 64).to(DEVICE)
    model = nn.Sequential(layer).eval()
    x = torch.full((3, 4096), 20.0, device=DEVICE)
    with torch.no_grad():
        layer.weight.abs_()
    made = quantized(model, [x], "weight_only", "auto")
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            assert decibels(model(x).float(), made(x).float()) > 30.0
    assert decibels(model(x), made(x.half().float())) > 30.0


def test_data_may_be_on_the_processor_and_may_be_made_up() -> None:
    model, data = pictures()
    there = model.to(DEVICE)
    made = fxquant.quantize(there, data, mode="static")
    # What the zoo asks of int8 models, and a little less where ranges come from made-up inputs.
    assert decibels(there(data[0].to(DEVICE)), made(data[0].to(DEVICE))) > 20.0
    with pytest.warns(fxquant.errors.CalibrationWarning):
        made = fxquant.quantize(there, mode="static", example_inputs=data[0].to(DEVICE))
    assert decibels(there(data[0].to(DEVICE)), made(data[0].to(DEVICE))) > 15.0


def test_random_numbers_of_the_gpu_are_those_they_would_have_been() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.fc(x + torch.rand_like(x))
            return made

    model, x = Noisy().eval().to(DEVICE), torch.randn(4, 8, device=DEVICE)
    torch.cuda.manual_seed(5)
    wanted = torch.rand(3, device=DEVICE)
    torch.cuda.manual_seed(5)
    made = fxquant.quantize(model, [x], mode="static")
    fxquant.compare(model, made, [x])
    assert torch.equal(torch.rand(3, device=DEVICE), wanted)


def test_a_model_that_is_slower_there_says_so() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval().to(DEVICE)
    with pytest.warns(SpeedWarning, match="slower than the float one"):
        fxquant.quantize(model, mode="dynamic", example_inputs=torch.randn(2, 16, device=DEVICE))


LEARNED = QConfig(
    activation=QSpec(learned=True),
    weight=QSpec("int8", 4, True, "channel", "minmax", learned=True),
)


def trained(model: nn.Module, data: list[Tensor], *, halves: bool = False) -> None:
    """A few steps, as users write them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=halves)
    for batch in data * 3:
        with torch.autocast(batch.device.type, dtype=torch.float16, enabled=halves):
            loss = model(batch).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("qconfig", [None, LEARNED], ids=["default", "learned"])
@pytest.mark.parametrize("make", [text, pictures])
def test_training_there_is_training_here(make: Any, qconfig: QConfig | None) -> None:
    model, data = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)
    ranges, outputs = [], []
    for device in (torch.device("cpu"), DEVICE):
        placed = copy.deepcopy(model).to(device)
        batches = [batch.to(device) for batch in data]
        prepared = fxquant.prepare(
            placed, mode="qat", example_inputs=batches[0], qconfig=qconfig, backend="reference"
        )
        held = (*prepared.parameters(), *prepared.buffers())
        assert {tensor.device.type for tensor in held} == {device.type}
        assert any(isinstance(module, FakeQuantizer) for module in prepared.modules())
        prepared.train()
        trained(prepared, batches)
        prepared.eval()
        fakes = [module for module in prepared.modules() if isinstance(module, FakeQuantize)]
        ranges.append(torch.cat([fake.scale_in_use().detach().cpu() for fake in fakes]))
        converted = fxquant.convert(prepared, backend="reference")
        assert fxquant.verify(prepared, converted, batches).ok
        # What is deployed is what was trained: only the order of sums differs, no code does.
        with torch.no_grad():
            assert decibels(prepared(batches[0]), converted(batches[0])) > 60.0
            outputs.append(converted(batches[0]).cpu())
    # Sums are summed in another order, and what falls on the other side of a tie is trained on.
    torch.testing.assert_close(ranges[1], ranges[0], rtol=0.02, atol=1e-4)
    assert decibels(*outputs) > 30.0


def test_training_in_half_precision_and_conversion_for_a_processor() -> None:
    model, data = pictures()
    batches = [batch.to(DEVICE) for batch in data]
    prepared = fxquant.prepare(model.to(DEVICE), mode="qat", example_inputs=batches[0])
    prepared.train()
    trained(prepared, batches, halves=True)
    prepared.eval()
    with torch.no_grad():
        wanted = prepared(batches[0]).cpu()
    if DEVICE.type == "cuda":
        with pytest.raises(ConfigError, match=r"model\.cpu\(\)"):
            fxquant.convert(prepared, backend="x86")
    here = fxquant.convert(copy.deepcopy(prepared).cpu(), backend="auto")
    # Trained in float16 for a part; a code at a tie is 40 dB and more below.
    assert decibels(wanted, here(data[0])) > 38.0
    assert fxquant.report(here).coverage > 0.5


def test_checkpoints_of_training_move_between_devices() -> None:
    model, data = pictures()
    batches = [batch.to(DEVICE) for batch in data]
    there = fxquant.prepare(copy.deepcopy(model).to(DEVICE), mode="qat", example_inputs=batches[0])
    there.train()
    trained(there, batches)
    here = fxquant.prepare(model, mode="qat", example_inputs=data[0])
    here.load_state_dict(there.state_dict())
    with torch.no_grad():
        assert decibels(there.eval()(batches[0]).cpu(), here.eval()(data[0])) > 60.0
