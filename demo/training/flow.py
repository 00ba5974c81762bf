"""The transformer: rectified flow from noise to latents, conditioned on the caption.

x_sigma = (1 - sigma) * latents + sigma * noise, and the model predicts noise - latents (Liu et al. 2022; Esser et al.
2024). Sigmas have a logit-normal distribution, shifted by the number of image tokens like the scheduler's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from torch import Tensor, nn

from flux_parts import flux_scheduler
from genserve_backend.flux.attention import RaggedAttention, complex_rotation
from shapes.captions import describe
from training.autoencoder import NATIVE_SIZE
from training.latents import Bucket, Size
from training.stage import DECAY, Session, Stage
from training.text import MAX_SEQUENCE_LENGTH, WIDTH, TextParts

HEADS = 6
HEAD_WIDTH = 32
ROPE_AXES = (4, 14, 14)
NO_GUIDANCE = 1.0
"""Guidance scale without effect."""

_LENGTHS = (MAX_SEQUENCE_LENGTH,) * 14 + (48, 96)
_NO_CAPTION = 0.1
"""Share of pictures with an empty caption, for guidance."""
_LOCATION = 0.6
"""Location of the logit-normal distribution of sigmas, before the shift."""
_FOREGROUND = 0.5
"""Minimum mean square distance from the background of a token that is not background."""
_NATIVE = (NATIVE_SIZE, NATIVE_SIZE)


@dataclass(frozen=True)
class FlowPlan:
    """Steps and data of the transformer's training."""

    steps: int = 6200
    tokens: int = 48 * 64
    """Image tokens of a batch, for all picture sizes."""
    rate: float = 1e-3
    native: float = 0.85
    """Share of batches of the native size."""
    pictures: dict[Size, int] = field(
        default_factory=lambda: {
            _NATIVE: 16000,
            (64, 64): 2500,
            (96, 96): 1500,
            (160, 160): 1200,
            (192, 192): 1000,
            (256, 256): 700,
            (96, 160): 900,
            (160, 96): 900,
            (192, 128): 900,
            (128, 192): 900,
        }
    )
    """Number of encoded pictures, by size."""
    emphasis: float = 2.5
    """Weight of foreground tokens relative to plain background, while the learning rate is at its peak.

    Three tokens in four are background, which is learnt first. The rest of the training weighs all tokens equally,
    because the emphasis favours pictures with more things where the noise leaves their number open.
    """
    show: int = 500
    """Steps between two sample grids."""


@dataclass(frozen=True)
class Batch:
    """Data of one step; the first dimension of all tensors except `positions` is the picture."""

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    pooled: Tensor
    tokens: Tensor
    positions: Tensor
    captions: list[str]

    @property
    def noisy(self) -> Tensor:
        """Return the noisy latents."""
        sigmas = self.sigmas[:, None, None]
        return (1 - sigmas) * self.latents + sigmas * self.noise

    @property
    def velocity(self) -> Tensor:
        """Return the direction from latents to noise."""
        return self.noise - self.latents


def new_transformer() -> FluxTransformer2DModel:
    """Return FLUX's transformer with two double and four single blocks, guidance embedding and random weights."""
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=ROPE_AXES,
    )
    # The blocks start as the identity, like DiT's (Peebles and Xie 2023).
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and name.endswith((".norm1.linear", ".norm1_context.linear", ".norm.linear")):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


def optimizers_for(model: FluxTransformer2DModel, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the blocks and AdamW for the rest, as Muon's author recommends."""
    blocks = {
        id(weight)
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]
        for weight in block.parameters()
        if weight.ndim == 2
    }
    inside = [weight for weight in model.parameters() if id(weight) in blocks]
    outside = [weight for weight in model.parameters() if id(weight) not in blocks]
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train_flow(
    session: Session, plan: FlowPlan, text: TextParts, buckets: Sequence[Bucket], pipeline: FluxPipeline
) -> FluxTransformer2DModel:
    """Train the transformer of `pipeline`, or resume; return the average of its last weights."""
    model = pipeline.transformer
    stage = Stage("flow", session, model, optimizers_for(model, plan.rate), steps=plan.steps, average=0.998)
    use_engine_attention(model)  # after `Stage` has copied the plain one for its averages
    for step in stage:
        batch = draw_batch(stage, text, pick(buckets, stage.rng, native=plan.native), plan.tokens)
        with torch.autocast(session.device.type, dtype=torch.bfloat16):
            predicted = predict(model, batch, guidance=torch.full_like(batch.sigmas, NO_GUIDANCE))
        weights = _weights(batch.latents, plan.emphasis if step < (1 - DECAY) * plan.steps else 1.0)
        error = (predicted.float() - batch.velocity).square().mean(dim=-1)
        stage.optimize((weights * error).mean(), error=error.mean())
        if (step + 1) % plan.show == 0:
            show(stage, pipeline, guidance=NO_GUIDANCE)
    return stage.averaged.module.eval()


