"""Weights in host memory that are on the device only while they are used, for GPUs with little memory.

diffusers' group offloading does the same with hooks that know one stream; here each part belongs to one thread of the
engine, with that thread's stream: the engine's thread encodes and denoises, the decoder's thread decodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from genserve_backend.devices import record_event


class Parked:
    """Tensors in pinned host memory, with copies on the device while they are used.

    The tensors do not change, so nothing is copied back.

    Args:
        tensors: Parameters and buffers. Their data moves to the host.
        device: The device to use them on.
        stream: A stream for the copies; None copies in the stream of the caller.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._tensors = list(tensors)
        self._device = device
        self._stream = stream
        self._host = [_to_host(tensor.data, pinned=device.type == "cuda") for tensor in self._tensors]
        self._copies: list[Tensor] | None = None
        self._copied: torch.cuda.Event | None = None
        self.times = 0
        """Number of times that the tensors were copied."""
        self._set(self._host)

    def fetch(self) -> list[Tensor]:
        """Start to copy the tensors to the device, unless they are there; return the copies.

        Their memory belongs to the caller's stream. What it did with that memory before has to end first, so the copies
        wait for the work that it has queued.
        """
        if self._copies is not None:
            return self._copies
        with torch.inference_mode(mode=False), torch.no_grad():
            copies = [torch.empty_like(tensor, device=self._device) for tensor in self._host]
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):  # None changes nothing
                for copy, tensor in zip(copies, self._host, strict=True):
                    copy.copy_(tensor, non_blocking=True)
                self._copied = record_event(self._device)
        self._copies = copies
        self.times += 1
        return copies

    def use(self) -> None:
        """Switch to the tensors on the device; work that is queued from now on waits for them."""
        copies = self.fetch()
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        self._set(copies)

    def leave(self) -> None:
        """Switch back to the host. The memory on the device is free for what the stream does next."""
        self._set(self._host)
        self._copies = self._copied = None

    def _set(self, data: Sequence[Tensor]) -> None:
        with torch.inference_mode(mode=False), torch.no_grad():
            for tensor, each in zip(self._tensors, data, strict=True):
                tensor.data = each


def apply(pipeline: FluxPipeline, mode: Literal["idle", "blocks"], device: torch.device) -> list[Parked]:
    """Keep parts of a pipeline in host memory, and move the others to the device.

    Args:
        pipeline: The pipeline on the host.
        mode: ``idle`` keeps the text encoders and the VAE on the host, ``blocks`` also the transformer's blocks.
        device: The device that the engine runs on.

    Returns:
        What is kept on the host.
    """
    transformer, vae, t5 = pipeline.transformer, pipeline.vae, pipeline.text_encoder_2
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    parked = [
        park(pipeline.text_encoder, device),
        # T5 takes as much as half of the transformer: only two of its blocks are on the device at a time.
        *stream(t5.encoder.block, device, copies, again=False),
        park(t5, device, besides=t5.encoder.block),
        park(vae.encoder, device),
        park(vae.decoder, device),
    ]
    _move(vae, device, besides=[vae.encoder, vae.decoder])
    blocks: list[nn.Module] = []
    if mode == "blocks":
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        parked += stream(blocks, device, copies, again=True)
    _move(transformer, device, besides=blocks)
    return parked


def park(module: nn.Module, device: torch.device, *, besides: Iterable[nn.Module] = ()) -> Parked:
    """Keep a module's tensors on the host, without those of some of its parts, except during its forwards."""
    parked = Parked(_tensors(module, besides=besides), device, None)

    def before(*_: Any) -> None:
        parked.use()

    def after(*_: Any) -> None:
        parked.leave()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
    return parked


def stream(
    blocks: Iterable[nn.Module], device: torch.device, copies: torch.cuda.Stream | None, *, again: bool
) -> list[Parked]:
    """Keep blocks on the host that run one after the other; while one runs, the next one is copied.

    Args:
        blocks: The blocks in their order.
        device: The device that they run on.
        copies: The stream for the copies.
        again: While the last one runs, copy the first one for the next pass.
    """
    blocks = list(blocks)
    parked = [Parked(_tensors(block), device, copies) for block in blocks]
    for index, block in enumerate(blocks):
        own = parked[index]
        following = parked[(index + 1) % len(parked)] if again or index + 1 < len(parked) else None

        def before(*_: Any, own: Parked = own, following: Parked | None = following) -> None:
            own.use()
            if following is not None:
                following.fetch()

        def after(*_: Any, own: Parked = own) -> None:
            own.leave()

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after, always_call=True)
    return parked


def _move(module: nn.Module, device: torch.device, *, besides: Iterable[nn.Module]) -> None:
    for tensor in _tensors(module, besides=besides):
        tensor.data = tensor.data.to(device)


def _tensors(module: nn.Module, *, besides: Iterable[nn.Module] = ()) -> list[Tensor]:
    """Return each parameter and buffer once, without those of some parts."""
    left_out = {id(tensor) for part in besides for tensor in _tensors(part)}
    found = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return [tensor for key, tensor in found.items() if key not in left_out]


def _to_host(tensor: Tensor, *, pinned: bool) -> Tensor:
    """Return the tensor in host memory, pinned so that copies of it do not wait."""
    host = tensor.to("cpu")
    return host.pin_memory() if pinned else host
