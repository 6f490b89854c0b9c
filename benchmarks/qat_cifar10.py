"""Quantization-aware training on CIFAR-10 pictures: what few bits cost, and what it wins back.

A MobileNetV2 is trained in float, quantized statically with weights of few bits, and then trained
on for some epochs with the rounding errors of those bits. Prints a table of the three, checks that
the converted model computes what was trained, and draws loss and accuracy as an SVG.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxquant
from benchmarks.cifar import RECIPES, RESULTS, Pictures, accuracy, batches, load, train, trained
from benchmarks.common import finish, machine, parser, say, show
from benchmarks.plot import Curve, svg
from fxquant.spec import QSpec

NETWORKS = ("mobilenet_v2", "mobilenet_v2_small")
WEIGHTS = {
    "3-bit": QSpec("int8", 3, True, "channel", "minmax"),
    "4-bit": QSpec("int8", 4, True, "channel", "minmax"),
    "per-tensor": QSpec("int8", 8, True, "tensor", "minmax"),
    "4-bit-per-tensor": QSpec("int8", 4, True, "tensor", "minmax"),
}


@dataclasses.dataclass(frozen=True)
class Course:
    """Mean loss and accuracy in percent after every epoch of a training."""

    losses: list[float]
    accuracies: list[float]
    seconds: float


def train_on(model: nn.Module, data: Pictures, check: Pictures, args: Namespace) -> Course:
    """Train ``model`` for a few epochs more at a low rate."""
    losses: list[float] = []
    accuracies: list[float] = []

    def note(epoch: int, loss: float) -> None:
        losses.append(loss)
        accuracies.append(accuracy(model.eval(), check))
        say(f"  epoch {epoch + 1}: loss {loss:.3f}, {accuracies[-1]:.2f} %")

    recipe = dataclasses.replace(RECIPES[args.network], epochs=args.qat_epochs, peak_rate=args.rate)
    start = time.perf_counter()
    train(model, recipe, data, args.seed + 1, note)
    return Course(losses, accuracies, time.perf_counter() - start)


def measure(model: nn.Module, data: Pictures, check: Pictures, args: Namespace) -> dict[str, Any]:
    """Accuracies in percent of float, static and trained models with the same bits."""
    config = fxquant.QConfig(weight=WEIGHTS[args.weights])
    images = data.images[: args.calibration]
    options: dict[str, Any] = {"qconfig": config, "example_inputs": (images[:1],)}
    figures: dict[str, Any] = {"float": accuracy(model, check)}
    static = fxquant.quantize(model, batches(images, 32), backend=args.backend, **options)
    figures["static"] = accuracy(static, check)
    say(f"float {figures['float']:.2f} %, static {figures['static']:.2f} %")
    prepared = fxquant.prepare(model, mode="qat", backend=args.backend, **options)
    fxquant.calibrate(prepared, batches(images, 32))
    # Of few bits per tensor, a channel may round to nothing, and its variance in one batch is no
    # longer that of the next: the statistics of float training are the better ones.
    fxquant.Schedule(prepared, freeze_norms_at=0 if args.freeze else None)
    figures["qat_course"] = dataclasses.asdict(train_on(prepared, data, check, args))
    converted = fxquant.convert(prepared, backend=args.backend)
    figures["qat"] = accuracy(converted, check)
    verified = fxquant.verify(prepared, converted, batches(check.images[:64], 32))
    figures["verify"] = {"ok": verified.ok, "worst": verified.worst}
    if args.float_too:
        say("float, trained on as long")
        longer = copy.deepcopy(model)
        figures["float_course"] = dataclasses.asdict(train_on(longer, data, check, args))
        figures["float_longer"] = accuracy(longer.eval(), check)
    return figures


def rows(figures: dict[str, Any]) -> list[list[str]]:
    """One row per variant, each compared with float and with static."""
    named = {
        "float": "float",
        "float_longer": "float, trained on as long",
        "static": "static",
        "qat": "quantization-aware training",
    }
    return [
        [text, f"{figures[key]:.2f}"]
        + [f"{figures[key] - figures[base]:+.2f}" for base in ("float", "static")]
        for key, text in named.items()
        if key in figures
    ]


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Loss and accuracy by epoch."""
    course = figures["qat_course"]
    curves = [Curve("QAT", course["accuracies"])]
    losses = [Curve("QAT", course["losses"])]
    if "float_course" in figures:
        curves.append(Curve("float, trained on", figures["float_course"]["accuracies"]))
        losses.append(Curve("float, trained on", figures["float_course"]["losses"]))
    levels = {"float": figures["float"], "static": figures["static"]}
    text = svg([("loss", losses, {}), ("right answers, %", curves, levels)])
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None, loaded: Callable[[Path], Pictures] = load) -> None:
    """Train where needed, quantize, train on, print."""
    args_parser = parser(__doc__)
    args_parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/cifar10"),
        help="folder with train8k.npz and val2k.npz",
    )  # fmt: skip
    args_parser.add_argument("--network", choices=NETWORKS, default=NETWORKS[0])
    args_parser.add_argument("--weights", choices=list(WEIGHTS), default="4-bit")
    args_parser.add_argument("--epochs", type=int, help="of float training; default: the recipe's")
    args_parser.add_argument("--qat-epochs", type=int, default=6)
    args_parser.add_argument("--rate", type=float, default=0.01, help="peak learning rate of QAT")
    args_parser.add_argument(
        "--freeze", action=BooleanOptionalAction, default=True, help="batch norms, from the start"
    )
    args_parser.add_argument("--seed", type=int, default=0)
    args_parser.add_argument("--calibration", type=int, default=320, help="pictures")
    args_parser.add_argument("--backend", default="reference")
    args_parser.add_argument("--float-too", action="store_true", help="train float on as long, too")
    args_parser.add_argument("--plot", type=Path, default=RESULTS / "qat_cifar10.svg")
    args = args_parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    data, check = loaded(args.data / "train8k.npz"), loaded(args.data / "val2k.npz")
    model = trained(args.network, data, check, seed=args.seed, epochs=args.epochs)
    figures = measure(model, data, check, args)
    print(", ".join(machine().values()))
    title = f"{args.network}, CIFAR-10, {len(check.labels)} pictures, {args.weights} weights"
    show(title, ["variant", "right %", "against float", "against static"], rows(figures))
    print(f"verify: ok {figures['verify']['ok']}, worst {figures['verify']['worst']} codes")
    draw(args.plot, figures)
    finish(args.json, figures)


if __name__ == "__main__":
    main()
