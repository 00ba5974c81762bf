"""Calibration of MagCache: ``python -m genserve_backend.flux.calibrate CHECKPOINT`` writes its ratios to its folder.

For fine-tuned, distilled or pruned relatives of FLUX.1, whose ratios differ from FLUX.1-dev's. Makes images without
skipping a step and measures, as diffusers' calibration does, the ratio of the residual's norm to that of the step
before: per token, averaged over tokens, images and batch rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.errors import RequestError
from genserve_backend.flux.build import assemble, load_pipeline
from genserve_backend.flux.checkpoint import MAG_RATIOS_FILE, FluxCheckpoint
from genserve_backend.flux.forward import Context, Forward, States
from genserve_backend.flux.request import MAX_CACHE, FluxRequest, parse
from genserve_backend.flux.step_cache import BlocksOutput, CachedRow, MagCache, Residual
from genserve_backend.settings import FluxSettings
from genserve_backend.worker.messages import Done, Event, Failed, Submit

PROMPTS = (
    "a portrait photo of an old fisherman, soft window light",
    "a city street at night in the rain, neon signs",
    "a bowl of fruit on a wooden table, oil painting",
    "a snow-covered mountain range at sunrise, wide angle",
    "a cat asleep on a pile of books, watercolour",
    "an exploded view of a mechanical watch, technical drawing",
    "a poster with the words OPEN TODAY in bold letters",
    "a plain red cube on a white background, studio render",
)
"""Default prompts: people, scenes, styles, lettering and plain shapes."""
EPSILON = 1e-8
"""Added to a norm before it divides, as in diffusers' calibration."""
TIMEOUT_S = 86_400.0


class Recorder:
    """A step cache that skips no step and records the ratios."""

    def __init__(self) -> None:
        # The only ratio is farther from 1 than any threshold.
        self._computed = MagCache((1.0 + 2 * MAX_CACHE,))
        self._found: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    def run(self, forward: Forward, states: States, context: Context, rows: Sequence[CachedRow]) -> BlocksOutput:
        """Run all blocks for all rows."""
        output = self._computed.run(forward, states, context, rows)
        for row, now in zip(rows, output.residuals, strict=True):
            if row.residual and now:
                self._found[row.step].append(_ratio(now, row.residual))
        return output

    def ratios(self) -> list[float]:
        """Return the mean ratio of each step; the first step has none before it and gets 1."""
        return [1.0, *(float(torch.stack(self._found[step]).mean()) for step in sorted(self._found))]


def _ratio(now: Residual, before: Residual) -> torch.Tensor:
    norm, norm_before = (torch.linalg.vector_norm(each.blocks.float(), dim=-1) for each in (now, before))
    ratio: torch.Tensor = (norm / (norm_before + EPSILON)).mean()
    return ratio


def calibrate(checkpoint: FluxCheckpoint, requests: Sequence[FluxRequest], *, device: str, dtype: str) -> list[float]:
    """Return the ratios of a checkpoint, one per step.

    Args:
        checkpoint: The checkpoint.
        requests: Images of the same number of steps.
        device: Device in torch's notation.
        dtype: dtype of the weights, see FLUX_DTYPE.

    Raises:
        CheckpointError: The scheduler is of another kind.
        RequestError: An image failed.
    """
    settings = FluxSettings.model_validate({"model_path": checkpoint.path, "dtype": dtype})
    recorder, answers = Recorder(), dict[int, Event]()

    def receive(event: Event) -> None:
        if isinstance(event, (Done, Failed)):
            answers[event.job_id] = event

    pipeline = load_pipeline(checkpoint, settings, device)
    engine = assemble(pipeline, checkpoint, settings, receive, step_cache=recorder)
    for number, request in enumerate(requests):
        deadline = time.monotonic() + TIMEOUT_S
        engine.submit(Submit(number, str(number), replace(request, cache=MAX_CACHE), deadline))
    while len(answers) < len(requests):
        engine.cancel(-1)  # an engine without work would wait for a message
        engine.turn()
    for event in answers.values():
        if isinstance(event, Failed):
            raise event.error
    return recorder.ratios()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m genserve_backend.flux.calibrate", description="Measure the ratios of MagCache for a checkpoint."
    )
    parser.add_argument("checkpoint", type=Path, help="FLUX checkpoint in diffusers format")
    parser.add_argument("--prompt", action="append", help="a prompt; may be repeated (default: eight of several kinds)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the checkpoint's)")
    parser.add_argument("--size", type=int, help="pixels of height and width (default: the native size)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the checkpoint's)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help=f"file to write (default: {MAG_RATIOS_FILE} of the checkpoint)")
    options = parser.parse_args(arguments)
    given = {"STEPS": options.steps, "GUIDANCE": options.guidance, "HEIGHT": options.size, "WIDTH": options.size}
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        checkpoint = FluxCheckpoint.load(options.checkpoint)
        requests = [
            parse({**values, "PROMPT": prompt, "SEED": seed}, checkpoint, max_pixels=2**28)
            for seed, prompt in enumerate(options.prompt or PROMPTS)
        ]
        ratios = calibrate(checkpoint, requests, device=options.device, dtype=options.dtype)
    except (CheckpointError, RequestError) as error:
        print(error, file=sys.stderr)
        return 1
    first = requests[0]
    settings = {"steps": first.steps, "guidance": first.guidance, "height": first.height, "width": first.width}
    prompts = [request.prompt for request in requests]
    text = json.dumps({"ratios": [round(ratio, 5) for ratio in ratios], **settings, "prompts": prompts}, indent=2)
    output = options.output or options.checkpoint / MAG_RATIOS_FILE
    output.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {output}: {len(ratios)} ratios from {min(ratios[1:], default=1):.3f} to {max(ratios):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
