"""One contender of ``dynamic`` in a process of its own; speaks as ``latency_worker`` does."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import warnings

import torch
from torch import Tensor, nn

import fxquant
from benchmarks.latency_worker import sqnr, timed
from benchmarks.peers import dynamic_linears
from fxquant.report.checks import size_in_bytes

WORDS = 30000
"""Ids are drawn below this; the vocabulary of BERT has 522 more."""


class Bert(nn.Module):
    """The last hidden states of a BERT with random weights."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``[batch, tokens]`` to ``[batch, tokens, 768]``."""
        made: Tensor = self.bert(input_ids=ids).last_hidden_state
        return made


def contender(name: str, model: nn.Module, ids: Tensor) -> nn.Module:
    """``float``, ``torch:ENGINE``, ``fxquant:dynamic``, or ``fxquant:int8-bf16`` (static)."""
    kind, _, variant = name.partition(":")
    if kind == "float":
        return model
    if kind == "torch":
        return dynamic_linears(model, variant)
    if variant == "dynamic":
        return fxquant.quantize(model, mode="dynamic", backend="x86", example_inputs=(ids,))
    data = [torch.randint(0, WORDS, tuple(ids.shape)) for _ in range(4)]
    return fxquant.quantize(model, data, qconfig=variant, backend="x86")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory() -> dict[str, float]:
    """Peak of quantizing linears of 400 MB, and what is left of them, both to their float size."""
    small = nn.Sequential(nn.Linear(8, 8)).eval()
    fxquant.quantize(small, mode="dynamic")  # what is loaded once is no part of it
    before = _peak()
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(24))).eval()
    size = size_in_bytes(model)
    quantized = fxquant.quantize(model, mode="dynamic")
    return {
        "float_mb": size / 1e6,
        "peak": (_peak() - before) / size,
        "result": size_in_bytes(quantized) / size,
    }


def main() -> None:
    """Build, say so, serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender")
    for option in ("threads", "layers", "tokens", "batch"):
        parser.add_argument(f"--{option}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if args.contender == "memory":
        print(json.dumps(memory()), flush=True)
        return
    original = Bert(args.layers).eval()
    ids = torch.randint(0, WORDS, (args.batch, args.tokens))
    model = contender(args.contender, original, ids)
    with torch.inference_mode():
        print(json.dumps({"sqnr": sqnr(original(ids), model(ids))}), flush=True)
        for line in sys.stdin:
            print(json.dumps(timed(model, ids, int(line))), flush=True)


if __name__ == "__main__":
    main()
