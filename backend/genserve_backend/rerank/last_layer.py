"""The last layer of a model, for one position of each sequence.

A score is read off one token: the first of a cross-encoder, the last of a causal model. The layers below need all
tokens, because that token looks at them; of the last layer, the others need no more than their keys and values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from genserve_backend.rerank.attention import Packing, packed_attention


def ask_one_position(model: nn.Module) -> None:
    """Make the last layer of `model` answer for `Packing.asked` alone: ``[sequences, 1, width]``.

    What comes after the layer takes it for a batch of sequences of one token, and finds it at the first and the last
    position of each.
    """
    layers = _layers(model)
    layers[-1] = OnePosition(layers[-1])


def _layers(model: nn.Module) -> nn.ModuleList:
    """The list of transformer layers: the longest module list there is."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len)


class OnePosition(nn.Module):
    """A layer that answers for `Packing.asked`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._forward = _forward_for(layer)

    def __getattr__(self, name: str) -> Any:
        """The model may look at what its layers are."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, packing: Packing, **kwargs: Any) -> Tensor:
        """``[1, tokens, width]`` to ``[sequences, 1, width]``."""
        asked = self._forward(self.layer, hidden_states, *args, packing=packing, **kwargs)
        return asked.transpose(0, 1)


def _forward_for(layer: nn.Module) -> Callable[..., Tensor]:
    if hasattr(layer, "attention") and hasattr(layer, "feed_forward_chunk"):
        return _bert
    if hasattr(layer, "self_attn") and hasattr(layer, "post_attention_layernorm"):
        return _llama
    if hasattr(layer, "attn") and hasattr(layer.attn, "Wqkv"):
        return _modern_bert
    return _any


def _any(layer: Any, hidden: Tensor, *args: Any, packing: Packing, **kwargs: Any) -> Tensor:
    """The whole layer, and what is asked of it."""
    whole: Tensor = layer(hidden, *args, packing=packing, **kwargs)
    return whole[:, packing.asked]


def _bert(layer: Any, hidden: Tensor, *_: Any, packing: Packing, **__: Any) -> Tensor:
    """BertLayer and its descendants: normalization after each half."""
    attention = layer.attention.self
    asked = hidden[:, packing.asked]
    query, key, value = (
        project(states).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for project, states in ((attention.query, asked), (attention.key, hidden), (attention.value, hidden))
    )
    attended = packed_attention(
        attention, query, key, value, None, packing=packing, scaling=attention.scaling, one_position=True
    )[0]
    result: Tensor = layer.feed_forward_chunk(layer.attention.output(attended.flatten(2), asked))
    return result


def _llama(
    layer: Any,
    hidden: Tensor,
    *_: Any,
    packing: Packing,
    position_embeddings: tuple[Tensor, Tensor],
    **__: Any,
) -> Tensor:
    """Qwen3DecoderLayer and other descendants of Llama's: normalization before each half, rotary positions."""
    attention = layer.self_attn
    residual = hidden[:, packing.asked]
    hidden = layer.input_layernorm(hidden)
    cosines, sines = position_embeddings
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb

    def heads(project: nn.Module, norm: str, states: Tensor) -> Tensor:
        split = project(states).unflatten(-1, (-1, attention.head_dim))
        normed: Tensor = getattr(attention, norm, nn.Identity())(split)
        return normed.transpose(1, 2)

    query = heads(attention.q_proj, "q_norm", hidden[:, packing.asked])
    key = heads(attention.k_proj, "k_norm", hidden)
    value = heads(attention.v_proj, "", hidden)
    query, _ = rotate(query, query, cosines[:, packing.asked], sines[:, packing.asked])
    key, _ = rotate(key, key, cosines, sines)
    attended = packed_attention(
        attention,
        query,
        key,
        value,
        None,
        packing=packing,
        scaling=attention.scaling,
        sliding_window=getattr(attention, "sliding_window", None),
        one_position=True,
    )[0]
    residual = residual + attention.o_proj(attended.flatten(2))
    result: Tensor = residual + layer.mlp(layer.post_attention_layernorm(residual))
    return result


def _modern_bert(
    layer: Any,
    hidden: Tensor,
    *_: Any,
    packing: Packing,
    position_embeddings: tuple[Tensor, Tensor],
    **__: Any,
) -> Tensor:
    """ModernBertEncoderLayer: queries, keys and values by one matrix, whose output is cut."""
    attention = layer.attn
    projected = attention.Wqkv(layer.attn_norm(hidden)).unflatten(-1, (3, -1, attention.head_dim))
    query, key, value = (part.transpose(1, 2) for part in projected.unbind(dim=-3))
    cosines, sines = position_embeddings
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query, key = rotate(query, key, cosines, sines, unsqueeze_dim=1)
    attended = packed_attention(
        attention,
        query[:, :, packing.asked],
        key,
        value,
        None,
        packing=packing,
        scaling=attention.head_dim**-0.5,
        sliding_window=attention.sliding_window,
        one_position=True,
    )[0]
    residual = hidden[:, packing.asked] + attention.Wo(attended.flatten(2))
    result: Tensor = residual + layer.mlp(layer.mlp_norm(residual))
    return result
