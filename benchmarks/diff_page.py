"""What a diff of large graphs and its page cost: seconds, megabytes, and how both grow.

A chain of residual blocks, float against int8 by the reference backend, whose graph is the longer
one; and the int8 graph against itself with one layer in float, where nearly everything is folded.
"""

from __future__ import annotations

import time
import warnings
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.common import finish, machine, parser, say, show, spread
from fxquant.graph.diff import GraphState
from fxquant.report.diff import diff_models

MOST_S, MOST_MB = 2.0, 5.0
PER_BLOCK = 17
"""Nodes of one block in the int8 graph."""


class Block(nn.Module):
    """Seven ops, one of them a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """Any picture of four channels."""
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(self.other(self.second(y)) + x)


def states(nodes: int) -> tuple[GraphState, GraphState, GraphState]:
    """The graphs of a float model, of its int8 form, and of that with one layer in float."""
    torch.manual_seed(0)
    blocks = max(2, nodes // PER_BLOCK)
    model = nn.Sequential(*(Block() for _ in range(blocks))).eval()
    batches = [torch.randn(2, 4, 4, 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = fxquant.quantize(model, batches, backend="reference")
        middle = {f"{blocks // 2}.*": None}
        part = fxquant.quantize(model, batches, backend="reference", overrides=middle)
    passes = fxquant.history(whole)
    return passes[0].state, passes[-1].state, fxquant.history(part)[-1].state


def measured(name: str, a: GraphState, b: GraphState, rounds: int) -> dict[str, Any]:
    """Diff and page of one pair."""
    diffs, pages, size = [], [], 0
    for _ in range(rounds):
        start = time.perf_counter()
        diff = diff_models(a, b)
        between = time.perf_counter()
        size = len(diff.to_html().encode())
        pages.append(time.perf_counter() - between)
        diffs.append(between - start)
    say(f"{name}: {len(a.nodes)} and {len(b.nodes)} nodes")
    nodes = max(len(a.nodes), len(b.nodes))
    return {"name": name, "nodes": nodes, "diff_s": diffs, "page_s": pages, "bytes": size}


def run(args: Namespace) -> list[dict[str, Any]]:
    """All pairs of all sizes."""
    found = []
    for nodes in args.nodes:
        real, whole, part = states(nodes)
        found.append(measured("float to int8", real, whole, args.rounds))
        found.append(measured("one layer in float", whole, part, args.rounds))
    return found


def main() -> None:
    """Measure and print."""
    args_parser = parser(__doc__)
    args_parser.add_argument("--rounds", type=int, default=5)
    args_parser.add_argument("--nodes", type=int, nargs="+", default=[1250, 2500, 5000])
    args = args_parser.parse_args()
    torch.set_num_threads(args.threads)
    print(", ".join(machine().values()))
    found = run(args)
    rows = []
    for each in found:
        both = [d + p for d, p in zip(each["diff_s"], each["page_s"], strict=True)]
        parts = [spread(each["diff_s"]), spread(each["page_s"]), spread(both)]
        rows.append([each["name"], f"{each['nodes']:,}", *parts, f"{each['bytes'] / 1e6:.2f}"])
    headers = ["pair", "nodes", "diff s", "page s", f"both (at most {MOST_S})"]
    show("Diff and page", [*headers, f"MB (at most {MOST_MB})"], rows)
    finish(args.json, {"pairs": found})


if __name__ == "__main__":
    main()
