"""What this machine is and can do: processor, versions, threads, engines."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

import fxquant
from fxquant.backends.x86_pairs import layers_saturate

_FEATURES: Final = {
    "avx2": "_is_avx2_supported",
    "avx512": "_is_avx512_supported",
    "avx512_vnni": "_is_vnni_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "amx_tile": "_is_amx_tile_supported",
    "amx_fp16": "_is_amx_fp16_supported",
}
"""Instructions that matter to int8 and bfloat16, and torch's probes for them."""
_EXTRA: Final = re.compile(r"""extra\s*==\s*['"](\w+)['"]""")
_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")
_NEEDED: Final = ("torch", "networkx", "tabulate", "safetensors", "jinja2", "numpy", "rich", "tqdm")


def machine() -> dict[str, Any]:
    """The processor, as far as it matters here, and how torch uses it."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": {name: _probe(probe) for name, probe in _FEATURES.items()},
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "cuda": torch.cuda.is_available(),
    }


def facts() -> dict[str, Any]:
    """All that a report of a bug should say; the keys are stable."""
    backends = fxquant.backends()
    x86 = any(backend.name == "x86" and backend.available for backend in backends)
    return {
        "fxquant": fxquant.__version__,
        "python": platform.python_version(),
        "machine": machine(),
        "onednn": torch.backends.mkldnn.is_available(),
        "versions": {name: _version(name) for name in _NEEDED},
        "extras": extras(),
        "backends": [asdict(backend) for backend in backends],
        "adds_pairs": layers_saturate() if x86 else None,
    }


def extras() -> dict[str, list[str]]:
    """What is missing of each extra; nothing where ``fxquant`` is run from a bare checkout."""
    try:
        needs = importlib.metadata.requires("fxquant") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for need in needs:
        extra, name = _EXTRA.search(need), _NAME.match(need)
        if extra is None or name is None or extra[1] == "dev":
            continue
        gone = missing.setdefault(extra[1], [])
        if _version(name[0]) is None:
            gone.append(name[0])
    return missing


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe(name: str) -> bool | None:
    """``None`` where this torch does not tell."""
    probe: Callable[[], object] | None = getattr(torch.cpu, name, None)
    return None if probe is None else bool(probe())


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return f"{names[0]} x {len(names)}"
    return platform.processor() or platform.machine()
