"""Training of a style LoRA for the demo's FLUX as it is in `demo/flux`.

``python demo/train_lora.py blueprint`` resumes an interrupted training, writes `demo/loras/blueprint` at the end, and
takes some minutes on two CPU cores. It is a stage of ``train_flux.py``, by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

from training.lora import PLANS, SMOKE, train_lora
from training.stage import Session

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train a style LoRA for the demo's FLUX, or resume the training.")
    parser.add_argument("style", choices=list(PLANS))
    parser.add_argument("--work", type=Path, default=HERE / "out" / "training", help="checkpoints, losses and samples")
    parser.add_argument("--flux", type=Path, default=HERE / "flux", help="checkpoint (default: demo/flux)")
    parser.add_argument("--output", type=Path, help="folder to write (default: demo/loras/STYLE)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a few steps, as a test")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    session = Session(options.work, options.seed, torch.device(options.device))
    pipeline = FluxPipeline.from_pretrained(options.flux, torch_dtype=torch.float32).to(session.device)
    output = options.output or HERE / "loras" / options.style
    plans = SMOKE if options.smoke else PLANS
    train_lora(session, plans[options.style], options.style, pipeline, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
