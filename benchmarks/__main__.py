"""Run every benchmark, one after the other, each in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

NAMES = (
    "latency",
    "accuracy_cifar10",
    "pipeline_cost",
    "recurrent",
    "dynamic",
    "weight_only",
    "qat_step",
    "qat_cifar10",
    "matching",
    "diff_page",
    "lowering_agreement",
)


def main() -> None:
    """Run what there is; the exit status is 1 if any of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--json-dir", type=Path, help="write NAME.json of each into this folder")
    args = parser.parse_args()
    failed = []
    for name in args.only:
        if find_spec(f"benchmarks.{name}") is None:
            continue
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        if args.json_dir is not None:
            args.json_dir.mkdir(parents=True, exist_ok=True)
            command += ["--json", str(args.json_dir / f"{name}.json")]
        print(f"\n== {name}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
