"""Stages of the training: steps that resume after an interruption, learning rates, averages and losses."""

from __future__ import annotations

import csv
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

_Weights = list[Tensor] | tuple[Tensor, ...]

DECAY = 0.3
"""Share of the steps, at the end, over which the learning rate falls to zero."""
REPORT_EVERY = 20


@dataclass(frozen=True)
class Session:
    """One run of the training script."""

    work: Path
    """Folder for checkpoints, losses and samples of all stages."""
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Stage:
    """Training of one model for a number of steps, over any number of runs.

    Everything random in a step is drawn from `rng` and `generator`, which stays on the CPU. Both are seeded before each
    step with the seed and the step's number: an interrupted training ends with the weights of an uninterrupted one.
    """

    def __init__(
        self,
        name: str,
        session: Session,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        *,
        steps: int,
        warmup: int = 100,
        average: float = 0.995,
        save_every: int = 100,
    ) -> None:
        self.name = name
        self.session = session
        self.model = model.to(session.device)
        self.steps = steps
        self.step = 0
        self.folder = session.work / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.averaged = AveragedModel(self.model, multi_avg_fn=_averaging(average))
        self._optimizers = optimizers
        self._rates = [LambdaLR(optimizer, lambda step: self._rate(step, warmup)) for optimizer in optimizers]
        self._save_every = save_every
        self.rng = random.Random()
        self.generator = torch.Generator()
        self._losses: dict[str, list[float]] = defaultdict(list)
        self._bar: tqdm[int] | None = None
        if self._checkpoint.exists():
            self._load()

    def __iter__(self) -> Iterator[int]:
        """Yield the remaining steps, with a progress bar; save at intervals."""
        with tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step", mininterval=2) as self._bar:
            while self.step < self.steps:
                self._seed()
                yield self.step
                self.step += 1
                self._bar.update()
                if self.step % self._save_every == 0 or self.step == self.steps:
                    self._save()

    def _seed(self) -> None:
        seed = f"{self.session.seed} {self.name} {self.step}"
        self.rng.seed(seed)
        self.generator.manual_seed(zlib.crc32(seed.encode()))

    def optimize(self, loss: Tensor, **losses: Tensor) -> None:
        """Take an optimizer step on `loss`; write it and the other `losses` to the loss file."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.step()
            rate.step()
        self.averaged.update_parameters(self.model)
        self._report({"loss": loss, **losses})

    def _rate(self, step: int, warmup: int) -> float:
        """Return the learning rate as a share of its peak: linear warm-up, constant, linear decay."""
        return min(1.0, (step + 1) / warmup, max(self.steps - step, 0) / (DECAY * self.steps))

    def _report(self, losses: dict[str, Tensor]) -> None:
        for name, loss in losses.items():
            self._losses[name].append(loss.detach().item())
        if (self.step + 1) % REPORT_EVERY:
            return
        means = {name: sum(values) / len(values) for name, values in self._losses.items()}
        self._losses.clear()
        if self._bar is not None:
            self._bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()}, refresh=False)
        path = self.folder / "losses.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", *means])
            writer.writerow([self.step + 1, *(f"{mean:.6f}" for mean in means.values())])

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _save(self) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "rates": [rate.state_dict() for rate in self._rates],
        }
        scratch = self._checkpoint.with_suffix(".new")
        torch.save(state, scratch)
        scratch.replace(self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint, map_location=self.session.device, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for rate, saved in zip(self._rates, state["rates"], strict=True):
            rate.load_state_dict(saved)


def _averaging(decay: float) -> Callable[[_Weights, _Weights, Tensor | int], None]:
    """Return an exponential average with a shorter window at first: at most the last tenth of the steps so far."""

    @torch.no_grad()
    def update(averaged: _Weights, current: _Weights, count: Tensor | int) -> None:
        share = max(1 - decay, 9 / (10 + float(count)))
        torch._foreach_lerp_(averaged, current, share)

    return update
