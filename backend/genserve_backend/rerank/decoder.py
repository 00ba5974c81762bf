"""A causal model's forward over packed sequences for GPUs, in few kernels.

transformers' layers launch a kernel for each of their small operators, about 60 per layer, and a GPU waits for the host
that launches them. Here a layer has one matrix for queries, keys and values and one for gate and up, normalization is
one operator, queries and keys are rotated together, and the last layer computes one position of each sequence. With
torch.compile, everything between two attentions is one graph, the same for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from genserve_backend.rerank.attention import Packing, attend
from genserve_backend.rerank.last_layer import sliding_window

_FUSED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types with Llama's layers: the two norms, gated MLP, and rotary positions of both halves of a head."""


def can_fuse(model: Any, device: torch.device) -> bool:
    """Return whether a `PackedDecoder` replaces a causal model on this device.

    On a CPU, which waits for no launches, matrix products in its own layout gain more: see `matrices`.
    """
    return device.type != "cpu" and model.config.model_type in _FUSED


class Matrix(NamedTuple):
    """The weight, ``[outputs, inputs]``, and bias of a linear layer."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, *layers: nn.Linear) -> Matrix:
        """Return one matrix for layers with the same input, their outputs one after another."""
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(layers) == 1:
            return cls(layers[0].weight.detach(), biases[0].detach() if biases else None)
        if biases and len(biases) < len(layers):
            zeros = [layer.weight.new_zeros(layer.out_features) for layer in layers]
            biases = [zero if layer.bias is None else layer.bias for layer, zero in zip(layers, zeros, strict=True)]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        return cls(weight, torch.cat([bias.detach() for bias in biases]) if biases else None)


class Norm(NamedTuple):
    """The weight and epsilon of a root-mean-square normalization."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: Any) -> Norm:
        """Return the parameters of one of transformers' RMSNorm classes."""
        return cls(norm.weight.detach(), norm.variance_epsilon)

    def apply(self, states: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return functional.rms_norm(states, (states.shape[-1],), self.weight, self.epsilon)


class Layer(NamedTuple):
    """The weights of a layer."""

    before: Norm
    """Normalization before the attention."""
    projection: Matrix
    """Queries, keys and values."""
    heads: tuple[int, int]
    """Heads of queries, and of keys and values."""
    of_heads: Norm | None
    """Normalization of each head of queries and keys, in Qwen3; its weight is ``[heads of both, width]``."""
    output: Matrix
    """The matrix after the attention."""
    between: Norm
    """Normalization before the gated MLP."""
    gate_up: Matrix
    down: Matrix
    scaling: float
    window: int | None

    @classmethod
    def of(cls, layer: Any) -> Layer:
        """Return the weights of one of transformers' layers, which may be dropped afterwards."""
        attention, mlp = layer.self_attn, layer.mlp
        width = attention.head_dim
        heads = (attention.q_proj.out_features // width, attention.k_proj.out_features // width)
        return cls(
            before=Norm.of(layer.input_layernorm),
            projection=Matrix.of(attention.q_proj, attention.k_proj, attention.v_proj),
            heads=heads,
            of_heads=_of_heads(attention, heads) if hasattr(attention, "q_norm") else None,
            output=Matrix.of(attention.o_proj),
            between=Norm.of(layer.post_attention_layernorm),
            gate_up=Matrix.of(mlp.gate_proj, mlp.up_proj),
            down=Matrix.of(mlp.down_proj),
            scaling=attention.scaling,
            window=sliding_window(attention),
        )


class Rotation(NamedTuple):
    """The rotary positions of all tokens, ``[tokens, 1, width]`` each."""

    cosines: Tensor
    sines: Tensor
    """Negative in the first half of a head."""

    def apply(self, states: Tensor) -> Tensor:
        """Rotate ``[tokens, heads, width]``."""
        swapped = states.roll(states.shape[-1] // 2, dims=-1)
        return torch.addcmul(states * self.cosines, swapped, self.sines)

    def at(self, positions: Tensor) -> Rotation:
        """Return the rotary positions of some tokens."""
        return Rotation(self.cosines.index_select(0, positions), self.sines.index_select(0, positions))


class PackedDecoder(nn.Module):
    """A model of Llama's family without its head, for packed sequences; it takes the layers' weights over.

    Args:
        model: transformers' model; it must not be used afterwards.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self._embedding = model.embed_tokens.weight.detach()
        self._rotary = model.rotary_emb
        self._norm = Norm.of(model.norm)
        self._activation: Callable[[Tensor], Tensor] = model.layers[0].mlp.act_fn
        self._layers: list[Layer] = []
        for index in range(len(model.layers)):
            self._layers.append(Layer.of(model.layers[index]))
            model.layers[index] = nn.Identity()  # frees its weights, so that only one layer is there twice
        self.uncompile_parts()

    def compile_parts(self) -> None:
        """Let the parts between the attentions be compiled as they first run, once for all layers and lengths."""
        self._enter, self._continue, self._continue_last, self._leave = map(torch.compile, _PARTS)

    def uncompile_parts(self) -> None:
        """Undo `compile_parts`."""
        self._enter, self._continue, self._continue_last, self._leave = _PARTS

    def forward(self, input_ids: Tensor, position_ids: Tensor, packing: Packing, **_: Any) -> Any:
        """Compute the last token of each sequence.

        Args:
            input_ids: int32 ``[1, tokens]``.
            position_ids: int64, the same shape.
            packing: The sequences; their output position is the last token.

        Returns:
            An object with ``last_hidden_state``, ``[sequences, 1, width]``, as transformers' models return it.
        """
        hidden = functional.embedding(input_ids[0], self._embedding)
        cosines, sines = (each[0, :, None] for each in self._rotary(hidden, position_ids))
        half = sines.shape[-1] // 2
        rotation = Rotation(cosines, torch.cat([-sines[..., :half], sines[..., half:]], dim=-1))
        own = packing.prefix_rows.own_rows if packing.prefix_rows else self._own_rows(hidden)
        first, last = self._layers[0], self._layers[-1]
        if first is last:
            query, hidden = _project_last(hidden, first, rotation, own, packing.output_positions)
        else:
            query = self._enter(hidden, first, rotation, own)
        for index, layer in enumerate(self._layers[:-1]):
            attended = _attend(query, own, index, layer, packing, one_position=False)
            following = self._layers[index + 1]
            common = (hidden, attended, layer, following, rotation, own, self._activation)
            if following is last:
                query, hidden = self._continue_last(*common, packing.output_positions)
            else:
                query, hidden = self._continue(*common)
        attended = _attend(query, own, len(self._layers) - 1, last, packing, one_position=True)
        return SimpleNamespace(last_hidden_state=self._leave(hidden, attended, last, self._norm, self._activation))

    def _own_rows(self, hidden: Tensor) -> Tensor:
        """Return space for the keys and values of a layer."""
        layer = self._layers[0]
        queries, keys = layer.heads
        width = layer.projection.weight.shape[0] // (queries + 2 * keys)
        return hidden.new_empty(len(hidden), 2, keys, width)


def _of_heads(attention: Any, heads: tuple[int, int]) -> Norm:
    of_queries, of_keys = Norm.of(attention.q_norm), Norm.of(attention.k_norm)
    weights = [norm.weight.expand(count, -1) for norm, count in zip((of_queries, of_keys), heads, strict=True)]
    return Norm(torch.cat(weights), of_queries.epsilon)


def _attend(query: Tensor, own: Tensor, index: int, layer: Layer, packing: Packing, *, one_position: bool) -> Tensor:
    """Return the attention of ``[queries, heads, width]`` over the keys and values in `own`, ``[queries, width]``."""
    keys_values = packing.prefix_rows.gather(index) if packing.prefix_rows else own
    key, value = (each.transpose(0, 1)[None] for each in keys_values.unbind(1))
    attended = attend(
        query.transpose(0, 1)[None],
        key,
        value,
        packing=packing,
        causal=True,
        scaling=layer.scaling,
        sliding_window=layer.window,
        one_position=one_position,
    )
    return attended[0].flatten(1)


# The following are compiled. They write keys and values to `own`, ``[tokens, 2, heads, width]``.


def _enter(hidden: Tensor, layer: Layer, rotation: Rotation, own: Tensor) -> Tensor:
    """Return the queries of the first layer."""
    return _project(layer.before.apply(hidden), layer, rotation, own)


def _continue(
    hidden: Tensor,
    attended: Tensor,
    layer: Layer,
    following: Layer,
    rotation: Rotation,
    own: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Finish a layer; return the queries of the following one, and the result."""
    hidden = _finish(hidden, attended, layer, activation)
    return _project(following.before.apply(hidden), following, rotation, own), hidden


def _continue_last(
    hidden: Tensor,
    attended: Tensor,
    layer: Layer,
    last: Layer,
    rotation: Rotation,
    own: Tensor,
    activation: Callable[[Tensor], Tensor],
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Finish the last layer but one; see `_project_last`."""
    return _project_last(_finish(hidden, attended, layer, activation), last, rotation, own, positions)


def _leave(
    hidden: Tensor, attended: Tensor, layer: Layer, norm: Norm, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """Finish the last layer: ``[sequences, 1, width]``."""
    return norm.apply(_finish(hidden, attended, layer, activation))[:, None]


def _project(normed: Tensor, layer: Layer, rotation: Rotation, own: Tensor) -> Tensor:
    """Return the queries, ``[tokens, heads, width]``."""
    queries, keys = layer.heads
    projected = functional.linear(normed, *layer.projection).view(len(normed), queries + 2 * keys, -1)
    states = projected[:, : queries + keys]
    if layer.of_heads is not None:
        # Values too, and then not used: one operator over everything needs no copy of a part.
        everything = functional.rms_norm(projected, (projected.shape[-1],), None, layer.of_heads.epsilon)
        states = everything[:, : queries + keys] * layer.of_heads.weight
    rotated = rotation.apply(states)
    own[:, 0] = rotated[:, queries:]
    own[:, 1] = projected[:, queries + keys :]
    return rotated[:, :queries]


def _project_last(
    hidden: Tensor, layer: Layer, rotation: Rotation, own: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the queries and the hidden states at `positions`."""
    queries, keys = layer.heads
    weight, bias = layer.projection
    split = weight.shape[0] * queries // (queries + 2 * keys)
    normed = layer.before.apply(hidden)
    selected = normed.index_select(0, positions)
    query = functional.linear(selected, weight[:split], None if bias is None else bias[:split])
    key_value = functional.linear(normed, weight[split:], None if bias is None else bias[split:])
    query = query.view(len(query), queries, -1)
    key, value = key_value.view(len(normed), 2, keys, -1).unbind(1)
    if layer.of_heads is not None:
        norm = layer.of_heads
        query, key = (
            functional.rms_norm(states, (states.shape[-1],), None, norm.epsilon) * weight
            for states, weight in ((query, norm.weight[:queries]), (key, norm.weight[queries:]))
        )
    own[:, 0] = rotation.apply(key)
    own[:, 1] = value
    return rotation.at(positions).apply(query), hidden.index_select(0, positions)


def _finish(hidden: Tensor, attended: Tensor, layer: Layer, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a layer's result, from its input and its attention."""
    hidden = hidden + functional.linear(attended, *layer.output)
    gate, up = functional.linear(layer.between.apply(hidden), *layer.gate_up).chunk(2, dim=-1)
    return hidden + functional.linear(activation(gate) * up, *layer.down)


_PARTS: tuple[Callable[..., Any], ...] = (_enter, _continue, _continue_last, _leave)
