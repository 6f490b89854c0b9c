"""The last look at a converted model: is enough of it int8, and is it faster?"""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.backends.x86_pairs import has_bfloat16
from fxquant.errors import LoweringError, SpeedWarning, warn_user
from fxquant.record import OpRecord, Record
from fxquant.report.ops import coverage, runs_in
from fxquant.report.speed import compare_speed


def size_in_bytes(module: nn.Module) -> int:
    """Bytes of parameters and persistent buffers, each storage once."""
    seen: dict[int, int] = {}
    for owner in module.modules():
        hidden = owner._non_persistent_buffers_set
        kept = [tensor for name, tensor in owner._buffers.items() if name not in hidden]
        for tensor in (*owner._parameters.values(), *kept):
            if tensor is not None:
                seen[tensor.data_ptr() or id(tensor)] = tensor.numel() * tensor.element_size()
        # Not by state_dict(), which unpacks what is kept packed only: as large, all at once.
        packed = getattr(owner, "packed", None)
        if isinstance(packed, Tensor) and owner._buffers.get("weight") is None:
            seen[id(packed)] = packed.numel() * packed.element_size()
    return sum(seen.values())


_BECAME: Final = {
    "bfloat16": "computes in bfloat16",
    "float16": "computes in float16",
    "weight_only": "can store its weight as integers",
}
_ARE: Final = {
    "bfloat16": "compute in bfloat16",
    "float16": "compute in float16",
    "weight_only": "have stored weights",
}
"""In modes whose aim is not int8."""


def nothing_int8(ops: tuple[OpRecord, ...], mode: str = "static") -> LoweringError:
    """The error for a model in which nothing became what its mode makes, with the reasons."""
    reasons = dict.fromkeys(f"{op.path or op.op} ({op.op}): {op.why}" for op in ops if not op.int8)
    listed = "\n".join(f"  {reason}" for reason in list(reasons)[:8]) or "  it has no float op"
    return LoweringError(f"nothing in this model {_BECAME.get(mode, 'became int8')}:\n{listed}")


def check_coverage(record: Record, least: float | None) -> None:
    """Refuse a model with no int8 op, or with fewer than asked for.

    Raises:
        LoweringError: lists what stayed float, and why.
    """
    if not any(runs_in(op) != "float" for op in record.ops):
        raise nothing_int8(record.ops, record.mode)
    share = coverage(record.ops)
    if least is not None and share < least:
        left = [f"  {op.path} ({op.op}): {op.why}" for op in record.ops if runs_in(op) == "float"]
        listed = "\n".join(left[:8])
        raise LoweringError(
            f"{share:.0%} of the ops {_ARE.get(record.mode, 'are int8')}, less than "
            f"min_coverage={least:.0%}. In float:\n{listed}"
        )


def check_half(record: Record, module: nn.Module) -> None:
    """Say so where 16 bits save memory and cost time.

    Args:
        record: says what each op runs in.
        module: the converted model.
    """
    devices = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}
    if devices - {"cpu"}:
        return
    runs = {runs_in(op) for op in record.ops}
    if "float16" in runs:
        warn_user(
            "processors compute float16 by way of float32: ops in float16 work here and take half "
            "the memory, but are slower than in float32; float16 is for GPUs, bfloat16 for "
            "processors that have it",
            SpeedWarning,
        )
    if "bfloat16" in runs and not has_bfloat16():
        warn_user(
            "this processor has no bfloat16 instructions (AVX512-BF16 or AMX): ops in bfloat16 "
            "work here and take half the memory, but for more than a few rows at once they are "
            "slower than in float32",
            SpeedWarning,
        )


def check_speed(prepared: GraphModule, converted: GraphModule, record: Record) -> None:
    """Measure both models once; a slower result is said, with the ops that cost most."""
    inputs, record.inputs = record.inputs, None
    if inputs is None or record.backend == "reference":
        return
    record.timing = compare_speed(prepared, converted, inputs)
    timing = record.timing
    if timing is None or not timing.slowest:
        return
    worst = "; ".join(
        f"{path} ({op}) {codes:.0f} us, {real:.0f} us in float"
        for path, op, codes, real in timing.slowest
    )
    fed = "on the example inputs" if record.mode == "dynamic" else "at batch 1"
    warn_user(
        f"the int8 model is slower than the float one {fed}: {timing.quantized_ms:.3f} ms "
        f"against {timing.float_ms:.3f} ms. What costs most: {worst}. Small layers gain nothing "
        "from int8: leave them in float with overrides={...: None}",
        SpeedWarning,
    )