def _weights(latents: Tensor, emphasis: float) -> Tensor:
    """Return a weight per token ``[pictures, tokens]``: 1 for plain background, else `emphasis`."""
    background = latents.median(dim=1, keepdim=True).values
    foreground = (latents - background).square().mean(dim=-1) > _FOREGROUND
    return 1 + (emphasis - 1) * foreground


def use_engine_attention(model: FluxTransformer2DModel) -> None:
    """Install the engine's attention, which `predict` needs: diffusers' arithmetic at a lower cost."""
    model.set_attn_processor(RaggedAttention())


def predict(model: FluxTransformer2DModel, batch: Batch, *, guidance: Tensor) -> Tensor:
    """Return the velocity of a batch; the model needs `use_engine_attention`."""
    text_ids = torch.zeros(batch.tokens.shape[1], 3, device=batch.positions.device)
    # The real form writes into its output in place, which has no gradient.
    rotation = complex_rotation(*model.pos_embed(torch.cat([text_ids, batch.positions])))[None, :, None]
    predicted: Tensor = model(
        hidden_states=batch.noisy,
        encoder_hidden_states=batch.tokens,
        pooled_projections=batch.pooled,
        timestep=batch.sigmas,
        guidance=guidance,
        img_ids=batch.positions,
        txt_ids=text_ids,
        joint_attention_kwargs={"rotation": rotation},
        return_dict=False,
    )[0]
    return predicted


def pick(buckets: Sequence[Bucket], rng: random.Random, *, native: float) -> Bucket:
    """Draw a bucket: the native one with probability `native`, else any other."""
    others = [bucket for bucket in buckets if bucket.size != _NATIVE]
    if not others or rng.random() < native:
        return next(bucket for bucket in buckets if bucket.size == _NATIVE)
    return rng.choice(others)


def draw_batch(stage: Stage, text: TextParts, bucket: Bucket, tokens: int, *, no_caption: float = _NO_CAPTION) -> Batch:
    """Draw pictures of a bucket with new captions, noise and sigmas."""
    rng, generator, device = stage.rng, stage.generator, stage.session.device
    count = min(max(tokens // bucket.tokens, 1), len(bucket.scenes))
    indices = rng.sample(range(len(bucket.scenes)), count)
    captions = [
        "" if rng.random() < no_caption else describe(bucket.scenes[index], rng, style=bucket.style)
        for index in indices
    ]
    with torch.no_grad():
        pooled, embedded = text.encode(captions, length=rng.choice(_LENGTHS))
    latents = bucket.latents[indices].float()
    noise = torch.randn(latents.shape, generator=generator)
    return Batch(
        latents=latents.to(device),
        noise=noise.to(device),
        sigmas=draw_sigmas(count, bucket.tokens, generator).to(device),
        pooled=pooled,
        tokens=embedded,
        positions=bucket.positions().to(device),
        captions=captions,
    )


def draw_sigmas(count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Draw logit-normal sigmas, shifted like the scheduler's.

    Their location is above zero: shapes are decided at sigmas from 0.6 to 0.95, where a wrong shape in the caption
    raises the error by a fifth to a third. Below 0.4 it hardly matters.
    """
    scheduler = flux_scheduler(schnell=False)
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    sigmas: Tensor = scheduler.time_shift(mu, 1.0, (_LOCATION + torch.randn(count, generator=generator)).sigmoid())
    return sigmas


SHOWN = (
    "a red circle on a blue background",
    "a large green star on a yellow background",
    "a small orange heart on black",
    "a purple triangle in the top left corner on a white background",
    "a cyan cross on the right, pink background",
    "a yellow square to the left of a white circle on a purple background",
    "a black heart above a large red square on a cyan background",
    "a small pink triangle below a green cross on black",
    "an orange circle to the right of a blue star on white",
    "a white background with a blue square above a yellow star",
    "a large white star in the center, red background",
    "a small cyan square at the bottom on an orange background",
)
"""Prompts of the sample grids."""


@torch.no_grad()
def show(stage: Stage, pipeline: FluxPipeline, *, guidance: float, prompts: Sequence[str] = SHOWN) -> None:
    """Write a grid of samples with the averaged weights."""
    trained, pipeline.transformer = pipeline.transformer, stage.averaged.module
    pictures = sample(pipeline, prompts, guidance=guidance)
    pipeline.transformer = trained
    columns = 6
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % columns * width, index // columns * height))
    folder = stage.folder / "samples"
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"{stage.step + 1:06}.png")


def sample(
    pipeline: FluxPipeline, prompts: Sequence[str], *, guidance: float, steps: int = 20, seed: int = 0
) -> list[Image.Image]:
    """Generate images with plain `FluxPipeline`, each with a seed of its own."""
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        list(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        height=NATIVE_SIZE,
        width=NATIVE_SIZE,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(len(prompts))],
        output_type="np",
    ).images
    return [Image.fromarray(picture) for picture in (np.asarray(made) * 255).round().astype("uint8")]
