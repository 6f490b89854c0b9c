"""What every benchmark does: describe the machine, print a table, write JSON, compare rounds."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate


def parser(description: str | None, threads: int = 2) -> argparse.ArgumentParser:
    """An argument parser with the options that all benchmarks share."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--threads", type=int, default=threads, help="torch's intra-op threads")
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    return result


def machine() -> dict[str, str]:
    """Processor, instruction set as torch sees it, and versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = f"{names[0]} x {len(names)}" if names else model
    return {
        "cpu": model,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one table on stdout; cells are text already, so that 1.10 stays 1.10."""
    body = tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")
    print(f"\n{title}\n\n{body}\n", flush=True)


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def finish(path: Path | None, figures: dict[str, Any]) -> None:
    """Write ``figures`` and the machine to ``path`` as JSON, if a path was given."""
    if path is not None:
        text = json.dumps({"machine": machine(), **figures}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


def ratios(rounds: Sequence[float], base: Sequence[float]) -> list[float]:
    """Quotient per round: what slows the whole machine for a while cancels out."""
    return [value / reference for value, reference in zip(rounds, base, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``median (min..max)``."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"
