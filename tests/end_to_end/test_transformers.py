"""Models of the ``transformers`` package, as they are: captured, int8, accurate, dynamic batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import fxquant
from fxquant.graph.integer_modules import IntegerEmbedding
from fxquant.record import record_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::fxquant.errors.SpeedWarning"),
    pytest.mark.filterwarnings("ignore::fxquant.errors.CalibrationWarning"),
]
# Wide against their length, as real ones are: attention is a few per cent of the products.
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
_TEXT = {"vocab_size": 300, "max_position_embeddings": 40, **_SIZES}
_GPT2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 40}
Batch = dict[str, Tensor]


def sentences(seed: int, count: int = 2) -> Batch:
    """Token ids; the second sentence is shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (count, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:2, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int, count: int = 2) -> Batch:
    return {"pixel_values": _normal(seed, count, 3, 32, 32)}


def sounds(seed: int, count: int = 2) -> Batch:
    return {"input_features": _normal(seed, count, 16, 32)}


def whisper_encoder() -> nn.Module:
    config = hf.WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=256,
        decoder_attention_heads=4, num_mel_bins=16, max_source_positions=16,
        vocab_size=80, pad_token_id=0,
    )  # fmt: skip
    encoder: nn.Module = hf.WhisperModel(config).get_encoder()
    return encoder


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Batch]]] = {
    "bert": (lambda: hf.BertModel(hf.BertConfig(**_TEXT)), sentences),
    "bert-eager": (
        lambda: hf.BertModel(hf.BertConfig(attn_implementation="eager", **_TEXT)),
        sentences,
    ),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(use_cache=False, **_GPT2)), sentences),
    "vit": (
        lambda: hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **_SIZES)),
        pictures,
    ),
    "whisper": (whisper_encoder, sounds),
}


def first(output: Any) -> Tensor:
    """The main result of a model."""
    found: Tensor = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_runs_in_int8(name: str) -> None:
    make, data = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    made = fxquant.quantize(model, [data(seed) for seed in range(4)], backend="x86")
    ops = record_of(made).ops
    total = sum(op.macs or 0 for op in ops)
    assert sum(op.macs or 0 for op in ops if op.int8) >= 0.95 * total
    for count in (2, 3):
        batch = data(9, count)
        with torch.no_grad():
            wanted, found = first(model(**batch)), first(made(**batch))
        assert found.shape == wanted.shape
        noise = float((wanted - found).square().mean() / wanted.square().mean())
        assert -10 * math.log10(noise) >= 20


def test_gpt2_stores_its_tied_table_once() -> None:
    torch.manual_seed(0)
    make, data = MODELS["gpt2"]
    made = fxquant.quantize(make().eval(), [data(0)], backend="x86")
    tables = [m for m in made.modules() if isinstance(m, IntegerEmbedding)]
    words = next(t for t in tables if t.num_embeddings == 300)
    heads = [t for k, t in made.state_dict().items() if t.shape == (300, 64)]
    assert {t.data_ptr() for t in heads} == {words.weight.data_ptr()}
