"""A last layer that computes one position of each sequence.

A score depends on a single token of the last layer: the first token of a cross-encoder, the last token of a causal
model. The layers below need all tokens, because that token attends to them. The last layer needs only their keys and
values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from genserve_backend.rerank.attention import Packing, packed_attention


def replace_last_layer(model: nn.Module) -> None:
    """Make the last layer of `model` compute only `Packing.output_positions`.

    Its result is ``[sequences, 1, width]``. The model's head treats that as a batch of sequences of one token, which
    is the first and the last of each.
    """
    layers = _layers(model)
    layers[-1] = LastLayer(layers[-1])


def _layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of transformer layers, which is the longest module list of the model."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len)


class LastLayer(nn.Module):
    """A layer that computes only `Packing.output_positions`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._forward = _forward_for(layer)

    def __getattr__(self, name: str) -> Any:
        """Return the layer's own attribute: the model may read its layers' attributes."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, packing: Packing, **kwargs: Any) -> Tensor:
        """Map ``[1, tokens, width]`` to ``[sequences, 1, width]``."""
        selected = self._forward(self.layer, hidden_states, *args, packing=packing, **kwargs)
        return selected.transpose(0, 1)


def _forward_for(layer: nn.Module) -> Callable[..., Tensor]:
    if hasattr(layer, "attention") and hasattr(layer, "feed_forward_chunk"):
        return _bert
    if hasattr(layer, "self_attn") and hasattr(layer, "post_attention_layernorm"):
        return _llama
    if hasattr(layer, "attn") and hasattr(layer.attn, "Wqkv"):
        return _modern_bert
    return _other


def _other(layer: Any, hidden: Tensor, *args: Any, packing: Packing, **kwargs: Any) -> Tensor:
    """Run the whole layer and select the output positions."""
    whole: Tensor = layer(hidden, *args, packing=packing, **kwargs)
    return whole.index_select(1, packing.output_positions)


def _bert(layer: Any, hidden: Tensor, *_: Any, packing: Packing, **__: Any) -> Tensor:
    """Run a BertLayer or a derived layer: normalization after each half."""
    attention = layer.attention.self
    selected = hidden.index_select(1, packing.output_positions)
    query, key, value = (
        project(states).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
        for project, states in ((attention.query, selected), (attention.key, hidden), (attention.value, hidden))
    )
    attended = packed_attention(
        attention, query, key, value, None, packing=packing, scaling=attention.scaling, one_position=True
    )[0]
    result: Tensor = layer.feed_forward_chunk(layer.attention.output(attended.flatten(2), selected))
    return result


def _llama(
    layer: Any,
    hidden: Tensor,
    *_: Any,
    packing: Packing,
    position_embeddings: tuple[Tensor, Tensor],
    **__: Any,
) -> Tensor:
    """Run a Qwen3DecoderLayer or another of Llama's family: normalization before each half, rotary positions."""
    attention = layer.self_attn
    residual = hidden.index_select(1, packing.output_positions)
    hidden = layer.input_layernorm(hidden)
    cosines, sines = position_embeddings
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb

    def heads(project: nn.Module, norm: str, states: Tensor) -> Tensor:
        split = project(states).unflatten(-1, (-1, attention.head_dim))
        normed: Tensor = getattr(attention, norm, nn.Identity())(split)
        return normed.transpose(1, 2)

    query = heads(attention.q_proj, "q_norm", hidden.index_select(1, packing.output_positions))
    key = heads(attention.k_proj, "k_norm", hidden)
    value = heads(attention.v_proj, "", hidden)
    at_output = (each.index_select(1, packing.output_positions) for each in (cosines, sines))
    query, _ = rotate(query, query, *at_output)
    key, _ = rotate(key, key, cosines, sines)
    attended = packed_attention(
        attention,
        query,
        key,
        value,
        None,
        packing=packing,
        scaling=attention.scaling,
        sliding_window=sliding_window(attention),
        one_position=True,
    )[0]
    residual = residual + attention.o_proj(attended.flatten(2))
    result: Tensor = residual + layer.mlp(layer.post_attention_layernorm(residual))
    return result


def sliding_window(attention: Any) -> int | None:
    """Return the window of an attention of Llama's family: the layer's own or, in Mistral, the model's."""
    of_mistral = attention.config.sliding_window if attention.config.model_type == "mistral" else None
    window: int | None = getattr(attention, "sliding_window", of_mistral)
    return window


def _modern_bert(
    layer: Any,
    hidden: Tensor,
    *_: Any,
    packing: Packing,
    position_embeddings: tuple[Tensor, Tensor],
    **__: Any,
) -> Tensor:
    """Run a ModernBertEncoderLayer: one matrix for queries, keys and values, whose output is split."""
    attention = layer.attn
    projected = attention.Wqkv(layer.attn_norm(hidden)).unflatten(-1, (3, -1, attention.head_dim))
    query, key, value = (part.transpose(1, 2) for part in projected.unbind(dim=-3))
    cosines, sines = position_embeddings
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query, key = rotate(query, key, cosines, sines, unsqueeze_dim=1)
    attended = packed_attention(
        attention,
        query.index_select(2, packing.output_positions),
        key,
        value,
        None,
        packing=packing,
        scaling=attention.head_dim**-0.5,
        sliding_window=attention.sliding_window,
        one_position=True,
    )[0]
    residual = hidden.index_select(1, packing.output_positions) + attention.Wo(attended.flatten(2))
    result: Tensor = residual + layer.mlp(layer.mlp_norm(residual))
    return result
