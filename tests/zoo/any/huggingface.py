"""Models of the ``transformers`` package: its own code, tiny configurations, random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.zoo.any.case import Case, Data, images, signals, tokens

_TEXT = {
    "vocab_size": 80,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}


def sentences(vocabulary: int = 80, **more: int) -> Data:
    """Token ids and an attention mask whose last samples are shorter, as a tokenizer gives."""

    def make(batch: int, seed: int, size: int) -> dict[str, Tensor]:
        ids = tokens(vocabulary)(batch, seed, size)
        mask = torch.ones_like(ids)
        if batch > 1:
            mask[batch // 2 :, size - 3 :] = 0
        given = {"input_ids": ids, "attention_mask": mask}
        return given | {name: torch.full_like(ids, value) for name, value in more.items()}

    return make


def named(name: str, data: Data) -> Data:
    """The same data as the keyword argument ``name``."""
    return lambda batch, seed, size: {name: data(batch, seed, size)}


def pairs(name: str) -> Data:
    """What is read as ``name``, and what is written so far, which is shorter."""
    read, written = tokens(80), tokens(80)
    return lambda batch, seed, size: {
        name: read(batch, seed, size),
        "decoder_input_ids": written(batch, seed + 1, size - 3),
    }


def mel(batch: int, seed: int, size: int) -> Tensor:
    """What Whisper is fed: 16 mel bands, twice as many frames as positions."""
    return signals(16)(batch, seed, 2 * size)


def _new(model: Callable[..., nn.Module], config: Callable[..., Any], **options: Any) -> Any:
    return lambda: model(config(**options))


_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "initializer_range": 0.2,
}

_GPT2 = {"vocab_size": 80, "n_positions": 40, "n_embd": 48, "n_layer": 2, "n_head": 4}
_LLAMA = _TEXT | {"num_key_value_heads": 2, "use_cache": False}
_T5 = {"vocab_size": 80, "d_model": 48, "d_kv": 12, "d_ff": 192, "num_layers": 2, "num_heads": 4}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 48, "depths": [2, 1], "num_heads": [2, 4]}
_WHISPER = {
    "num_mel_bins": 16, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "max_source_positions": 24,
}  # fmt: skip


def whisper_encoder() -> nn.Module:
    """Only the encoder, with positions that are not all zero."""
    config = hf.WhisperConfig(**_WHISPER, decoder_attention_heads=4, vocab_size=80, pad_token_id=0)
    model = hf.WhisperModel(config)
    encoder: nn.Module = model.get_encoder()
    return encoder


# torch itself cannot settle the -1 in the views of their attention for an empty batch
_LONG = (
    "torch's fused attention in float took less than two integer products and a softmax: measured, "
    "the report has the figures; where sequences are as long as layers are wide, it is much"
)
_text = partial(Case, empty=False)
CASES = {
    "hf_bert": _text(
        _new(hf.BertModel, hf.BertConfig, **_TEXT), sentences(token_type_ids=0), 12, 16
    ),
    "hf_bert_classifier": _text(
        _new(hf.BertForSequenceClassification, hf.BertConfig, **_TEXT), sentences(), 12, 16
    ),
    "hf_bert_ids_only": _text(
        _new(hf.BertModel, hf.BertConfig, **_TEXT), named("input_ids", tokens(80)), 12, 16
    ),
    "hf_roberta": _text(
        _new(hf.RobertaForTokenClassification, hf.RobertaConfig, **_TEXT), sentences(), 12, 16
    ),
    "hf_distilbert": _text(
        _new(
            hf.DistilBertForSequenceClassification, hf.DistilBertConfig,
            vocab_size=80, dim=48, n_layers=2, n_heads=4, hidden_dim=192, initializer_range=0.2,
        ),
        sentences(), 12, 16,
    ),
    "hf_albert": _text(
        _new(hf.AlbertModel, hf.AlbertConfig, embedding_size=16, **_TEXT), sentences(), 12, 16
    ),
    "hf_electra": _text(
        _new(hf.ElectraForTokenClassification, hf.ElectraConfig, embedding_size=16, **_TEXT),
        sentences(), 12, 16,
    ),
    "hf_gpt2": _text(
        _new(hf.GPT2LMHeadModel, hf.GPT2Config, use_cache=False, initializer_range=0.2, **_GPT2),
        named("input_ids", tokens(80)), 12, 16,
    ),
    "hf_llama": _text(
        _new(hf.LlamaForCausalLM, hf.LlamaConfig, **_LLAMA), named("input_ids", tokens(80)), 12, 16
    ),
    "hf_t5_encoder": _text(_new(hf.T5EncoderModel, hf.T5Config, **_T5), sentences(), 12, 16),
    "hf_t5": _text(
        _new(hf.T5ForConditionalGeneration, hf.T5Config, use_cache=False, **_T5),
        pairs("input_ids"), 12, 16,
    ),
    "hf_vit": _text(
        _new(hf.ViTForImageClassification, hf.ViTConfig, **_VISION),
        named("pixel_values", images()), 32,
    ),
    "hf_swin": _text(
        _new(
            hf.SwinForImageClassification, hf.SwinConfig,
            window_size=4, initializer_range=0.2, **_SWIN,
        ),
        named("pixel_values", images()), 32,
    ),
    "hf_convnext": Case(
        _new(
            hf.ConvNextForImageClassification, hf.ConvNextConfig,
            hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, initializer_range=0.2,
            layer_scale_init_value=0.5,
        ),
        named("pixel_values", images()), 32, 48,
    ),
    "hf_resnet": Case(
        _new(
            hf.ResNetForImageClassification, hf.ResNetConfig,
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic",
        ),
        named("pixel_values", images()), 64, 48,
    ),
    "hf_whisper_encoder": _text(
        whisper_encoder, named("input_features", mel), 24, macs=0.85, why=_LONG
    ),
}  # fmt: skip
