"""Opened up: attention and transformer modules of ``torch.nn`` as code that can be traced.

``nn.MultiheadAttention`` and the transformer layers decide by sizes, dtypes and a fused fast path
what they compute, so tracing takes them as one opaque op. :func:`open_modules` gives each such
module of a copied model a class whose ``forward`` is a few linears, an attention and views, in any
layout, and leaves its parameters and its place in the model as they are. The fast path is off;
results are those of the slow path to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxquant.graph.attention_ops import append_row, attention_mask, attention_weights
from fxquant.graph.layers import linear_of
from fxquant.graph.recurrent_cells import CELLS

Inputs = tuple[Tensor, Tensor, Tensor]


class _Attention(nn.MultiheadAttention):
    """Projections as linears, then attention by heads, for inputs with and without a batch."""

    in_proj: nn.Linear
    kv_proj: nn.Linear
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def install(self) -> None:
        """Make the linears that ``forward`` may call; only those called stay in the graph."""
        width = self.embed_dim
        bias = self._parameters["in_proj_bias"]
        parts = [None] * 3 if bias is None else list(bias.split(width))
        packed = self._parameters["in_proj_weight"]
        if packed is None:
            for name, part in zip("qkv", parts, strict=True):
                weight = self.get_parameter(f"{name}_proj_weight")
                self.add_module(f"{name}_proj", linear_of(weight, part))
            return
        self.add_module("in_proj", linear_of(packed, bias))
        self.add_module(
            "kv_proj", linear_of(packed[width:], None if bias is None else bias[width:])
        )
        for name, weight, part in zip("qkv", packed.split(width), parts, strict=True):
            self.add_module(f"{name}_proj", linear_of(weight, part))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Inputs:
        if self._parameters["in_proj_weight"] is not None and key is value:
            if query is key:
                q, k, v = self.in_proj(query).chunk(3, -1)
                return q, k, v
            k, v = self.kv_proj(key).chunk(2, -1)
            return self.q_proj(query), k, v
        return self.q_proj(query), self.k_proj(key), self.v_proj(value)

    def _heads(self, x: Tensor) -> Tensor:
        """``[..., length, embed]`` (or length first) to ``[..., heads, length, head]``."""
        parts: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return parts.transpose(-2, -3) if self.batch_first else parts.movedim(0, -2)

    def _append(self, heads: Tensor, row: Tensor | None) -> Tensor:
        """The learned and the zero row that keys and values may get at their end."""
        if row is not None:
            heads = append_row(heads, row.view(self.num_heads, 1, self.head_dim))
        return F.pad(heads, (0, 0, 0, 1)) if self.add_zero_attn else heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        q, k, v = (self._heads(part) for part in self._project(query, key, value))
        bias_k, bias_v = self.bias_k, self.bias_v
        k, v = self._append(k, bias_k), self._append(v, bias_v)
        # The hint is taken as torch takes it: the mask itself is not looked at.
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None
        if not causal and (attn_mask is not None or key_padding_mask is not None):
            extra = int(bias_k is not None) + int(self.add_zero_attn)
            mask = attention_mask(q, attn_mask, key_padding_mask, heads=self.num_heads, extra=extra)
        dropout = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        found = found.transpose(-2, -3) if self.batch_first else found.movedim(-2, 0)
        result = self.out_proj(found.flatten(-2))
        weights = (
            attention_weights(q, k, mask, average=average_attn_weights) if need_weights else None
        )
        return result, weights


class _EncoderLayer(nn.TransformerEncoderLayer):
    """The slow path alone."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As :meth:`torch.nn.TransformerEncoderLayer.forward`."""
        masks: tuple[Any, ...] = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), *masks)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, *masks))
        found: Tensor = self.norm2(src + self._ff_block(src))
        return found


class _DecoderLayer(nn.TransformerDecoderLayer):
    """Its own ``forward`` can be traced."""


class _Encoder(nn.TransformerEncoder):
    """Layer after layer; padded positions are computed, not cut out."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As :meth:`torch.nn.TransformerEncoder.forward`; a mask is used as it is given."""
        for layer in self.layers:
            src = layer(
                src,
                src_mask=mask,
                is_causal=bool(is_causal),
                src_key_padding_mask=src_key_padding_mask,
            )
        return src if self.norm is None else self.norm(src)


class _Decoder(nn.TransformerDecoder):
    """Layer after layer."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As :meth:`torch.nn.TransformerDecoder.forward`; a mask is used as it is given."""
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=bool(tgt_is_causal),
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)


class _Transformer(nn.Transformer):
    """Encoder, then decoder."""

    def forward(  # noqa: PLR0913 - torch's own signature
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As :meth:`torch.nn.Transformer.forward`."""
        memory = self.encoder(
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
        )
        found: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return found


class _Bilinear(nn.Bilinear):
    """``x1 A x2`` as a linear over ``x2`` and a matrix product with ``x1``."""

    linear: nn.Linear

    def install(self) -> None:
        """Make the linear, over a view of the weight."""
        self.add_module("linear", linear_of(self.weight.flatten(0, 1), None))

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """As :meth:`torch.nn.Bilinear.forward`."""
        rows = self.linear(input2).unflatten(-1, (self.out_features, self.in1_features))
        found: Tensor = torch.matmul(rows, input1.unsqueeze(-1)).squeeze(-1)
        return found if self.bias is None else found + self.bias


_OPEN: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.MultiheadAttention: _Attention,
    nn.TransformerEncoderLayer: _EncoderLayer,
    nn.TransformerDecoderLayer: _DecoderLayer,
    nn.TransformerEncoder: _Encoder,
    nn.TransformerDecoder: _Decoder,
    nn.Transformer: _Transformer,
    nn.Bilinear: _Bilinear,
    **CELLS,
}


def open_modules(root: nn.Module) -> None:
    """Give attention, transformers and recurrent cells of ``root`` a ``forward`` to trace.

    Args:
        root: a copy of the user's model, about to be traced; its modules change class, their
            names and parameters stay. Subclasses with a ``forward`` of their own are left alone.

    Example:
        >>> model = nn.Sequential(nn.TransformerEncoderLayer(8, 2))
        >>> open_modules(model)
        >>> type(model[0].self_attn.in_proj).__name__
        'Linear'
    """
    for module in list(root.modules()):
        standard = next((base for base in _OPEN if isinstance(module, base)), None)
        if standard is None or type(module).forward is not standard.forward:
            continue
        module.__class__ = _opened(type(module), _OPEN[standard])
        install: Callable[[], None] | None = getattr(module, "install", None)
        if install is not None:
            install()


def _opened(cls: type[nn.Module], by: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with the ``forward`` of ``by``, under its own name: users select ops by class."""
    bases = (by,) if issubclass(by, cls) else (by, cls)
    return type(cls.__name__, bases, {"__module__": __name__, "__doc__": cls.__doc__})


def settle_activations(model: nn.Module, made: nn.Module) -> None:
    """Undo what copying does to transformer decoder layers whose activation is a module.

    Their ``__setstate__`` does not find the activation among the attributes and puts ``F.relu``
    in front of it; a copy would compute something else than the model does.

    Args:
        model: the user's model.
        made: a deep copy of it.
    """
    for own, twin in zip(model.modules(), made.modules(), strict=False):
        covered = isinstance(twin, nn.TransformerDecoderLayer) and "activation" in twin._modules
        if covered and "activation" not in vars(own):
            vars(twin).pop("activation", None)
