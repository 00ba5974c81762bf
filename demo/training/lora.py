"""Style LoRAs: neon outlines on black, and blueprints."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.nn import functional

from shapes.captions import NEON
from shapes.scenes import Style
from training.autoencoder import NATIVE_SIZE
from training.flow import SHOWN, draw_batch, predict, show, use_engine_attention
from training.guidance import SHOWN_GUIDANCE
from training.latents import encode
from training.stage import Session, Stage
from training.text import TextParts

RANK = 8
TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "proj_mlp",
    "proj_out",
]
"""Layers with a LoRA: the attention of both kinds of block, and the single blocks' linear layers."""
_NATIVE = (NATIVE_SIZE, NATIVE_SIZE)


@dataclass(frozen=True)
class LoraPlan:
    """Steps and data of a LoRA's training."""

    steps: int = 1000
    tokens: int = 32 * 64
    rate: float = 2e-3
    pictures: int = 1200
    show: int = 200


PLANS: dict[Style, LoraPlan] = {
    "neon": LoraPlan(),
    "blueprint": LoraPlan(steps=500, tokens=16 * 64),  # All of them have the same paper and the same ink.
}
"""Plan of each style with a LoRA."""
SMOKE: dict[Style, LoraPlan] = dict.fromkeys(PLANS, LoraPlan(steps=2, tokens=2 * 64, pictures=4, show=2))
"""Plans for tests."""


def train_lora(session: Session, plan: LoraPlan, style: Style, pipeline: FluxPipeline, output: Path) -> None:
    """Train a LoRA of a style, or resume; write `output`/pytorch_lora_weights.safetensors. `pipeline` is unchanged.

    It is trained at the default guidance scale, so its style is right there.
    """
    pipeline = FluxPipeline(**pipeline.components)
    pipeline.transformer = model = copy.deepcopy(pipeline.transformer)
    text = TextParts(pipeline.tokenizer, pipeline.text_encoder, pipeline.tokenizer_2, pipeline.text_encoder_2)
    vae: AutoencoderKL = pipeline.vae
    (bucket,) = encode(session, vae, {_NATIVE: plan.pictures}, style=style)
    model.requires_grad_(requires_grad=False)
    blocks = "|".join(each.replace(".", r"\.") for each in TARGETS)
    model.add_adapter(
        LoraConfig(
            r=RANK,
            lora_alpha=RANK,
            init_lora_weights="gaussian",
            target_modules=rf"(single_)?transformer_blocks\.\d+\.(attn\.)?({blocks})",
        )
    )
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0)
    stage = Stage(f"lora-{style}", session, model, [optimizer], steps=plan.steps, average=0.98, save_every=20)
    use_engine_attention(model)
    prompts = list(map(_neon, SHOWN)) if style == "neon" else SHOWN
    for step in stage:
        batch = draw_batch(stage, text, bucket, plan.tokens, no_caption=0.0)
        with torch.autocast(session.device.type, dtype=torch.bfloat16):
            predicted = predict(model, batch, guidance=torch.full_like(batch.sigmas, SHOWN_GUIDANCE))
        stage.optimize(functional.mse_loss(predicted.float(), batch.velocity))
        if (step + 1) % plan.show == 0:
            show(stage, pipeline, guidance=SHOWN_GUIDANCE, prompts=prompts)
    weights = get_peft_model_state_dict(stage.averaged.module)
    FluxPipeline.save_lora_weights(
        output, transformer_lora_layers={name: weight.half().contiguous() for name, weight in weights.items()}
    )
    for path in output.iterdir():
        path.chmod(0o644)  # diffusers writes them readable for the owner only


def _neon(prompt: str) -> str:
    """Return a prompt without its background, in neon style."""
    return f"{prompt.partition(' on ')[0].partition(', ')[0]}, {NEON}"
