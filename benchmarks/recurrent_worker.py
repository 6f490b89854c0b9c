"""One contender of ``recurrent`` in a process of its own; speaks as ``latency_worker`` does."""

from __future__ import annotations

import argparse
import json
import sys
import warnings

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.latency_worker import sqnr, timed
from benchmarks.peers import dynamic_recurrent


class Model(nn.Module):
    """The outputs of a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """All hidden states of the last layer."""
        made: Tensor = self.layer(x)[0]
        return made


def contender(name: str, model: nn.Module, x: Tensor) -> nn.Module:
    """``float``, ``torch:dynamic``, or ``fxquant:BACKEND``."""
    kind, _, variant = name.partition(":")
    if kind == "float":
        return model
    if kind == "torch":
        return dynamic_recurrent(model)
    asked = {nn.RNNBase: "dynamic"}
    return fxquant.quantize(model, [x], backend=variant, overrides=asked)


def main() -> None:
    """Build, say so, serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    parser.add_argument("kind", choices=("LSTM", "GRU"))
    for option in ("threads", "width", "hidden", "layers", "steps", "batch"):
        parser.add_argument(f"--{option}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    layer = getattr(nn, args.kind)(args.width, args.hidden, args.layers)
    original = Model(layer).eval()
    x = torch.randn(args.steps, args.batch, args.width)
    model = contender(args.contender, original, x)
    with torch.inference_mode():
        print(json.dumps({"sqnr": sqnr(original(x), model(x))}), flush=True)
        for line in sys.stdin:
            print(json.dumps(timed(model, x, int(line))), flush=True)


if __name__ == "__main__":
    main()
