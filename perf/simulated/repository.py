"""Model repository and import path of servers with a simulated device."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from common.command import FLUX_CHECKPOINT, ROOT

ENGINE, SIMULATED_ENGINE = "genserve_backend.flux.build:build", "simulated.engine:build"
ONE_INSTANCE = "kind: KIND_AUTO, count: 1"


@dataclass(frozen=True)
class SimulatedRepository:
    """Rendered folders.

    Attributes:
        models: The model repository, for ``--repository``.
        packages: Folder for PYTHONPATH. `genserve serve` passes folders of the name ``site-packages`` on to workers.
    """

    models: Path
    packages: Path


def render(folder: Path, *, instances: int = 1) -> SimulatedRepository:
    """Write the repository of `flux` and `tasks` into `folder`.

    It is the real one, except for the name of FLUX's engine, and the number of its instances if there are several.

    Raises:
        ValueError: FLUX's files do not name its engine or its instances as expected.
    """
    models, packages = folder / "model_repository", folder / "site-packages"
    for name in ("flux", "tasks"):
        shutil.copytree(ROOT / "model_repository" / name, models / name, ignore=shutil.ignore_patterns("__pycache__"))
    _replace(models / "flux" / "1" / "model.py", ENGINE, SIMULATED_ENGINE)
    if instances > 1:
        _replace(models / "flux" / "config.pbtxt", ONE_INSTANCE, f"kind: KIND_CPU, count: {instances}")
    packages.mkdir()
    (packages / "simulated").symlink_to(Path(__file__).parent, target_is_directory=True)
    return SimulatedRepository(models, packages)


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(f"{old} is not in {path.name} exactly once")
    path.write_text(text.replace(old, new), encoding="utf-8")


def link_checkpoint(folder: Path, name: str) -> Path:
    """Return a checkpoint folder with this name, which INFO gives as ``model``. It is the demo's, never loaded."""
    checkpoint = folder / name
    checkpoint.symlink_to(FLUX_CHECKPOINT, target_is_directory=True)
    return checkpoint
