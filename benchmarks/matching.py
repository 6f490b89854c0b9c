"""What matching costs: all built-in fusion rules and 50 patterns of a user over 5,000 nodes.

Half of the patterns match somewhere, half never do. The fuse pass is timed alone, on a graph that
went through every pass before it, in processor time: a busy machine falsifies that less.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant
from benchmarks.common import finish, machine, parser, say, show, spread
from fxquant.graph.capture import capture
from fxquant.graph.edit import Editor
from fxquant.passes.fuse import Fuse
from fxquant.patterns.builtin import FUSION_RULES
from fxquant.recipes import prepare_recipe
from fxquant.spec import QConfig

MOST_S = 2.0
ACTS = (nn.ReLU, nn.SiLU, nn.GELU, nn.Tanh, nn.Hardswish)


class Block(nn.Module):
    """Ten ops: convolutions with norms, activations written in several ways, a residual."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.second, self.third = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        """Any picture of four channels."""
        y = self.act(self.norm(self.first(x)))
        z = self.second(y)
        z = z * torch.sigmoid(z)
        return F.relu(self.third(z) * 0.5 + x)


def model(nodes: int) -> nn.Module:
    """Blocks of ten nodes, in a row."""
    return nn.Sequential(*(Block(ACTS[place % len(ACTS)]) for place in range(nodes // 10))).eval()


def patterns(count: int) -> list[fxquant.Pattern]:
    """Lists and functions, some with conditions, of which half match in :func:`model`."""
    made: list[fxquant.Pattern] = []
    acts = (*ACTS, nn.ELU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.LeakyReLU)
    kinds: list[Callable[[Any, str, int], fxquant.Pattern]] = [
        lambda act, name, p: fxquant.Pattern(
            [nn.Conv2d, nn.BatchNorm2d, act], name=name, priority=p
        ),
        lambda act, name, p: fxquant.Pattern(
            [nn.Conv2d, act], name=name, priority=p, where=lambda conv2d: conv2d.groups == 1
        ),
        _gate,
        _scaled,
        lambda act, name, p: fxquant.Pattern([nn.Linear, (nn.LayerNorm, None), act], name=name),
    ]
    while len(made) < count:
        place = len(made)
        act = acts[place // len(kinds) % len(acts)]
        made.append(kinds[place % len(kinds)](act, f"pattern_{place}", place % 7))
    return made


def _gate(act: Any, name: str, priority: int) -> fxquant.Pattern:
    def definition(x, conv, act):  # type: ignore[no-untyped-def]  # annotated below
        y = conv(x)
        return y * act(y)

    definition.__annotations__ = {"conv": nn.Conv2d, "act": act}
    return fxquant.Pattern(definition, name=name, priority=priority)


def _scaled(act: Any, name: str, priority: int) -> fxquant.Pattern:
    def definition(x, y, conv, scale, act):  # type: ignore[no-untyped-def]  # annotated below
        return act(conv(x) * scale + y)

    definition.__annotations__ = {"conv": nn.Conv2d, "scale": float, "act": act}
    return fxquant.Pattern(definition, name=name, priority=priority)


def fuse(nodes: int, rules: tuple[Any, ...]) -> tuple[float, int, int]:
    """Seconds of the fuse pass, nodes of the graph, edits that users' patterns made."""
    module = capture(model(nodes), evaluate=True).module
    steps = takewhile(
        lambda step: step.name != "fuse", prepare_recipe(QConfig(), (), (), {}).passes
    )
    for step in steps:
        step.run(Editor(module))
    count, editor = len(module.graph.nodes), Editor(module)
    start = time.process_time()
    Fuse(rules).run(editor)
    seconds = time.process_time() - start
    return seconds, count, sum(edit.rule.startswith("pattern_") for edit in editor.log)


def main() -> None:
    """Time the pass with and without the user's patterns, in turns."""
    args: Namespace = _arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print(", ".join(machine().values()))
    start = time.perf_counter()
    own = tuple(pattern.rule for pattern in patterns(args.patterns))
    defining = time.perf_counter() - start
    say(f"defined {len(own)} patterns in {defining:.2f} s")
    plain, both, count, hits = [], [], 0, 0
    for _ in range(args.rounds):
        plain.append(fuse(args.nodes, FUSION_RULES)[0])
        seconds, count, hits = fuse(args.nodes, (*own, *FUSION_RULES))
        both.append(seconds)
    header = ["nodes", "patterns", "hits", "built-in rules", "and patterns", "at most", "defining"]
    counts = [str(count), str(len(own)), str(hits)]
    row = [*counts, spread(plain), spread(both), f"{MOST_S:.1f}", f"{defining:.2f}"]
    show("the fuse pass, processor seconds", header, [row])
    figures = {"nodes": count, "hits": hits, "builtin_s": plain, "both_s": both}
    finish(args.json, {"matching": figures | {"defining_s": defining}})


def _arguments() -> Namespace:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--nodes", type=int, default=5000)
    options.add_argument("--patterns", type=int, default=50)
    return options.parse_args()


if __name__ == "__main__":
    main()
