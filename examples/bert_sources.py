"""A small BERT learns which package a piece of the standard library is from; in dynamic int8.

The text is the source that every Python installation carries. Run it with
``python examples/bert_sources.py``; it needs the extra ``dev`` (transformers).
"""

from __future__ import annotations

import re
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import fxquant

PACKAGES = ("email", "asyncio", "unittest", "xml")
WORDS, LENGTH = 2000, 32


def pieces(limit: int) -> tuple[Tensor, Tensor]:
    """Pieces of source as ``[pieces, LENGTH]`` word ids, and their packages, shuffled."""
    library = Path(sysconfig.get_paths()["stdlib"])
    rows, labels = [], []
    for label, package in enumerate(PACKAGES):
        text = "".join(
            path.read_text(encoding="utf-8") for path in sorted((library / package).rglob("*.py"))
        )
        # The name of the package itself would be too easy.
        words = [w for w in re.findall(r"[a-z]+|[^\sa-z]", text.lower()) if w not in PACKAGES]
        ids = [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in words]
        count = min(limit, len(ids) // LENGTH)
        rows += [ids[LENGTH * i : LENGTH * (i + 1)] for i in range(count)]
        labels += [label] * count
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return torch.tensor(rows)[order], torch.tensor(labels)[order]


def trained(ids: Tensor, labels: Tensor, epochs: int) -> BertForSequenceClassification:
    """A BERT of two layers, trained from nothing."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=LENGTH,
        num_labels=len(PACKAGES),
    )
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch, wanted in zip(ids.split(32), labels.split(32), strict=True):
            loss = model(input_ids=batch, labels=wanted).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def accuracy(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> float:
    """The share of right answers, 0 to 1."""
    with torch.no_grad():
        found = torch.cat([model(input_ids=batch).logits.argmax(-1) for batch in ids.split(100)])
    return float((found == labels).float().mean())


def main(limit: int = 1500, epochs: int = 6) -> tuple[float, float]:
    """Train, quantize without data, compare; returns both accuracies."""
    ids, labels = pieces(limit)
    held = len(ids) // 2
    model = trained(ids[held:], labels[held:], epochs)
    quantized = fxquant.quantize(model, mode="dynamic", example_inputs={"input_ids": ids[:1]})
    real = accuracy(model, ids[:held], labels[:held])
    codes = accuracy(quantized, ids[:held], labels[:held])
    print(f"{held} pieces: {real:.2%} in float, {codes:.2%} in dynamic int8")
    print(fxquant.report(quantized))
    return real, codes


if __name__ == "__main__":
    main()
