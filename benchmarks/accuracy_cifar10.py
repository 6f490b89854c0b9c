"""Accuracy and size on CIFAR-10 pictures: two small networks, trained here, float against int8.

Trains each network once (about a quarter of an hour on two cores; the checkpoint is kept), then
quantizes it statically in the default configuration and counts right answers on pictures that
neither training nor calibration has seen.
"""

from __future__ import annotations

import io
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxquant
from benchmarks.cifar import RECIPES, Pictures, accuracy, batches, load, trained
from benchmarks.common import finish, machine, parser, say, show
from benchmarks.peers import engines, fx_static

BACKENDS = ("x86", "reference")


def saved_bytes(model: nn.Module) -> int:
    """Size of ``torch.save(model.state_dict())``."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getbuffer().nbytes


def measure(model: nn.Module, train: Pictures, check: Pictures, args: Namespace) -> dict[str, Any]:
    """Accuracies in percent and sizes in bytes of one network: float, int8, and the peers'."""
    images = train.images[: args.calibration]
    figures: dict[str, Any] = {
        "float": {"accuracy": accuracy(model, check), "bytes": saved_bytes(model)}
    }
    for backend in BACKENDS:
        quantized = fxquant.quantize(
            model,
            batches(images, args.batch),
            mode="static",
            backend=backend,
            example_inputs=(images[:1],),
        )
        figures[backend] = {
            "accuracy": accuracy(quantized, check),
            "bytes": saved_bytes(quantized),
        }
    for engine in engines() if args.peers else ():
        peer = fx_static(model, batches(images, args.batch), engine)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the deprecation of what the peer is made of
            figures[f"torch FX, {engine}"] = {
                "accuracy": accuracy(peer, check),
                "bytes": saved_bytes(peer),
            }
    return figures


def rows(name: str, figures: dict[str, Any]) -> list[list[str]]:
    """One row per variant, each compared with the float network."""
    base = figures["float"]
    return [
        [
            name,
            variant,
            f"{values['accuracy']:.2f}",
            f"{values['accuracy'] - base['accuracy']:+.2f}",
            f"{values['bytes'] / 1e6:.3f}",
            f"{values['bytes'] / base['bytes']:.3f}",
        ]
        for variant, values in figures.items()
    ]


def main() -> None:
    """Train where needed, quantize, print."""
    args_parser = parser(__doc__)
    args_parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/cifar10"),
        help="folder with train8k.npz and val2k.npz",
    )  # fmt: skip
    args_parser.add_argument(
        "--networks", nargs="+", default=["resnet20", "mobilenet_v2"], choices=list(RECIPES)
    )
    args_parser.add_argument("--epochs", type=int, help="default: the recipe's")
    args_parser.add_argument("--seed", type=int, default=0)
    args_parser.add_argument("--calibration", type=int, default=320, help="pictures")
    args_parser.add_argument("--batch", type=int, default=32, help="pictures per calibration batch")
    args_parser.add_argument("--peers", action="store_true", help="torch's FX mode as well")
    args = args_parser.parse_args()
    torch.set_num_threads(args.threads)
    train, check = load(args.data / "train8k.npz"), load(args.data / "val2k.npz")
    table: list[list[str]] = []
    figures: dict[str, Any] = {"calibration": args.calibration, "pictures": len(check.labels)}
    for name in args.networks:
        model = trained(name, train, check, seed=args.seed, epochs=args.epochs)
        say(f"{name}: quantizing")
        figures[name] = measure(model, train, check, args)
        table += rows(name, figures[name])
    print(", ".join(machine().values()))
    title = f"CIFAR-10, {len(check.labels)} pictures, calibrated on {args.calibration}"
    show(title, ["network", "variant", "right %", "points", "MB", "size ratio"], table)
    finish(args.json, figures)


if __name__ == "__main__":
    main()
