"""FLUX attention for a batch of images of different sizes."""

from __future__ import annotations

import inspect

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch.nn import functional


class RaggedAttention:
    """Replacement for diffusers' ``FluxAttnProcessor``: the same arithmetic with positions per batch row.

    The transformer passes the additional arguments through its ``joint_attention_kwargs``.
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: object = None,
        *,
        rotation: torch.Tensor,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend.

        Args:
            attn: The block's weights.
            hidden_states: ``[B, S, D]``; image tokens in a double block, text and image tokens in a single block.
            encoder_hidden_states: ``[B, T, D]``, the text tokens of a double block.
            attention_mask: Bool ``[B, 1, 1, T + S]``, false for padding; None without padding.
            image_rotary_emb: The transformer's own rotation; not used.
            rotation: Complex64 ``[B or 1, T + S, 1, head / 2]``, or float32 ``[B or 1, T + S, 1, head / 2, 2]``
                with cosines and sines; see `complex_rotation` and `real_rotation`.
        """
        query, key, value = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text_query, text_key, text_value = (
                project(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
                for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        attended = functional.scaled_dot_product_attention(
            rotate(query, rotation).transpose(1, 2),
            rotate(key, rotation).transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=attention_mask,
        )
        attended = attended.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return attended
        text, image = attended.split_with_sizes([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text.contiguous())

    # diffusers inspects it in every block of every forward, which took 4 % of the demo's time.
    __call__.__signature__ = inspect.signature(__call__)  # type: ignore[attr-defined]


def rotate(states: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of numbers of ``[B, S, heads, head]`` by its position's angle, in float32."""
    if rotation.is_complex():
        pairs = torch.view_as_complex(states.float().reshape(*states.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(-2).to(states.dtype)
    if torch.compiler.is_compiling():
        return rotate_pairs(states, rotation)
    rotated = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    first, second = states.reshape(*states.shape[:-1], -1, 2).unbind(-1)
    new_first, new_second = rotated.view(*states.shape[:-1], -1, 2).unbind(-1)
    cosines, sines = rotation.unbind(-1)
    # addcmul rounds to the states' dtype as it writes: two passes over memory per half.
    torch.addcmul(first * cosines, second, sines, value=-1, out=new_first)
    torch.addcmul(second * cosines, first, sines, out=new_second)
    return rotated


def rotate_pairs(states: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Return `rotate` for real rotations, in operators that Inductor makes one kernel of."""
    first, second = states.float().reshape(*states.shape[:-1], -1, 2).unbind(-1)
    cosines, sines = rotation.unbind(-1)
    pairs = torch.stack([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return pairs.flatten(-2).to(states.dtype)


def complex_rotation(cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Return the output of ``FluxPosEmbed``, ``[S, head]`` with each number twice, as complex64 ``[S, head / 2]``.

    For CPUs: swapping pairs of numbers as diffusers does took a third of the demo's forward.
    """
    return torch.complex(cosines[:, ::2].float(), sines[:, ::2].float())


def real_rotation(cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Return the output of ``FluxPosEmbed`` as float32 ``[S, head / 2, 2]``, cosine and sine.

    For GPUs: a complex product makes float32 copies of all states there, and Inductor cannot compile it.
    """
    return torch.stack([cosines[:, ::2], sines[:, ::2]], dim=-1).float()
