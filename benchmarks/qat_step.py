"""What a step of quantization-aware training costs: ResNet-18, against float and torch's FX mode.

Forward, backward and SGD, in training mode. Contenders take turns, and a ratio is formed within a
round.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from benchmarks.common import finish, machine, parser, ratios, show, spread
from benchmarks.peers import fx_qat
from tests.zoo.resnet import resnet18


def stepper(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A function that trains ``model`` for one step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None]) -> float:
    """Seconds of one step, until what it queued on a GPU is done."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Build the contenders, let them take turns, print."""
    args_parser = parser(__doc__)
    args_parser.add_argument("--batch", type=int, default=32)
    args_parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    args_parser.add_argument("--rounds", type=int, default=5)
    args_parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = args_parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size).to(args.device)
    labels = torch.randint(0, 10, (args.batch,)).to(args.device)
    model = resnet18().train().to(args.device)
    models = {
        "float": copy.deepcopy(model),
        "fxquant": fxquant.prepare(model, mode="qat", example_inputs=(images[:1],)),
        "torch FX": fx_qat(model, images[:1]),
    }
    steps = {name: stepper(each, images, labels) for name, each in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecation of what the peer is made of
        for step in steps.values():
            timed(step)
        for place in range(args.rounds):
            names = list(steps)
            for name in names[place % 3 :] + names[: place % 3]:
                seconds[name].append(timed(steps[name]))
    rows = [
        [name, spread([1e3 * each for each in values], 0)]
        + [spread(ratios(values, seconds[base])) for base in ("float", "torch FX")]
        for name, values in seconds.items()
    ]
    where = torch.cuda.get_device_name() if images.is_cuda else machine()["cpu"]
    print(", ".join((where, *list(machine().values())[1:])))
    title = f"One step, ResNet-18, batch {args.batch}, {args.size}x{args.size}"
    show(title, ["model", "ms", "to float", "to torch FX"], rows)
    finish(args.json, {"batch": args.batch, "size": args.size, "seconds": seconds})


if __name__ == "__main__":
    main()
