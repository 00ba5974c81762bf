"""Training of the demo's FLUX: a small one with the real architecture, which draws coloured shapes.

``python demo/train_flux.py`` resumes an interrupted training, writes `demo/flux` and `demo/loras` at the end, and takes
some hours on two CPU cores. ``--smoke`` runs every stage for a few steps in a minute, as a test.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

from flux_parts import Parts, flux_scheduler, write_checkpoint
from output_folder import staged
from shapes.scenes import Style
from training.autoencoder import NATIVE_SIZE, AutoencoderPlan, train_autoencoder
from training.flow import FlowPlan, new_transformer, train_flow
from training.guidance import GuidancePlan, distill_guidance
from training.latents import encode, normalize
from training.lora import PLANS, LoraPlan, train_lora
from training.lora import SMOKE as SMOKE_LORAS
from training.stage import Session
from training.text import TextParts, TextPlan, train_text

HERE = Path(__file__).resolve().parent
NATIVE = (NATIVE_SIZE, NATIVE_SIZE)


@dataclass(frozen=True)
class Plan:
    """Plans of all stages."""

    autoencoder: AutoencoderPlan = field(default_factory=AutoencoderPlan)
    text: TextPlan = field(default_factory=TextPlan)
    flow: FlowPlan = field(default_factory=FlowPlan)
    guidance: GuidancePlan = field(default_factory=GuidancePlan)
    loras: dict[Style, LoraPlan] = field(default_factory=lambda: PLANS)


SMOKE = Plan(
    autoencoder=AutoencoderPlan(steps=6, crops=((0.0, 32, 4), (0.5, 128, 1)), pool=24),
    text=TextPlan(steps=4, batch=8),
    flow=FlowPlan(steps=4, tokens=4 * 64, pictures={NATIVE: 8, (64, 64): 8}, show=4),
    guidance=GuidancePlan(steps=2, tokens=2 * 64, show=2),
    loras=SMOKE_LORAS,
)


def train(session: Session, plan: Plan, *, flux: Path, loras: Path) -> None:
    """Train the unfinished stages, and write the checkpoint and a LoRA per style."""
    vae = train_autoencoder(session, plan.autoencoder).eval().requires_grad_(requires_grad=False)
    normalize(vae, session.seed)
    text = train_text(session, plan.text)
    buckets = encode(session, vae, plan.flow.pictures)
    pipeline = assemble(vae, text, new_transformer())
    pipeline.transformer = train_flow(session, plan.flow, text, buckets, pipeline)
    pipeline.transformer = distill_guidance(session, plan.guidance, text, buckets, pipeline)
    with staged(flux, marker="model_index.json") as folder:
        write_checkpoint(folder, half(pipeline))
    for style, each in plan.loras.items():
        train_lora(session, each, style, pipeline, loras / style)


def assemble(vae: AutoencoderKL, text: TextParts, transformer: FluxTransformer2DModel) -> FluxPipeline:
    """Assemble the parts into a FluxPipeline."""
    return FluxPipeline(
        scheduler=flux_scheduler(schnell=False),
        vae=vae,
        text_encoder=text.encoder,
        tokenizer=text.tokenizer,
        text_encoder_2=text.encoder_2,
        tokenizer_2=text.tokenizer_2,
        transformer=transformer,
    )


def half(pipeline: FluxPipeline) -> Parts:
    """Copy the pipeline's parts in float16, which halves the files."""
    weights = ("vae", "text_encoder", "text_encoder_2", "transformer")
    kept = {name: part for name, part in pipeline.components.items() if name in Parts.__dataclass_fields__}
    return Parts(**kept | {name: copy.deepcopy(kept[name]).half() for name in weights})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's FLUX and its LoRAs, or resume the training.")
    parser.add_argument("--work", type=Path, default=HERE / "out" / "training", help="checkpoints, losses and samples")
    parser.add_argument("--flux", type=Path, default=HERE / "flux", help="checkpoint to write (default: demo/flux)")
    parser.add_argument("--loras", type=Path, default=HERE / "loras", help="folder of LoRAs (default: demo/loras)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="every stage for a few steps, in a minute")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    session = Session(options.work, options.seed, torch.device(options.device))
    train(session, SMOKE if options.smoke else Plan(), flux=options.flux, loras=options.loras)
    print(f"wrote {options.flux} and {options.loras}")


if __name__ == "__main__":
    main()
